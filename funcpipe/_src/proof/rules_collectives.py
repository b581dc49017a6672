"""Rules of collectives that the loss function calls itself, as single ops.

Where rows are split, a collective over axes that split them is one op with rules of its own
(`rules_row_collectives.py`). A collective over axes that split a sequence is refused at once,
whether or not the loss depends on it: ranks might not bring tensors of equal shapes.

In: op contexts. Out: placements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from funcpipe._src.proof.align import Differs, OpCall
from funcpipe._src.proof.op_context import OpContext
from funcpipe._src.proof.placements import (
    Number,
    Partial,
    Placement,
    Refusal,
    Replicate,
    Shard,
    SplitContext,
    as_partial,
    replicated,
)
from funcpipe._src.proof.rules import kept, rule


def over_sequence(call: OpCall, split: SplitContext) -> bool:
    """Whether a collective names an axis that splits the sequence."""
    return "axes" in call.args and bool(_named(call.args["axes"]) & frozenset(split.live))


def _named(axes: Any) -> frozenset[str]:
    text = axes.local if isinstance(axes, Differs) else axes
    return frozenset(text.split(","))


def _own_axes(op: OpContext) -> frozenset[str]:
    """The axes of the sequence that a collective names."""
    return _named(op.args["axes"]) & frozenset(op.split.live)


@rule("funcpipe::psum_start")
def _psum(op: OpContext) -> Placement:
    operand, own = op.operand("x"), _own_axes(op)
    placement = as_partial(op.split, operand.placement)
    if not own:
        return _summed_over_others(op)
    if isinstance(placement, Partial) and not operand.varying and own <= frozenset(placement.axes):
        return summed_over(placement, own)
    if replicated(placement):
        raise Refusal(
            f"its operand is {op.split.text(placement)}, so the sum over {in_words(own)} would "
            f"hold it once for every {op.words.owner}"
        )
    raise Refusal(
        f"its operand is {operand}: take the sum over {op.words.items} first, and psum that"
    )


def summed_over(placement: Partial, axes: Iterable[str]) -> Placement:
    """What is left of a partial sum that is summed over some of its axes."""
    left = tuple(axis for axis in placement.axes if axis not in axes)
    return Partial(left) if left else Replicate()


@rule("funcpipe::pmax_start")
def _pmax(op: OpContext) -> Placement:
    operand, own = op.operand("x"), _own_axes(op)
    if replicated(operand.placement) and not (own and operand.varying):
        return Replicate()
    if operand.shard and not own:
        return operand.placement
    raise Refusal(
        f"it takes the maximum over {in_words(_named(op.args['axes']))} of {operand}: that is not "
        f"a maximum over {op.words.items}"
    )


@rule("funcpipe::all_gather_start", "funcpipe::ppermute_start")
def _sent(op: OpContext) -> Placement:
    operand, own = op.operand("x"), _own_axes(op)
    if own:
        raise Refusal(f"its operand is {operand}, which goes to other ranks of {in_words(own)}")
    placement = _summed_over_others(op)
    if op.call.name == "funcpipe::all_gather_start" and isinstance(placement, Shard):
        return placement.at(placement.dim + 1)
    return placement


@rule("funcpipe::psum_scatter_start", "funcpipe::all_to_all_start")
def _exchanged(op: OpContext) -> Placement:
    operand, own = op.operand("x"), _own_axes(op)
    if own or operand.split_at(0):
        raise Refusal(f"its operand is {operand}, which goes to other ranks of {in_words(own)}")
    placement = _summed_over_others(op)
    if op.call.name == "funcpipe::psum_scatter_start" and isinstance(placement, Shard):
        return placement.at(placement.dim - 1)
    return placement


def _summed_over_others(op: OpContext) -> Placement:
    """The placement of what a linear collective over other axes makes of an operand."""
    operand = op.operand("x")
    placement = as_partial(op.split, operand.placement)
    return kept(operand) if isinstance(placement, Number) else placement


@rule("funcpipe::wait")
def _wait(op: OpContext) -> Placement:
    return op.operand("token").placement


@rule("funcpipe::axis_index")
def _axis_index(op: OpContext) -> Placement:
    if _own_axes(op):
        raise Refusal(
            f"it is another number on every rank that splits the {op.words.items}: "
            "fp.positions(x, dim) numbers positions"
        )
    return Replicate()


def in_words(axes: Iterable[str]) -> str:
    return ", ".join(repr(axis) for axis in sorted(axes))
