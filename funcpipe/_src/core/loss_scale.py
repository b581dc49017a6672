"""The dynamic loss scale under which a step runs, and how many of its gradients overflowed.

In: a scale. Out: the context's ``loss_scale``. Every ``value_and_grad`` inside starts its backward
pass from the scale, and counts leaves that are not finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from funcpipe._src.core.context import current
from funcpipe._src.core.loss_types import differentiable


class LossScale:
    """A loss scale in use.

    Args:
        scale: 0-d; what the backward pass starts from in place of 1.

    ``bad``, 0-d, int64: how many leaves of gradients were not finite so far, on the whole mesh.
    """

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale
        self.bad = torch.zeros((), dtype=torch.int64, device=scale.device)


@contextlib.contextmanager
def scaled(scale: torch.Tensor) -> Iterator[LossScale]:
    """Run a step under a loss scale, in the context that a runner has bound."""
    context = current()
    before = context.loss_scale
    context.loss_scale = LossScale(scale)
    try:
        yield context.loss_scale
    finally:
        context.loss_scale = before


def non_finite(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """How many leaves hold a value that is not finite: 0-d, int64. One pass over each: the largest
    magnitude tells.

    >>> two = [torch.tensor([1.0, torch.inf]), torch.tensor(torch.nan)]
    >>> non_finite([*two, torch.zeros(0), torch.tensor([3])])
    tensor(2)
    """
    able = [leaf for leaf in leaves if differentiable(leaf) and leaf.numel()]
    if not able:
        return torch.zeros((), dtype=torch.int64)
    largest = [torch.linalg.vector_norm(leaf, torch.inf) for leaf in able]
    overflowed = [value.isfinite().logical_not() for value in largest]
    return torch.stack(overflowed).sum()
