"""Buffers that a loss function changes, where its batch is split.

In: buffers before and after a call of a module.
Out: their means as aux of the loss function, and buffers after a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcpipe._src.core.loss_types import Mean

Tensors = dict[str, Tensor]


def buffer_means(
    buffers: Tensors,
    new_buffers: Tensors,
    weight: Tensor,
) -> dict[str, Mean]:
    """The buffers that a call changed, as aux: their mean over microbatches and shards.

    Args:
        buffers, new_buffers: what ``apply_fn`` of `from_module` took and gave.
        weight: how much this part of the batch counts, such as its number of rows: a 0-d tensor,
            from the batch alone.

    Returns:
        a `Mean` for every changed buffer, with the buffer's shape; integers are averaged in
        float64.

    The mean of running variances is that of the variances within microbatches, as in gradient
    accumulation elsewhere. A count of batches grows by one for a step, not for a microbatch.

    >>> old = {"mean": torch.zeros(2), "table": torch.ones(3)}
    >>> buffer_means(old, old | {"mean": torch.tensor([1.0, 2.0])}, torch.tensor(4.0))
    {'mean': Mean(total=tensor([4., 8.]), weight=tensor(4.))}
    """
    means = {}
    for name, buffer in new_buffers.items():
        if buffer is not buffers[name]:
            means[name] = Mean(_as_float(buffer) * weight, weight)
    return means


def update_buffers(buffers: Tensors, means: Tensors) -> Tensors:
    """The buffers after a step.

    Args:
        buffers: those before it.
        means: what became of `buffer_means`, as ``value_and_grad`` returned it.

    Returns:
        all buffers, in their old dtypes (integers rounded).

    >>> buffers = {"seen": torch.tensor(2), "w": torch.ones(1)}
    >>> update_buffers(buffers, {"seen": torch.tensor(2.9999999)})
    {'seen': tensor(3), 'w': tensor([1.])}
    """
    updated = {}
    for name, buffer in buffers.items():
        updated[name] = _as_dtype(means[name], buffer.dtype) if name in means else buffer
    return updated


def _as_float(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor
    return tensor.double()


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return tensor.to(dtype)
    return tensor.round().to(dtype)
