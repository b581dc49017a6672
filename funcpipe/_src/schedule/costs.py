"""Costs: how long units and messages take, and how many bytes segments hold.

In: times and a link's speed (`Costs`), by hand or from `funcpipe.profile_units`; for a loss, the
time and bytes of every segment and the bytes that pass between segments (`Load`).
Out: the time of an action or a message, and the most bytes that a rank holds (`Load.memory`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from funcpipe._src.schedule.actions import Action, Edge, Schedule
from funcpipe._src.schedule.actions import chain as chain_edges
from funcpipe._src.schedule.communication import arrivals
from funcpipe.errors import PlanError

Stages = Sequence[Sequence[int]]
# The forward or backward of a segment: ("F" | "B", segment).
HalfSegment = tuple[str, int]
# What passes between segments: (the half that makes values, the half that reads them).
Flow = tuple[HalfSegment, HalfSegment]
TimeOf = Callable[[Action], float]
# What a half of a stage hands on: ("F" | "B", stage that makes it, stage that reads it).
StageLink = tuple[str, int, int]
# The same to all stages of a rank: ("F" | "B", stage that makes it, rank).
RankLink = tuple[str, int, int]


@dataclass(frozen=True)
class Costs:
    """How long units and messages take.

    Args:
        units: seconds (or any unit of time) by ``(kind, segment)``, or by kind alone where all
            segments cost the same; or a function of kind and segment. A kind that is missing is
            derived: ``B = I + W``, ``I = W = B / 2``.
        bandwidth: bytes that a link moves in a unit of time.
        latency: time that a message takes, whatever its size. A rank does nothing else while it
            receives.
        unit: of time, for pictures: ``"s"``, or ``""`` for none.

    >>> costs = Costs({"F": 1.0, "B": 2.0, ("F", 3): 5.0}, bandwidth=100.0, latency=0.5)
    >>> costs.of("F", 0), costs.of("F", 3), costs.of("W", 3), costs.message(100)
    (1.0, 5.0, 1.0, 1.5)
    """

    units: Mapping[Any, float] | Callable[[str, int], float]
    bandwidth: float = math.inf
    latency: float = 0.0
    unit: str = "s"

    def of(self, kind: str, segment: int) -> float:
        """The time of a unit.

        Raises:
            PlanError: it is not given, nor what it could be derived from.
        """
        if callable(self.units):
            return float(self.units(kind, segment))
        given = {name: self._given(name, segment) for name in "FBIW"}
        time = given[kind]
        if time is not None:
            return time
        backward = given["B"]
        input_grad = given["I"]
        weight_grad = given["W"]
        if kind == "B" and input_grad is not None and weight_grad is not None:
            return input_grad + weight_grad
        if kind in "IW" and backward is not None:
            other = weight_grad if kind == "I" else input_grad
            return backward / 2 if other is None else max(backward - other, 0.0)
        raise PlanError(
            f"costs do not say what {kind} of segment {segment} costs; add ({kind!r}, {segment}) "
            f"or {kind!r}"
        )

    def _given(self, kind: str, segment: int) -> float | None:
        assert not callable(self.units)
        of_kind = self.units.get(kind)
        time = self.units.get((kind, segment), of_kind)
        return None if time is None else float(time)

    def message(self, nbytes: float) -> float:
        """The time in which a message of so many bytes moves."""
        return self.latency + nbytes / self.bandwidth


def _no_time(nbytes: float) -> float:
    return 0.0


@dataclass(frozen=True)
class Load:
    """A loss as a search sees it. All tuples are by segment; bytes are those of one microbatch.

    Args:
        F, B, I, W: the time of its units.
        held: the bytes that are held from F until the backward.
        waiting: the part of it, and of what I makes, that is held until W.
        work: the most bytes that one of its units takes for itself while it runs.
        flows: the bytes that one half of a segment hands to a half of another.
        link: the time of a message of so many bytes.
    """

    F: tuple[float, ...]
    B: tuple[float, ...]
    I: tuple[float, ...]  # noqa: E741
    W: tuple[float, ...]
    held: tuple[float, ...]
    waiting: tuple[float, ...]
    work: tuple[float, ...]
    flows: Mapping[Flow, float] = field(default_factory=dict)
    link: Callable[[float], float] = _no_time

    @property
    def segments(self) -> int:
        """The number of segments."""
        return len(self.F)

    def cost(self, stages: Stages) -> TimeOf:
        """The time of every compute action."""
        of_stage = {
            "F": per_stage(self.F, stages),
            "B": per_stage(self.B, stages),
            "I": per_stage(self.I, stages),
            "W": per_stage(self.W, stages),
        }

        def cost(action: Action) -> float:
            kind, stage, _, nth, _ = action
            if nth is None:
                return of_stage[kind][stage]
            return self.W[stages[stage][nth]]

        return cost

    def edges(self, stages: Stages) -> frozenset[Edge]:
        """What depends on what between stages."""
        return frozenset(self._bytes_by_edge(stages))

    def transfer(self, stages: Stages, placement: Sequence[int]) -> TimeOf:
        """The time in which the message of a ``SEND`` moves, with all that its target reads."""
        times = {}
        for link, by_stage in self.sent(stages, placement).items():
            nbytes = sum(by_stage.values())
            times[link] = self.link(nbytes)
        empty = self.link(0.0)

        def transfer(send: Action) -> float:
            return times.get(_link_of(send, placement), empty)

        return transfer

    def sent(
        self,
        stages: Stages,
        placement: Sequence[int],
    ) -> dict[RankLink, dict[int, float]]:
        """What a stage hands to the stages of a rank: the bytes, by stage that reads them."""
        sent: dict[RankLink, dict[int, float]] = {}
        for (kind, maker, reader), nbytes in self.messages(stages).items():
            link = (kind, maker, placement[reader])
            sent.setdefault(link, {})[reader] = nbytes
        return sent

    def messages(self, stages: Stages) -> dict[StageLink, float]:
        """The bytes that stages hand to each other."""
        messages: dict[StageLink, float] = defaultdict(float)
        for ((kind, maker), (_, reader)), nbytes in self._bytes_by_edge(stages).items():
            messages[kind, maker, reader] += nbytes
        return dict(messages)

    def _bytes_by_edge(self, stages: Stages) -> dict[Edge, float]:
        stage_of = {}
        for stage, segments in enumerate(stages):
            stage_of.update(dict.fromkeys(segments, stage))
        by_edge: dict[Edge, float] = {}
        for (made, read), nbytes in self.flows.items():
            maker = stage_of[made[1]]
            reader = stage_of[read[1]]
            if maker != reader:
                edge = ((made[0], maker), (read[0], reader))
                by_edge[edge] = by_edge.get(edge, 0.0) + nbytes
        return by_edge

    def memory(
        self,
        schedule: Schedule,
        rank: int,
        stages: Stages,
    ) -> float:
        """The most bytes that a rank holds.

        What a stage hands to another one of its rank is held until that one reads it. Where the
        table has transfers, what a rank sends is held until it has surely arrived, and what it
        receives until it is read. Some messages come early, since later ones are read before them.
        """
        ledger = _Ledger(self, schedule, rank, stages)
        for action in schedule.ranks[rank]:
            ledger.run(action)
        return ledger.peak + ledger.most_work


class _Ledger:
    """The bytes that one rank holds while it runs its actions one after another.

    Attributes:
        peak: the most that it held.
        most_work: the most that a unit took for itself besides.
    """

    def __init__(
        self,
        load: Load,
        schedule: Schedule,
        rank: int,
        stages: Stages,
    ) -> None:
        self.load = load
        self.rank = rank
        self.stages = stages
        self.placement = schedule.placement
        self.held = per_stage(load.held, stages)
        self.waiting = per_stage(load.waiting, stages)
        self.work = [max(map(load.work.__getitem__, segments)) for segments in stages]
        self.sent = load.sent(stages, schedule.placement)
        self.message_bytes = {link: sum(some.values()) for link, some in self.sent.items()}
        self.arrived_with = arrivals(schedule, rank)
        sends = chain.from_iterable(self.arrived_with.values())
        self.proven = set(sends)
        # What was handed to a stage of this rank and is not read yet, by its reader. The reader
        # counts it among its own work.
        self.unread: dict[tuple[str, int, int], float] = defaultdict(float)
        self.now = 0.0
        self.peak = 0.0
        self.most_work = 0.0

    def run(self, action: Action) -> None:
        if action in self.arrived_with:
            self._receive(action)
            return
        kind, stage = action.kind, action.stage
        if kind == "F":
            self._read("F", action)
            self._hand_on("F", stage, action.microbatch)
            self.now += self.held[stage]
        elif kind in ("B", "I"):
            self._read("F", action)
            self._read("B", action)
            self._hand_on("B", stage, action.microbatch)
            kept = self.waiting[stage] if kind == "I" else 0.0
            change = kept - self.held[stage]
            self.now += change
        elif kind == "W":
            self.now -= self._released_by(action)
        elif action in self.proven:
            self.now += self._bytes_of(action)
        held = self.now + sum(self.unread.values())
        self.peak = max(self.peak, held)
        self.most_work = max(self.most_work, self.work[stage])

    def _receive(self, action: Action) -> None:
        """Free what has arrived elsewhere, and keep what has come."""
        arrived = self.arrived_with[action]
        freed = sum(map(self._bytes_of, arrived))
        self.now -= freed
        assert action.peer is not None
        self._hand_on(action.kind[-1], action.peer, action.microbatch)

    def _read(self, kind: str, action: Action) -> None:
        self.unread.pop((kind, action.stage, action.microbatch), None)

    def _hand_on(
        self,
        kind: str,
        maker: int,
        microbatch: int,
    ) -> None:
        """Keep what a stage made for the stages of this rank."""
        link = (kind, maker, self.rank)
        for reader, nbytes in self.sent.get(link, {}).items():
            self.unread[kind, reader, microbatch] += nbytes

    def _released_by(self, weight_grad: Action) -> float:
        """What is no longer held once a W has run."""
        stage, nth = weight_grad.stage, weight_grad.segment
        if nth is None:
            return self.waiting[stage]
        return self.load.waiting[self.stages[stage][nth]]

    def _bytes_of(self, send: Action) -> float:
        link = _link_of(send, self.placement)
        return self.message_bytes.get(link, 0.0)


def per_stage(of_segment: Sequence[float], stages: Stages) -> list[float]:
    """For every stage the sum over its segments.

    >>> per_stage([1.0, 2.0, 4.0], [(0, 1), (2,)])
    [3.0, 4.0]
    """
    return [sum(map(of_segment.__getitem__, segments)) for segments in stages]


def _link_of(send: Action, placement: Sequence[int]) -> RankLink:
    assert send.peer is not None
    return send.kind[-1], send.stage, placement[send.peer]


def even_load(
    segments: int,
    ranks: int,
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
) -> Load:
    """A chain of equal segments.

    Memory is counted in microbatches of a rank's layers: a rank holds 1 byte for a microbatch.

    Args:
        segments, ranks: how many; every rank has the same number of segments.
        forward, input_grad, weight_grad: the time of F, I and W of all segments of a rank.

    >>> from funcpipe._src.schedule.library import one_f_one_b
    >>> load = even_load(segments=8, ranks=4)
    >>> load.memory(one_f_one_b()(4, 8), 0, [(0, 1), (2, 3), (4, 5), (6, 7)])
    4.0
    """
    share = ranks / segments

    def each(of_rank: float) -> tuple[float, ...]:
        of_segment = of_rank * share
        return (of_segment,) * segments

    return Load(
        F=each(forward),
        B=each(input_grad + weight_grad),
        I=each(input_grad),
        W=each(weight_grad),
        held=each(1.0),
        waiting=each(1.0),
        work=(0.0,) * segments,
        flows=dict.fromkeys(sorted(chain_edges(segments)), 0.0),
    )
