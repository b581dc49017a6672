"""Statistics of gradients (or params, or moments), leaf by leaf.

In: a tree, of which a rank may hold a part. Out: trees of 0-d tensors, the same on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from funcpipe._src.core.reductions import reduce_leaves
from funcpipe._src.optim.leaves import trained


class Statistics(NamedTuple):
    """Trees of 0-d float64 tensors, with an entry for every leaf.

    ``norm``: the 2-norm; ``max_abs``: the largest absolute value among finite elements; ``zeros``,
    ``nonfinite``: the fraction of elements that are zero, that are infinite or NaN.
    """

    norm: Any
    max_abs: Any
    zeros: Any
    nonfinite: Any


@torch.no_grad()
def statistics(tree_of_leaves: Any) -> Statistics:
    """What the leaves of a tree look like: for the metrics of a step, and for updates that need the
    norm of each leaf.

    Args:
        tree_of_leaves: params, gradients, or a tree like them. Norms are computed in float32, or in
            float64 where a leaf has it; those of integer leaves, and of leaves without elements,
            are zero like all else about them.

    Returns:
        a `Statistics`, of whole leaves also where a rank holds a part of one. It takes two global
        reductions, however many leaves there are. Its trees go with params through ``tree_map``,
        and are metrics; the entries of several leaves may be joined
        (``torch.stack(tree_leaves(found.norm)).max()``). To do both, call it twice: where a rank
        lacks leaves, a tree that goes with params has entries of its own leaves, one that is joined
        has all.

    Example:
        >>> import optree
        >>> grads = {"w": torch.tensor([3.0, 0.0, -4.0, 0.0]), "b": torch.tensor([1.0, float("nan")])}
        >>> found = statistics(grads)
        >>> found.norm["w"].item(), found.max_abs["w"].item(), found.zeros["w"].item()
        (5.0, 4.0, 0.5)
        >>> found.max_abs["b"].item(), found.nonfinite["b"].item()
        (1.0, 0.5)
        >>> optree.tree_map(lambda g, n: g / n, grads, found.norm)["w"]  # a step of length 1 for each leaf
        tensor([ 0.6000,  0.0000, -0.8000,  0.0000])

    Reference:
        Megatron-LM's ``--log-num-zeros-in-grad`` and ``--log-params-norm``, leaf by leaf
    """
    join, sums = reduce_leaves(tree_of_leaves, lambda leaves: _rows(leaves, _sums, 4))
    join_largest, largest = reduce_leaves(
        tree_of_leaves, lambda leaves: _rows(leaves, _largest, 1), "max"
    )
    squares, zeros, nonfinite, count = sums.unbind(1)
    count = count.clamp(min=1)
    return Statistics(
        join(squares.sqrt().unbind()),
        join_largest(largest[:, 0].unbind()),
        join((zeros / count).unbind()),
        join((nonfinite / count).unbind()),
    )


def _rows(leaves: list[torch.Tensor | None], row: Any, width: int) -> torch.Tensor:
    """One row for every leaf: zeros for one that another rank counts, or that has nothing to
    measure."""
    rows = [
        row(x)
        if trained(x) and x.numel()
        else torch.zeros(width, dtype=torch.float64, device=getattr(x, "device", None))
        for x in leaves
    ]
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def _sums(x: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).real
    count = torch.full((), x.numel(), dtype=torch.float64, device=x.device)
    sums = norm.double().square(), (x == 0).sum().double(), (~x.isfinite()).sum().double(), count
    return torch.stack(sums)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isfinite(), x.abs(), 0).amax().double().view(1)
