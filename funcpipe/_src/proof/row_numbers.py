"""Places: numbers of a part's own rows, and what else is right on a part without being what one
device has.

``torch.arange(len(x))`` counts the rows of a part from 0, where one device goes on; as an index
into the rows of the part it is right all the same. So is the order in which a part sorts its rows,
as long as they are put back: experts get their tokens sorted.

============ ===============================================================================================
state        claim
============ ===============================================================================================
`Places`     every entry is the number of an entry of a part; one device has the number that it has there
`Keys`       `Shard`, and sorted: the keys of an order
`Counts`     `Partial`, and how many rows have every key of an order; `Ends`: their running sum
`Largest`    the maximum over parts is what one device has
`Norm`       the sum of its powers over parts is the power of what one device has
`Item`       one row of a loop over them (`loops.py`); the same is computed of every one
`Start`      what comes of ``axis_index`` alone; with ``rows``: times so many, the number of a rank's first row
============ ===============================================================================================

A *layout* is a `Shard` along dim 0: the rows as they come, or (its part is an `Order`) as some keys
sort them. Positions of a sequence have none of these states.

In: a site of which an operand has such a state. Out: states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.proof import loops
from funcpipe._src.proof.align import Differs, Pair
from funcpipe._src.proof.op_context import OpContext, Operand, all_plain, elementwise, refuse_mixing
from funcpipe._src.proof.op_recorder import BUFFER, STATISTIC
from funcpipe._src.proof.placements import (
    Local,
    Number,
    Partial,
    Refusal,
    Refused,
    Replicate,
    Shard,
    State,
    plain,
)
from funcpipe._src.proof.rules_pointwise import RULES, States, pointwise, rule, same_everywhere


@dataclass(frozen=True)
class Order:
    """The rows of a part in the order of some keys.

    Args:
        base: the part.
        size: the number of entries.
        made: the number of the tensor that sorts.
        keys: the number of the tensor by which it sorts, smallest first; None: largest first.
    """

    base: Any
    size: int
    made: int
    keys: int | None

    @property
    def axes(self) -> Axes:
        """Over which the part is split."""
        return self.base.axes


@dataclass(frozen=True)
class Places(Local):
    """Numbers of entries.

    Args:
        at: how the numbers themselves lie.
        of: the layout whose entries they number.
        once: whether every entry of that is named exactly once.
        own: whether every entry names itself, in whichever layout it is.
        first_of: they name, in order, the first of every so many entries; 0: not known.
    """

    at: Shard
    of: Shard
    once: bool = False
    own: bool = False
    first_of: int = 0

    def __str__(self) -> str:
        return "the numbers of a part's own rows"


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


@dataclass(frozen=True)
class Largest(Local):
    """A maximum (or minimum) over the rows of a part."""

    axes: Axes
    how: str

    def __str__(self) -> str:
        return f"the {self.how}imum over the rows of a part"


@dataclass(frozen=True)
class Start(Local):
    """What comes of a rank's place alone.

    Args:
        rows: by how much the place is multiplied; NaN: it is some other number.
    """

    axes: Axes
    rows: float = 1

    def __str__(self) -> str:
        return "the place of a rank"


@dataclass(frozen=True)
class Item(Local):
    """Any row, in a loop over rows: the same function of every one.

    Args:
        inner: how many entries a row has, each of them a turn.
    """

    part: Any
    inner: int = 1

    def __str__(self) -> str:
        return "one row"


@dataclass(frozen=True)
class Norm(Local):
    """A norm over the rows of a part: its power adds up."""

    axes: Axes
    power: float

    def __str__(self) -> str:
        return "a norm over the rows of a part"


ANY = "any op"
_RULES: dict[str, list[Callable[[OpContext], States | None]]] = {}


def place_rule(*names: str) -> Callable:
    """Register a rule of some ops on such states; it gives None where another one may know more."""

    def register(fn: Callable[[OpContext], States | None]) -> Callable[[OpContext], States | None]:
        for name in names:
            _RULES.setdefault(name, []).append(fn)
        return fn

    return register


def apply(s: OpContext) -> States:
    """The states of the results of an op, one of whose operands is right on its part alone."""
    for known in (*_RULES.get(s.call.name, ()), *_RULES.get(ANY, ())):
        out = known(s)
        if out is not None:
            return out
    starts = [x.state for x in s.operands if isinstance(x.state, Start)]
    if (
        starts
        and all(isinstance(x.state, Start) or all_plain([x]) for x in s.operands)
        and s.call.func is not None
    ):
        s.all_values()
        return Start(starts[0].axes, math.nan)
    odd = next(x for x in s.operands if isinstance(x.state, Local))
    if isinstance(odd.state, Item):
        return _of_one_row(s, odd.state)
    if isinstance(odd.state, Places):
        raise Refusal(
            f"it computes with {odd}: every part counts its rows from 0, where one device goes on. "
            "Pass the numbers of rows through batch"
        )
    raise Refusal(f"it computes with {odd}, which one device does not have")


def _alone(state: Shard) -> Shard:
    """A layout: its rows along dim 0."""
    return Shard(0, state.part, state.outer, state.inner)


@rule(STATISTIC, BUFFER)
def _statistic(s: OpContext) -> States:
    """What a declared batch statistic gives: an entry for every row, or what all rows of the part
    see."""
    return [_declared(s, o) for o in s.outs]


place_rule(STATISTIC)(_statistic)


def _declared(s: OpContext, out: Pair) -> State:
    moving = [d for d in range(len(out.a)) if out.a[d] != out.b[d]]
    found = s.world.factor((out.a[moving[0]], out.b[moving[0]])) if len(moving) == 1 else None
    if moving and found is None:
        return Refused(
            f"{s.call.where}: it gives a tensor of shape {out.a} in a part, and {out.b} on one "
            "device: it may have an entry for every row, along one dim, or be the same for all"
        )
    return Shard(moving[0], found[0], 1, found[1]) if found else Replicate()


# ---- numbers of rows


def numbers(s: OpContext) -> State | None:
    """The state of ``arange``, if it counts the rows of a part."""
    start, step, end = (s.args.get(k) for k in ("start", "step", "end"))
    if not s.world.rows or not isinstance(end, Differs) or start not in (None, 0):
        return None
    found = s.world.factor((s.out.a[0], s.out.b[0]))
    if found is None:
        return None
    layout = Shard(0, found[0], 1, found[1])
    if step in (None, 1):
        return own_numbers(layout)
    if (
        not isinstance(step, int)
        or step < 1
        or (end.a, end.b) != (s.out.a[0] * step, s.out.b[0] * step)
    ):
        return None
    return Places(layout, replace(layout, inner=found[1] * step), once=True, first_of=step)


def own_numbers(layout: Shard) -> State:
    """Every entry of a layout numbers itself."""
    return Places(layout, layout, once=True, own=True)


@rule("arange")
def _arange(s: OpContext) -> State:
    return numbers(s) or same_everywhere(s)


@place_rule("clone", "detach", "_to_copy")
def _kept(s: OpContext) -> State | None:
    x = s.x()
    if isinstance(x.state, Places) and s.out.dtype.is_floating_point | (
        str(s.out.dtype) == "torch.bool"
    ):
        return None
    return x.state


@place_rule(
    "view",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "transpose",
    "t",
    "slice",
    "select",
    "repeat",
)
def _rearranged(s: OpContext) -> State | None:
    x = s.x()
    if not isinstance(x.state, Places):
        return x.state if isinstance(x.state, Largest) else None
    moved = RULES[s.call.name](replace(s, args=s.args | {"self": replace(x, state=x.state.at)}))
    assert isinstance(moved, Shard)
    return replace(x.state, at=moved, once=x.state.once and _all_kept(s), own=False, first_of=0)


def _all_kept(s: OpContext) -> bool:
    return s.call.name in ("view", "unsqueeze", "squeeze", "permute", "transpose", "t")


@place_rule("floor_divide", "div", "remainder", "fmod")
def _divided(s: OpContext) -> State | None:
    """Several entries of a row, as the numbers of fewer entries, or which of them it is."""
    x, by = s.args["self"], s.term("other")
    floors = s.call.name != "div" or s.args.get("rounding_mode") in ("floor", "trunc")
    if (
        not isinstance(x, Operand)
        or not isinstance(x.state, Places)
        or not isinstance(by, Number)
        or not floors
    ):
        return None
    if not by.constant or by.a <= 0 or x.state.of.inner % by.a:
        return None
    if s.call.name in ("remainder", "fmod"):
        return x.state.at
    fewer = replace(x.state.of, inner=x.state.of.inner // int(by.a))
    return replace(x.state, of=fewer, once=x.state.once and by.a == 1, own=False, first_of=0)


@place_rule("add")
def _first_row(s: OpContext) -> State | None:
    """The number of a rank's first row, and its own numbers from there on."""
    terms = [s.term(k) for k in ("self", "other")]
    first = next((t for t in terms if isinstance(t, Start)), None)
    own = next((t for t in terms if isinstance(t, Places)), None)
    if (
        first is None
        or own is None
        or s.args.get("alpha", 1) != 1
        or isinstance(own.of.part, Order)
    ):
        return None
    rows = s.world.lengths[own.of.part][0] * own.of.inner
    if first.rows != rows or first.axes != own.of.part.axes or first.axes != s.world.live:
        return None
    return own.at.at(
        own.at.dim + len(s.out.a) - max(x.ndim for x in s.operands if isinstance(x.state, Places))
    )


