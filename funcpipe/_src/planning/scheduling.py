"""Scheduling: the table of actions of a call, and which segments each stage holds.

The stage knows costs as numbers; it sees no graph, tensor or param.

In: the pipeline that transforms ask for, costs of segments. Out: `ChosenSchedule`, the same for all
ranks; then, for ranks of one set of local shapes, a `CheckedSchedule` with sends and receives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from funcpipe._src.core.describe_value import describe
from funcpipe._src.schedule.actions import Edge, Schedule
from funcpipe._src.schedule.checker import Report, check
from funcpipe._src.schedule.communication import insert_communication
from funcpipe._src.schedule.costs import Costs, Load
from funcpipe._src.schedule.library import one_f_one_b
from funcpipe._src.schedule.search import Auto
from funcpipe._src.schedule.stage_assignment import group
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import ScheduleError

Stages = tuple[tuple[int, ...], ...]  # for every stage its segments


@dataclass(frozen=True)
class LossCosts:
    """What a search or a balanced grouping may know of a loss function.

    Args:
        flops: of every segment, forward and backward.
        load: what its segments cost and hold, given costs of units (None: their FLOPs).
        waits: whether ranks wait for each other behind the last backward.
    """

    flops: Sequence[int]
    load: Callable[[Costs | None], Load]
    waits: bool


@dataclass(frozen=True)
class ChosenSchedule:
    """A table of actions without sends and receives, and the segments of its stages."""

    table: Schedule
    stages: Stages


@dataclass(frozen=True, eq=False)
class CheckedSchedule:
    """The schedule of a call, checked.

    Args:
        stages: for every stage its segments.
        table: every rank's actions, with sends and receives.
        edges: what depends on what between stages.
        report: what the checker found.
    """

    stages: Stages
    table: Schedule
    edges: frozenset[Edge]
    report: Report

    def __str__(self) -> str:
        lines = [
            f"{self.table.name}: {self.report.actions} actions, {self.report.messages} messages"
        ]
        for stage, segments in enumerate(self.stages):
            rank = self.table.placement[stage]
            lines.append(f"  stage {stage} on pipeline rank {rank}: segments {span(segments)}")
        for rank, actions in enumerate(self.table.ranks):
            lines.append(f"  pipeline rank {rank}: {' '.join(map(str, actions))}")
        return "\n".join(lines)


def lay_out_schedule(resolved: ResolvedStep, microbatches: int) -> Schedule | None:
    """The table that a schedule function lays out; None where `fp.schedules.auto` will search for
    one when costs are known.

    Raises:
        ScheduleError: the function returns no table, or one that does not fit.
    """
    schedule_fn = resolved.pipeline.schedule if resolved.pipeline else one_f_one_b()
    if isinstance(schedule_fn, Auto):
        return None
    table = schedule_fn(resolved.ranks, microbatches)
    if not isinstance(table, Schedule):
        raise ScheduleError(
            f"the schedule function returned {describe(table)}, not an "
            "fp.schedules.Schedule; fp.schedules.from_table(rows) makes one from rows of "
            "actions"
        )
    if len(table.ranks) != resolved.ranks or table.microbatches != microbatches:
        raise ScheduleError(
            f"{table.name}: is a table for {len(table.ranks)} ranks and "
            f"{table.microbatches} microbatches, but axis {resolved.pipe_axis!r} has "
            f"{resolved.ranks} ranks and the batch {microbatches} microbatches"
        )
    if not _has(table, "BW"):
        raise ScheduleError(
            f"{table.name}: has no backward actions, but value_and_grad needs gradients"
        )
    return table


def separates_w(table: Schedule | None) -> bool:
    """Whether I and W may be actions of their own."""
    return table is None or _has(table, "IW")


def _has(table: Schedule, kinds: str) -> bool:
    actions = itertools.chain.from_iterable(table.ranks)
    return any(action.kind in kinds for action in actions)


def choose_schedule(
    resolved: ResolvedStep,
    table: Schedule | None,
    costs: LossCosts,
    microbatches: int,
    earlier: ChosenSchedule | None,
) -> ChosenSchedule:
    """The table and the stages of a call.

    Args:
        table: None to search for one.
        earlier: what was chosen for another shape of batch, whose stages are kept.

    Raises:
        CutError: fewer segments than stages.
        ScheduleError: a search finds nothing within its memory limit.
    """
    grouping = resolved.pipeline.stages if resolved.pipeline else "even"
    if table is not None:
        stages = earlier.stages if earlier else group(costs.flops, table.stages, grouping)
        return ChosenSchedule(table, stages)
    assert resolved.pipeline is not None
    search = resolved.pipeline.schedule
    assert isinstance(search, Auto)
    placement = None
    if earlier is not None:
        grouping, placement = tuple(map(len, earlier.stages)), earlier.table.placement
    load = costs.load(resolved.measured or search.costs)
    found = search.fit(resolved.ranks, microbatches, load, grouping, placement, costs.waits)
    return ChosenSchedule(found.schedule, found.stages)


def check_schedule(chosen: ChosenSchedule, edges: frozenset[Edge]) -> CheckedSchedule:
    """The schedule with its sends and receives.

    Args:
        edges: what depends on what between stages.

    Raises:
        ScheduleError: a dependency is missed, or ranks wait for each other.
    """
    table = insert_communication(chosen.table, edges)
    report = check(table, edges, [len(segments) for segments in chosen.stages])
    return CheckedSchedule(chosen.stages, table, edges, report)


def span(numbers: Sequence[int]) -> str:
    """Neighbouring numbers as text.

    >>> span([3]), span([3, 4, 5])
    ('3', '3-5')
    """
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
