"""What units cost: times, links, and what a loss looks like to a search.

Terms. `Costs` says how long a unit of a kind and segment runs, and how fast a message travels; it
is given by a person or measured by `funcpipe.profile_units`. A `Load` is a whole loss as a search
sees it: time and bytes of every segment, and what its halves exchange. A *flow* is the bytes that
one half of a segment hands to a half of another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.schedule.actions import Action, Edge, Schedule
from funcpipe._src.schedule.communication import arrivals
from funcpipe.errors import PlanError

Stages = Sequence[Sequence[int]]
# ("F" | "B", segment) made it, ("F" | "B", segment) reads it
Flow = tuple[tuple[str, int], tuple[str, int]]


@dataclass(frozen=True)
class Costs:
    """How long units and messages take.

    Args:
        units: seconds (or any unit of time) by ``(kind, segment)``, or by kind alone where all
            segments cost the same; or a function of kind and segment. What is missing follows from
            the rest: ``B = I + W``, ``I = W = B / 2``.
        bandwidth: bytes that a link moves in a unit of time.
        latency: time that a message takes, whatever its size. A rank does nothing else while it
            receives.
        unit: of time, for pictures: ``"s"``, or ``""`` where it means nothing.

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
            PlanError: it is not known, nor what it would follow from.
        """
        if callable(self.units):
            return float(self.units(kind, segment))
        known = {k: self._known(k, segment) for k in "FBIW"}
        if (time := known[kind]) is not None:
            return time
        if kind == "B" and known["I"] is not None and known["W"] is not None:
            return known["I"] + known["W"]
        if kind in "IW" and known["B"] is not None:
            other = known["W" if kind == "I" else "I"]
            return known["B"] / 2 if other is None else max(known["B"] - other, 0.0)
        raise PlanError(
            f"costs do not say what {kind} of segment {segment} costs; add ({kind!r}, {segment}) "
            f"or {kind!r}"
        )

    def _known(self, kind: str, segment: int) -> float | None:
        assert not callable(self.units)
        found = self.units.get((kind, segment), self.units.get(kind))
        return None if found is None else float(found)

    def message(self, nbytes: float) -> float:
        """How long so many bytes take to move."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Load:
    """A loss as a search sees it. All lists are by segment; bytes are those of one microbatch.

    Args:
        F, B, I, W: the time of its units.
        held: what is held from F until the backward.
        waiting: the part of it, and of what I makes, that is held until W.
        work: the most that one of its units takes for itself while it runs.
        flows: the bytes between segments.
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
    link: Callable[[float], float] = lambda nbytes: 0.0

    @property
    def segments(self) -> int:
        """How many."""
        return len(self.F)

    def cost(self, stages: Stages) -> Callable[[Action], float]:
        """The time of every compute action."""
        whole = {
            k: [sum(getattr(self, k)[x] for x in segments) for segments in stages] for k in "FBIW"
        }

        def cost(action: Action) -> float:
            if action.segment is None:
                return whole[action.kind][action.stage]
            return self.W[stages[action.stage][action.segment]]

        return cost

    def edges(self, stages: Stages) -> frozenset[Edge]:
        """What depends on what between stages."""
        return frozenset(self._between(stages))

    def transfer(self, stages: Stages, placement: Sequence[int]) -> Callable[[Action], float]:
        """The time that the message of a ``SEND`` takes to move, with all that is read on the rank
        where it goes."""
        times = {
            key: self.link(sum(some.values())) for key, some in self.mail(stages, placement).items()
        }
        nothing = self.link(0.0)
        return lambda send: times.get(
            (send.kind[-1], send.stage, placement[send.peer or 0]), nothing
        )

    def mail(
        self, stages: Stages, placement: Sequence[int]
    ) -> dict[tuple[str, int, int], dict[int, float]]:
        """What goes from a stage to a rank: by ("F" | "B", stage that makes it, rank), the bytes
        that other stages there read."""
        out: dict[tuple[str, int, int], dict[int, float]] = {}
        for (half, a, b), nbytes in self.messages(stages).items():
            out.setdefault((half, a, placement[b]), {})[b] = nbytes
        return out

    def messages(self, stages: Stages) -> dict[tuple[str, int, int], float]:
        """Bytes by ("F" | "B", stage that makes them, stage that reads them)."""
        out: dict[tuple[str, int, int], float] = {}
        for ((half, a), (_, b)), nbytes in self._between(stages).items():
            out[half, a, b] = out.get((half, a, b), 0.0) + nbytes
        return out

    def _between(self, stages: Stages) -> dict[Edge, float]:
        stage = {segment: s for s, segments in enumerate(stages) for segment in segments}
        out: dict[Edge, float] = {}
        for ((half, a), (reader, b)), nbytes in self.flows.items():
            if stage[a] != stage[b]:
                edge = ((half, stage[a]), (reader, stage[b]))
                out[edge] = out.get(edge, 0.0) + nbytes
        return out

    def memory(self, schedule: Schedule, rank: int, stages: Stages) -> float:
        """The most bytes that a rank holds. What a stage hands to another one of its rank is held
        until that reads it. Where the table
        has transfers, what a rank sends is held until it has surely arrived, and what it receives
        until it is read: some messages come before their turn, since those behind them are read
        earlier."""
        told = arrivals(schedule, rank)
        sent = {send for sends in told.values() for send in sends}
        mail = self.mail(stages, schedule.placement)
        weigh = {key: sum(some.values()) for key, some in mail.items()}
        nbytes = lambda a: weigh.get((a.kind[-1], a.stage, schedule.placement[a.peer or 0]), 0.0)  # noqa: E731
        # By what reads it, which counts it among its `work`.
        got: dict[tuple[str, int, int], float] = defaultdict(float)

        def get(half: str, maker: int, microbatch: int) -> None:
            for reader, some in mail.get((half, maker, rank), {}).items():
                got[half, reader, microbatch] += some

        now = peak = 0.0
        held = [sum(self.held[x] for x in segments) for segments in stages]
        late = [sum(self.waiting[x] for x in segments) for segments in stages]
        work = [max(self.work[x] for x in segments) for segments in stages]
        most = 0.0
        for a in schedule.ranks[rank]:
            if a in told:
                now -= sum(map(nbytes, told[a]))
                get(a.kind[-1], a.peer or 0, a.microbatch)
                continue
            if a.kind in "FBI":
                for half in "F" if a.kind == "F" else "FB":
                    got.pop((half, a.stage, a.microbatch), None)
                get("F" if a.kind == "F" else "B", a.stage, a.microbatch)
            if a in sent:
                now += nbytes(a)
            elif a.kind == "F":
                now += held[a.stage]
            elif a.kind == "B":
                now -= held[a.stage]
            elif a.kind == "I":
                now += late[a.stage] - held[a.stage]
            elif a.kind == "W":
                now -= (
                    late[a.stage] if a.segment is None else self.waiting[stages[a.stage][a.segment]]
                )
            peak, most = max(peak, now + sum(got.values())), max(most, work[a.stage])
        return peak + most


def even_load(segments: int, ranks: int, F: float = 1.0, I: float = 1.0, W: float = 1.0) -> Load:  # noqa: E741
    """A chain of equal segments, where F, I and W of all segments of a rank take these times and a
    rank holds 1 byte for
    a microbatch: memory is then counted in microbatches of a rank's layers.

    >>> from funcpipe._src.schedule.library import one_f_one_b
    >>> load = even_load(segments=8, ranks=4)
    >>> load.memory(one_f_one_b()(4, 8), 0, [(0, 1), (2, 3), (4, 5), (6, 7)])
    4.0
    """
    share = ranks / segments
    same = lambda x: (x * share,) * segments  # noqa: E731
    flows: dict[Flow, float] = {(("F", s), ("F", s + 1)): 0.0 for s in range(segments - 1)}
    flows |= {(("B", s + 1), ("B", s)): 0.0 for s in range(segments - 1)}
    return Load(
        same(F), same(I + W), same(I), same(W), same(1.0), same(1.0), (0.0,) * segments, flows
    )