@place_rule("mul")
def _times_rows(s: OpContext) -> State | None:
    terms = [s.term(k) for k in ("self", "other")]
    for first, by in (terms, terms[::-1]):
        if isinstance(first, Start) and first.rows == 1 and isinstance(by, Number):
            return Start(first.axes, by.a)
    return None


# ---- loops over rows, norms


@rule(loops.ONE)
def _one_row(s: OpContext) -> State:
    x = s.x()
    if (
        x.moving != [s.dim()]
        or not isinstance(x.state, Shard)
        or x.state.dim != s.dim()
        or x.state.outer != 1
    ):
        raise Refusal(f"it takes {x} apart")
    return Item(x.state.part, x.state.inner)


def _of_one_row(s: OpContext, state: Item) -> State:
    """Any op on one row and on what is the same for all."""
    s.all_values()
    if s.call.name == loops.SUM:
        return Partial(s.world.axes(state.part))
    if s.call.name in (loops.STACK, loops.CAT):
        entries = s.x().a[s.dim()] if s.call.name == loops.CAT else 1
        return Shard(s.value("dim") % len(s.out.a), state.part, 1, state.inner * entries)
    for x in s.operands:
        if x.state != state and not all_plain([x]):
            raise Refusal(f"it puts one row beside {x}")
    if any(o.a != o.b for o in s.outs) or torch.Tag.nondeterministic_seeded in getattr(
        s.call.func, "tags", ()
    ):
        raise Refusal("nothing is known of it")
    return state


