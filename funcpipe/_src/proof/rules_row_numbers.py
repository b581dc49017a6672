"""Numbers of rows, and the rules of how they come about and of what they name.

``torch.arange(len(x))`` counts the rows of a part from 0, where one device goes on. As an index
into the rows of the part it is right all the same. So is the order in which a part sorts its rows,
as long as the loss function puts them back.

An *arrangement* is a `Shard` along dim 0: the rows as they come, or, if its layout is an `Order`,
as some keys sort them.

In: op contexts, where the rows of a batch are split. Out: placements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import (
    OpContext,
    Operand,
    all_replicated,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import Local, Number, Placement, Shard, replicated
from funcpipe._src.proof.rules import apply_common, rule
from funcpipe._src.proof.rules_row_reductions import Largest


@dataclass(frozen=True)
class Order:
    """A layout: the rows of a part in the order of some keys.

    Args:
        base: the layout of the rows.
        size: the number of entries.
        made: the number of the tensor that the sort returned.
        keys: the number of the tensor by which it sorts, smallest first; None: largest first.
    """

    base: Any
    size: int
    made: int
    keys: int | None

    @property
    def axes(self) -> Axes:
        """The axes that split the rows."""
        return self.base.axes


@dataclass(frozen=True)
class RowNumbers(Local):
    """Numbers of entries.

    Args:
        at: how the numbers themselves lie.
        of: the arrangement whose entries they number.
        once: whether they name every entry exactly once.
        own: whether every entry names itself, in any arrangement.
        first_of: they name, in order, the first of every so many entries; 0: not known.
    """

    at: Shard
    of: Shard
    once: bool = False
    own: bool = False
    first_of: int = 0

    fault = (
        ": every part counts its rows from 0, where one device goes on. Pass the numbers of rows "
        "through batch"
    )

    def __str__(self) -> str:
        return "the numbers of a part's own rows"


def own_numbers(arrangement: Shard) -> RowNumbers:
    """Every entry of an arrangement numbers itself."""
    return RowNumbers(arrangement, arrangement, once=True, own=True)


def arranged(placement: Shard) -> Shard:
    """An arrangement: the same rows along dim 0."""
    return Shard(0, placement.layout, placement.outer, placement.inner)


def arrangement_along(operand: Operand, dim: int) -> Shard | None:
    """The arrangement of an operand, or of numbers, whose rows lie along a dim."""
    placement = operand.placement
    split = placement.at if isinstance(placement, RowNumbers) else placement
    if not isinstance(split, Shard):
        return None
    if split.dim != dim:
        return None
    if split.outer != 1:
        return None
    return arranged(split)


_KEEP_ALL_ENTRIES = ("view", "unsqueeze", "squeeze", "permute", "transpose", "t")


# ---- where numbers come from, and go


@rule("arange", rows=True)
def _arange(op: OpContext) -> Placement | None:
    """The numbers of a part's rows, or of the first entry of each."""
    end = op.args["end"]
    step = op.args.get("step")
    if not isinstance(end, Differs):
        return None
    if op.args.get("start") not in (None, 0):
        return None
    local = op.out.local[0]
    full = op.out.full[0]
    found = op.split.factor((local, full))
    if found is None:
        return None
    layout, inner = found
    arrangement = Shard(0, layout, 1, inner)
    if step in (None, 1):
        return own_numbers(arrangement)
    if not isinstance(step, int) or step < 1:
        return None
    if end != Differs(local * step, full * step):
        return None
    entries = replace(arrangement, inner=inner * step)
    return RowNumbers(arrangement, entries, once=True, first_of=step)


@rule("clone", "detach", "_to_copy", local=True)
def _copied(op: OpContext) -> Placement | None:
    placement = op.operand().placement
    dtype = op.out.dtype
    no_numbers = dtype.is_floating_point or dtype == torch.bool
    return None if isinstance(placement, RowNumbers) and no_numbers else placement


@rule(*_KEEP_ALL_ENTRIES, "expand", "slice", "select", "repeat", local=True)
def _rearranged(op: OpContext) -> Placement | None:
    operand = op.operand()
    numbers = operand.placement
    if not isinstance(numbers, RowNumbers):
        return numbers if isinstance(numbers, Largest) else None
    as_shard = replace(operand, placement=numbers.at)
    moved = apply_common(replace(op, args=op.args | {"self": as_shard}))
    assert isinstance(moved, Shard)
    once = numbers.once and op.call.name in _KEEP_ALL_ENTRIES
    return replace(numbers, at=moved, once=once, own=False, first_of=0)


