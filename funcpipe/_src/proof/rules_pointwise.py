"""Rules of elementwise ops, and of ops that make tensors from nothing.

In: op contexts. Out: placements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import (
    OpContext,
    Operand,
    all_replicated,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import (
    ZERO,
    Average,
    Number,
    Partial,
    Placement,
    Refusal,
    Refused,
    Replicate,
    Shard,
    add,
    div,
    mul,
    replicated,
)
from funcpipe._src.proof.rules import ELEMENTWISE, Placements, kept, rule, same_everywhere
from funcpipe._src.proof.words import COUNTS

# torch does not tag all overloads of these.
_UNTAGGED = (
    "abs", "copysign", "eq", "floor_divide", "ge", "gelu", "gt", "hardswish", "heaviside", "le",
    "lt", "masked_fill", "mish", "ne", "_prelu_kernel", "rsub", "threshold", "xlogy",
)  # fmt: skip


# ---- element by element


@rule(ELEMENTWISE, *_UNTAGGED)
def pointwise(op: OpContext) -> Placement:
    """An op that computes every element by itself."""
    if not op.outs:
        return same_everywhere(op)
    operands, numbers = op.operands, _numbers_from_lengths(op)
    if not numbers:
        op.check_values()
    placements = [operand.placement for operand in operands]
    if any(isinstance(placement, Shard) for placement in placements):
        if numbers:
            raise Refusal(
                f"it puts {numbers[0]} beside {op.words.share}; the number is made from its "
                f"length. {COUNTS}"
            )
        return elementwise(op, operands, len(op.out.local))
    if all(isinstance(placement, Number) for placement in placements):
        return _computed(op)
    if not numbers and all(map(replicated, placements)):
        return Replicate()
    if op.call.name in _LINEAR:
        return _LINEAR[op.call.name](op)
    return _refuse_nonlinear(op, numbers)


def _numbers_from_lengths(op: OpContext) -> list[Number]:
    """The Python numbers among the arguments that depend on lengths."""
    numbers = []
    for value in op.args.values():
        if isinstance(value, Differs) and _is_number(value.local):
            numbers.append(Number(value.local, value.full))
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_nonlinear(op: OpContext, numbers: list[Number]) -> NoReturn:
    odd = next((x for x in op.operands if not replicated(x.placement)), None)
    if odd is not None and isinstance(odd.placement, Partial):
        raise Refusal(f"it is not linear, and its operand is {odd}: {op.words.sum_first}")
    raise Refusal(f"it is not linear, and {odd or numbers[0]} is among its operands; {COUNTS}")


def _computed(op: OpContext) -> Placement:
    """Numbers of numbers: the op itself, once for each run."""
    try:
        return Number(_run_on_numbers(op, "local"), _run_on_numbers(op, "full"))
    except (RuntimeError, TypeError, ZeroDivisionError, OverflowError, AttributeError):
        return same_everywhere(op)


def _run_on_numbers(op: OpContext, which: str) -> float:
    positional, named = [], {}
    for parameter, (name, value) in zip(
        op.call.func._schema.arguments, op.args.items(), strict=True
    ):
        number = None if name == "device" else _number(value, which)
        if parameter.kwarg_only:
            named[parameter.name] = number
        else:
            positional.append(number)
    return op.call.func(*positional, **named).item()


def _number(value: Any, which: str) -> Any:
    """An argument as it is in one of the runs; of a tensor, a 0-d one."""
    if isinstance(value, Operand):
        assert isinstance(value.placement, Number)
        dtype = torch.float64 if value.dtype.is_floating_point else value.dtype
        return torch.tensor(getattr(value.placement, which), dtype=dtype)
    return getattr(value, which) if isinstance(value, Differs) else value


def _add(op: OpContext) -> Placement:
    op.value("alpha")
    return add(op.split, op.placement_of("self"), op.placement_of("other"))


def _mul(op: OpContext) -> Placement:
    return mul(op.split, op.placement_of("self"), op.placement_of("other"))


def _div(op: OpContext) -> Placement:
    if op.args.get("rounding_mode") is not None:
        raise Refusal("it rounds, which is not linear")
    return div(op.split, op.placement_of("self"), op.placement_of("other"))


def _where(op: OpContext) -> Placement:
    condition = op.operand("mask" if "mask" in op.args else "condition")
    if not replicated(condition.placement):
        raise Refusal(f"it chooses by {condition}")
    other = op.placement_of("value" if "value" in op.args else "other")
    return add(op.split, op.placement_of("self"), other)


def _addcmul(op: OpContext) -> Placement:
    op.value("value")
    product = mul(op.split, op.placement_of("tensor1"), op.placement_of("tensor2"))
    return add(op.split, op.placement_of("self"), product)


def _lerp(op: OpContext) -> Placement:
    weight = op.args["weight"]
    if isinstance(weight, Operand) and not replicated(weight.placement):
        raise Refusal(f"it weighs by {weight}")
    op.value("weight")
    return add(op.split, op.placement_of("self"), op.placement_of("end"))


def _itself(op: OpContext) -> Placement:
    return op.operand().placement


_LINEAR: dict[str, Callable[[OpContext], Placement]] = {
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "mul": _mul,
    "div": _div,
    "true_divide": _div,
    "neg": _itself,
    "positive": _itself,
    "clone": _itself,
    "where": _where,
    "masked_fill": _where,
    "addcmul": _addcmul,
    "lerp": _lerp,
}


@rule("log_sigmoid_forward")
def _log_sigmoid(op: OpContext) -> Placements:
    return [pointwise(op), Refused("it is for the gradient alone")]


_TABLES = ("test_elements", "boundaries", "sorted_sequence")


@rule("complex", "polar", "isin", "bucketize", "searchsorted")
def _by_table(op: OpContext) -> Placement:
    """Element by element in one operand; another may be a table that is the same everywhere."""
    tables = [op.args[name] for name in _TABLES if name in op.args]
    rest = [operand for operand in op.operands if operand not in tables]
    usual = all_replicated(tables) and all(table.ndim == 1 for table in tables)
    if usual and any(operand.shard for operand in rest):
        return elementwise(op, rest, len(op.out.local))
    return same_everywhere(op)


@rule("_to_copy")
def _to_copy(op: OpContext) -> Placement:
    operand, dtype = op.args["self"], op.out.dtype
    if not isinstance(operand, Operand):
        return op.placement_of("self")  # torch.func replaces what all rows share by a number
    placement = operand.placement
    if isinstance(placement, Number):
        return _computed(op)
    keeps_fractions = dtype.is_floating_point or dtype.is_complex
    rounds = operand.dtype.is_floating_point and not keeps_fractions
    if isinstance(placement, Partial | Average) and (rounds or dtype == torch.bool):
        raise Refusal(
            f"it rounds {op.split.text(placement)} to {dtype}, which is not linear: "
            f"{op.words.sum_first}"
        )
    return placement


# ---- what is made from nothing


@rule("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(op: OpContext) -> Placement:
    return ZERO


@rule("ones", "ones_like", "new_ones")
def _ones(op: OpContext) -> Placement:
    return Number(1, 1)


@rule("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
def _empty(op: OpContext) -> Placement:
    return Number(math.nan, math.nan)


@rule("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(op: OpContext) -> Placement:
    name = next(name for name in ("fill_value", "s", "value") if name in op.args)
    return op.placement_of(name)


@rule("constant")
def _constant(op: OpContext) -> Placement:
    value = op.args["value"]
    differs = isinstance(value, Differs)
    local, full = (value.local, value.full) if differs else (value, value)
    if local.dim() == 0 and full.dim() == 0 and not local.is_complex():
        return Number(local.item(), full.item())
    if not differs:
        return Replicate()
    raise Refusal(
        f"a tensor of shape {tuple(local.shape)}: it is made from {op.words.length}. "
        f"{op.words.number_advice}"
    )


@rule("unknown")
def _unknown(op: OpContext) -> Placement:
    raise Refusal("a tensor came from elsewhere: it did not come in through params or batch")


@rule("copy")
def _copy(op: OpContext) -> Placement:
    """Like an elementwise op of the source alone, in the shape of what is written to."""
    source = op.operand("src")
    if source.shard:
        return elementwise(op, [source], len(op.out.local))
    return source.placement


@rule("tril", "triu")
def _triangle(op: OpContext) -> Placement:
    operand = op.operand()
    op.value("diagonal")
    refuse_mixing(operand, [operand.ndim - 2, operand.ndim - 1], "takes a triangle")
    return kept(operand)