def norm(s: OpContext, x: Operand) -> State | None:
    """The state of a norm over rows."""
    assert isinstance(x.state, Shard)
    power = s.args.get("ord", s.args.get("p", 2))
    known = (
        s.world.rows
        and s.call.name == "linalg_vector_norm"
        and isinstance(power, int | float)
        and 0 < power < math.inf
    )
    return Norm(s.world.axes(x.state.part), power) if known else None


@place_rule("pow")
def _power(s: OpContext) -> State | None:
    x = s.args["self"]
    power = s.args["exponent"]
    same = isinstance(x, Operand) and isinstance(x.state, Norm) and x.state.power == power
    return Partial(x.state.axes) if same else None


# ---- orders


def ordered(s: OpContext, x: Operand) -> States:
    """The states of what sorts the rows of a part: the sorted keys, and where they were."""
    state = x.state
    assert isinstance(state, Shard)
    down = s.args.get("descending")
    base = state.part.base if isinstance(state.part, Order) else state.part
    order = Order(base, x.b[0], s.outs[-1].number, None if down else x.source)
    s.world.lengths[order] = (x.a[0], x.b[0])
    at = Shard(0, order)
    return [Keys(0, order), Places(at, _alone(state), once=True)]


@place_rule("sort")
def _sort(s: OpContext) -> States | None:
    """Sorting where rows were gives where they went."""
    x = s.x()
    state = x.state
    if not isinstance(state, Places) or not state.once or x.ndim != 1 or s.args.get("descending"):
        return None
    return [Refused("it sorts numbers of rows"), Places(state.of, _alone(state.at), once=True)]


def _fitted(places: Places, layout: Shard) -> Places | None:
    """Places as numbers of the entries of a layout; None if they number others."""
    if places.of == layout:
        return places
    return (
        Places(layout, layout, True, True)
        if places.own and isinstance(layout.part, Order)
        else None
    )


def _own_dim(x: Operand, dim: int) -> Shard | None:
    """The layout of an operand along a dim."""
    at = x.state.at if isinstance(x.state, Places) else x.state
    return _alone(at) if isinstance(at, Shard) and at.dim == dim and at.outer == 1 else None


@place_rule("index", "index_select")
def _taken(s: OpContext) -> State | None:
    """Entries of rows, by the numbers of rows."""
    x = s.x()
    if s.call.name == "index_select":
        indices: list[Any] = [None] * s.dim() + [s.x("index")]
    else:
        indices = s.args["indices"]
    given = [d for d, i in enumerate(indices) if i is not None]
    named = [d for d in given if isinstance(indices[d].state, Places)]
    if len(named) != 1 or given != list(range(given[0], given[0] + len(given))):
        return None
    d = named[0]
    layout, places = _own_dim(x, d), indices[d].state
    if plain(x.state) and x.moving == [d] and all_plain(indices[e] for e in given if e != d):
        return x.state  # it is constant along the rows
    places = None if layout is None else _fitted(places, layout)
    if places is None or x.moving != [d]:
        return None
    wide = max(indices[e].ndim for e in given)
    operands = [replace(indices[e], state=places.at) if e == d else indices[e] for e in given]
    if any(i.moving != [i.state.dim] for i in operands if isinstance(i.state, Shard)):
        return None
    for e in given:
        refuse_mixing(x, [e] if e != d else [], "takes entries by number")
    state = elementwise(s, operands, wide)
    assert isinstance(state, Shard)
    at = state.at(state.dim + given[0])
    return (
        replace(x.state, at=at, once=False, own=False, first_of=0)
        if isinstance(x.state, Places)
        else at
    )


