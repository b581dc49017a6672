"""Sums over all leaves of a tree, on every rank alike: norms, clipping, and what they are made of.

In: a tree of params, gradients or the like, of which a rank may hold a part. Out: a number that is
the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import Join, Local, current
from funcpipe._src.core.loss_types import differentiable
from funcpipe.errors import OptimError

# From the leaves that a rank counts to their sum.
LocalSum = Callable[[list[Tensor]], Tensor]


def global_norm(tree_of_leaves: Any) -> Tensor:
    """The 2-norm over all elements of a tree of params, gradients or the like: a 0-d tensor, the
    same on every rank.

    Computed in float32, or in float64 where a leaf has it. A leaf that several ranks hold counts
    once.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return global_sum(tree_of_leaves, _sum_of_squares).sqrt()


def global_sum(
    tree_of_leaves: Any,
    local: LocalSum,
) -> Tensor:
    """The sum over every rank of ``local(leaves)``, each element of a leaf counted once.

    Args:
        tree_of_leaves: params, gradients, or a tree like them.
        local: from the leaves that this rank counts (possibly none) to a 0-d tensor or number,
            additive over elements.

    >>> global_sum([torch.ones(3), torch.ones(2)], lambda leaves: sum(x.sum() for x in leaves))
    tensor(5.)
    """

    def of_counted(leaves: list[Tensor | None]) -> Tensor:
        counted = [leaf for leaf in leaves if leaf is not None]
        return torch.as_tensor(local(counted))

    _, total = reduce_leaves(tree_of_leaves, of_counted)
    return total


def reduce_leaves(
    tree_of_leaves: Any,
    local: Local,
    op: str = "sum",
) -> tuple[Join, Tensor]:
    """`global_sum` where it matters which leaf is which.

    Args:
        tree_of_leaves: as for `global_sum`.
        local: gets an entry for every leaf of the whole tree, None for those that this rank does
            not count; gives a tensor whose shape follows from their number.
        op: "sum" or "max".

    Returns:
        what makes a tree of a value for each leaf, and what ``local`` gave, reduced over every
        rank. Where the values of such a tree go with leaves, a rank has those of its own leaves.
    """
    return current().reduce(tree_of_leaves, local, op)


def join_shown(spec: Any, shown: Sequence[bool], values: Sequence[Any]) -> Any:
    """The tree of the values that are shown, with None for others."""
    entries = []
    for value, here in zip(values, shown, strict=True):
        entries.append(value if here else None)
    return tree.unflatten(spec, entries)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, Tensor]:
    """Gradients scaled down to a global norm of at most ``max_norm``, and their norm before that.

    Raises:
        OptimError: ``max_norm`` is a number that is not above 0, or no number.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0])], 1.0)[1]
    tensor(5.)
    """
    is_tensor = isinstance(max_norm, Tensor)
    if not is_tensor and not _is_positive(max_norm):
        raise OptimError(f"clip_by_global_norm: max_norm={max_norm!r}; it is a number above 0")
    norm = global_norm(grads)
    ratio = max_norm / (norm + 1e-6)
    scale = torch.clamp(ratio, max=1.0)

    def clipped(grad: Tensor) -> Tensor:
        if not differentiable(grad):
            return grad
        return grad * scale.to(grad.dtype)

    return tree.map(clipped, grads), norm


def _is_positive(number: Any) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return number > 0


def _sum_of_squares(leaves: list[Tensor]) -> Tensor:
    leaves = [leaf for leaf in leaves if differentiable(leaf)]
    if not leaves:
        return torch.zeros(())
    real = torch.float32
    for leaf in leaves:
        real = torch.promote_types(real, leaf.dtype.to_real())
    norms = []
    for leaf in leaves:
        dtype = real.to_complex() if leaf.is_complex() else real
        norm = torch.linalg.vector_norm(leaf, dtype=dtype)
        norms.append(norm)
    device = norms[0].device
    squares = [norm.real.square().to(device) for norm in norms]
    return torch.stack(squares).sum()
