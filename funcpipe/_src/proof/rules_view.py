"""Rules of what rearranges: views, joins, padding, and what picks entries by their numbers.

In: a site. Out: states, with positions along the dim to which they went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from funcpipe._src.proof.op_context import (
    MIXES,
    OpContext,
    Operand,
    all_plain,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import (
    ZERO,
    Average,
    Number,
    Partial,
    Refusal,
    Replicate,
    Shard,
    State,
    as_partial,
    plain,
)
from funcpipe._src.proof.rules_pointwise import States, kept, rule, same_everywhere

SLICED = (
    "it takes entries {what} of a tensor of shape {shape}, as many as a slice is long: which ones "
    "a rank needs depends on its place. Index with fp.positions(x, dim)"
)
PICKS = (
    "it takes entries {what} along dim {dim} of a tensor of shape {shape}, along which a rank has "
    "{a} of {b} positions: those have other numbers on one device. Shift, pool or cut positions "
    "outside of the loss function (labels come shifted in the batch), or choose them by a mask "
    "made with fp.positions(x, dim)"
)


def _moved(x: Operand, dim: int | None) -> State:
    """The state of an operand when its split dim has become ``dim``."""
    return x.state.at(dim) if isinstance(x.state, Shard) and dim is not None else x.state


def _at(x: Operand) -> int:
    """The split dim; -1 if there is none."""
    return x.state.dim if isinstance(x.state, Shard) else -1


# ---- dims go elsewhere


@rule("detach", "view_as_complex", "view_as_real", "_conj", "_neg_view")
def _itself(s: OpContext) -> State:
    return s.x().state


@rule("permute")
def _permute(s: OpContext) -> State:
    x = s.x()
    dims = [d % x.ndim for d in s.value("dims")]
    return _moved(x, dims.index(_at(x)) if _at(x) >= 0 else None)


@rule("transpose", "t")
def _transpose(s: OpContext) -> State:
    x = s.x()
    if x.ndim < 2:
        return x.state
    pair = (s.dim("dim0"), s.dim("dim1")) if "dim0" in s.args else (0, 1)
    return _moved(x, {pair[0]: pair[1], pair[1]: pair[0]}.get(_at(x), _at(x)))


@rule("unsqueeze")
def _unsqueeze(s: OpContext) -> State:
    x = s.x()
    dim = s.value("dim") % (x.ndim + 1)
    return _moved(x, _at(x) + (_at(x) >= dim))


@rule("squeeze")
def _squeeze(s: OpContext) -> State:
    x = s.x()
    gone = [d for d in s.dims() if d < x.ndim and x.a[d] == 1]
    if gone != [d for d in s.dims() if d < x.ndim and x.b[d] == 1]:
        raise Refusal(
            f"it removes a dim of a tensor of shape {x.a} that has size 1 on a rank alone: name "
            "the dims to remove"
        )
    return _moved(x, _at(x) - sum(d < _at(x) for d in gone))


@rule("expand")
def _expand(s: OpContext) -> State:
    x = s.x()
    return _moved(x, _at(x) + len(s.out.a) - x.ndim)


@rule("repeat")
def _repeat(s: OpContext) -> State:
    x, times, state = s.x(), s.args["repeats"], s.x().state
    extra = len(s.out.a) - x.ndim
    for d in range(x.ndim):
        a, b = (getattr(times, which, times)[d + extra] for which in "ab")
        found = (
            s.world.factor((a, b))
            if a != b and s.world.rows and all_plain([x]) and x.a[d] != 1
            else None
        )
        if found is not None:  # every row gets the same
            state = Shard(d + extra, found[0], 1, found[1] * x.a[d])
            continue
        if a != b and not (x.a[d] == x.b[d] == 1 or isinstance(state, Number)):
            raise Refusal(f"it repeats dim {d} of {x} as often as a rank has positions")
        if isinstance(state, Shard) and x.split_at(d):
            state = Shard(d + extra, state.part, state.outer * a, state.inner)
    return state


@rule("view")
def _view(s: OpContext) -> State:
    x, out = s.x(), s.out
    if (x.a == out.a and x.b == out.b) or isinstance(x.state, Number):
        return x.state
    moving = [d for d in range(len(out.a)) if out.a[d] != out.b[d]]
    if not x.moving and not moving:
        return x.state
    old = _as_split(s, x)
    before, after = math.prod(x.a[: old.dim]) * old.outer, math.prod(x.a[old.dim + 1 :]) * old.inner
    if len(moving) != 1 or len(x.moving) != 1 or not before * after:
        raise Refusal(
            f"it makes shape {out.a} of {x}, which cuts positions apart or joins them to others. "
            f"{MIXES}"
        )
    d = moving[0]
    (outer, cut), (inner, cut_too) = (
        divmod(before, math.prod(out.a[:d])),
        divmod(after, math.prod(out.a[d + 1 :])),
    )
    if cut or cut_too:
        raise Refusal(f"it makes shape {out.a} of {x}, which cuts positions apart. {MIXES}")
    return Shard(d, old.part, outer, inner)


def _as_split(s: OpContext, x: Operand) -> Shard:
    """The state of a split operand, or of one that is constant along a dim that moves."""
    if isinstance(x.state, Shard):
        return x.state
    d = x.moving[0]
    found = s.world.along(d, (x.a[d], x.b[d])) if len(x.moving) == 1 else None
    if found is None or not isinstance(x.state, Replicate):
        raise Refusal(
            f"it makes shape {s.out.a} of {x}; that is made from the length of a rank's slice"
        )
    return found


# ---- some entries


@rule("select")
def _select(s: OpContext) -> State:
    x, d = s.x(), s.dim()
    if x.split_at(d):
        raise Refusal(
            PICKS.format(what=_text(s.args["index"]), dim=d, shape=x.a, a=x.a[d], b=x.b[d])
        )
    if not x.free_at(d):
        s.value("index")
    return _moved(x, _at(x) - (_at(x) > d))


@rule("slice")
def _slice(s: OpContext) -> State:
    x, d = s.x(), s.dim()
    a, b = (_range(s, x, d, which) for which in "ab")
    if a == range(x.a[d]) and b == range(x.b[d]):
        return x.state
    if x.split_at(d):
        raise Refusal(PICKS.format(what=_written(a), dim=d, shape=x.a, a=x.a[d], b=x.b[d]))
    if a != b and not x.free_at(d) and not isinstance(x.state, Number):
        raise Refusal(SLICED.format(what=_written(a), shape=x.a))
    return x.state


def _range(s: OpContext, x: Operand, dim: int, which: str) -> range:
    """The entries that a slice takes, in one of the runs."""
    start, end, step = (getattr(s.args[k], which, s.args[k]) for k in ("start", "end", "step"))
    return range(getattr(x, which)[dim])[start:end:step]


def _written(r: range) -> str:
    return f"{r.start}:{r.stop}" + (f":{r.step}" if r.step != 1 else "")


def _text(x: Any) -> str:
    return f"{x.a}" if hasattr(x, "a") else f"{x}"


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(s: OpContext) -> State:
    x, d = s.x(), s.dim()
    if len(s.outs) == 1 and s.out.a == x.a and s.out.b == x.b:
        return x.state
    refuse_mixing(x, [d], "cuts pieces")
    s.all_values()
    return x.state


@rule("unbind")
def _unbind(s: OpContext) -> State:
    x, d = s.x(), s.dim()
    refuse_mixing(x, [d], "takes one entry after another")
    return _moved(x, _at(x) - (_at(x) > d))


@rule("diagonal")
def _diagonal(s: OpContext) -> State:
    x, dims = s.x(), (s.dim("dim1"), s.dim("dim2"))
    refuse_mixing(x, dims, "takes the diagonal")
    s.all_values()
    return _moved(x, _at(x) - sum(d < _at(x) for d in dims))


@rule("unfold")
def _unfold(s: OpContext) -> State:
    refuse_mixing(s.x(), [s.dim("dimension")], "takes windows")
    s.all_values()
    return s.x().state


# ---- joins


@rule("cat")
def _cat(s: OpContext) -> State:
    xs: Sequence[Operand] = s.args["tensors"]
    d = s.value("dim") % len(s.out.a)
    xs = [
        x for x in xs if x.a != (0,) or x.ndim == len(s.out.a)
    ]  # torch leaves empty 1-d tensors out
    joined = [x for x in xs if x.moves(d)]
    if not joined:
        return _beside(s, xs)
    states = [_joined_dim(s, x, d) for x in xs]
    first = states[0]
    if any(t.part != first.part or t.inner != first.inner for t in states):
        raise Refusal(f"it joins {' and '.join(map(str, xs))} along dim {d}")
    return Shard(d, first.part, sum(t.outer for t in states), first.inner)


def _joined_dim(s: OpContext, x: Operand, d: int) -> Shard:
    """How positions lie in an operand along a dim that is joined."""
    if not x.moves(d):
        raise Refusal(
            f"it puts {x} before or behind a rank's slice of positions, along dim {d}: every rank "
            "would have it, and one device has it once. Add such tokens outside of the loss "
            "function, before the sequence is split"
        )
    found = s.world.along(d, (x.a[d], x.b[d]))
    if isinstance(x.state, Shard) and x.state.dim == d:
        return x.state
    if found is None or not (isinstance(x.state, Number) and x.state.constant):
        refuse_mixing(x, [d], "joins")
    assert found is not None
    return found


def _beside(s: OpContext, xs: Sequence[Operand]) -> State:
    """The state of operands that are joined along a dim in which none of them has positions."""
    if any(isinstance(x.state, Shard) for x in xs):
        return elementwise(s, xs, len(s.out.a))
    if all(plain(x.state) for x in xs):
        return Replicate()
    states = {as_partial(s.world, x.state) for x in xs if x.state != ZERO}
    one = next(iter(states))
    if len(states) == 1 and isinstance(one, Partial | Average):
        return one
    raise Refusal(f"it joins {' and '.join(map(str, xs))}")


@rule("stack")
def _stack(s: OpContext) -> State:
    xs = s.args["tensors"]
    d = s.value("dim") % len(s.out.a)
    if any(isinstance(x.state, Shard) for x in xs):
        state = elementwise(s, xs, xs[0].ndim)
        assert isinstance(state, Shard)
        return state.at(state.dim + (state.dim >= d))
    return _beside(s, xs)


@rule("constant_pad_nd")
def _pad(s: OpContext) -> State:
    x, pad = s.x(), s.value("pad")
    changed = [x.ndim - 1 - i // 2 for i in range(len(pad)) if pad[i]]
    refuse_mixing(x, changed, "puts padding")
    s.value("value")
    if isinstance(x.state, Partial | Average) and s.value("value") == 0:
        return x.state
    return kept(x)


# ---- entries by their numbers


@rule("embedding")
def _embedding(s: OpContext) -> State:
    table, indices = s.x("weight"), s.x("indices")
    refuse_mixing(table, table.moving, "looks up rows")
    if all_plain([table]) and isinstance(indices.state, Replicate | Number | Shard):
        return kept(indices)
    return same_everywhere(s)


@rule("index_select")
def _index_select(s: OpContext) -> State:
    x, d, index = s.x(), s.dim(), s.x("index")
    refuse_mixing(x, [d], "takes entries by number")
    if isinstance(x.state, Shard) and all_plain([index]):
        return x.state
    if isinstance(index.state, Shard) and all_plain([x]) and index.ndim == 1:
        return index.state.at(d)
    return same_everywhere(s)


@rule("gather")
def _gather(s: OpContext) -> State:
    x, d, index = s.x(), s.dim(), s.x("index")
    refuse_mixing(x, [d], "takes entries by number")
    if isinstance(x.state, Shard) and plain(index.state):
        if index.moving != [x.state.dim]:
            raise Refusal(f"it takes entries of {x} at {index}")
        return elementwise(s, [x, index], x.ndim)
    if not isinstance(index.state, Shard):
        return same_everywhere(s)
    if index.state.dim == d:  # every entry picks from a table that is the same everywhere
        return index.state if all_plain([x]) else same_everywhere(s)
    return elementwise(s, [x, index], x.ndim)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(s: OpContext) -> State:
    x, d, index = s.x(), s.dim(), s.x("index")
    others = [t for t in s.operands if t is not x and t.ndim]
    if not any(isinstance(t.state, Shard) for t in (x, *others)):
        return same_everywhere(s)
    s.all_values()
    for t in (x, *others):
        refuse_mixing(t, [d], "writes entries by number")
    for e in range(x.ndim):
        if e != d and any((t.a[e], t.b[e]) != (index.a[e], index.b[e]) for t in (x, *others)):
            raise Refusal(f"it writes to some entries of {x} along dim {e}")
    return elementwise(s, s.operands, x.ndim)


@rule("index")
def _index(s: OpContext) -> State:
    x, indices = s.x(), s.args["indices"]
    given = [d for d, i in enumerate(indices) if i is not None]
    for d in given:
        if x.split_at(d):
            raise Refusal(PICKS.format(what="by number", dim=d, shape=x.a, a=x.a[d], b=x.b[d]))
        refuse_mixing(x, [d], "takes entries by number")
    where = [indices[d] for d in given]
    wide = max((i.ndim for i in where), default=0)
    together = given == list(range(given[0], given[0] + len(given)))
    front = given[0] if together else 0
    if any(isinstance(i.state, Shard) for i in where):
        if not all_plain([x]):
            raise Refusal(f"it takes entries of {x} at {where[0]}")
        state = elementwise(s, where, wide)
        assert isinstance(state, Shard)
        return state.at(state.dim + front)
    if isinstance(x.state, Shard) and all_plain(where):
        before = sum(d not in given for d in range(x.state.dim))
        return x.state.at(before + (wide if x.state.dim > front or not together else 0))
    return same_everywhere(s)


def _put_beside(
    s: OpContext, x: Operand, state: Shard, indices: Sequence[Operand | None], values: Operand
) -> State:
    """Entries written along other dims than the split one."""
    where = [i for i in indices if i is not None]
    if not all_plain(where):
        raise Refusal(f"it writes to entries of {x} at {where[0]}")
    s.value("accumulate")
    taken = _index(replace(s, args=s.args | {"indices": indices}))
    assert isinstance(taken, Shard)
    given = sum(i is not None for i in indices)
    at = taken.dim - (
        x.ndim - given + max(i.ndim for i in where) - values.ndim
    )  # values are aligned at the last dims
    lies = at >= 0 and values.state == state.at(at) and values.moving == [at]
    if not lies and not all_plain([values]):
        raise Refusal(f"it writes {values} to entries of {x}")
    return state


@rule("index_put")
def _index_put(s: OpContext) -> States:
    """One number where a mask says so; or anything where nothing depends on positions."""
    x, indices, values = s.x(), s.args["indices"], s.x("values")
    mask = indices[0] if len(indices) == 1 else None
    numbers = all(i is None or i.dtype != torch.bool for i in indices)
    if (
        isinstance(x.state, Shard)
        and numbers
        and (x.state.dim >= len(indices) or indices[x.state.dim] is None)
    ):
        return _put_beside(s, x, x.state, indices, values)
    if (
        mask is None
        or str(mask.dtype) != "torch.bool"
        or not any(isinstance(t.state, Shard) for t in (x, mask))
    ):
        return same_everywhere(s)
    n = mask.ndim
    if (
        s.value("accumulate")
        or values.ndim
        or not all_plain([values])
        or (mask.a, mask.b) != (x.a[:n], x.b[:n])
    ):
        raise Refusal(f"it writes {values} where a mask says so; that is known of a single number")
    ones = (1,) * (x.ndim - n)
    return elementwise(
        s, [x, Operand(mask.a + ones, mask.b + ones, mask.dtype, mask.state)], x.ndim
    )