@place_rule("index_put", "index_add", "index_copy", "scatter", "scatter_add")
def _put(s: OpContext) -> State | None:
    """Entries written, or added, to the rows that they belong to."""
    x, name = s.x(), s.call.name
    values: Any
    if name == "index_put":
        if len(s.args["indices"]) != 1:
            return None
        d, index, values, adds = 0, s.args["indices"][0], s.x("values"), s.value("accumulate")
    else:
        d, index, adds = s.dim(), s.args["index"], name in ("index_add", "scatter_add")
        values = s.args.get("source", s.args.get("src"))
    if not isinstance(index.state, Places) or not isinstance(values, Operand) or x.moving != [d]:
        return None
    if name.startswith("scatter") and (x.ndim, index.ndim, values.ndim) != (1, 1, 1):
        return None
    layout = _own_dim(x, d)
    to = index.state.of if layout is None else layout
    places, lengths = index.state, s.world.lengths[to.part]
    if (
        index.ndim != 1
        or places.of != to
        or (x.a[d], x.b[d]) != tuple(n * to.inner for n in lengths)
    ):
        return None
    if adds:
        if not isinstance(x.state, Shard) and not plain(x.state):
            return None
    elif not places.once:
        return None
    return _written(values, places, d)


def _written(values: Operand, places: Places, d: int) -> State | None:
    """What lies as places say, in the layout that they number."""
    if isinstance(values.state, Places):
        of = _fitted(values.state, _alone(places.at))
        return (
            None
            if of is None or of.at != _alone(places.at)
            else Places(places.of, of.of, once=of.once)
        )
    if values.state != places.at.at(d) or values.moving != [d]:
        return None
    return places.of.at(d)


# ---- experts: rows sorted by them


@rule("eq")
def _one_hot(s: OpContext) -> State:
    """Keys beside the numbers 0, 1, ...: which of them each is."""
    state = pointwise(s)
    keys, table = s.args["self"], s.call.args["other"]
    if (
        not s.world.rows
        or type(state) is not Shard
        or not isinstance(table, Pair)
        or len(table.a) != 1
    ):
        return state
    numbers = s.value_of(table)
    if (
        keys.a[1:] != (1,)
        or state.dim
        or numbers is None
        or not torch.equal(numbers, torch.arange(len(numbers)))
    ):
        return state
    return OneHot(0, state.part, state.outer, state.inner, keys.source)


def counts(s: OpContext, x: Operand, dims: Sequence[int]) -> State:
    """The state of a sum over rows."""
    assert isinstance(x.state, Shard)
    axes = s.world.axes(x.state.part)
    return (
        Counts(axes, x.state.keys)
        if isinstance(x.state, OneHot) and tuple(dims) == (0,)
        else Partial(axes)
    )


@rule("histc")
def _histc(s: OpContext) -> State:
    x = s.x()
    s.all_values()
    if not isinstance(x.state, Shard) or s.value("min") == s.value("max"):
        return same_everywhere(s)
    axes = s.world.axes(x.state.part)
    return Counts(axes, x.state.part.keys if isinstance(x.state, Keys) else x.source)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped(s: OpContext) -> State:
    """Rows that are sorted by experts, each times the matrix of its own."""
    x, weight, offs = (
        s.x(n)
        for n in (("self", "mat2", "offs") if "mat2" in s.args else ("input", "weight", "offs"))
    )
    if not isinstance(x.state, Shard):
        return same_everywhere(s)
    ends = offs.state
    if (
        x.ndim != 2
        or x.state.dim
        or not isinstance(ends, Ends)
        or not isinstance(x.state.part, Order)
        or ends.keys is None
        or ends.keys != x.state.part.keys
        or not all_plain([weight])
    ):
        raise Refusal(
            f"it multiplies groups of {x} that end at {offs}: sort tokens by the number of their "
            "expert (sorted, perm = experts.sort()), and take the ends from torch.histc(sorted, "
            "...).cumsum(0)"
        )
    return x.state


# ---- maxima


@place_rule("amax", "amin", "max", "min")
def _larger(s: OpContext) -> State | None:
    x = s.x()
    same = (
        isinstance(x.state, Largest) and x.state.how == s.call.name[-3:] and "other" not in s.args
    )
    return x.state if same else None


def largest(s: OpContext, x: Operand) -> State | None:
    """The state of a maximum over rows."""
    assert isinstance(x.state, Shard)
    if not s.world.rows or s.call.name not in ("amax", "amin", "max", "min") or len(s.outs) != 1:
        return None
    return Largest(s.world.axes(x.state.part), s.call.name[-3:])
