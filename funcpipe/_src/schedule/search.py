"""Search: the fastest schedule, and the cut that goes with it, for given costs and memory.

In: a `Load` (times and bytes of every segment) and a memory limit.
Out: a `Fitted`: a table with its stages.

Every schedule of the library that keeps to the memory limit is a candidate, so what is found is as
fast as the best of them. The other candidates are greedy tables over cuts, placements and policies;
`search_drafts.py` finds out which are worth making. All candidates are timed by the same
`timeline`. Nothing is random: the same costs give the same schedule everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from funcpipe._src.schedule.actions import Action, Schedule
from funcpipe._src.schedule.catalogue import training
from funcpipe._src.schedule.communication import insert_communication
from funcpipe._src.schedule.costs import Costs, Load, TimeOf, even_load
from funcpipe._src.schedule.search_drafts import (
    Draft,
    Drafts,
    Problem,
    Sizes,
    Stages,
    best_third,
    grouped,
    rounded,
)
from funcpipe._src.schedule.timeline import timeline
from funcpipe.errors import ScheduleError

# So many times the best third of the drafts is kept and improved. New tables of all rounds together
# have about so many actions, but no more than so many tables in which every segment is a stage.
_ROUNDS = 3
_ACTIONS = 300_000
_TABLES = 700


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
    stages: Stages
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
        """The table for equal segments.

        F, I and W take the same time, or that of the costs' segment 0. The memory limit counts
        microbatches of a rank's layers. Pipelines call ``fit`` instead.
        """
        if ranks < 1 or microbatches < 1:
            raise ScheduleError(
                f"auto: needs at least 1 rank and 1 microbatch, got {ranks} and {microbatches}"
            )
        times = [1.0, 1.0, 1.0]
        if self.costs:
            times = [self.costs.of(kind, 0) for kind in "FIW"]
        load = even_load(4 * ranks, ranks, *times)
        problem = self._problem(ranks, microbatches, load, whole_w=True)
        return self._found(problem).schedule

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
        return self._found(self._problem(ranks, microbatches, load, how, placement, waits))

    def _problem(
        self,
        ranks: int,
        microbatches: int,
        load: Load,
        how: str | Sizes = "balanced",
        placement: Sizes | None = None,
        waits: bool = False,
        whole_w: bool = False,
    ) -> Problem:
        limit = self.memory_limit or math.inf
        return Problem(ranks, microbatches, load, limit, how, placement, waits, whole_w)

    def _found(self, problem: Problem) -> Fitted:
        search = _Search(problem)
        found = search.best()
        if found is not None:
            return found
        least = ""
        if search.least_memory < math.inf:
            least = f"; the least that any holds is {search.least_memory:.4g}"
        raise ScheduleError(
            f"auto: no schedule for {problem.ranks} ranks and {problem.microbatches} microbatches "
            f"keeps to memory_limit={self.memory_limit:.4g}{least}. Raise it, use more "
            "microbatches or smaller ones, or checkpoint the blocks"
        )


def auto(memory_limit: float | None = None, costs: Costs | None = None) -> Auto:
    """The fastest schedule that is found for the costs, with the cut that suits it.

    By these costs it is at least as fast as every schedule of the library that keeps to the memory
    limit, since these are candidates. Among equally fast ones it holds the least. What counts is a
    step in steady state (`Timeline.period`); where the step makes ranks wait for each other, as
    clipping does, a step alone (`Timeline.makespan`).

    Args:
        memory_limit: bytes of activations and residuals that a rank may hold (``plan.memory``'s
            "activations"). Where a table is asked for without a loss, as in the example, it counts
            microbatches of a rank's layers instead: 1F1B holds P.
        costs: of units and links, from `funcpipe.profile_units` or by hand; by default a unit costs
            its FLOPs, and messages nothing.

    Returns:
        a schedule for ``pipelined(schedule=...)``.

    Raises, when it is laid out:
        ScheduleError: nothing keeps to the memory limit.

    >>> from funcpipe._src.schedule import timeline, unit_costs, zb_h1
    >>> best = auto(memory_limit=4)(4, 8)
    >>> period = timeline(best, unit_costs(F=0.5, I=0.5, W=0.5)).period
    >>> len(best.placement), period <= timeline(zb_h1()(4, 8), unit_costs()).period
    (8, True)
    """
    if memory_limit is not None and not memory_limit > 0:
        raise ScheduleError(f"auto: memory_limit={memory_limit!r}; give a positive number of bytes")
    return Auto(memory_limit, costs)


class _Search:
    """The candidates for a problem.

    Attributes:
        least_memory: the least that any candidate held, also of those that did not fit.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.drafts = Drafts(problem)
        self.least_memory = math.inf

    def best(self) -> Fitted | None:
        """The fastest candidate, or None if none keeps to the memory limit."""
        candidates = self._named()
        if any(self._merit(fitted)[0] <= self.problem.least_time for fitted in candidates):
            return min(candidates, key=self._merit)
        for draft in self._best_drafts():
            fitted = self._from_draft(draft)
            if fitted is not None:
                candidates.append(fitted)
        return min(candidates, key=self._merit, default=None)

    def _merit(self, fitted: Fitted) -> tuple[float, float, float]:
        """What is least for the best: the time, then the memory, then the time of a step alone."""
        time = fitted.alone if self.problem.waits else fitted.time
        return rounded(time), fitted.memory, fitted.alone

    def _named(self) -> list[Fitted]:
        """The schedules of the library that keep to the memory limit."""
        problem = self.problem
        fitting = []
        for schedule_fn in training():
            placement = schedule_fn(problem.ranks, 1).placement
            stages = problem.stages(len(placement))
            if stages is None or not problem.allows(placement):
                continue
            schedule = schedule_fn(problem.ranks, problem.microbatches)
            fitted = self._timed(schedule, stages)
            if fitted is not None:
                fitting.append(fitted)
        return fitting

    def _timed(self, schedule: Schedule, stages: Stages) -> Fitted | None:
        """A candidate, unless it exceeds the memory limit."""
        load = self.problem.load
        edges = load.edges(stages)
        sending = insert_communication(schedule, edges)
        held = [load.memory(sending, rank, stages) for rank in range(self.problem.ranks)]
        memory = max(held)
        self.least_memory = min(self.least_memory, memory)
        if not self.problem.fits(memory):
            return None
        transfer = load.transfer(stages, schedule.placement)
        line = timeline(sending, load.cost(stages), transfer, edges)
        return Fitted(schedule, stages, line.period, line.makespan, memory)

    def _best_drafts(self) -> list[Draft]:
        problem = self.problem
        drafts = list(self.drafts.first_drafts())
        per_table = 2 * problem.few_microbatches * problem.load.segments
        actions = min(_ACTIONS, _TABLES * per_table)
        for _ in range(_ROUNDS):
            drafts = best_third(drafts)
            share = actions // _ROUNDS // max(len(drafts), 1)
            drafts = [self.drafts.improved(draft, share) for draft in drafts]
        return drafts

    def _from_draft(self, draft: Draft) -> Fitted | None:
        table = self.drafts.table(
            draft.sizes,
            draft.placement,
            draft.policy,
            draft.policy_limit,
            self.problem.microbatches,
        )
        if table is None:
            return None
        stages = grouped(draft.sizes)
        joined = _join_backwards(table.schedule, stages, self.problem.load.cost(stages))
        return self._timed(joined, stages)


def _join_backwards(schedule: Schedule, stages: Stages, cost: TimeOf) -> Schedule:
    """The schedule in which I and all its W right behind it are one B, where B costs no more."""
    ranks = []
    for actions in schedule.ranks:
        joined: list[Action] = []
        position = 0
        while position < len(actions):
            action = actions[position]
            segments = len(stages[action.stage])
            weight_grads = _weight_grads(actions, position, segments)
            both = action._replace(kind="B")
            apart = cost(action) + sum(map(cost, weight_grads))
            if weight_grads and cost(both) <= apart * (1 + 1e-9):
                joined.append(both)
                position += 1 + len(weight_grads)
            else:
                joined.append(action)
                position += 1
        ranks.append(tuple(joined))
    return replace(schedule, ranks=tuple(ranks))


def _weight_grads(actions: Sequence[Action], position: int, segments: int) -> Sequence[Action]:
    """The W of an I, if all of them stand right behind it."""
    action = actions[position]
    if action.kind != "I":
        return ()
    behind = actions[position + 1 : position + 1 + segments]
    whole = action._replace(kind="W")
    if behind and behind[0] == whole:
        return behind[:1]
    same = [other for other in behind if other._replace(segment=None) == whole]
    return same if len(same) == segments == len(behind) else ()
