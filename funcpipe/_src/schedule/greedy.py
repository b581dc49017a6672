"""Greedy list scheduling: a table made by running it; every rank always does the best that it can.

In: a `Load`, its stages, the ranks that hold them, a memory limit, and a `Policy`.
Out: a `GreedyTable`, or None where the memory limit leaves no way.

A free rank runs a ready B (or I, where the policy keeps I and W apart), else a ready F, else one
segment's W; W also comes first when its memory is needed. F waits while it would exceed the rank's
memory limit. Before an action the rank receives what it reads, as `timeline.py` has it. Qi et al.
2023, "Zero Bubble Pipeline Parallelism", section 3, https://arxiv.org/abs/2401.10241, with W by
segment.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from funcpipe._src.schedule.actions import Action, HalfStage, Schedule
from funcpipe._src.schedule.communication import Unit
from funcpipe._src.schedule.costs import Load
from funcpipe._src.schedule.greedy_costs import StageCosts, stage_costs

_SLACK = 1e-9  # sums of floats are compared with the memory limit


@dataclass(frozen=True)
class Policy:
    """How a rank chooses.

    Args:
        forward_first: F before I.
        old_first: among ready actions of one kind the oldest microbatch first, instead of the
            deepest stage.
        reserve: F of a rank's first stage waits until the microbatch's other stages on the rank
            fit, too.
        in_flight: how many microbatches may be on a rank at most, for itself and each rank behind
            it on the axis.
        by_segment: whether W is run by segment.
        apart: for every stage of how many microbatches I and W are apart; the others have B, which
            holds less. These are the last microbatches, since gradients are added up in the order
            of microbatches. By default all.
    """

    forward_first: bool = False
    old_first: bool = False
    reserve: bool = True
    in_flight: float | None = None
    by_segment: bool = True
    apart: tuple[int, ...] | None = None


class GreedyTable(NamedTuple):
    """A table that a policy made.

    Args:
        end: when it ends.
        period: what it takes in steady state (`Timeline.period`).
        busy: how long its busiest rank computes and receives.
        memory: about how many bytes a rank holds at most.
    """

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
    memory_limit: float,
    policy: Policy,
) -> GreedyTable | None:
    """The table that a policy makes, or None where the memory limit leaves no way.

    Args:
        name: of the table.
        load: what segments cost.
        stages: for every stage its segments.
        placement: for every stage its rank.
        microbatches: how many.
        memory_limit: the most bytes that a rank may hold.
        policy: how a rank chooses.

    >>> from funcpipe._src.schedule.costs import even_load
    >>> load = even_load(segments=2, ranks=2)
    >>> made = greedy("mine", load, [(0,), (1,)], (0, 1), 2, 9.0, Policy(by_segment=False))
    >>> print(made.schedule)
    rank 0: 0F0 0F1 0I0 0W0 0I1 0W1
    rank 1: 1F0 1I0 1F1 1I1 1W0 1W1
    """
    costs = stage_costs(load, stages, placement)
    return greedy_table(name, costs, microbatches, memory_limit, policy)


def greedy_table(
    name: str,
    costs: StageCosts,
    microbatches: int,
    memory_limit: float,
    policy: Policy,
) -> GreedyTable | None:
    """`greedy` for stages whose costs are known; a search asks for many tables of the same."""
    ranks = _Run(costs, microbatches, memory_limit, policy).run()
    if ranks is None:
        return None
    actions = tuple(tuple(rank.actions) for rank in ranks)
    return GreedyTable(
        Schedule(name, actions, tuple(costs.placement), microbatches),
        end=max(rank.free_at for rank in ranks),
        period=max(rank.free_at - rank.began for rank in ranks),
        busy=max(rank.busy for rank in ranks),
        memory=max(rank.peak + rank.work for rank in ranks),
    )


# For every stage that has ready actions of one kind, a heap of their microbatches.
_Ready = dict[int, list[int]]


class _Message(NamedTuple):
    """What is on its way to a rank: the unit, when it was sent, how long it moves."""

    unit: Unit
    sent_at: float
    takes: float


@dataclass
class _Rank:
    """One rank during a run. Times count from the start of the run, ``held`` and on in bytes.

    Args:
        work: what a unit takes besides ``held`` while it runs, at most.
        limit: the most that may be held.
        began: when its first action began, or the message that it reads.
        promised: bytes for F of later stages, of microbatches that are here already.
        in_flight: microbatches between F of the rank's first stage and its backward.
        coming: units that can run at some later time, a heap.
        weight_grads: the W that wait, in order.
    """

    index: int
    work: float
    limit: float
    began: float = math.inf
    free_at: float = 0.0
    busy: float = 0.0
    held: float = 0.0
    peak: float = 0.0
    promised: float = 0.0
    in_flight: int = 0
    coming: list[tuple[float, Unit]] = field(default_factory=list)
    ready_forwards: _Ready = field(default_factory=dict)
    ready_backwards: _Ready = field(default_factory=dict)
    weight_grads: deque[Action] = field(default_factory=deque)
    actions: list[Action] = field(default_factory=list)

    def spend(self, begin: float, takes: float) -> None:
        """Compute or receive for some time."""
        if begin < self.began:
            self.began = begin
        if begin > self.free_at:
            self.free_at = begin
        self.free_at += takes
        self.busy += takes

    def take_ready(self, now: float) -> None:
        """Move what can run by now from ``coming`` to the lists of ready actions."""
        while self.coming and self.coming[0][0] <= now:
            _, (kind, stage, microbatch) = heapq.heappop(self.coming)
            ready = self.ready_forwards if kind == "F" else self.ready_backwards
            heapq.heappush(ready.setdefault(stage, []), microbatch)


class _Run:
    """The state of a run."""

    def __init__(
        self,
        costs: StageCosts,
        microbatches: int,
        memory_limit: float,
        policy: Policy,
    ) -> None:
        self.costs = costs
        self.microbatches = microbatches
        self.policy = policy
        self.ranks = []
        slack = _SLACK * max(memory_limit, 1.0) if memory_limit < math.inf else 0.0
        for index, work in enumerate(costs.work):
            self.ranks.append(_Rank(index, work, memory_limit - work + slack))
        # Messages by source, target and kind, in the order in which they were sent.
        self.channels: dict[tuple[int, int, str], deque[_Message]] = defaultdict(deque)
        self.missing: dict[Unit, int] = {}  # how many of its inputs a unit still lacks
        for (kind, stage), needs in costs.needs.items():
            for microbatch in range(microbatches):
                self.missing[kind, stage, microbatch] = len(needs)
        self.inputs_at: dict[Unit, float] = {}  # when the last input of a unit is there
        self.events: list[tuple[float, int]] = []  # when which rank has something to do

    def run(self) -> list[_Rank] | None:
        """The ranks at the end, or None if some action never fitted."""
        for (kind, stage), needs in self.costs.needs.items():
            if kind == "F" and not needs:
                for microbatch in range(self.microbatches):
                    self._announce(0.0, (kind, stage, microbatch))
        todo = len(self.missing)
        while self.events:
            now, index = heapq.heappop(self.events)
            rank = self.ranks[index]
            if now < rank.free_at:
                continue  # it was busy when it was called
            rank.take_ready(now)
            action = self._choose(rank)
            if action is not None:
                todo -= action.kind != "W"
                self._do(rank, now, action)
                heapq.heappush(self.events, (rank.free_at, index))
            elif rank.coming:
                heapq.heappush(self.events, (rank.coming[0][0], index))
        if todo or any(rank.weight_grads for rank in self.ranks):
            return None
        return self.ranks

    def _announce(self, time: float, unit: Unit) -> None:
        """A unit can run from this time on."""
        rank = self.ranks[self.costs.placement[unit[1]]]
        heapq.heappush(rank.coming, (time, unit))
        heapq.heappush(self.events, (max(time, rank.free_at), rank.index))

    def _choose(self, rank: _Rank) -> Action | None:
        """What a rank does now, taken off its lists; None if it has to wait."""
        forwards, backwards = rank.ready_forwards, rank.ready_backwards
        fitting = [stage for stage in forwards if self._fits(rank, stage)]
        forward = self._first(forwards, fitting)
        backward = self._first(backwards, backwards)
        if forward is not None and (backward is None or self.policy.forward_first):
            return Action("F", forward, _take(forwards, forward))
        if backward is None:
            return rank.weight_grads.popleft() if rank.weight_grads else None
        if not self._is_apart(backward, backwards[backward][0]):
            return Action("B", backward, _take(backwards, backward))
        more = self.costs.waiting[backward] - self.costs.held[backward]
        if more > 0 and rank.held + more > rank.limit and rank.weight_grads:
            return rank.weight_grads.popleft()
        return Action("I", backward, _take(backwards, backward))

    def _first(self, ready: _Ready, stages: Collection[int]) -> int | None:
        """Of these stages the one whose turn it is."""
        if not stages:
            return None
        if self.policy.old_first:
            return min(stages, key=lambda stage: (ready[stage][0], -stage))
        return max(stages)

    def _fits(self, rank: _Rank, stage: int) -> bool:
        """Whether F of a stage keeps to the limits of its rank."""
        costs, policy = self.costs, self.policy
        enters = stage in costs.entry
        if enters and policy.in_flight is not None:
            behind = len(self.ranks) - rank.index
            if rank.in_flight >= max(policy.in_flight * behind, 1):
                return False
        need = rank.held + costs.held[stage]
        if enters and policy.reserve:
            need += rank.promised + costs.entry[stage]
        return need <= rank.limit

    def _is_apart(self, stage: int, microbatch: int) -> bool:
        """Whether I and W are apart."""
        apart = self.policy.apart
        return apart is None or microbatch >= self.microbatches - apart[stage]

    def _do(
        self,
        rank: _Rank,
        now: float,
        action: Action,
    ) -> None:
        """Run an action, and announce what can run next."""
        kind, stage, microbatch, nth, _ = action
        costs = self.costs
        rank.actions.append(action)
        if kind == "W":
            rank.spend(now, costs.time(action))
            segments = costs.segment_waiting[stage]
            rank.held -= costs.waiting[stage] if nth is None else segments[nth]
            return
        half = ("F" if kind == "F" else "B", stage)
        for maker in costs.needs[half]:
            self._receive(rank, (*maker, microbatch))
        rank.spend(now, costs.time(action))
        if kind == "F":
            self._hold_forward(rank, stage)
        else:
            self._release_forward(rank, stage)
        if kind == "I":
            rank.held += costs.waiting[stage]
            rank.weight_grads.extend(self._weight_grads(stage, microbatch))
        rank.peak = max(rank.peak, rank.held)
        self._hand_on(rank, half, microbatch)

    def _hold_forward(self, rank: _Rank, stage: int) -> None:
        held, entry = self.costs.held[stage], self.costs.entry
        rank.held += held
        if stage in entry:
            rank.promised += entry[stage]
            rank.in_flight += 1
        else:
            rank.promised -= held

    def _release_forward(self, rank: _Rank, stage: int) -> None:
        rank.held -= self.costs.held[stage]
        if stage in self.costs.entry:
            rank.in_flight -= 1

    def _hand_on(
        self,
        rank: _Rank,
        half: HalfStage,
        microbatch: int,
    ) -> None:
        """Send what was made, and announce the units whose last input it is."""
        costs = self.costs
        kind, stage = half
        unit = (kind, stage, microbatch)
        for target, takes in costs.sends[half]:
            message = _Message(unit, rank.free_at, takes)
            self.channels[rank.index, target, kind].append(message)
        for reader_kind, reader_stage, takes in costs.readers[half]:
            reader = (reader_kind, reader_stage, microbatch)
            # A message is not asked for before it could be there, had its receiver waited for it.
            arrives = rank.free_at + takes
            at = max(self.inputs_at.get(reader, 0.0), arrives)
            self.inputs_at[reader] = at
            self.missing[reader] -= 1
            if not self.missing[reader]:
                self._announce(at, reader)

    def _receive(self, rank: _Rank, unit: Unit) -> None:
        """Receive a unit, unless that was done, and what is ahead of it on its channel."""
        kind, stage, _ = unit
        queue = self.channels[self.costs.placement[stage], rank.index, kind]
        if not queue:
            return
        while any(message.unit == unit for message in queue):
            _, sent_at, takes = queue.popleft()
            rank.spend(max(rank.free_at, sent_at), takes)

    def _weight_grads(self, stage: int, microbatch: int) -> list[Action]:
        segments = len(self.costs.stages[stage])
        if not self.policy.by_segment or segments == 1:
            return [Action("W", stage, microbatch)]
        return [Action("W", stage, microbatch, nth) for nth in reversed(range(segments))]


def _take(ready: _Ready, stage: int) -> int:
    """The first ready microbatch of a stage, taken off the list."""
    microbatch = heapq.heappop(ready[stage])
    if not ready[stage]:
        del ready[stage]
    return microbatch
