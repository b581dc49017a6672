"""Edges: the last rows of a part, which ranks hand on, and what is another number on the last rank
alone.

A loss function that looks at the row before each row gets that of the rank before by `fp.ppermute`.

========== ==================================================================================
state      claim
========== ==================================================================================
`Last`     the last rows of a part; one device has the last rows of all
`Rest`     the rows of a part without the last ones; one device lacks the last rows of all
`Before`   the last rows of the part before; the first part has what one device has
`Flag`     one number on the last rank, and on one device; another number on every other rank
`Shuffled` all rows, on a part in another order than on one device
========== ==================================================================================

In: a site. Out: states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.proof import rules_view as shapes
from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import OpContext, Operand
from funcpipe._src.proof.placements import Local, Number, Replicate, Shard, State, plain
from funcpipe._src.proof.row_numbers import ANY, Start, place_rule
from funcpipe._src.proof.rules_pointwise import RULES, States, rule
from funcpipe._src.proof.rules_pointwise import apply as apply_rule


@dataclass(frozen=True)
class Last(Local):
    """The last ``count`` entries of a part along the dim of its rows."""

    rows: Shard
    count: int

    def __str__(self) -> str:
        return "the last rows of a part"


@dataclass(frozen=True)
class Rest(Local):
    """What `Last` leaves."""

    rows: Shard
    count: int

    def __str__(self) -> str:
        return "the rows of a part without the last ones"


@dataclass(frozen=True)
class Before(Local):
    """The `Last` of the part before."""

    rows: Shard
    count: int

    def __str__(self) -> str:
        return "the last rows of the part before"


@dataclass(frozen=True)
class Flag(Local):
    """``yes`` on the last rank of ``axes`` and on one device, ``no`` on the others, in every
    entry."""

    axes: Axes
    yes: float
    no: float

    def __str__(self) -> str:
        return "a number that says which rank is the last"


assert shapes  # registers the rule that is refined here


@dataclass(frozen=True)
class Shuffled(Local):
    """All rows, along ``dim``, rank by rank in another order than the mesh has."""

    dim: int

    def __str__(self) -> str:
        return "the rows of all ranks in another order"


_slice_elsewhere = RULES["slice"]


@rule("slice")
def _slice(s: OpContext) -> States:
    return _end(s) or _slice_elsewhere(s)


def _end(s: OpContext) -> State | None:
    """The last rows of a part, or the rows before them."""
    x, dim = s.x(), s.dim()
    rows = x.split_at(dim)
    if not s.world.rows or rows is None or rows.outer != 1 or rows.part.axes != s.world.live:
        return None
    part, one = _taken(s, x.a[dim], "a"), _taken(s, x.b[dim], "b")
    count = len(part)
    if part == range(x.a[dim] - count, x.a[dim]) and one == range(x.b[dim] - count, x.b[dim]):
        return Last(rows, count)
    count = x.a[dim] - count
    if part == range(x.a[dim] - count) and one == range(x.b[dim] - count):
        return Rest(rows, count)
    return None


def _taken(s: OpContext, size: int, which: str) -> range:
    """The entries that a slice takes, in one of the runs."""
    given = [s.args[name] for name in ("start", "end", "step")]
    start, end, step = (getattr(x, which) if isinstance(x, Differs) else x for x in given)
    return range(size)[start:end:step]


def handed_on(state: State, perm: Any, ranks: int) -> Before | None:
    """What `fp.ppermute` makes of the last rows of every part, if each goes to the next rank.

    Args:
        perm: of a part, and of one device if that differs: there the first part gets zeros, or, in
            a ring, the last rows.
    """
    part, one = (getattr(perm, which, perm) for which in ("a", "b"))
    line = [(rank, rank + 1) for rank in range(ranks - 1)]
    to_next = sorted(part) == line and not one
    in_ring = sorted(part) == [*line, (ranks - 1, 0)] and list(one) == [(0, 0)]
    if isinstance(state, Last) and (to_next or in_ring):
        return Before(state.rows, state.count)
    return None


@place_rule("cat")
def _joined(s: OpContext) -> State | None:
    """All rows, each in the place of the next ones; or one number in every row but the last."""
    xs = s.args["tensors"]
    if len(xs) != 2:
        return None
    first, last = (x.state for x in xs)
    dim = s.value("dim") % len(s.out.a)
    if isinstance(first, Before) and isinstance(last, Rest):
        fits = first.rows == last.rows and first.count == last.count and first.rows.dim == dim
        return first.rows if fits else None
    found = s.world.along(dim, (s.out.a[dim], s.out.b[dim]))
    if isinstance(first, Number) and isinstance(last, Flag) and found is not None:
        alike = first.constant and first.a == last.no and not xs[1].moving
        return found if alike and found.part.axes == last.axes else None
    return None


@place_rule("eq")
def _is_last(s: OpContext) -> State | None:
    """Whether a rank is the last one."""
    place, other = s.args["self"], s.args["other"]
    if (
        not isinstance(place, Operand)
        or not isinstance(place.state, Start)
        or not isinstance(other, Differs)
    ):
        return None
    axes = place.state.axes
    ranks = [n for part, (_, n) in s.world.lengths.items() if part.axes == axes == s.world.live]
    if place.state.rows == 1 and ranks and (other.a, other.b) == (ranks[0] - 1, 0):
        return Flag(axes, 1, 0)
    return None


@place_rule(ANY)
def _of_flags(s: OpContext) -> State | None:
    """Any op on flags and constants: a flag again."""
    flags = [x.state for x in s.operands if isinstance(x.state, Flag)]
    if not flags:
        return None
    numbers = [x.state for x in s.operands if x.state != flags[0]]
    if not all(isinstance(state, Number) and state.constant for state in numbers):
        return None
    out = apply_rule(replace(s, args={name: _as_number(x) for name, x in s.args.items()}))
    return Flag(flags[0].axes, yes=out.b, no=out.a) if isinstance(out, Number) else None


def _as_number(x: Any) -> Any:
    if isinstance(x, Operand) and isinstance(x.state, Flag):
        return replace(x, state=Number(x.state.no, x.state.yes))
    return x


@place_rule(ANY)
def _of_shuffled(s: OpContext) -> State | None:
    """Row by row the same, and sums over all rows."""
    shuffled = [x for x in s.operands if isinstance(x.state, Shuffled)]
    if len(shuffled) != 1 or not isinstance(s.call.func, torch._ops.OpOverload):
        return None
    (x,) = shuffled
    assert isinstance(x.state, Shuffled)
    alike = all(plain(other.state) and not other.ndim for other in s.operands if other is not x)
    if torch.Tag.pointwise in s.call.func.tags and alike:
        s.all_values()
        return x.state
    sums = s.call.name in ("sum", "mean", "amax", "amin")
    return Replicate() if sums and x.state.dim in s.dims() else None
