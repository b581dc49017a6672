"""Scaling: the dynamic loss scale under which a step runs, and what became of its gradients.

In: a scale. Out: a context in which every ``value_and_grad`` starts its backward pass from the
scale, and counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

_current: ContextVar[Scaling | None] = ContextVar("funcpipe_scaling", default=None)


class Scaling:
    """A loss scale in use.

    Args:
        scale: 0-d; what the backward pass starts from in place of 1.

    ``bad``, 0-d, int64: how many leaves of gradients were not finite so far, on the whole mesh.
    """

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale
        self.bad = torch.zeros((), dtype=torch.int64, device=scale.device)


@contextlib.contextmanager
def scaled(scale: torch.Tensor) -> Iterator[Scaling]:
    """Run a step under a loss scale."""
    found = Scaling(scale)
    token = _current.set(found)
    try:
        yield found
    finally:
        _current.reset(token)


def current() -> Scaling | None:
    """The loss scale under which a step runs; None where that is none, or does not change."""
    return _current.get()


def non_finite(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """How many leaves hold a value that is not finite: 0-d, int64. One pass over each: the largest
    magnitude tells.

    >>> non_finite([torch.tensor([1.0, torch.inf]), torch.zeros(0), torch.tensor(torch.nan), torch.tensor([3])])
    tensor(2)
    """
    able = [x for x in leaves if (x.is_floating_point() or x.is_complex()) and x.numel()]
    if not able:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack(
        [torch.linalg.vector_norm(x, torch.inf).isfinite().logical_not() for x in able]
    ).sum()
