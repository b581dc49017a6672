"""Rules of maxima and norms over rows, and of declared batch statistics.

In: op contexts, where the rows of a batch are split. Out: placements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from funcpipe._src.core.mesh import Axes
from funcpipe._src.proof.align import AlignedTensor
from funcpipe._src.proof.op_context import OpContext, Operand, varying_dims
from funcpipe._src.proof.placements import Local, Partial, Placement, Refused, Replicate, Shard
from funcpipe._src.proof.recording import BUFFER, STATISTIC
from funcpipe._src.proof.rules import Placements, rule


@dataclass(frozen=True)
class Largest(Local):
    """A maximum over the rows of a part; ``how`` is "max" or "min"."""

    axes: Axes
    how: str

    def __str__(self) -> str:
        return f"the {self.how}imum over the rows of a part"


@dataclass(frozen=True)
class Norm(Local):
    """A norm over the rows of a part: its power adds up."""

    axes: Axes
    power: float

    def __str__(self) -> str:
        return "a norm over the rows of a part"


_MAXIMA = ("amax", "amin", "max", "min")


@rule(*_MAXIMA, rows=True)
def _largest(op: OpContext) -> Placement | None:
    rows = _rows_alone(op)
    if rows is None or len(op.outs) != 1:
        return None
    return Largest(op.split.axes(rows.layout), op.call.name[-3:])


@rule(*_MAXIMA, local=True)
def _largest_again(op: OpContext) -> Placement | None:
    placement = op.operand().placement
    if not isinstance(placement, Largest) or "other" in op.args:
        return None
    if placement.how == op.call.name[-3:]:
        return placement
    return None


@rule("linalg_vector_norm", rows=True)
def _norm(op: OpContext) -> Placement | None:
    rows = _rows_alone(op)
    power = op.args["ord"]
    if rows is None:
        return None
    if not isinstance(power, int | float):
        return None
    if not 0 < power < math.inf:
        return None
    if power == 1:  # a sum
        return None
    return Norm(op.split.axes(rows.layout), power)


def _rows_alone(op: OpContext) -> Shard | None:
    """How rows lie along the one varying dim of a reduction; None if it is another reduction."""
    operand = op.operand()
    placement = operand.placement
    if "other" in op.args or not isinstance(placement, Shard):
        return None
    op.check_values()
    varying = [dim for dim in op.dims() if operand.varies(dim) and dim != placement.dim]
    if placement.dim in op.dims() and not varying:
        return placement
    return None


@rule("pow", local=True)
def _power(op: OpContext) -> Placement | None:
    operand = op.args["self"]
    power = op.args["exponent"]
    norm = operand.placement if isinstance(operand, Operand) else None
    if isinstance(norm, Norm) and norm.power == power:
        return Partial(norm.axes)
    return None


# ---- declared batch statistics


@rule(STATISTIC, BUFFER, rows=True)
def _statistic(op: OpContext) -> Placements:
    """An entry for every row, or a value that all rows of the part see."""
    return [_of_statistic(op, out) for out in op.outs]


def _of_statistic(op: OpContext, out: AlignedTensor) -> Placement:
    varying = varying_dims(out)
    if not varying:
        return Replicate()
    dim = varying[0]
    found = op.split.factor(out.sizes(dim)) if len(varying) == 1 else None
    if found is None:
        return Refused(
            f"{op.call.where}: it gives a tensor of shape {out.local} in a part, and {out.full} on "
            "one device: it may have an entry for every row, along one dim, or be the same for all"
        )
    layout, inner = found
    return Shard(dim, layout, 1, inner)
