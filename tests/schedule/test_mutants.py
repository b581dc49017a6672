"""The checker's verdict against running the table, for mutated tables of the library.

The interpreter shares no code with the checker. A table is right if every rank ends, nothing is
left in a channel, nothing runs twice, everything ran, and whatever an action reads was there.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from support.schedule_tables import edges_for, library

from funcpipe._src.schedule import Action, Edge, Schedule, check, insert_communication
from funcpipe.errors import ScheduleError


class Fault(Exception):
    """The table asked for something that is not there."""


class Interpreter:
    """Runs a table rank by rank in turn, with blocking channels, and knows which rank has which
    values."""

    def __init__(self, schedule: Schedule, edges: frozenset[Edge]) -> None:
        self.schedule, self.edges = schedule, edges
        self.values: list[set] = [set() for _ in schedule.ranks]  # of (kind, stage, microbatch)
        self.channels: dict = defaultdict(deque)
        self.ran: set[Action] = set()
        self.backward = any(a.kind in "BIW" for row in schedule.ranks for a in row)

    def right(self) -> bool:
        """Whether the table runs to its end, and has then done everything once."""
        at = [0] * len(self.schedule.ranks)
        try:
            moved = True
            while moved:
                moved = False
                for rank, row in enumerate(self.schedule.ranks):
                    while at[rank] < len(row) and self.step(rank, row[at[rank]]):
                        at[rank], moved = at[rank] + 1, True
        except Fault:
            return False
        ended = all(n == len(row) for n, row in zip(at, self.schedule.ranks, strict=True))
        return ended and not any(self.channels.values()) and self.complete()

    def step(self, rank: int, action: Action) -> bool:
        """Run one action; False if it has to wait."""
        kind, stage, m = action.kind, action.stage, action.microbatch
        if self.schedule.placement[stage] != rank or action in self.ran:
            raise Fault
        if "_" in kind:
            if not self.transfer(rank, action):
                return False
        elif kind == "W":
            self.read(rank, "B", stage, m)
        else:
            made = "F" if kind == "F" else "B"
            inputs = [maker for maker, reader in self.edges if reader == (made, stage)]
            for k, s in inputs if kind == "F" else [("F", stage), *inputs]:
                self.read(rank, k, s, m)
            self.values[rank].add((made, stage, m))
        self.ran.add(action)
        return True

    def transfer(self, rank: int, action: Action) -> bool:
        stage, peer, m, kind = action.stage, action.peer, action.microbatch, action.kind[-1]
        if peer is None or self.schedule.placement[peer] == rank:
            raise Fault
        other = self.schedule.placement[peer]
        if action.kind.startswith("SEND"):
            self.read(rank, kind, stage, m)
            self.channels[rank, other, kind].append((stage, peer, m))
            return True
        channel = self.channels[other, rank, kind]
        if not channel:
            return False
        if channel.popleft() != (peer, stage, m):
            raise Fault
        self.values[rank].add((kind, peer, m))
        return True

    def read(self, rank: int, kind: str, stage: int, m: int) -> None:
        if (kind, stage, m) not in self.values[rank]:
            raise Fault

    def complete(self) -> bool:
        """Whether F of every stage and microbatch ran, and its backward exactly once: B, or I and
        every W."""
        parts = Counter((a.kind, a.stage, a.microbatch) for a in self.ran if "_" not in a.kind)
        segments: dict[int, int] = defaultdict(int)
        for a in self.ran:
            segments[a.stage] = max(segments[a.stage], (-1 if a.segment is None else a.segment) + 1)
        for stage in range(self.schedule.stages):
            for m in range(self.schedule.microbatches):
                whole = Action("W", stage, m) in self.ran
                f, b, i, w = (parts[kind, stage, m] for kind in "FBIW")
                split = (i, b) == (1, 0) and w == (1 if whole else max(segments[stage], 1))
                if f != 1 or (self.backward and not split and (b, i, w) != (1, 0, 0)):
                    return False
        return True


def mutate(schedule: Schedule, rng: random.Random) -> Schedule:
    """Drop, duplicate, swap, move or retarget one action of a table."""
    rows = [list(row) for row in schedule.ranks]
    row = rng.choice([row for row in rows if row] or [[Action("F", 0, 0)]])
    i = rng.randrange(len(row))
    match rng.choice(
        ["drop", "duplicate", "swap", "neighbours", "move", "retarget", "retarget", "elsewhere"]
    ):
        case "drop":
            del row[i]
        case "duplicate":
            row.insert(rng.randrange(len(row) + 1), row[i])
        case "swap":
            j = rng.randrange(len(row))
            row[i], row[j] = row[j], row[i]
        case "neighbours":
            j = min(i + 1, len(row) - 1)
            row[i], row[j] = row[j], row[i]
        case "move":
            action = row.pop(i)
            row.insert(rng.randrange(len(row) + 1), action)
        case "elsewhere":
            action, other = row.pop(i), rng.choice(rows)
            other.insert(rng.randrange(len(other) + 1), action)
        case "retarget":
            row[i] = retarget(row[i], schedule, rng)
    return replace(schedule, ranks=tuple(map(tuple, rows)))


def retarget(action: Action, schedule: Schedule, rng: random.Random) -> Action:
    """The action with another microbatch, stage, peer, kind or segment."""
    stage, microbatch = rng.randrange(schedule.stages), rng.randrange(schedule.microbatches)
    match rng.choice(["microbatch", "stage", "other"]):
        case "microbatch":
            return action._replace(microbatch=microbatch)
        case "stage":
            return action._replace(stage=stage)
    if action.peer is not None:
        return action._replace(peer=stage)
    if action.segment is not None:
        return action._replace(segment=rng.choice([None, 0, 1]))
    return action._replace(kind=rng.choice("FBIW"))


def by_segment(schedule: Schedule, segments: int = 2) -> Schedule:
    """The table with every B as I and W, and every W by segment."""

    def parts(action: Action) -> list[Action]:
        if action.kind == "B":
            return [action._replace(kind="I"), *parts(action._replace(kind="W"))]
        return (
            [action._replace(segment=n) for n in range(segments)]
            if action.kind == "W"
            else [action]
        )

    rows = tuple(tuple(part for action in row for part in parts(action)) for row in schedule.ranks)
    return replace(schedule, ranks=rows)


MUTANTS_PER_EXAMPLE = 40  # 600 by default, 10,000 in the thorough profile


@given(st.data())
def test_verdict_is_that_of_a_run(data: st.DataObject) -> None:
    written = data.draw(library(ranks=5, microbatches=6, v=3))
    if data.draw(st.booleans()):
        written = by_segment(written)
    edges = data.draw(edges_for(written.stages))
    full = insert_communication(written, edges)
    assert Interpreter(full, edges).right()
    rng = random.Random(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    for _ in range(MUTANTS_PER_EXAMPLE):
        mutant = full
        for _ in range(rng.choice([1, 1, 2])):
            mutant = mutate(mutant, rng)
        if full.communicates and not mutant.communicates:
            continue  # a table without any transfer is not wrong but short for one with them
        assert verdict(mutant, edges) == Interpreter(mutant, edges).right(), [
            " ".join(map(str, row)) for row in mutant.ranks
        ]


def verdict(schedule: Schedule, edges: frozenset[Edge]) -> bool:
    try:
        check(schedule, edges)
    except ScheduleError:
        return False
    return True
