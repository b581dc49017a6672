"""Rules: what an op makes of the states of its operands.

Here are those of elementwise ops and of what is made from nothing; in `rules_reduction.py` of what
adds up or runs along dims; in `rules_view.py` of what rearranges; in `rules_intrinsic.py` of known
calls and collectives.

Terms. A rule takes a `OpContext` and gives the state of its results (one state for all, or one for
each), or a `Refusal`. It holds for every value of every operand. An op that has no rule is allowed
only where nothing depends on positions.

In: a site. Out: states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import (
    MIXES,
    OpContext,
    Operand,
    all_plain,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import (
    COUNTS,
    PSUM,
    ZERO,
    Average,
    Number,
    Partial,
    Refusal,
    Refused,
    Replicate,
    Shard,
    State,
    add,
    div,
    mul,
    plain,
)

States = State | Sequence[State]
Rule = Callable[[OpContext], States]
RULES: dict[str, Rule] = {}
LENGTH = "it is made from the length of a rank's slice. Positions come from fp.positions(x, dim)"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some ops."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def apply(s: OpContext) -> States:
    """The states of an op's results, by its rule or, without one, by what its tags say."""
    known, func = RULES.get(s.call.name), s.call.func
    if known is not None:
        return known(s)
    if not isinstance(func, torch._ops.OpOverload) or "c10d" in func.namespace:
        raise Refusal("nothing is known of it")
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise Refusal(
            "it draws from the global random generator. Draw outside the loss and pass it through "
            "batch"
        )
    if (torch.Tag.pointwise in func.tags or s.call.name in _UNTAGGED) and s.outs:
        return pointwise(s)
    return same_everywhere(s)


# Elementwise ops of which some overloads lack torch's tag.
_UNTAGGED = (
    "abs", "copysign", "eq", "floor_divide", "ge", "gelu", "gt", "hardswish", "heaviside", "le", "lt", "masked_fill", "mish",
    "ne", "_prelu_kernel", "rsub", "threshold", "xlogy",
)  # fmt: skip


def same_everywhere(s: OpContext) -> State:
    """Any op on what is the same everywhere."""
    for name, value in s.args.items():
        if isinstance(value, Differs) and (not s.operands or all_plain(s.operands)):
            raise Refusal(
                f"its {name} is {value.a} on a rank and {value.b} on one device: {LENGTH}"
            )
    odd = next((x for x in s.operands if not plain(x.state) or x.moving), None)
    if odd is not None:
        raise Refusal(f"nothing is known of this op that would allow it on {odd}. {MIXES}")
    if any(o.a != o.b for o in s.outs):
        raise Refusal(LENGTH)
    return Replicate()


# ---- element by element


def pointwise(s: OpContext) -> State:
    """An op that computes every element by itself."""
    operands = s.operands
    numbers = [
        Number(v.a, v.b) for v in s.args.values() if isinstance(v, Differs) and _is_number(v.a)
    ]
    if not numbers:
        s.all_values()
    if any(isinstance(x.state, Shard) for x in operands):
        if numbers:
            raise Refusal(
                f"it puts {numbers[0]} beside a rank's slice; the number is made from its length. "
                f"{COUNTS}"
            )
        return elementwise(s, operands, len(s.out.a))
    if all(isinstance(x.state, Number) for x in operands):
        return _computed(s)
    linear = _LINEAR.get(s.call.name)
    if not numbers and all(plain(x.state) for x in operands):
        return Replicate()
    if linear is not None:
        return linear(s)
    odd = next((x for x in operands if not plain(x.state)), None)
    if isinstance(odd, Operand) and isinstance(odd.state, Partial):
        raise Refusal(f"it is not linear, and its operand is {odd}: {PSUM}")
    raise Refusal(f"it is not linear, and {odd or numbers[0]} is among its operands; {COUNTS}")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _computed(s: OpContext) -> State:
    """Numbers of numbers: the op itself, once for each run."""

    def run(which: str) -> float:
        args = [None if k == "device" else _scalar(v, which) for k, v in s.args.items()]
        schema = s.call.func._schema.arguments
        named = {p.name: x for p, x in zip(schema, args, strict=True) if p.kwarg_only}
        return s.call.func(*args[: len(schema) - len(named)], **named).item()

    try:
        return Number(run("a"), run("b"))
    except (RuntimeError, TypeError, ZeroDivisionError, OverflowError, AttributeError):
        return same_everywhere(s)


def _scalar(v: Any, which: str) -> Any:
    if isinstance(v, Operand):
        assert isinstance(v.state, Number)
        dtype = torch.float64 if v.dtype.is_floating_point else v.dtype
        return torch.tensor(getattr(v.state, which), dtype=dtype)
    return getattr(v, which) if isinstance(v, Differs) else v


