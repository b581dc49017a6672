"""Rules of known calls (`functional/dispatch.py`), which leave findings, and of collectives that
the loss function calls itself.

In: a site. Out: states; for known calls, also how their operands lie on ranks. What is refused here
is refused at once,
whether or not the loss comes of it: a rank could not run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funcpipe._src.functional.dispatch import Held
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.align import Differs, OpCall
from funcpipe._src.proof.op_context import OpContext, Operand, all_plain, elementwise, refuse_mixing
from funcpipe._src.proof.placements import (
    Number,
    Partial,
    Refusal,
    Replicate,
    Shard,
    State,
    World,
    agrees,
    as_partial,
    dual,
    plain,
)
from funcpipe._src.proof.row_numbers import own_numbers
from funcpipe._src.proof.rules_pointwise import kept, rule, same_everywhere

Sliced = (
    tuple[int, SequenceLayout] | None
)  # along which dim a tensor is split by positions, and how
_SHAPE = "attention takes (batch, heads, positions, head dim)"
_LOCAL_MASK = (
    "it is built from the length of a rank's slice: use causal=True, or a mask of the whole "
    "sequence (every rank takes its rows), or one with size 1 along queries or keys"
)


# ---- attention


def held(s: OpContext) -> tuple[Held, State]:
    """How the operands of an attention lie on ranks, and what it gives."""
    q, k, v = s.x("q"), s.x("k"), s.x("v")
    s.value("scale")
    packed = s.args["cu_seqlens"]
    if s.world.rows:
        return Held(), _of_rows(s, q, k, v)
    if packed is not None and not all_plain([packed]):
        raise Refusal(
            f"cu_seqlens are {packed}: hand them to every rank whole (dims=None for that leaf)"
        )
    if q.split_at(2) or k.split_at(2) or v.split_at(2):
        return _over_positions(s, q, k, v, s.args["bias"])
    if all_plain([q, k, v, *([] if s.args["bias"] is None else [s.x("bias")])]):
        return Held(), Replicate()
    return Held(), _along_another_dim(s, q, k, v)


def _over_positions(
    s: OpContext, q: Operand, k: Operand, v: Operand, bias: Operand | None
) -> tuple[Held, State]:
    part, keys = _part(q, "queries"), _part(k, "keys")
    if keys != _part(v, "values"):
        raise Refusal(f"keys are {k}, but values are {v}: both have the same positions")
    if part is None:
        raise Refusal(
            f"queries are {q}, but keys are {k}: split the queries too, or gather keys and values"
        )
    if keys is None and (s.args["causal"] or s.args["cu_seqlens"] is not None):
        raise Refusal(
            f"queries are {q}, but every rank has all keys ({k}): causal and cu_seqlens would "
            "count a rank's queries from its first. Split keys and values too, or pass a bias "
            "that has rows for queries"
        )
    rows, columns = _bias(bias, part, keys)
    return Held(part, keys, rows, columns), Shard(2, part)


def _part(x: Operand, what: str) -> SequenceLayout | None:
    """The part that splits an operand along its positions."""
    own = x.split_at(2)
    if own is not None and x.moving == [2] and (own.outer, own.inner) == (1, 1):
        return own.part
    if all_plain([x]):
        return None
    raise Refusal(
        f"{what} are {x}; {_SHAPE}, with positions unmixed in the third dim, or the same on every "
        "rank"
    )


def _bias(
    bias: Operand | None, part: SequenceLayout, keys: SequenceLayout | None
) -> tuple[bool, bool]:
    """Whether a bias is split along queries, along keys."""
    if bias is None:
        return False, False
    state, other = bias.state, [d for d in bias.moving if not bias.split_at(d)]
    if other:
        raise Refusal(
            f"the bias, or mask, is {bias}, and dim {other[0]} is as long as a rank's slice: "
            f"{_LOCAL_MASK}"
        )
    rows, columns = (bias.split_at(d) for d in (2, 3))
    if (rows is not None and rows != Shard(2, part)) or (
        columns is not None and (keys is None or columns != Shard(3, keys))
    ):
        raise Refusal(
            f"the bias, or mask, is {bias}, which does not lie as queries and keys do: "
            f"{_LOCAL_MASK}"
        )
    if (isinstance(state, Shard) and rows is columns is None) or (
        not isinstance(state, Shard) and not plain(state)
    ):
        raise Refusal(f"the bias, or mask, is {bias}; {_LOCAL_MASK}")
    if rows is None and bias.a[2] != 1 and (keys is None or bias.a[2] != part.size):
        raise Refusal(
            f"the bias, or mask, is {bias}, with {bias.a[2]} rows for {part.size} queries: "
            f"{_LOCAL_MASK}"
        )
    if columns is None and keys is not None and bias.a[3] not in (1, keys.size):
        raise Refusal(
            f"the bias, or mask, is {bias}, with {bias.a[3]} columns for {keys.size} keys: "
            f"{_LOCAL_MASK}"
        )
    return rows is not None, columns is not None


def _along_another_dim(s: OpContext, q: Operand, k: Operand, v: Operand) -> State:
    """Attention in which every rank has whole sequences, but not all of them: positions lie along
    batch or heads."""
    if s.args["cu_seqlens"] is not None:
        raise Refusal(
            f"queries are {q}: cu_seqlens go with sequences that are split along positions"
        )
    state, bias = q.state, s.args["bias"]
    alike = isinstance(state, Shard) and all(
        x.state == state and x.moving == [state.dim] for x in (q, k, v)
    )
    if not isinstance(state, Shard) or state.dim > 1 or not alike:
        raise Refusal(
            f"queries are {q}, keys {k}, values {v}; {_SHAPE}, and all of them lie alike on ranks"
        )
    elementwise(s, [q, *([] if bias is None else [bias])], 4)
    if bias is not None and [d for d in bias.moving if d != state.dim]:
        raise Refusal(f"the bias, or mask, is {bias}: {_LOCAL_MASK}")
    return state


def _of_rows(s: OpContext, q: Operand, k: Operand, v: Operand) -> State:
    """Attention within every row."""
    bias, packed = s.args["bias"], s.args["cu_seqlens"]
    operands = [x for x in (q, k, v, bias) if x is not None]
    if all_plain(operands if packed is None else [*operands, packed]):
        return Replicate()
    for x in operands:
        refuse_mixing(x, [2, 3], "attends")
    if not any(isinstance(x.state, Shard) for x in operands):
        return same_everywhere(s)
    state = elementwise(s, operands, 4)
    assert isinstance(state, Shard)
    alike = state.dim == 0 or all(x.state == state for x in (q, k, v))
    wants_rows = packed is not None and packed.ndim == 2
    if not alike or (
        packed is not None
        and not all_plain([packed])
        and not (wants_rows and packed.state == state)
    ):
        raise Refusal(
            f"queries are {q}, keys {k}, values {v}, cu_seqlens {packed}; they have rows along "
            "their first dim"
        )
    return state


# ---- positions, losses


def positioned(s: OpContext) -> tuple[SequenceLayout | None, State]:
    """Which part `fp.positions` counts, and what it gives."""
    x, d = s.x("x"), s.value("dim")
    split = x.split_at(d)
    if s.world.rows and split is not None and split.outer == 1:
        return None, own_numbers(split.at(0))
    if split is not None:
        if (split.outer, split.inner) != (1, 1):
            raise Refusal(
                f"dim {d} of {x} holds positions together with another dim: take positions before "
                "they are merged"
            )
        return split.part, Shard(0, split.part)
    if x.moves(d):
        raise Refusal(
            f"dim {d} of {x} is as long as a slice, but which positions those are is not known: "
            "name a tensor of the batch"
        )
    return None, Replicate()


def scored(s: OpContext) -> tuple[SequenceLayout | None, State]:
    """Which part splits the tokens of `fp.losses.cross_entropy`, and what total and weight are."""
    x, head, labels = s.x("x"), s.args["head"], s.x("labels")
    s.value("options")
    if head is not None and not all_plain([head]):
        raise Refusal(f"the head is {head}: every rank has to have all of it")
    if all_plain([x, labels]):
        return None, Replicate()
    rows = Operand(x.a[:-1], x.b[:-1], x.dtype, x.state)
    for t in (rows, labels):
        if not isinstance(t.state, Shard) or t.moving != [t.state.dim]:
            raise Refusal(f"tokens are {x}, labels {labels}: split both, along the same dim")
    if isinstance(x.state, Shard) and x.state.dim == x.ndim - 1:
        raise Refusal(f"tokens are {x}: their last dim holds features")
    state = elementwise(s, [rows, labels], labels.ndim)
    assert isinstance(state, Shard)
    return state.part, Partial(s.world.axes(state.part))


def dropped(s: OpContext) -> tuple[Sliced, State]:
    """Along which dim places of a row of `fp.random.dropout` are positions, and which; and what it
    gives."""
    x, key = s.x("x"), s.x("key")
    s.value("rate")
    if all_plain([x, key]):
        return None, Replicate()
    state = x.state
    if s.world.rows and (not isinstance(state, Shard) or key.ndim <= state.dim):
        raise Refusal(
            f"x is {x}, but its key {key}: give every row a key, a leaf fp.random.keys(key, rows) "
            "of the batch"
        )
    whole = isinstance(state, Shard) and x.moving == [state.dim] and state.outer == 1
    if not isinstance(state, Shard) or not whole or (state.inner != 1 and not s.world.rows):
        raise Refusal(f"x is {x}: drop places before positions are merged with another dim")
    if state.dim < key.ndim:  # every position has a key of its own
        if key.state != state or key.moving != [state.dim]:
            raise Refusal(f"x is {x}, but its key {key}: both are split alike")
        return None, state
    if not all_plain([key]):
        raise Refusal(
            f"x is {x}, but its key {key}: a row has one key on all ranks (dims=None for that leaf)"
        )
    return (state.dim, state.part), state


# ---- collectives


def over_sequence(call: OpCall, world: World) -> bool:
    """Whether a collective names an axis of the sequence."""
    return "axes" in call.args and bool(_named(call.args["axes"]) & frozenset(world.live))


def _named(axes: Any) -> frozenset[str]:
    return frozenset((axes.a if isinstance(axes, Differs) else axes).split(","))


def _axes(s: OpContext) -> tuple[frozenset[str], frozenset[str]]:
    """The axes that a collective names: those of the sequence, and others."""
    names, live = _named(s.args["axes"]), frozenset(s.world.live)
    return names & live, names - live


@rule("funcpipe::psum_start")
def _psum(s: OpContext) -> State:
    state, (own, _) = as_partial(s.world, s.x("x").state), _axes(s)
    if not own:
        return _sendable(s)
    if isinstance(state, Partial) and not s.x("x").moving and own <= frozenset(state.axes):
        left = tuple(a for a in state.axes if a not in own)
        return Partial(left) if left else Replicate()
    if plain(state):
        raise Refusal(
            f"its operand is {state}, so the sum over {_text(own)} would hold it once for every "
            "rank"
        )
    raise Refusal(f"its operand is {s.x('x')}: take the sum over positions first, and psum that")


@rule("funcpipe::pmax_start")
def _pmax(s: OpContext) -> State:
    x, (own, others) = s.x("x"), _axes(s)
    if (plain(x.state) and not (own and x.moving)) or (isinstance(x.state, Shard) and not own):
        return Replicate() if plain(x.state) else x.state
    raise Refusal(
        f"it takes the maximum over {_text(own | others)} of {x}: that is not a maximum over "
        "positions"
    )


@rule("funcpipe::all_gather_start", "funcpipe::ppermute_start")
def _sent(s: OpContext) -> State:
    x, (own, _) = s.x("x"), _axes(s)
    if own:
        raise Refusal(f"its operand is {x}, which goes to other ranks of {_text(own)}")
    state = _sendable(s)
    if s.call.name == "funcpipe::all_gather_start" and isinstance(state, Shard):
        return state.at(state.dim + 1)
    return state


@rule("funcpipe::psum_scatter_start", "funcpipe::all_to_all_start")
def _exchanged(s: OpContext) -> State:
    x, (own, _) = s.x("x"), _axes(s)
    if own or x.split_at(0):
        raise Refusal(f"its operand is {x}, which goes to other ranks of {_text(own)}")
    state = _sendable(s)
    if s.call.name == "funcpipe::psum_scatter_start" and isinstance(state, Shard):
        return state.at(state.dim - 1)
    return state


def _sendable(s: OpContext) -> State:
    """The state of what a linear collective over other axes makes of an operand."""
    state = as_partial(s.world, s.x("x").state)
    if isinstance(state, Number):
        return kept(s.x("x"))
    return state


@rule("funcpipe::wait")
def _wait(s: OpContext) -> State:
    return s.x("token").state


@rule("funcpipe::axis_index")
def _axis_index(s: OpContext) -> State:
    if _axes(s)[0]:
        raise Refusal(
            "it is another number on every rank that splits the sequence: fp.positions(x, dim) "
            "numbers positions"
        )
    return Replicate()


def _text(axes: Any) -> str:
    return ", ".join(repr(a) for a in sorted(axes))


Finding = Held | SequenceLayout | Sliced
FINDERS: dict[str, Callable[[OpContext], tuple[Finding, State]]] = {
    "attention": held,
    "positions": positioned,
    "cross_entropy": scored,
    "dropout": dropped,
}


# ---- gradients that the user wrote


@rule("cotangent")
def _cotangent(s: OpContext) -> State:
    state = dual(s.world, s.x("of").state) if "of" in s.args else None
    if state is None or _free(s.x("of")):
        raise Refusal("what gradient comes to an autograd.Function is not known")
    return state


def check_gradient(s: OpContext) -> None:
    """Refuse a gradient, made by the backward of an autograd.Function, that is not of its operand's
    kind."""
    name, g = s.args["function"], s.x("grad")
    if "of" not in s.args:
        raise Refusal(
            f"{name} makes a gradient of a tensor that was changed in place, or that no op has seen"
        )
    x = s.x("of")
    wanted = dual(s.world, x.state)
    if wanted is None or _free(x) or not agrees(as_partial(s.world, g.state), wanted):
        raise Refusal(
            f"{name} makes {g} of {x}: on ranks that is not the gradient that one device makes. It "
            f"wants {wanted or 'none'}"
        )


def _free(x: Operand) -> bool:
    return any(x.free_at(d) for d in range(x.ndim))
