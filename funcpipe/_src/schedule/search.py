"""Search: the fastest schedule, and the cut that goes with it, for given costs and memory.

Terms. A *candidate* is a table with its stages. Every named schedule that fits the memory is one,
so that what is found is as fast as the best of them; the others are made by `greedy.py`, over cuts,
placements and policies, from *drafts*: tables with few microbatches, of which the best are varied a
step at a time. All candidates are timed by the same `timeline`. Nothing is random: the same costs
give the same schedule everywhere.

In: a `Load` (times and bytes of every segment) and a cap. Out: `Fitted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

from funcpipe._src.schedule.actions import Action, Schedule
from funcpipe._src.schedule.building_blocks import loop, vee
from funcpipe._src.schedule.catalogue import training
from funcpipe._src.schedule.communication import insert_communication
from funcpipe._src.schedule.costs import Costs, Load, even_load
from funcpipe._src.schedule.greedy import Policy, greedy
from funcpipe._src.schedule.stage_assignment import group
from funcpipe._src.schedule.timeline import timeline
from funcpipe.errors import ScheduleError

Sizes = tuple[int, ...]

# So many times the best third of drafts is gone on with. Together they are varied as long as their
# tables make up so many actions, but no more than so many tables have in which every segment is a
# stage.
_ROUNDS, _ACTIONS, _TABLES = 3, 300_000, 700
# Parts of the cap that policies keep to: they do better with one than with another. The smaller the
# table, the more of them.
_ROOMS, _CELLS = (1.0, 1.15, 0.94, 1.5), 128
# Drafts have as many microbatches as fill and empty the pipeline, and at least so many.
_LEAST = 8


@dataclass(frozen=True)
class Fitted:
    """A schedule and the cut it was made for.

    Args:
        schedule: the table.
        stages: for every stage its segments.
        time: of a step in steady state (`Timeline.period`), in the unit of the costs.
        alone: of a step alone (`Timeline.makespan`).
        memory: the most bytes that a rank holds.
    """

    schedule: Schedule
    stages: tuple[tuple[int, ...], ...]
    time: float
    alone: float
    memory: float


@dataclass(frozen=True)
class Auto:
    """A schedule that is searched for; see `auto`."""

    memory_limit: float | None = None
    costs: Costs | None = None
    __name__ = "auto"

    def __call__(self, ranks: int, microbatches: int) -> Schedule:
        """The table for equal segments and F = I = W (or the costs' F, I and W of segment 0), where
        the memory limit counts microbatches of a rank's layers. A pipeline does not call this but
        ``fit``."""
        if ranks < 1 or microbatches < 1:
            raise ScheduleError(
                f"auto: needs at least 1 rank and 1 microbatch, got {ranks} and {microbatches}"
            )
        times = [self.costs.of(kind, 0) for kind in "FIW"] if self.costs else [1.0, 1.0, 1.0]
        return _search(
            self,
            ranks,
            microbatches,
            even_load(4 * ranks, ranks, *times),
            "balanced",
            None,
            False,
            whole=True,
        ).schedule

    def fit(
        self,
        ranks: int,
        microbatches: int,
        load: Load,
        how: str | Sizes = "balanced",
        placement: Sizes | None = None,
        waits: bool = False,
    ) -> Fitted:
        """The fastest table and cut for a loss.

        Args:
            ranks, microbatches: as for any schedule.
            load: what its segments cost.
            how: "balanced" to choose the cut freely, "even", or how many segments each stage gets.
            placement: the rank of every stage, if that is settled.
            waits: whether ranks wait for each other at the end of a step, so that its time alone
                counts.

        Raises:
            ScheduleError: nothing keeps to the memory limit.
        """
        return _search(self, ranks, microbatches, load, how, placement, waits, whole=False)


def auto(memory_limit: float | None = None, costs: Costs | None = None) -> Auto:
    """The fastest schedule that is found for the costs, with the cut that suits it, under a cap on
    memory.

    Args:
        memory_limit: bytes of activations and residuals that a rank may hold (``plan.memory``'s
            "activations"); where a table is asked for without a loss, as here below, microbatches
            of a rank's layers instead: 1F1B holds P.
        costs: of units and links, from `funcpipe.profile_units` or by hand; by default a unit costs
            its FLOPs, and messages nothing.

    Returns:
        a schedule for ``pipelined(schedule=...)``. It is at least as fast, by these costs, as every
        schedule of the library
        that keeps to the limit: these are among what it chooses from; among equally fast ones it
        holds the least. What counts is a step in steady state (`Timeline.period`); where the step
        makes ranks wait for each other, as clipping does, a step alone (`Timeline.makespan`).

    Raises, when it is laid out:
        ScheduleError: nothing keeps to the memory limit.

    >>> from funcpipe._src.schedule import timeline, unit_costs, zb_h1
    >>> best = auto(memory_limit=4)(4, 8)
    >>> half = unit_costs(F=0.5, I=0.5, W=0.5)
    >>> len(best.placement), timeline(best, half).period <= timeline(zb_h1()(4, 8), unit_costs()).period
    (8, True)
    """
    if memory_limit is not None and not memory_limit > 0:
        raise ScheduleError(f"auto: memory_limit={memory_limit!r}; give a positive number of bytes")
    return Auto(memory_limit, costs)


def _search(
    auto: Auto,
    ranks: int,
    microbatches: int,
    load: Load,
    how: str | Sizes,
    placement: Sizes | None,
    waits: bool,
    whole: bool,
) -> Fitted:
    cap = auto.memory_limit or math.inf
    search = _Search(ranks, microbatches, load, cap, how, placement, waits, whole)
    found = search.best()
    if found is None:
        least = (
            f"; the least that any holds is {search.least:.4g}" if search.least < math.inf else ""
        )
        raise ScheduleError(
            f"auto: no schedule for {ranks} ranks and {microbatches} microbatches keeps to "
            f"memory_limit={auto.memory_limit:.4g}{least}. Raise it, use more microbatches or "
            "smaller ones, or checkpoint the blocks"
        )
    return found


class _Draft(NamedTuple):
    """A greedy table with few microbatches. What is least for the best comes first.

    Args:
        over: the part of the cap by which it is exceeded.
        time: about what a step with all microbatches takes.
        memory: about what a rank holds at most.
        actions: how many the table has.
        sizes, placement, policy, room: what it is made of. The table may hold less than the room
            that the policy keeps to.
    """

    over: float
    time: float
    memory: float
    actions: int
    sizes: Sizes
    placement: Sizes
    policy: Policy
    room: float


@dataclass
class _Search:
    ranks: int
    microbatches: int
    load: Load
    cap: float
    how: str | Sizes
    placement: Sizes | None
    waits: bool
    whole: bool  # tables without W by segment
    least: float = math.inf
    known: dict[tuple, _Draft | None] = field(
        default_factory=dict
    )  # what was drawn, by what it is made of

    def best(self) -> Fitted | None:
        named = [fitted for fitted in self._named() if fitted is not None]
        if any(self.counts(fitted)[0] <= self._bound for fitted in named):
            return min(named, key=self.counts)
        drafts = list(self._drafts())
        most = min(_ACTIONS, _TABLES * 2 * self._some * self.load.segments)
        for _ in range(_ROUNDS):
            drafts = _best_third(drafts)
            drafts = [self._varied(draft, most // _ROUNDS // len(drafts)) for draft in drafts]
        made = [self._greedy(draft) for draft in drafts]
        return min([*named, *filter(None, made)], key=self.counts, default=None)

    def fits(self, memory: float) -> bool:
        """Whether that keeps to the cap."""
        return memory <= self.cap * (1 + 1e-9)

    def counts(self, fitted: Fitted) -> tuple[float, float, float]:
        """What is least for the best. Among equals, which sums of floats do not quite show, memory
        decides, then the time alone."""
        return _rounded(fitted.alone if self.waits else fitted.time), fitted.memory, fitted.alone

    def _stages(self, count: int) -> tuple[tuple[int, ...], ...] | None:
        """The segments of so many stages, unless that is not what was asked for."""
        if count > self.load.segments or (isinstance(self.how, tuple) and len(self.how) != count):
            return None
        total = sum(self.load.F) + sum(self.load.B) or 1.0
        parts = [(f + b) / total for f, b in zip(self.load.F, self.load.B, strict=True)]
        return group([round(1e6 * x) for x in parts], count, self.how)

    def _placed(self, placement: Sizes) -> bool:
        return self.placement is None or placement == self.placement

    def _timed(self, schedule: Schedule, stages: tuple[tuple[int, ...], ...]) -> Fitted | None:
        load = self.load
        sending = insert_communication(schedule, load.edges(stages))
        memory = max(load.memory(sending, rank, stages) for rank in range(self.ranks))
        self.least = min(self.least, memory)
        if not self.fits(memory):
            return None
        line = timeline(
            sending,
            load.cost(stages),
            load.transfer(stages, schedule.placement),
            load.edges(stages),
        )
        return Fitted(schedule, stages, line.period, line.makespan, memory)

    def _named(self) -> Iterator[Fitted | None]:
        """Every schedule of the library."""
        for schedule_fn in training():
            count = len(schedule_fn(self.ranks, 1).placement)
            stages = self._stages(count)
            if stages is not None:
                schedule = schedule_fn(self.ranks, self.microbatches)
                yield self._timed(schedule, stages) if self._placed(schedule.placement) else None

    def _drafts(self) -> Iterator[_Draft]:
        """Policies on the plain cuts, with B whole and with I and W apart."""
        rooms = [
            part * self.cap for part in _ROOMS[: max(1, _CELLS // (self.ranks * self.microbatches))]
        ]
        for placement in [loop(1)(self.ranks), vee()(self.ranks), loop(2)(self.ranks)]:
            stages = self._stages(len(placement))
            if stages is None or not self._placed(placement):
                continue
            sizes = tuple(map(len, stages))
            for policy, apart, room in product(
                self._policies(), (0, self.microbatches), dict.fromkeys(rooms)
            ):
                draft = self._draft(
                    sizes, placement, replace(policy, apart=(apart,) * len(sizes)), room
                )
                if draft is not None:
                    yield draft

    def _policies(self) -> Iterator[Policy]:
        for forward_first, old_first, reserve in product((False, True), repeat=3):
            for flying in (None, 1.0, 2.0):
                if reserve or self.cap < math.inf:
                    yield Policy(forward_first, old_first, reserve, flying, not self.whole)

    @property
    def _bound(self) -> float:
        """What no step is faster than."""
        load = self.load
        back = [min(b, i + w) for b, i, w in zip(load.B, load.I, load.W, strict=True)]
        return _rounded(self.microbatches * (sum(load.F) + sum(back)) / self.ranks)

    @property
    def _some(self) -> int:
        return min(self.microbatches, max(2 * self.ranks, _LEAST))

    def _draft(self, sizes: Sizes, placement: Sizes, policy: Policy, room: float) -> _Draft | None:
        """A draft, unless the policy finds no way. Its time is that with few microbatches, and the
        busiest rank's for the rest."""
        key = (sizes, placement, policy, room)
        if key in self.known:
            return self.known[key]
        some, found = self._some, None
        drawn = greedy("auto", self.load, _grouped(sizes), placement, some, room, policy)
        if drawn is not None:
            time = (drawn.end if self.waits else drawn.period) + (
                self.microbatches - some
            ) * drawn.busy / some
            over = 0.0 if self.fits(drawn.memory) else drawn.memory / self.cap - 1
            found = _Draft(
                over, _rounded(time), drawn.memory, sum(map(len, drawn.schedule.ranks)), *key
            )
        self.known[key] = found
        return found

    def _varied(self, draft: _Draft, actions: int) -> _Draft:
        """A draft after steps that made it better, as many as new tables of so many actions
        show."""
        better: _Draft | None = draft
        while better is not None:
            draft, better = better, None
            for sizes, policy, room in self._steps(draft):
                fresh = (sizes, draft.placement, policy, room) not in self.known
                if fresh and actions <= 0:
                    continue
                other = self._draft(sizes, draft.placement, policy, room)
                if other is None:
                    continue
                actions -= other.actions if fresh else 0
                if other[:3] < draft[:3]:
                    better = other
                    break
        return draft

    def _steps(self, draft: _Draft) -> Iterator[tuple[Sizes, Policy, float]]:
        """What is a step away from a draft: a segment is elsewhere, I and W of a stage are apart
        for more microbatches or for fewer, more or fewer of them are under way, there is more room
        or less."""
        _, _, memory, _, sizes, _, policy, room = draft
        for other in _neighbours(sizes) if self.how == "balanced" else ():
            yield other, policy, room
        apart, most = policy.apart or (), self.microbatches
        for s, k in enumerate(apart):
            for n in dict.fromkeys((k - 1, k + 1, k - 2, k + 2, 0, most)):
                if n in range(most + 1) and n != k:
                    yield sizes, replace(policy, apart=(*apart[:s], n, *apart[s + 1 :])), room
        if policy.in_flight is not None:
            for more in (-0.5, 0.5):
                yield sizes, replace(policy, in_flight=policy.in_flight + more), room
        for part in (0.85, 1.15):
            yield sizes, policy, part * min(room, memory)

    def _greedy(self, draft: _Draft) -> Fitted | None:
        stages = _grouped(draft.sizes)
        drawn = greedy(
            "auto", self.load, stages, draft.placement, self.microbatches, draft.room, draft.policy
        )
        return (
            None
            if drawn is None
            else self._timed(_joined(drawn.schedule, stages, self.load), stages)
        )


def _best_third(drafts: list[_Draft]) -> list[_Draft]:
    """As many of every placement: which is best shows late. Of those that look the same, one."""
    out: dict[tuple, _Draft] = {}
    for draft in sorted(drafts, key=lambda draft: draft[:3]):
        if sum(draft.placement == other.placement for other in out.values()) < max(
            2, len(drafts) // 9
        ):
            out.setdefault((*draft[:6], draft.policy.apart), draft)
    return list(out.values())


def _rounded(time: float) -> float:
    """Without what the order of a sum makes of it."""
    return float(f"{time:.9g}")


def _grouped(sizes: Sizes) -> tuple[tuple[int, ...], ...]:
    return group([1] * sum(sizes), len(sizes), sizes)


def _neighbours(sizes: Sizes) -> Iterator[Sizes]:
    """The cuts with one segment moved, from the largest stages first: to the next stage, then to
    the one behind, by which the stage between slides along."""
    stages = range(len(sizes))
    pairs = [
        (a, b) for a in stages for b in (a - 1, a + 1, a - 2, a + 2) if b in stages and sizes[a] > 1
    ]
    for a, b in sorted(
        pairs, key=lambda pair: (abs(pair[0] - pair[1]), sizes[pair[1]] - sizes[pair[0]], pair)
    ):
        moved = list(sizes)
        moved[a] -= 1
        moved[b] += 1
        yield tuple(moved)


def _joined(schedule: Schedule, stages: Sequence[Sequence[int]], load: Load) -> Schedule:
    """I and all its W right behind it as one B, where B costs no more."""
    cost = load.cost(stages)
    rows = []
    for row in schedule.ranks:
        out: list[Action] = []
        at = 0
        while at < len(row):
            action = row[at]
            behind = row[at + 1 : at + 1 + len(stages[action.stage])] if action.kind == "I" else ()
            weights = _weights(action, behind, len(stages[action.stage]))
            both = action._replace(kind="B")
            if weights and cost(both) <= (cost(action) + sum(map(cost, weights))) * (1 + 1e-9):
                out.append(both)
                at += 1 + len(weights)
            else:
                out.append(action)
                at += 1
        rows.append(tuple(out))
    return replace(schedule, ranks=tuple(rows))


def _weights(action: Action, behind: Sequence[Action], segments: int) -> Sequence[Action]:
    """The W of an I if they stand right behind it, all of them."""
    same = [a for a in behind if a.kind == "W" and a[1:3] == action[1:3]]
    if behind and behind[0] == action._replace(kind="W"):
        return behind[:1]
    return same if len(same) == segments == len(behind) else ()