@rule("floor_divide", "div", "remainder", "fmod", local=True)
def _divided(op: OpContext) -> Placement | None:
    """Several entries of a row, as the numbers of fewer entries, or which of them it is."""
    numbers = op.placement_of("self")
    number = op.placement_of("other")
    if not isinstance(numbers, RowNumbers):
        return None
    if not isinstance(number, Number):
        return None
    if op.call.name == "div" and op.args.get("rounding_mode") not in ("floor", "trunc"):
        return None
    by = number.local
    inner = numbers.of.inner
    if not number.constant or by <= 0 or inner % by:
        return None
    if op.call.name in ("remainder", "fmod"):
        return numbers.at
    fewer = replace(numbers.of, inner=inner // int(by))
    once = numbers.once and by == 1
    return replace(numbers, of=fewer, once=once, own=False, first_of=0)


# ---- rows that numbers name


def _fitted(numbers: RowNumbers, arrangement: Shard) -> RowNumbers | None:
    """Numbers of the entries of an arrangement; None if they number other entries."""
    if numbers.of == arrangement:
        return numbers
    if numbers.own and isinstance(arrangement.layout, Order):
        return own_numbers(arrangement)
    return None


@rule("index", "index_select", local=True)
def _taken(op: OpContext) -> Placement | None:
    """Entries of rows, by the numbers of rows."""
    operand = op.operand()
    if op.call.name == "index_select":
        indices = {op.dim(): op.operand("index")}
    else:
        given = enumerate(op.args["indices"])
        indices = {dim: index for dim, index in given if index is not None}
    named = [dim for dim in indices if isinstance(indices[dim].placement, RowNumbers)]
    front = min(indices)
    if len(named) != 1:
        return None
    if max(indices) - front + 1 != len(indices):
        return None
    dim = named[0]
    others = [index for other, index in indices.items() if other != dim]
    if operand.varying != [dim]:
        return None
    if replicated(operand.placement) and all_replicated(others):
        return operand.placement  # it is constant along the rows
    arrangement = arrangement_along(operand, dim)
    given_numbers = indices[dim].placement
    assert isinstance(given_numbers, RowNumbers)
    numbers = _fitted(given_numbers, arrangement) if arrangement else None
    if numbers is None:
        return None
    indices[dim] = replace(indices[dim], placement=numbers.at)
    return _taken_at(op, list(indices.values()), front, dim)


def _taken_at(
    op: OpContext,
    indices: list[Operand],
    front: int,
    dim: int,
) -> Placement | None:
    """The placement of the rows that indices name; ``front`` is the first dim that has one."""
    operand = op.operand()
    for index in indices:
        if index.shard and index.varying != [index.shard.dim]:
            return None
    for other in range(front, front + len(indices)):
        if other != dim:
            refuse_mixing(operand, [other], "takes entries by number")
    ndim = max(index.ndim for index in indices)
    split = elementwise(op, indices, ndim)
    split = split.at(split.dim + front)
    if isinstance(operand.placement, RowNumbers):
        return replace(operand.placement, at=split, once=False, own=False, first_of=0)
    return split


@rule("index_put", "index_add", "index_copy", "scatter", "scatter_add", local=True)
def _put(op: OpContext) -> Placement | None:
    """Entries written, or added, to the rows that they belong to."""
    operand = op.operand()
    name = op.call.name
    if name == "index_put":
        if len(op.args["indices"]) != 1:
            return None
        dim = 0
        index = op.args["indices"][0]
        values = op.args["values"]
        adds = op.value("accumulate")
    else:
        dim = op.dim()
        index = op.args["index"]
        values = op.args.get("source", op.args.get("src"))
        adds = name in ("index_add", "scatter_add")
    numbers = index.placement
    if not isinstance(numbers, RowNumbers):
        return None
    if not isinstance(values, Operand):
        return None
    if operand.varying != [dim] or index.ndim != 1:
        return None
    if name.startswith("scatter") and not operand.ndim == values.ndim == 1:
        return None
    if not _names_entries(op, numbers, dim):
        return None
    has_rows = operand.shard is not None or replicated(operand.placement)
    may_write = has_rows if adds else numbers.once
    return _written(values, numbers, dim) if may_write else None


def _names_entries(op: OpContext, numbers: RowNumbers, dim: int) -> bool:
    """Whether numbers name entries of an operand as they lie along a dim."""
    operand = op.operand()
    arrangement = arrangement_along(operand, dim) or numbers.of
    local, full = op.split.lengths[arrangement.layout]
    inner = arrangement.inner
    has_size = operand.sizes(dim) == (local * inner, full * inner)
    return has_size and numbers.of == arrangement


def _written(values: Operand, numbers: RowNumbers, dim: int) -> Placement | None:
    """How values lie that are written as numbers say, in the arrangement that these number."""
    if isinstance(values.placement, RowNumbers):
        lies_at = arranged(numbers.at)
        fitted = _fitted(values.placement, lies_at)
        if fitted is None or fitted.at != lies_at:
            return None
        return RowNumbers(numbers.of, fitted.of, once=fitted.once)
    if values.placement != numbers.at.at(dim):
        return None
    if values.varying != [dim]:
        return None
    return numbers.of.at(dim)
