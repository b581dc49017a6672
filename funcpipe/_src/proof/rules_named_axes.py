"""Rules of collectives over the axes that split rows, which a loss function calls by name.

One device has one rank on every axis, and all rows. So a sum over ranks, of sums over their rows,
is there the sum over all rows; but what does not come from params or batch is every rank's own, and
as many of it are added up as there are ranks.

In: a site. Out: states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from funcpipe._src.proof.align import Differs, Pair
from funcpipe._src.proof.op_context import OpContext, Operand
from funcpipe._src.proof.op_recorder import NAMED
from funcpipe._src.proof.placements import (
    Average,
    Local,
    Number,
    Partial,
    Refusal,
    Replicate,
    Shard,
    State,
    as_partial,
    plain,
)
from funcpipe._src.proof.row_numbers import Largest, Start
from funcpipe._src.proof.rules_edges import Shuffled, handed_on
from funcpipe._src.proof.rules_pointwise import rule


@rule(NAMED)
def of(s: OpContext) -> State:
    """What a collective makes of an operand."""
    kind, names = s.value("kind"), s.value("axes").split(",")
    own = [a for a in names if a in s.world.live]
    if kind == "axis_index":
        return Start(tuple(own)) if own else Replicate()
    x = s.x("x")
    if not own:
        return _over_others(kind, x)
    if len(own) < len(names):
        raise Refusal(
            f"it names {_text(own)}, which split the rows, and other axes: call it for each of them"
        )
    if s.value("free"):
        return _of_constant(s, kind, x, own)
    return _of_rows(s, kind, x, own)


def _over_others(kind: str, x: Operand) -> State:
    """Over axes that are as they are on one device."""
    if (
        kind in ("psum", "pmean")
        or plain(x.state)
        or (kind == "pmax" and isinstance(x.state, Shard))
    ):
        return x.state
    raise Refusal(f"its operand is {x}, which goes to other ranks")


# ---- of what comes from params and batch


def _of_rows(s: OpContext, kind: str, x: Operand, own: Sequence[str]) -> State:
    state, live = as_partial(s.world, x.state), set(s.world.live)
    if kind == "psum" and isinstance(state, Partial) and set(own) <= set(state.axes):
        left = tuple(a for a in state.axes if a not in own)
        return Partial(left) if left else Replicate()
    if kind == "psum" and plain(state):
        raise Refusal(
            f"its operand is {state}, so the sum over {_text(own)} would hold it once for every "
            "rank"
        )
    if kind == "psum":
        raise Refusal(f"its operand is {x}: take the sum over rows first, and psum that")
    if kind == "pmean":
        return _mean(x, state, own, live)
    if (
        kind == "pmax"
        and isinstance(state, Largest)
        and state.how == "max"
        and set(own) <= set(state.axes)
    ):
        left = tuple(a for a in state.axes if a not in own)
        return Largest(left, "max") if left else Replicate()
    if kind == "pmax" and plain(state) and not x.moving:
        return Replicate()
    if kind == "all_gather":
        return _gathered(s, x, own)
    moved = _moved(s, kind, x, own) if own == list(s.world.live) else None
    if moved is not None:
        return moved
    raise Refusal(
        f"its operand is {x}, and what it makes of the rows of other ranks cannot be proven to be "
        "what one device computes"
    )


def _mean(x: Operand, state: State, own: Sequence[str], live: set[str]) -> State:
    if plain(state) and not x.moving:
        return Replicate()
    if isinstance(state, Average) and set(own) == live == set(state.part.axes):
        return Replicate()
    if isinstance(state, Partial) and set(own) == live == set(state.axes):
        return state  # every rank has its share of the sum
    raise Refusal(
        f"its operand is {x}: one device has the mean over ranks of means over all their rows, and "
        "of nothing else"
    )


def _moved(s: OpContext, kind: str, x: Operand, own: Sequence[str]) -> State | None:
    """Rows for columns and back, columns of sums, and last rows that go to the next rank."""
    state, ranks, options = x.state, s.value("ranks"), s.args["options"]
    if kind == "ppermute":
        perm = (
            Differs(options.a["perm"], options.b["perm"])
            if isinstance(options, Differs)
            else options["perm"]
        )
        return handed_on(state, perm, ranks)
    if isinstance(options, Differs) or not options["tiled"]:
        return None
    if (
        kind == "psum_scatter"
        and isinstance(state, Partial)
        and set(state.axes) == set(own)
        and not x.moving
    ):
        dim = options["dim"] % x.ndim
        part = next((p for p in s.world.lengths if p.axes == tuple(own)), None)
        return None if part is None else Shard(dim, part, 1, x.a[dim] // ranks)
    if kind == "all_to_all" and isinstance(state, Shard):
        cut, joined = options["split_dim"] % x.ndim, options["concat_dim"] % x.ndim
        whole = (state.dim, state.outer, x.moving) == (
            joined,
            1,
            [joined],
        ) and state.part.axes == tuple(own)
        return Shard(cut, state.part, 1, x.a[cut] // ranks) if whole and cut != joined else None
    return None


def _gathered(s: OpContext, x: Operand, own: Sequence[str]) -> State:
    state, options = x.state, s.value("options")
    dim = options["dim"] % x.ndim
    if (
        not isinstance(state, Shard)
        or (state.dim, state.outer) != (dim, 1)
        or x.moving != [dim]
        or not options["tiled"]
    ):
        raise Refusal(f"its operand is {x}: gather a tensor that has rows, along their dim, tiled")
    if (
        set(own) == set(state.part.axes)
        and state.part.axes == s.world.live
        and tuple(own) != s.world.live
    ):
        return Shuffled(dim)
    if tuple(own) != state.part.axes or state.part.axes != s.world.live:
        raise Refusal(
            f"it joins the rows of the ranks of {_text(own)}, but the batch is split over "
            f"{' and '.join(map(_axis, s.world.live))}"
        )
    return Replicate()


# ---- of what every rank has by itself


def _of_constant(s: OpContext, kind: str, x: Operand, own: Sequence[str]) -> State:
    state, ranks = x.state, s.value("ranks")
    if isinstance(state, Local) and not (isinstance(state, Start) and set(state.axes) <= set(own)):
        raise Refusal(f"its operand is {x}")
    if kind in ("pmax", "pmean", "all_gather") and not x.moving:
        return Replicate() if isinstance(state, Start) else state
    if (
        kind == "psum"
        and isinstance(state, Number)
        and not x.moving
        and (state.constant or s.world.counted(state) is not None)
    ):
        return Number(state.a * ranks, state.b * ranks if state.constant else state.b)
    if kind == "psum" and isinstance(state, Start | Replicate) and not x.moving:
        return Replicate()
    pair = s.call.args["x"]
    value = s.value_of(pair) if isinstance(pair, Pair) else None
    if value is not None and _alike(kind, value, ranks, s):
        return Replicate()
    raise Refusal(f"its operand is {x}: ranks get different parts of it, and one device has one")


def _alike(kind: str, value: torch.Tensor, ranks: int, s: OpContext) -> bool:
    """Whether every rank gets the same of what all ranks have."""
    options = s.value("options")
    if kind == "ppermute":
        return len(options["perm"]) == ranks
    dim = options["dim" if kind == "psum_scatter" else "split_dim"]
    pieces = value.chunk(ranks, dim)
    return len(pieces) == ranks and all(torch.equal(p, pieces[0]) for p in pieces)


def _text(axes: Sequence[str]) -> str:
    return ", ".join(map(repr, axes))


def _axis(name: str) -> str:
    return repr(name) if name.isidentifier() else "microbatches"
