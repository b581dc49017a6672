"""The registry of rules: what an op makes of the placements of its operands.

A rule is a function of an `OpContext`. It gives the placement of the results (one for all, or one
for each), or raises a `Refusal`. It has to hold for every value of every operand. There are three
kinds, and `apply` asks them in this order:

1. ``@rule("op", rows=True)``: only where the rows of a batch are split. Such a rule sees ops that
   do more with rows than with positions (it sorts them, counts them). It gives None where it does
   not apply; then the next one is asked.
2. ``@rule("op", local=True)``: only where an operand is right on its part alone
   (`placements.Local`). It gives None where it does not apply. If all give None, `apply` refuses
   the op.
3. ``@rule("op")``: one for each op. It does not give None.

An op without a rule is taken for elementwise if torch tags it so; any other is allowed only where
nothing depends on what is split. A *known call* (`functional/dispatch.py`) has a rule of its own
kind, ``@known_call("attention")``, which also says how its operands are split.

In: op contexts. Out: placements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcpipe._src.functional.dispatch import Held
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import OpContext, Operand, all_replicated
from funcpipe._src.proof.placements import (
    Average,
    Local,
    Number,
    Partial,
    Placement,
    Refusal,
    Replicate,
    replicated,
)
from funcpipe._src.proof.recording import BUFFER, SHAPE_ONLY

Placements = Placement | Sequence[Placement]
Rule = Callable[[OpContext], Placements]
RowRule = Callable[[OpContext], Placements | None]

Sliced = tuple[int, SequenceLayout] | None  # the dim of positions of a tensor, and their layout
Finding = Held | SequenceLayout | Sliced
KnownCallRule = Callable[[OpContext], tuple[Any, Placement]]

ANY = "any op"
ELEMENTWISE = "any elementwise op"
# These ops use the shape of an operand, or write over it.
IGNORES_ENTRIES = frozenset((*SHAPE_ONLY, "zero", "fill", BUFFER))
RULES: dict[str, Rule] = {}
ROW_RULES: dict[str, list[RowRule]] = {}
LOCAL_RULES: dict[str, list[RowRule]] = {}
KNOWN_CALLS: dict[str, KnownCallRule] = {}


def rule(*ops: str, rows: bool = False, local: bool = False) -> Callable[[Any], Any]:
    """Register a rule of some ops, named without their overload and without the ``_`` of ops that
    write to an operand.

    Args:
        rows: asked only where rows are split, before all others.
        local: asked only where an operand is right on its part alone; then it may be for `ANY` op.
    """

    def register(function: Any) -> Any:
        for op in ops:
            if rows:
                ROW_RULES.setdefault(op, []).append(function)
            elif local:
                LOCAL_RULES.setdefault(op, []).append(function)
            else:
                assert op not in RULES, op
                RULES[op] = function
        return function

    return register


def known_call(name: str) -> Callable[[KnownCallRule], KnownCallRule]:
    """Register the rule of a known call: how its operands are split, and the placement of its
    result."""

    def register(function: KnownCallRule) -> KnownCallRule:
        KNOWN_CALLS[name] = function
        return function

    return register


def apply(op: OpContext) -> Placements:
    """The placements of an op's results."""
    name = op.call.name
    if not op.split.rows:
        return apply_common(op)
    for row_rule in ROW_RULES.get(name, ()):
        found = row_rule(op)
        if found is not None:
            return found
    if name in IGNORES_ENTRIES:
        return apply_common(op)
    if any(isinstance(operand.placement, Local) for operand in op.operands):
        return _apply_local(op)
    return apply_common(op)


def _apply_local(op: OpContext) -> Placements:
    for name in (op.call.name, ANY):
        for local_rule in LOCAL_RULES.get(name, ()):
            found = local_rule(op)
            if found is not None:
                return found
    odd = next(operand for operand in op.operands if isinstance(operand.placement, Local))
    assert isinstance(odd.placement, Local)
    raise Refusal(f"it computes with {odd}{odd.placement.fault}")


def apply_common(op: OpContext) -> Placements:
    """The placements of an op's results by the one rule that serves positions and rows."""
    found, function = RULES.get(op.call.name), op.call.func
    if found is not None:
        return found(op)
    if not isinstance(function, torch._ops.OpOverload) or "c10d" in function.namespace:
        raise Refusal("nothing is known of it")
    if torch.Tag.nondeterministic_seeded in function.tags:
        raise Refusal(
            "it draws random values. Draw them outside the loss and pass them through batch; for "
            "dropout write fp.random.dropout(x, rate, key)"
        )
    if torch.Tag.pointwise in function.tags:
        return RULES[ELEMENTWISE](op)
    return same_everywhere(op)


def same_everywhere(op: OpContext) -> Placement:
    """Any op on operands that are the same everywhere."""
    words, operands = op.words, op.operands
    if all_replicated(operands):
        for name, value in op.args.items():
            if isinstance(value, Differs):
                raise Refusal(
                    f"its {name} is {value.local} {words.at_owner} and {value.full} on one "
                    f"device: it is made from {words.length}. {words.number_advice}"
                )
    for operand in operands:
        if not replicated(operand.placement) or operand.varying:
            raise Refusal(
                f"nothing is known of this op that would allow it on {operand}. {words.keep_apart}"
            )
    if any(out.local != out.full for out in op.outs):
        raise Refusal(f"it is made from {words.length}. {words.number_advice}")
    return Replicate()


def kept(operand: Operand) -> Placement:
    """The placement of a tensor that has the same positions as an operand, but other numbers."""
    placement, words = operand.placement, operand.words
    if isinstance(placement, Partial | Average):
        raise Refusal(f"it is not linear, and its operand is {operand}: {words.sum_first}")
    if not isinstance(placement, Number):
        return placement
    if not placement.constant:
        raise Refusal(f"its operand is {operand}, made from {words.length}")
    return Replicate()
