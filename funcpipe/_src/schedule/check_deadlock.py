"""Deadlock: ranks that wait for each other in a circle.

In: a schedule whose transfers pair up.
Out: the schedule with its transfers, or a ScheduleError that shows the circle and what was ready.

A rank that stands still waits for one other rank only: the sender of the message that it wants. So
from any such rank the waiting leads into a circle, and the circle is the whole counterexample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from funcpipe._src.schedule.actions import COMPUTE, Action, Edge, Schedule
from funcpipe._src.schedule.check_order import needs
from funcpipe._src.schedule.communication import (
    Links,
    Unit,
    insert_communication,
    message_of,
    sources,
    unit_of,
)
from funcpipe._src.schedule.rejection_text import excerpt, maker
from funcpipe._src.schedule.simulate_transfers import Simulation, simulate_transfers
from funcpipe.errors import ScheduleError


class Wait(NamedTuple):
    """A rank that stands still: at which position of the written table, for which unit.

    Args:
        source: the rank that computes the unit.
    """

    rank: int
    position: int
    unit: Unit
    source: int


def check_deadlock(schedule: Schedule, edges: Iterable[Edge]) -> Schedule:
    """The table with its transfers, proven to end under blocking channels.

    Raises:
        ScheduleError: it does not; the text names the ranks that wait for each other.
    """
    edges = frozenset(edges)
    full = insert_communication(schedule, edges)
    simulation = simulate_transfers(full)
    if simulation.ended(full):
        return full
    computed: set[Unit] = set()
    for rank, position in simulation.order:
        unit = unit_of(full.ranks[rank][position])
        if unit is not None:
            computed.add(unit)
    standstill = _Standstill(schedule, full, simulation, computed, sources(edges))
    raise ScheduleError(standstill.explain())


@dataclass(frozen=True)
class _Standstill:
    """A table that cannot go on.

    Args:
        schedule: as it was written.
        full: with its transfers.
        simulation: how far ``full`` gets.
        computed: the units that were computed until then.
        sources_of: what each half of a stage reads of other stages.
    """

    schedule: Schedule
    full: Schedule
    simulation: Simulation
    computed: set[Unit]
    sources_of: Links

    def explain(self) -> str:
        circle = self._circle()
        names = " and ".join(f"rank {wait.rank}" for wait in circle)
        lines = [f"{self.schedule.name}: deadlock: {names} wait for each other"]
        for wait in circle:
            actions = self.schedule.ranks[wait.rank]
            wanted = maker(self.schedule, wait.unit)
            lines += [
                f"  rank {wait.rank} stands at position {wait.position}, {actions[wait.position]}: "
                f"it waits for {wanted} of rank {wait.source}; ready behind it: "
                f"{self._list_ready(wait)}",
                f"    rank {wait.rank}: {excerpt(actions, [wait.position])}",
            ]
        lines.append(f"  instead: {self._advice(circle)}")
        return "\n".join(lines)

    def _circle(self) -> list[Wait]:
        """The ranks that wait for each other, from the lowest; every one waits for the next."""
        waits = [self._wait(rank) for rank in range(len(self.full.ranks))]
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

    def _wait(self, rank: int) -> Wait | None:
        """What a rank waits for; None if it ended."""
        actions = self.full.ranks[rank]
        stopped_at = self.simulation.stopped_at[rank]
        if stopped_at == len(actions):
            return None
        unit = message_of(actions[stopped_at]).unit
        source = self.full.placement[unit[1]]
        if self.schedule.communicates:
            return Wait(rank, stopped_at, unit, source)
        # The transfers were inserted, so speak of the table as written: of the compute action that
        # waits. It may need a later message of the channel than the one at which the rank stands;
        # that one is not there either.
        position = sum(action.kind in COMPUTE for action in actions[:stopped_at])
        for needed in needs(self.schedule.ranks[rank][position], self.sources_of):
            if needed not in self.computed and self.full.placement[needed[1]] == source:
                return Wait(rank, position, needed, source)
        raise AssertionError("a rank waits, though all that its next action reads is there")

    def _ready(self, wait: Wait) -> Iterator[Action]:
        """The compute actions behind a wait whose inputs have all been computed somewhere."""
        for action in self.schedule.ranks[wait.rank][wait.position :]:
            if action.kind in COMPUTE:
                units = needs(action, self.sources_of)
                if self.computed.issuperset(units):
                    yield action

    def _list_ready(self, wait: Wait, most: int = 3) -> str:
        ready = [str(action) for action in self._ready(wait)]
        if not ready:
            return "nothing"
        if len(ready) > most:
            ready[most:] = ["…"]
        return ", ".join(ready)

    def _advice(self, circle: list[Wait]) -> str:
        """Bring forward what a rank of the circle waits for, or else anything that can run."""
        for wait, following in zip(circle, circle[1:] + circle[:1], strict=True):
            wanted = self._brought_forward(wait.unit, following)
            if wanted is not None:
                also = ""
                if wanted.kind in COMPUTE and self.schedule.communicates:
                    also = " (and its send)"
                return f"on rank {following.rank} write {wanted}{also} before {self._at(following)}"
        for wait in circle:
            for action in self._ready(wait):
                return f"on rank {wait.rank} write {action} before {self._at(wait)}"
        return "no order of these actions would end: the edges between the stages lead in a circle"

    def _brought_forward(self, unit: Unit, wait: Wait) -> Action | None:
        """What makes or sends a unit behind a wait and could run now."""
        for action in self._ready(wait):
            if unit_of(action) == unit:
                return action
        if unit in self.computed:
            for action in self.schedule.ranks[wait.rank][wait.position :]:
                if action.kind.startswith("SEND") and message_of(action).unit == unit:
                    return action
        return None

    def _at(self, wait: Wait) -> Action:
        return self.schedule.ranks[wait.rank][wait.position]
