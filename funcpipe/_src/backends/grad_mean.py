"""Means of gradients: sums of gradients over the weight of the batch.

In: sums of gradients, what they are divided by, a backend. Out: the gradients of a mean, each in
its own dtype.
"""

from __future__ import annotations

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.core.loss_types import averaged


def divide(
    sums: list[torch.Tensor | None],
    divisor: torch.Tensor,
    backend: Backend,
) -> None:
    """Replace sums by means, one by one: a sum is gone before the next one is divided.

    Args:
        sums: of any shapes and dtypes.
        divisor: 0-d; infinity makes zeros.
        backend: divides those for which PyTorch has no fast kernel.
    """
    for number, total in enumerate(sums):
        if total is None:
            continue
        if backend.fuses and _is_slow(total, divisor):
            sums[number] = _compiled(total, divisor, backend)
        else:
            sums[number] = averaged(total, divisor)


def _is_slow(total: torch.Tensor, divisor: torch.Tensor) -> bool:
    """On a GPU PyTorch divides by a 0-d tensor there without vectors, at a quarter of the speed of
    memory."""
    on_gpu = total.is_cuda and divisor.is_cuda
    dense_floats = total.is_floating_point() and total.is_contiguous()
    return on_gpu and dense_floats and total.numel() > 0


def _compiled(
    total: torch.Tensor,
    divisor: torch.Tensor,
    backend: Backend,
) -> torch.Tensor:
    """By a function that is compiled once for every number of elements."""
    flat = total.view(-1)
    name = f"mean of {total.numel()} {total.dtype} over {divisor.dtype}"
    run = backend.function(name, averaged, flat, divisor)
    return run([flat, divisor])[0].view(total.shape)
