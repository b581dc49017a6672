"""Ranks that wait for each other in a circle: found by a walk, explained by the circle and what was
ready.

In: a schedule whose transfers pair up. Out: nothing, or a ScheduleError. A rank waits for one other
rank only, the sender of the message at which it stands; so from any rank that stands still the
waiting leads into a circle, and the circle is the whole counterexample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from funcpipe._src.schedule.actions import COMPUTE, Action, Edge, Schedule
from funcpipe._src.schedule.check_order import Sources, needs
from funcpipe._src.schedule.communication import (
    Unit,
    insert_communication,
    message_of,
    sources,
    unit_of,
)
from funcpipe._src.schedule.rejection_text import excerpt, maker
from funcpipe._src.schedule.simulate_transfers import Walk, walk
from funcpipe.errors import ScheduleError


class Wait(NamedTuple):
    """A rank that stands still: at which position of the written table, for which unit of which
    rank."""

    rank: int
    position: int
    unit: Unit
    source: int


def ends(schedule: Schedule, edges: Iterable[Edge]) -> Schedule:
    """The table with its transfers, proven to end under blocking channels.

    Raises: ScheduleError with the ranks that wait for each other, if some do.
    """
    edges = frozenset(edges)
    full = insert_communication(schedule, edges)
    found = walk(full)
    if all(at == len(actions) for at, actions in zip(found.stands, full.ranks, strict=True)):
        return full
    done = {unit for r, p in found.order if (unit := unit_of(full.ranks[r][p])) is not None}
    sources_of = sources(edges)
    circle = _circle(
        [_wait(schedule, full, rank, found, done, sources_of) for rank in range(len(full.ranks))]
    )
    raise ScheduleError(_explain(schedule, circle, done, sources_of))


def _wait(
    schedule: Schedule, full: Schedule, rank: int, found: Walk, done: set[Unit], sources_of: Sources
) -> Wait | None:
    stands = found.stands[rank]
    if stands == len(full.ranks[rank]):
        return None
    unit = message_of(full.ranks[rank][stands]).unit
    source = full.placement[unit[1]]
    if schedule.communicates:
        return Wait(rank, stands, unit, source)
    # Transfers were put in: speak of the table as written, and of the action that waits. It may
    # need a later message of the channel than the one at which the rank stands; that one is not
    # there either.
    position = sum(action.kind in COMPUTE for action in full.ranks[rank][:stands])
    wanted = needs(schedule.ranks[rank][position], sources_of)
    absent = [u for u in wanted if u not in done and full.placement[u[1]] == source]
    return Wait(rank, position, absent[0], source)


def _circle(waits: list[Wait | None]) -> list[Wait]:
    """The ranks that wait for each other, from the lowest; every one waits for the next."""
    at = next(wait for wait in waits if wait is not None)
    seen: list[Wait] = []
    while at not in seen:
        seen.append(at)
        following = waits[at.source]
        assert following is not None  # a rank that ended has sent everything
        at = following
    circle = seen[seen.index(at) :]
    lowest = circle.index(min(circle))
    return circle[lowest:] + circle[:lowest]


def _explain(schedule: Schedule, circle: list[Wait], done: set[Unit], sources_of: Sources) -> str:
    names = [f"rank {wait.rank}" for wait in circle]
    lines = [f"{schedule.name}: deadlock: {' and '.join(names)} wait for each other"]
    for wait in circle:
        row = schedule.ranks[wait.rank]
        ready = [str(action) for _, action in _ready(row, wait.position, done, sources_of)]
        shown = ", ".join(ready[:3]) + (", …" if len(ready) > 3 else "") if ready else "nothing"
        lines += [
            f"  rank {wait.rank} stands at position {wait.position}, {row[wait.position]}: it "
            f"waits for {maker(schedule, wait.unit)} of rank {wait.source}; ready behind it: "
            f"{shown}",
            f"    rank {wait.rank}: {excerpt(row, [wait.position])}",
        ]
    lines.append(f"  instead: {_advice(schedule, circle, done, sources_of)}")
    return "\n".join(lines)


def _ready(
    row: tuple[Action, ...], position: int, done: set[Unit], sources_of: Sources
) -> Iterator[tuple[int, Action]]:
    """The compute actions behind a position whose inputs have all been computed somewhere."""
    for at in range(position, len(row)):
        if row[at].kind in COMPUTE and all(unit in done for unit in needs(row[at], sources_of)):
            yield at, row[at]


def _advice(schedule: Schedule, circle: list[Wait], done: set[Unit], sources_of: Sources) -> str:
    """Bring forward what another rank of the circle waits for, if it can run, else anything that
    can."""
    for wait, following in zip(circle, circle[1:] + circle[:1], strict=True):
        row, stands = schedule.ranks[following.rank], following.position
        blocked = row[stands]
        for _, action in _ready(row, stands, done, sources_of):
            if unit_of(action) == wait.unit:
                also = " (and its send)" if schedule.communicates else ""
                return f"on rank {following.rank} write {action}{also} before {blocked}"
        sends = [
            a for a in row[stands:] if a.kind.startswith("SEND") and message_of(a).unit == wait.unit
        ]
        if sends and wait.unit in done:
            return f"on rank {following.rank} write {sends[0]} before {blocked}"
    for wait in circle:
        row = schedule.ranks[wait.rank]
        for _, action in _ready(row, wait.position, done, sources_of):
            return f"on rank {wait.rank} write {action} before {row[wait.position]}"
    return "no order of these actions would end: the edges between the stages lead in a circle"
