"""Drafts: greedy tables with few microbatches, among which the search looks for the best.

In: a `Problem`: the ranks, microbatches, costs and memory limit of a search.
Out: `Draft` records: what a table is made of, and about what it takes and holds.

The search starts from plain cuts and policies (``first_drafts``), keeps the best third
(``best_third``), and varies those a step at a time (``improved``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

from funcpipe._src.schedule.building_blocks import loop, vee
from funcpipe._src.schedule.costs import Load
from funcpipe._src.schedule.greedy import GreedyTable, Policy, greedy_table
from funcpipe._src.schedule.greedy_costs import StageCosts, stage_costs
from funcpipe._src.schedule.stage_assignment import group

Sizes = tuple[int, ...]
Stages = tuple[tuple[int, ...], ...]

# Policies do better when they keep to another limit than that of the rank, so several parts of it
# are tried: the smaller the table, the more of them.
_LIMIT_PARTS = (1.0, 1.15, 0.94, 1.5)
_CELLS_PER_PART = 128
# Drafts have as many microbatches as fill and empty the pipeline, and at least so many.
_LEAST_MICROBATCHES = 8


@dataclass(frozen=True)
class Problem:
    """What a search is asked for.

    Args:
        ranks, microbatches: as for any schedule.
        load: what segments cost.
        memory_limit: the most bytes that a rank may hold.
        how: "balanced" to choose the cut freely, "even", or how many segments each stage gets.
        placement: the rank of every stage, if that is settled.
        waits: whether ranks wait for each other at the end of a step.
        whole_w: whether tables may not have W by segment.
    """

    ranks: int
    microbatches: int
    load: Load
    memory_limit: float
    how: str | Sizes
    placement: Sizes | None
    waits: bool
    whole_w: bool

    def fits(self, memory: float) -> bool:
        """Whether so many bytes keep to the limit, but for rounding."""
        return memory <= self.memory_limit * (1 + 1e-9)

    def stages(self, count: int) -> Stages | None:
        """The segments of so many stages, or None if ``how`` does not allow so many."""
        load = self.load
        if count > load.segments:
            return None
        if isinstance(self.how, tuple) and len(self.how) != count:
            return None
        times = [forward + back for forward, back in zip(load.F, load.B, strict=True)]
        total = sum(load.F) + sum(load.B) or 1.0
        return group([round(1e6 * (time / total)) for time in times], count, self.how)

    def allows(self, placement: Sizes) -> bool:
        """Whether stages may lie on these ranks."""
        return self.placement is None or placement == self.placement

    @property
    def least_time(self) -> float:
        """No step is faster than this."""
        load = self.load
        split = map(sum, zip(load.I, load.W, strict=True))
        backwards = map(min, load.B, split)
        return rounded(self.microbatches * (sum(load.F) + sum(backwards)) / self.ranks)

    @property
    def few_microbatches(self) -> int:
        """How many microbatches a draft has."""
        return min(self.microbatches, max(2 * self.ranks, _LEAST_MICROBATCHES))


class Draft(NamedTuple):
    """A greedy table with few microbatches. The best one is the least, by the first three fields.

    Args:
        excess: by which part of the memory limit it is exceeded.
        time: about what a step with all microbatches takes.
        memory: about what a rank holds at most.
        actions: how many the table has.
        sizes, placement, policy: what it is made of.
        policy_limit: the memory limit that the policy keeps to; the table may hold less.
    """

    excess: float
    time: float
    memory: float
    actions: int
    sizes: Sizes
    placement: Sizes
    policy: Policy
    policy_limit: float

    @property
    def merit(self) -> tuple[float, float, float]:
        """What is least for the best draft."""
        return self.excess, self.time, self.memory


# What a draft is made of: its sizes, placement, policy and policy limit.
_Key = tuple[Sizes, Sizes, Policy, float]


@dataclass
class Drafts:
    """The drafts of a problem. Each is made once."""

    problem: Problem
    known: dict[_Key, Draft | None] = field(default_factory=dict)
    costs: dict[tuple[Sizes, Sizes], StageCosts] = field(default_factory=dict)

    def first_drafts(self) -> Iterator[Draft]:
        """All policies on the plain cuts, with B whole and with I and W apart."""
        problem = self.problem
        parts = max(1, _CELLS_PER_PART // (problem.ranks * problem.microbatches))
        limits = [part * problem.memory_limit for part in _LIMIT_PARTS[:parts]]
        counts_apart = (0, problem.microbatches)
        for placement_fn in (loop(1), vee(), loop(2)):
            placement = placement_fn(problem.ranks)
            stages = problem.stages(len(placement))
            if stages is None or not problem.allows(placement):
                continue
            sizes = tuple(map(len, stages))
            choices = product(self._policies(), counts_apart, dict.fromkeys(limits))
            for policy, count, limit in choices:
                policy = replace(policy, apart=(count,) * len(sizes))
                draft = self.draft(sizes, placement, policy, limit)
                if draft is not None:
                    yield draft

    def _policies(self) -> Iterator[Policy]:
        by_segment = not self.problem.whole_w
        limited = self.problem.memory_limit < math.inf
        for forward_first, old_first, reserve in product((False, True), repeat=3):
            if not reserve and not limited:
                continue
            for in_flight in (None, 1.0, 2.0):
                yield Policy(forward_first, old_first, reserve, in_flight, by_segment)

    def draft(
        self,
        sizes: Sizes,
        placement: Sizes,
        policy: Policy,
        policy_limit: float,
    ) -> Draft | None:
        """A draft, or None if the policy finds no way."""
        key = (sizes, placement, policy, policy_limit)
        if key not in self.known:
            self.known[key] = self._made(*key)
        return self.known[key]

    def _made(
        self,
        sizes: Sizes,
        placement: Sizes,
        policy: Policy,
        policy_limit: float,
    ) -> Draft | None:
        problem = self.problem
        few = problem.few_microbatches
        table = self.table(sizes, placement, policy, policy_limit, few)
        if table is None:
            return None
        # The microbatches that a draft lacks take as long as the busiest rank computes for them.
        more = problem.microbatches - few
        time = (table.end if problem.waits else table.period) + more * table.busy / few
        fits = problem.fits(table.memory)
        return Draft(
            excess=0.0 if fits else table.memory / problem.memory_limit - 1,
            time=rounded(time),
            memory=table.memory,
            actions=sum(map(len, table.schedule.ranks)),
            sizes=sizes,
            placement=placement,
            policy=policy,
            policy_limit=policy_limit,
        )

    def table(
        self,
        sizes: Sizes,
        placement: Sizes,
        policy: Policy,
        policy_limit: float,
        microbatches: int,
    ) -> GreedyTable | None:
        """The greedy table of a draft, with so many microbatches."""
        key = (sizes, placement)
        if key not in self.costs:
            self.costs[key] = stage_costs(self.problem.load, grouped(sizes), placement)
        return greedy_table("auto", self.costs[key], microbatches, policy_limit, policy)

    def improved(self, draft: Draft, actions: int) -> Draft:
        """A draft after steps that made it better; new tables have so many actions together."""
        better: Draft | None = draft
        while better is not None:
            draft, better = better, None
            for sizes, policy, policy_limit in self._steps(draft):
                key = (sizes, draft.placement, policy, policy_limit)
                fresh = key not in self.known
                if fresh and actions <= 0:
                    continue
                other = self.draft(*key)
                if other is None:
                    continue
                if fresh:
                    actions -= other.actions
                if other.merit < draft.merit:
                    better = other
                    break
        return draft

    def _steps(self, draft: Draft) -> Iterator[tuple[Sizes, Policy, float]]:
        """What is a step away from a draft: its sizes, policy, or policy limit differ."""
        sizes, policy, limit = draft.sizes, draft.policy, draft.policy_limit
        if self.problem.how == "balanced":
            for other in _neighbours(sizes):
                yield other, policy, limit
        for apart in self._neighbours_apart(policy.apart or ()):
            yield sizes, replace(policy, apart=apart), limit
        if policy.in_flight is not None:
            for more in (-0.5, 0.5):
                yield sizes, replace(policy, in_flight=policy.in_flight + more), limit
        for part in (0.85, 1.15):
            yield sizes, policy, part * min(limit, draft.memory)

    def _neighbours_apart(self, apart: Sizes) -> Iterator[Sizes]:
        """I and W of one stage are apart for more microbatches, or for fewer."""
        most = self.problem.microbatches
        for stage, count in enumerate(apart):
            near = (count - 1, count + 1, count - 2, count + 2, 0, most)
            for other in dict.fromkeys(near):
                if 0 <= other <= most and other != count:
                    yield (*apart[:stage], other, *apart[stage + 1 :])


def best_third(drafts: list[Draft]) -> list[Draft]:
    """The best drafts, of every placement as many: which placement is best shows late.

    Of drafts that look the same, one is kept.
    """
    best: dict[tuple, Draft] = {}
    most = max(2, len(drafts) // 9)  # there are three placements
    for draft in sorted(drafts, key=lambda draft: draft.merit):
        alike = [other for other in best.values() if other.placement == draft.placement]
        if len(alike) < most:
            look = (*draft.merit, draft.actions, draft.sizes, draft.placement, draft.policy.apart)
            best.setdefault(look, draft)
    return list(best.values())


def rounded(time: float) -> float:
    """The time without the digits that depend on the order of a sum."""
    return float(f"{time:.9g}")


def grouped(sizes: Sizes) -> Stages:
    """The segments of stages of given sizes.

    >>> grouped((1, 2))
    ((0,), (1, 2))
    """
    return group([1] * sum(sizes), len(sizes), sizes)


def _neighbours(sizes: Sizes) -> Iterator[Sizes]:
    """The cuts with one segment moved, from the largest stages first.

    A segment moves to the next stage, or past it: then the stage between slides along.
    """
    moves = []
    for source, size in enumerate(sizes):
        if size == 1:
            continue
        for target in (source - 1, source + 1, source - 2, source + 2):
            if 0 <= target < len(sizes):
                difference = sizes[target] - size
                moves.append((abs(source - target), difference, source, target))
    for _, _, source, target in sorted(moves):
        moved = list(sizes)
        moved[source] -= 1
        moved[target] += 1
        yield tuple(moved)
