"""Greedy list scheduling: a table made by running it, every rank doing at any moment the best that
it can.

A rank that is free runs a ready B, or I where a policy has I and W apart, else a ready F, else one
segment's W; W also comes first when its memory is needed. Ahead of what it runs it receives what
that reads, as `timeline` has it. F waits while it would exceed the rank's memory. Qi et al. 2023,
"Zero Bubble Pipeline Parallelism", section 3, https://arxiv.org/abs/2401.10241, with W by segment.

In: a `Load`, its stages, where they lie, a cap on memory, and a `Policy`. Out: a table, or None
where the cap leaves no way.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from funcpipe._src.schedule.actions import Action, Schedule
from funcpipe._src.schedule.communication import sources
from funcpipe._src.schedule.costs import Load

_SLACK = 1e-9  # sums of floats are compared with caps


@dataclass(frozen=True)
class Policy:
    """How a rank chooses.

    Args:
        forward_first: F before I.
        old_first: among ready actions of one kind the oldest microbatch first, instead of the
            deepest stage.
        reserve: F of a rank's first stage waits until there is room for the microbatch's other
            stages on the rank too.
        in_flight: how many microbatches may be on a rank at most, for each rank behind it on the
            axis and itself.
        by_segment: whether W is run by segment.
        apart: for every stage of how many microbatches, the last ones, I and W are apart; the
            others have B, which holds less. The last ones, since gradients are added up in the
            order of microbatches. By default all.
    """

    forward_first: bool = False
    old_first: bool = False
    reserve: bool = True
    in_flight: float | None = None
    by_segment: bool = True
    apart: tuple[int, ...] | None = None


class Drawn(NamedTuple):
    """A table that a policy made; when it ends; what it takes in steady state (`Timeline.period`);
    how long its busiest rank computes and receives; about how many bytes a rank holds at most."""

    schedule: Schedule
    end: float
    period: float
    busy: float
    memory: float


def greedy(
    name: str,
    load: Load,
    stages: Sequence[Sequence[int]],
    placement: Sequence[int],
    microbatches: int,
    cap: float,
    policy: Policy,
) -> Drawn | None:
    """The table that a policy makes, or None.

    Args:
        name: of the table.
        load: what segments cost.
        stages: for every stage its segments.
        placement: for every stage its rank.
        microbatches: how many.
        cap: the most bytes that a rank may hold.
        policy: how a rank chooses.

    >>> from funcpipe._src.schedule.costs import even_load
    >>> load = even_load(segments=2, ranks=2)
    >>> drawn = greedy("mine", load, [(0,), (1,)], (0, 1), 2, 9.0, Policy(by_segment=False))
    >>> print(drawn.schedule)
    rank 0: 0F0 0F1 0I0 0W0 0I1 0W1
    rank 1: 1F0 1I0 1F1 1I1 1W0 1W1
    """
    ranks = _List(load, stages, placement, microbatches, cap, policy).run()
    if ranks is None:
        return None
    schedule = Schedule(
        name, tuple(tuple(rank.row) for rank in ranks), tuple(placement), microbatches
    )
    return Drawn(
        schedule,
        end=max(rank.free for rank in ranks),
        period=max(rank.free - rank.start for rank in ranks),
        busy=max(rank.busy for rank in ranks),
        memory=max(rank.peak + rank.work for rank in ranks),
    )


_Cell = tuple[str, int, int]  # "F" or "B" (for I), stage, microbatch
_Mail = tuple[
    _Cell, float, float
]  # what made a message, when it was sent, how long it takes to move


@dataclass
class _Rank:
    start: float = math.inf  # of its first action, or of the message ahead of it
    free: float = 0.0
    busy: float = 0.0
    held: float = 0.0
    peak: float = 0.0  # the most that was held
    work: float = 0.0  # that is taken besides while a unit runs, at most
    room: float = 0.0
    promised: float = 0.0  # for F of later stages of microbatches that are here already
    flying: int = 0
    coming: list[tuple[float, _Cell]] = field(default_factory=list)
    ready: dict[str, dict[int, list[int]]] = field(default_factory=lambda: {"F": {}, "B": {}})
    waiting: deque[Action] = field(default_factory=deque)
    row: list[Action] = field(default_factory=list)


class _List:
    """The state of a run."""

    def __init__(
        self,
        load: Load,
        stages: Sequence[Sequence[int]],
        placement: Sequence[int],
        microbatches: int,
        cap: float,
        policy: Policy,
    ) -> None:
        self.stages, self.placement, self.microbatches, self.policy = (
            stages,
            placement,
            microbatches,
            policy,
        )
        count = len(stages)
        self.cost, transfer, edges = (
            load.cost(stages),
            load.transfer(stages, placement),
            load.edges(stages),
        )
        away = {
            k: n for k, n in load.messages(stages).items() if placement[k[1]] != placement[k[2]]
        }
        # What F sends has arrived when its gradient comes back.
        self.held = [
            sum(load.held[x] for x in segments)
            + sum(n for (half, a, _), n in away.items() if (half, a) == ("F", s))
            for s, segments in enumerate(stages)
        ]
        self.late = [[load.waiting[x] for x in segments] for segments in stages]
        reads = sources(edges)
        own: dict[tuple[str, int], list[tuple[str, int]]] = {
            ("B", s): [("F", s)] for s in range(count)
        }
        self.needs = {
            (h, s): sorted(
                [*reads.get((h, s), ()), *own.get((h, s), ())],
                key=lambda need: (placement[need[1]], need),
            )
            for h in "FB"
            for s in range(count)
        }
        self.readers: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
        self.sends: dict[tuple[str, int], dict[int, float]] = defaultdict(
            dict
        )  # how long to which rank
        for (half, s), makers in self.needs.items():
            for maker, m in makers:
                self.readers[maker, m].append((half, s))
                if placement[m] != placement[s]:
                    self.sends[maker, m].setdefault(
                        placement[s], transfer(Action(f"SEND_{maker}", m, 0, peer=s))
                    )
        self.mail: dict[tuple[int, int, str], deque[_Mail]] = defaultdict(
            deque
        )  # by source, target and half, in order
        self.missing = {
            (h, s, m): len(n) for (h, s), n in self.needs.items() for m in range(microbatches)
        }
        self.at: dict[_Cell, float] = {}
        ranks = max(placement) + 1
        self.ranks = [_Rank() for _ in range(ranks)]
        self.entry: dict[int, float] = {}  # a rank's first stage -> what its other stages hold
        for r, rank in enumerate(self.ranks):
            mine = [s for s in range(count) if placement[s] == r]
            work = max((load.work[x] for s in mine for x in stages[s]), default=0.0)
            work += max(
                (n for (half, a, _), n in away.items() if half == "B" and a in mine), default=0.0
            )
            rank.work = work
            rank.room = cap - work + _SLACK * max(cap, 1.0) if cap != float("inf") else cap
            self.entry[mine[0]] = sum(self.held[s] for s in mine[1:])
        self.events: list[tuple[float, int]] = []

    def run(self) -> list[_Rank] | None:
        """The ranks at the end, unless some action never found room."""
        for (half, s), needs in self.needs.items():
            if half == "F" and not needs:
                for m in range(self.microbatches):
                    self._come(0.0, (half, s, m))
        todo = 2 * len(self.stages) * self.microbatches
        while self.events:
            now, r = heapq.heappop(self.events)
            rank = self.ranks[r]
            if now < rank.free:
                continue  # it was busy when it was called
            while rank.coming and rank.coming[0][0] <= now:
                _, (half, stage, m) = heapq.heappop(rank.coming)
                heapq.heappush(rank.ready[half].setdefault(stage, []), m)
            action = self._choose(r, rank)
            if action is None:
                if rank.coming:
                    heapq.heappush(self.events, (rank.coming[0][0], r))
                continue
            todo -= action.kind != "W"
            self._do(r, rank, now, action)
            heapq.heappush(self.events, (rank.free, r))
        if todo or any(rank.waiting for rank in self.ranks):
            return None
        return self.ranks

    def _come(self, time: float, cell: _Cell) -> None:
        """An action can run from this time on."""
        r = self.placement[cell[1]]
        heapq.heappush(self.ranks[r].coming, (time, cell))
        heapq.heappush(self.events, (max(time, self.ranks[r].free), r))

    def _choose(self, r: int, rank: _Rank) -> Action | None:
        """What a rank does now, taken off its lists."""
        forward = self._first(rank.ready["F"], lambda stage: self._fits(r, rank, stage))
        back = self._first(rank.ready["B"], lambda stage: True)
        if back is not None and not (self.policy.forward_first and forward is not None):
            apart = self._apart(back, rank.ready["B"][back][0])
            more = sum(self.late[back]) - self.held[back]
            if apart and more > 0 and rank.held + more > rank.room and rank.waiting:
                return rank.waiting.popleft()
            return Action("I" if apart else "B", back, _taken(rank.ready["B"], back))
        if forward is not None:
            return Action("F", forward, _taken(rank.ready["F"], forward))
        return rank.waiting.popleft() if rank.waiting else None

    def _first(self, ready: dict[int, list[int]], fits: Callable[[int], bool]) -> int | None:
        """The stage whose turn it is."""
        if not ready:
            return None
        some = [stage for stage in ready if fits(stage)]
        if self.policy.old_first:
            return min(some, key=lambda stage: (ready[stage][0], -stage), default=None)
        return max(some, default=None)

    def _fits(self, r: int, rank: _Rank, stage: int) -> bool:
        enters = stage in self.entry
        most = self.policy.in_flight
        if enters and most is not None and rank.flying >= max(most * (len(self.ranks) - r), 1):
            return False
        need = rank.held + self.held[stage]
        if self.policy.reserve:
            need += rank.promised + self.entry[stage] if enters else 0.0
        return need <= rank.room

    def _do(self, r: int, rank: _Rank, now: float, action: Action) -> None:
        kind, s, m, segment, _ = action
        half = "F" if kind == "F" else "B"
        if kind != "W":
            for maker, stage in self.needs[half, s]:
                self._receive(r, rank, (maker, stage, m))
        rank.start = min(rank.start, now)
        rank.row.append(action)
        time = self.cost(action)
        rank.free, rank.busy = max(rank.free, now) + time, rank.busy + time
        if kind == "F":
            rank.held += self.held[s]
            rank.promised += self.entry[s] if s in self.entry else -self.held[s]
            rank.flying += s in self.entry
        elif kind != "W":
            rank.held -= self.held[s]
            rank.flying -= s in self.entry
            if kind == "I":
                rank.held += sum(self.late[s])
                rank.waiting.extend(self._weights(s, m))
        else:
            rank.held -= sum(self.late[s]) if segment is None else self.late[s][segment]
            return
        rank.peak = max(rank.peak, rank.held)
        for target, takes in self.sends[half, s].items():
            self.mail[r, target, half].append(((half, s, m), rank.free, takes))
        for reader, stage in self.readers[half, s]:
            cell = (reader, stage, m)
            self.missing[cell] -= 1
            # A message is not asked for before it could be there, had its receiver waited for it.
            takes = self.sends[half, s].get(self.placement[stage], 0.0)
            self.at[cell] = max(self.at.get(cell, 0.0), rank.free + takes)
            if not self.missing[cell]:
                self._come(self.at[cell], cell)

    def _receive(self, r: int, rank: _Rank, maker: _Cell) -> None:
        """Receive a message, unless that was done, and those ahead of it on its way."""
        queue = self.mail[self.placement[maker[1]], r, maker[0]]
        while any(message[0] == maker for message in queue):
            _, sent, takes = queue.popleft()
            begin = max(rank.free, sent)
            rank.start = min(rank.start, begin)
            rank.free, rank.busy = begin + takes, rank.busy + takes

    def _apart(self, stage: int, microbatch: int) -> bool:
        """Whether I and W are."""
        apart = self.policy.apart
        return apart is None or microbatch >= self.microbatches - apart[stage]

    def _weights(self, stage: int, microbatch: int) -> list[Action]:
        count = len(self.stages[stage])
        if not self.policy.by_segment or count == 1:
            return [Action("W", stage, microbatch)]
        return [Action("W", stage, microbatch, k) for k in reversed(range(count))]


def _taken(ready: dict[int, list[int]], stage: int) -> int:
    """A stage's first microbatch that is ready, which no longer is."""
    microbatch = heapq.heappop(ready[stage])
    if not ready[stage]:
        del ready[stage]
    return microbatch
