"""Statistics of gradients (or params, or moments), leaf by leaf.

In: a tree, of whose leaves a rank may hold shards.
Out: trees of 0-d tensors, the same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core.reductions import reduce_leaves
from funcpipe._src.optim.leaves import is_trained


class Statistics(NamedTuple):
    """Trees of 0-d float64 tensors, with an entry for every leaf.

    Args:
        norm: the 2-norm.
        max_abs: the largest absolute value among finite elements.
        zeros: the fraction of elements that are zero.
        nonfinite: the fraction of elements that are infinite or NaN.
    """

    norm: Any
    max_abs: Any
    zeros: Any
    nonfinite: Any


@torch.no_grad()
def statistics(tree_of_leaves: Any) -> Statistics:
    """Norm, largest value, zeros and non-finite elements of every leaf of a tree.

    They serve as metrics of a step, and in updates that need the norm of each leaf.

    Args:
        tree_of_leaves: params, gradients, or a tree like them. Norms are computed in float32, or in
            float64 where a leaf has it. All statistics of an integer leaf, and of a leaf without
            elements, are zero.

    Returns:
        a `Statistics` of unsharded leaves, also where a rank holds a shard of one. It takes two
        global reductions, however many leaves there are. Its trees go with params through
        ``tree_map``, and are metrics; the entries of several leaves may be joined
        (``torch.stack(tree_leaves(found.norm)).max()``). To do both, call it twice: where a rank
        lacks leaves, a tree that goes with params has entries of the rank's own leaves, and a tree
        that is joined has all.

    Example:
        >>> import optree
        >>> weight = torch.tensor([3.0, 0.0, -4.0, 0.0])
        >>> grads = {"w": weight, "b": torch.tensor([1.0, float("nan")])}
        >>> found = statistics(grads)
        >>> found.norm["w"].item(), found.max_abs["w"].item(), found.zeros["w"].item()
        (5.0, 4.0, 0.5)
        >>> found.max_abs["b"].item(), found.nonfinite["b"].item()
        (1.0, 0.5)
        >>> unit = optree.tree_map(lambda grad, norm: grad / norm, grads, found.norm)
        >>> unit["w"]  # a step of length 1 for each leaf
        tensor([ 0.6000,  0.0000, -0.8000,  0.0000])

    Reference:
        Megatron-LM's ``--log-num-zeros-in-grad`` and ``--log-params-norm``, leaf by leaf
    """
    join, sums = reduce_leaves(tree_of_leaves, _sums_of_leaves)
    join_largest, largest = reduce_leaves(tree_of_leaves, _largest_of_leaves, "max")
    squares, zeros, nonfinite, count = sums.unbind(1)
    norms = squares.sqrt()
    max_abs = largest[:, 0]
    count = count.clamp(min=1)
    return Statistics(
        norm=join(norms.unbind()),
        max_abs=join_largest(max_abs.unbind()),
        zeros=join((zeros / count).unbind()),
        nonfinite=join((nonfinite / count).unbind()),
    )


def _sums_of_leaves(leaves: list[Tensor | None]) -> Tensor:
    """For every leaf: the squared norm, how many zeros, non-finite elements and elements."""
    return _per_leaf(leaves, _sums, width=4)


def _largest_of_leaves(leaves: list[Tensor | None]) -> Tensor:
    return _per_leaf(leaves, _largest, width=1)


def _per_leaf(
    leaves: list[Tensor | None],
    measure: Callable[[Tensor], Tensor],
    width: int,
) -> Tensor:
    """Float64 ``(leaves, width)``: what ``measure`` gives for each leaf.

    A leaf that another rank counts (None), or that has nothing to measure, gets zeros.
    """
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    if not leaves:
        return zeros(0, width)
    measured = []
    for leaf in leaves:
        if is_trained(leaf) and leaf.numel():
            measured.append(measure(leaf))
        else:
            device = getattr(leaf, "device", None)
            measured.append(zeros(width, device=device))
    return torch.stack(measured)


def _sums(leaf: Tensor) -> Tensor:
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    norm = torch.linalg.vector_norm(leaf, dtype=dtype).real
    squares = norm.double().square()
    zeros = (leaf == 0).sum().double()
    nonfinite = (~leaf.isfinite()).sum().double()
    count = torch.full_like(squares, leaf.numel())
    return torch.stack((squares, zeros, nonfinite, count))


def _largest(leaf: Tensor) -> Tensor:
    finite = leaf.isfinite()
    largest = torch.where(finite, leaf.abs(), 0).amax()
    return largest.double().view(1)
