"""Divide: gradients over the weight of the batch.

In: sums of gradients, what they are divided by, a backend. Out: the gradients of a mean, each in
its own dtype.
"""

from __future__ import annotations

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.core.loss_types import averaged


def divide(sums: list[torch.Tensor | None], divisor: torch.Tensor, backend: Backend) -> None:
    """Replace sums by means, one by one: a sum is gone before the next one is divided.

    Args:
        sums: of any shapes and dtypes.
        divisor: 0-d; infinity makes zeros.
        backend: divides those for which PyTorch has no fast kernel.
    """
    for i, x in enumerate(sums):
        if x is not None:
            slow = backend.fuses and _is_slow(x, divisor)
            sums[i] = _compiled(x, divisor, backend) if slow else averaged(x, divisor)


def _is_slow(x: torch.Tensor, divisor: torch.Tensor) -> bool:
    """On a GPU PyTorch divides by a 0-d tensor there without vectors, at a quarter of the speed of
    memory."""
    return (
        x.is_cuda
        and divisor.is_cuda
        and x.is_floating_point()
        and x.is_contiguous()
        and x.numel() > 0
    )


def _compiled(x: torch.Tensor, divisor: torch.Tensor, backend: Backend) -> torch.Tensor:
    """By a function that is compiled once for every number of elements."""
    run = backend.function(
        f"mean of {x.numel()} {x.dtype} over {divisor.dtype}", averaged, x.view(-1), divisor
    )
    return run([x.view(-1), divisor])[0].view(x.shape)