def _add(s: OpContext) -> State:
    s.value("alpha")
    return add(s.world, s.term("self"), s.term("other"))


def _div(s: OpContext) -> State:
    if s.args.get("rounding_mode") is not None:
        raise Refusal("it rounds, which is not linear")
    return div(s.world, s.term("self"), s.term("other"))


def _where(s: OpContext) -> State:
    condition = s.x("mask" if "mask" in s.args else "condition")
    if not plain(condition.state):
        raise Refusal(f"it chooses by {condition}")
    return add(s.world, s.term("self"), s.term("value" if "value" in s.args else "other"))


def _addcmul(s: OpContext) -> State:
    s.value("value")
    return add(s.world, s.term("self"), mul(s.world, s.term("tensor1"), s.term("tensor2")))


def _lerp(s: OpContext) -> State:
    weight = s.args["weight"]
    if isinstance(weight, Operand) and not plain(weight.state):
        raise Refusal(f"it weighs by {weight}")
    s.value("weight")
    return add(s.world, s.term("self"), s.term("end"))


def _itself(s: OpContext) -> State:
    return s.x().state


_LINEAR: dict[str, Callable[[OpContext], State]] = {
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "mul": lambda s: mul(s.world, s.term("self"), s.term("other")),
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
def _log_sigmoid(s: OpContext) -> States:
    return [pointwise(s), Refused("it is for the gradient alone")]


@rule("complex", "polar", "isin", "bucketize", "searchsorted")
def _by_table(s: OpContext) -> State:
    """Element by element in one operand; another may be a table that is the same everywhere."""
    tables = [
        v for k, v in s.args.items() if k in ("test_elements", "boundaries", "sorted_sequence")
    ]
    rest = [x for x in s.operands if x not in tables]
    if (
        not all_plain(tables)
        or any(t.ndim != 1 for t in tables)
        or not any(isinstance(x.state, Shard) for x in rest)
    ):
        return same_everywhere(s)
    return elementwise(s, rest, len(s.out.a))


@rule("_to_copy")
def _to_copy(s: OpContext) -> State:
    x, dtype = s.args["self"], s.out.dtype
    if not isinstance(x, Operand):
        return s.term("self")  # a number, as torch.func makes one of what is the same in every row
    smaller = x.dtype.is_floating_point and not (dtype.is_floating_point or dtype.is_complex)
    if isinstance(x.state, Number):
        return _computed(s)
    if isinstance(x.state, Partial | Average) and (smaller or dtype == torch.bool):
        raise Refusal(f"it rounds {x.state} to {dtype}, which is not linear: {PSUM}")
    return x.state


# ---- what is made from nothing


@rule("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(s: OpContext) -> State:
    return ZERO


@rule("ones", "ones_like", "new_ones")
def _ones(s: OpContext) -> State:
    return Number(1, 1)


@rule("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
def _empty(s: OpContext) -> State:
    return Number(math.nan, math.nan)


@rule("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(s: OpContext) -> State:
    name = next(n for n in ("fill_value", "s", "value") if n in s.args)
    return s.term(name)


@rule("constant")
def _constant(s: OpContext) -> State:
    value = s.args["value"]
    if not isinstance(value, Differs):
        return (
            Number(value.item(), value.item())
            if value.dim() == 0 and not value.is_complex()
            else Replicate()
        )
    if value.a.dim() == 0 and value.b.dim() == 0 and not value.a.is_complex():
        return Number(value.a.item(), value.b.item())
    raise Refusal(f"a tensor of shape {tuple(value.a.shape)}: {LENGTH}")


@rule("unknown")
def _unknown(s: OpContext) -> State:
    raise Refusal("a tensor came from elsewhere: it did not come in through params or batch")


@rule("copy")
def _copy(s: OpContext) -> State:
    """Like an elementwise op of the source alone, in the shape of what is written to."""
    source = s.x("src")
    if isinstance(source.state, Shard):
        return elementwise(s, [source], len(s.out.a))
    return source.state


@rule("tril", "triu")
def _triangle(s: OpContext) -> State:
    x = s.x()
    s.value("diagonal")
    refuse_mixing(x, [x.ndim - 2, x.ndim - 1], "takes a triangle")
    return kept(x)


def kept(x: Operand) -> State:
    """The state of what has the same positions as an operand, but other numbers."""
    if isinstance(x.state, Partial | Average):
        raise Refusal(f"it is not linear, and its operand is {x}: {PSUM}")
    if isinstance(x.state, Number):
        if not x.state.constant:
            raise Refusal(f"its operand is {x}, made from a slice's length")
        return Replicate()
    return x.state
