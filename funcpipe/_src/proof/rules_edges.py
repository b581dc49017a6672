"""What depends on the place of a rank, and its rules: the number of its first row, the last rows
that it hands on to the next rank, and which rank is the last.

A loss function that looks at the row before each row gets that of the rank before by `fp.ppermute`.

In: op contexts, where the rows of a batch are split. Out: placements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import OpContext, Operand, all_replicated
from funcpipe._src.proof.placements import Local, Number, Placement, Replicate, Shard, replicated
from funcpipe._src.proof.rules import ANY, apply_common, rule
from funcpipe._src.proof.rules_row_numbers import Order, RowNumbers
from funcpipe._src.proof.rules_view import both, taken


@dataclass(frozen=True)
class RankIndex(Local):
    """A function of the index of a rank alone.

    Args:
        factor: the number that the index is multiplied by; NaN: it is another function.
    """

    axes: Axes
    factor: float = 1

    def __str__(self) -> str:
        return "the place of a rank"


@dataclass(frozen=True)
class Last(Local):
    """The last ``count`` entries of a part along the dim of its rows."""

    rows: Shard
    count: int

    def __str__(self) -> str:
        return "the last rows of a part"


@dataclass(frozen=True)
class Rest(Local):
    """The entries before those of `Last`."""

    rows: Shard
    count: int

    def __str__(self) -> str:
        return "the rows of a part without the last ones"


@dataclass(frozen=True)
class Before(Local):
    """The `Last` of the part before."""

    rows: Shard
    count: int

    def __str__(self) -> str:
        return "the last rows of the part before"


@dataclass(frozen=True)
class LastFlag(Local):
    """``yes`` on the last rank of ``axes`` and on one device, ``no`` on the others, in every
    entry."""

    axes: Axes
    yes: float
    no: float

    def __str__(self) -> str:
        return "a number that says which rank is the last"


@dataclass(frozen=True)
class Shuffled(Local):
    """All rows, along ``dim``, rank by rank in another order than the mesh has."""

    dim: int

    def __str__(self) -> str:
        return "the rows of all ranks in another order"


# ---- the index of a rank


@rule("mul", local=True)
def _times_factor(op: OpContext) -> Placement | None:
    terms = [op.placement_of("self"), op.placement_of("other")]
    for index, number in (terms, terms[::-1]):
        if isinstance(index, RankIndex) and index.factor == 1 and isinstance(number, Number):
            return RankIndex(index.axes, number.local)
    return None


@rule("add", local=True)
def _first_row(op: OpContext) -> Placement | None:
    """The number of a rank's first row, and its own numbers from there on."""
    indices = op.placements(RankIndex)
    numbers = op.placements(RowNumbers)
    if not indices or not numbers:
        return None
    first = indices[0]
    own = numbers[0]
    if op.args.get("alpha", 1) != 1:
        return None
    layout = own.of.layout
    if isinstance(layout, Order):
        return None
    if not first.axes == layout.axes == op.split.live:
        return None
    rows, _ = op.split.lengths[layout]
    if first.factor != rows * own.of.inner:
        return None
    ndim = next(operand.ndim for operand in op.operands if operand.placement == own)
    return own.at.at(own.at.dim + len(op.out.local) - ndim)


@rule(ANY, local=True)
def _of_index(op: OpContext) -> Placement | None:
    """Any function of the index of a rank."""
    indices = op.placements(RankIndex)
    rest = [other for other in op.operands if not isinstance(other.placement, RankIndex)]
    if not indices or not all_replicated(rest):
        return None
    if op.call.func is None:
        return None
    op.check_values()
    return RankIndex(indices[0].axes, math.nan)


# ---- the last rows of a part


@rule("slice", rows=True)
def _end(op: OpContext) -> Placement | None:
    """The last rows of a part, or the rows before them."""
    operand = op.operand()
    dim = op.dim()
    rows = operand.split_at(dim)
    if rows is None or rows.outer != 1:
        return None
    if rows.layout.axes != op.split.live:
        return None
    sizes = operand.sizes(dim)
    both_taken = taken(op, operand, dim)
    if both_taken == tuple(range(size) for size in sizes):
        return None  # all rows, as they are
    count = len(both_taken[0])
    last = tuple(range(size - count, size) for size in sizes)
    if both_taken == last:
        return Last(rows, count)
    count = sizes[0] - count
    rest = tuple(range(size - count) for size in sizes)
    return Rest(rows, count) if both_taken == rest else None


