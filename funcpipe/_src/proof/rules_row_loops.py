"""Rules of loops over rows, of which `loops.py` has left one turn.

In: op contexts, where the rows of a batch are split. Out: placements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from funcpipe._src.proof import loops
from funcpipe._src.proof.op_context import OpContext, all_replicated
from funcpipe._src.proof.placements import Local, Partial, Placement, Refusal, Shard
from funcpipe._src.proof.rules import ANY, rule


@dataclass(frozen=True)
class OneRow(Local):
    """Any row, in a loop over rows: the same function of every one.

    Args:
        inner: how many entries a row has; the loop takes a turn for each.
    """

    layout: Any
    inner: int = 1

    def __str__(self) -> str:
        return "one row"


@rule(loops.ONE)
def _one_row(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    rows = operand.split_at(dim)
    if rows is None or rows.outer != 1:
        raise Refusal(f"it takes {operand} apart")
    if operand.varying != [dim]:
        raise Refusal(f"it takes {operand} apart")
    return OneRow(rows.layout, rows.inner)


@rule(ANY, local=True)
def _of_one_row(op: OpContext) -> Placement | None:
    """Any op on one row and on what is the same for all."""
    first = op.placements(Local)[0]
    if not isinstance(first, OneRow):
        return None
    op.check_values()
    if op.call.name == loops.SUM:
        return Partial(op.split.axes(first.layout))
    if op.call.name == loops.STACK:
        return _all_rows(op, first, 1)
    if op.call.name == loops.CAT:
        operand = op.operand()
        return _all_rows(op, first, operand.local[op.dim()])
    for operand in op.operands:
        if operand.placement != first and not all_replicated([operand]):
            raise Refusal(f"it puts one row beside {operand}")
    tags = getattr(op.call.func, "tags", ())
    shapes = [(out.local, out.full) for out in op.outs]
    same_shapes = all(local == full for local, full in shapes)
    if not same_shapes or torch.Tag.nondeterministic_seeded in tags:
        raise Refusal("nothing is known of it")
    return first


def _all_rows(op: OpContext, row: OneRow, entries: int) -> Shard:
    """All rows again, each with so many entries."""
    ndim = len(op.out.local)
    dim = op.value("dim") % ndim
    inner = row.inner * entries
    return Shard(dim, row.layout, 1, inner)
