"""Rules of rows in the order of some keys: sorting, counting keys, and matrices of experts.

A mixture of experts sorts tokens by the number of their expert, multiplies the tokens of each
expert by its matrix, and puts them back.

In: op contexts, where the rows of a batch are split. Out: placements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from funcpipe._src.proof.align import AlignedTensor
from funcpipe._src.proof.op_context import OpContext, Operand, all_replicated
from funcpipe._src.proof.placements import Local, Partial, Placement, Refusal, Refused, Shard
from funcpipe._src.proof.rules import Placements, rule, same_everywhere
from funcpipe._src.proof.rules_pointwise import pointwise
from funcpipe._src.proof.rules_row_numbers import Order, RowNumbers, arranged


@dataclass(frozen=True)
class Keys(Shard):
    """The keys of an order."""


@dataclass(frozen=True)
class OneHot(Shard):
    """Which of the numbers from 0 on a key is."""

    keys: int | None = None


@dataclass(frozen=True)
class Counts(Partial):
    """How many rows have every key, smallest first."""

    keys: int | None = None


@dataclass(frozen=True)
class Ends(Partial):
    """Behind how many rows, in their order, every key ends."""

    keys: int | None = None


@rule("sort", rows=True)
def _sort_rows(op: OpContext) -> Placements | None:
    """The sorted keys, and where they were."""
    operand = op.operand()
    placement = operand.split_at(0)
    if operand.ndim != 1 or placement is None:
        return None
    layout = placement.layout
    base = layout.base if isinstance(layout, Order) else layout
    keys = None if op.args.get("descending") else operand.source
    order = Order(base, operand.full[0], op.outs[-1].number, keys)
    op.split.lengths[order] = operand.sizes(0)
    return [Keys(0, order), RowNumbers(Shard(0, order), arranged(placement), once=True)]


@rule("sort", local=True)
def _sort_numbers(op: OpContext) -> Placements | None:
    """Sorting where rows were gives where they went."""
    operand = op.operand()
    numbers = operand.placement
    if not isinstance(numbers, RowNumbers):
        return None
    if not numbers.once:
        return None
    if operand.ndim != 1:
        return None
    if op.args.get("descending"):
        return None
    went = RowNumbers(numbers.of, arranged(numbers.at), once=True)
    return [Refused("it sorts numbers of rows"), went]


# ---- how many rows have a key


@rule("eq", rows=True)
def _one_hot(op: OpContext) -> Placement | None:
    """Keys beside the numbers 0, 1, ...: which of them each is."""
    keys = op.args["self"]
    table = op.call.args["other"]
    if not isinstance(keys, Operand):
        return None
    if not isinstance(table, AlignedTensor):
        return None
    if any(isinstance(operand.placement, Local) for operand in op.operands):
        return None
    if not keys.shard:
        return None
    if keys.local[1:] != (1,):
        return None
    if len(table.local) != 1:
        return None
    placement = pointwise(op)
    numbers = op.value_of(table)
    if type(placement) is not Shard or placement.dim or numbers is None:
        return placement
    if not torch.equal(numbers, torch.arange(len(numbers))):
        return placement
    return OneHot(0, placement.layout, placement.outer, placement.inner, keys.source)


@rule("sum", "nansum", "count_nonzero", rows=True)
def _counts(op: OpContext) -> Placement | None:
    placement = op.operand().placement
    if not isinstance(placement, OneHot):
        return None
    if op.dims() != (0,):
        return None
    op.check_values()
    return Counts(op.split.axes(placement.layout), placement.keys)


@rule("cumsum", rows=True)
def _ends(op: OpContext) -> Placement | None:
    placement = op.operand().placement
    if not isinstance(placement, Counts):
        return None
    op.check_values()
    return Ends(placement.axes, placement.keys)


@rule("histc")
def _histc(op: OpContext) -> Placement:
    operand = op.operand()
    placement = operand.placement
    op.check_values()
    if not isinstance(placement, Shard) or op.value("min") == op.value("max"):
        return same_everywhere(op)
    keys = placement.layout.keys if isinstance(placement, Keys) else operand.source
    return Counts(op.split.axes(placement.layout), keys)


# ---- matrices of experts


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped(op: OpContext) -> Placement:
    """Rows that are sorted by experts, each times the matrix of its own."""
    names = ("self", "mat2", "offs") if "mat2" in op.args else ("input", "weight", "offs")
    rows, weight, ends = (op.operand(name) for name in names)
    if not rows.shard:
        return same_everywhere(op)
    if not _ends_of(ends, rows.shard) or rows.ndim != 2 or not all_replicated([weight]):
        raise Refusal(
            f"it multiplies groups of {rows} that end at {ends}: sort tokens by the number of "
            "their expert (sorted, perm = experts.sort()), and take the ends from "
            "torch.histc(sorted, ...).cumsum(0)"
        )
    return rows.placement


def _ends_of(ends: Operand, rows: Shard) -> bool:
    """Whether ends are those of the keys that rows are sorted by."""
    if not isinstance(ends.placement, Ends):
        return False
    if not isinstance(rows.layout, Order):
        return False
    if rows.dim:
        return False
    keys = ends.placement.keys
    return keys is not None and keys == rows.layout.keys