def handed_on(placement: Placement, perm: Any, ranks: int) -> Before | None:
    """What `fp.ppermute` makes of the last rows of every part, if each goes to the next rank.

    Args:
        perm: of a part, and of one device if that differs: there the first part gets zeros, or, in
            a ring, the last rows.
    """
    if not isinstance(placement, Last):
        return None
    of_part, of_one = both(perm)
    line = [(rank, rank + 1) for rank in range(ranks - 1)]
    ring = [*line, (ranks - 1, 0)]
    to_next = sorted(of_part) == line and not of_one
    in_ring = sorted(of_part) == ring and list(of_one) == [(0, 0)]
    if to_next or in_ring:
        return Before(placement.rows, placement.count)
    return None


@rule("cat", local=True)
def _joined(op: OpContext) -> Placement | None:
    """All rows, each in the place of the next ones; or one number in every row but the last."""
    tensors = op.args["tensors"]
    if len(tensors) != 2:
        return None
    first, last = (tensor.placement for tensor in tensors)
    dim = op.value("dim") % len(op.out.local)
    if isinstance(first, Before) and isinstance(last, Rest):
        alike = first.rows == last.rows and first.count == last.count
        return first.rows if alike and first.rows.dim == dim else None
    found = op.split.along(dim, op.out.sizes(dim))
    if found is None:
        return None
    if not isinstance(first, Number):
        return None
    if not isinstance(last, LastFlag):
        return None
    alike = first.constant and first.local == last.no and not tensors[1].varying
    if alike and found.layout.axes == last.axes:
        return found
    return None


# ---- which rank is the last


@rule("eq", local=True)
def _is_last(op: OpContext) -> Placement | None:
    index = op.placement_of("self")
    other = op.args["other"]
    if not isinstance(index, RankIndex):
        return None
    if not isinstance(other, Differs):
        return None
    if index.factor != 1:
        return None
    axes = index.axes
    for layout, (_, ranks) in op.split.lengths.items():
        if layout.axes == axes == op.split.live:
            is_last = (other.local, other.full) == (ranks - 1, 0)
            return LastFlag(axes, 1, 0) if is_last else None
    return None


@rule(ANY, local=True)
def _of_flags(op: OpContext) -> Placement | None:
    """Any op on flags and constants: a flag again."""
    flags = op.placements(LastFlag)
    if not flags:
        return None
    for operand in op.operands:
        number = operand.placement
        is_constant = isinstance(number, Number) and number.constant
        if number != flags[0] and not is_constant:
            return None
    args = {name: _as_number(value) for name, value in op.args.items()}
    found = apply_common(replace(op, args=args))
    if not isinstance(found, Number):
        return None
    return LastFlag(flags[0].axes, yes=found.full, no=found.local)


def _as_number(value: Any) -> Any:
    if isinstance(value, Operand) and isinstance(value.placement, LastFlag):
        flag = value.placement
        return replace(value, placement=Number(flag.no, flag.yes))
    return value


# ---- all rows in another order


@rule(ANY, local=True)
def _of_shuffled(op: OpContext) -> Placement | None:
    """Row by row the same, and sums over all rows."""
    shuffled = op.placements(Shuffled)
    if len(shuffled) != 1:
        return None
    if not isinstance(op.call.func, torch._ops.OpOverload):
        return None
    placement = shuffled[0]
    others = [operand for operand in op.operands if operand.placement is not placement]
    are_numbers = all(replicated(other.placement) and not other.ndim for other in others)
    if torch.Tag.pointwise in op.call.func.tags and are_numbers:
        op.check_values()
        return placement
    sums = op.call.name in ("sum", "mean", "amax", "amin")
    if sums and placement.dim in op.dims():
        return Replicate()
    return None
