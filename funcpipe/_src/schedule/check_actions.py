"""Checks of each action by itself: it makes sense where it stands, and it runs once.

In: a schedule.
Out: nothing, or a ScheduleError for the first violation, with what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from funcpipe._src.schedule.actions import COMMUNICATE, KINDS, Action, Cell, Schedule
from funcpipe._src.schedule.rejection_text import at, rejection
from funcpipe.errors import ScheduleError

_SENSE = (
    "an action names a stage that its rank holds, a microbatch of the step, and a transfer its peer"
)


def check_each_action(schedule: Schedule) -> None:
    """Every stage lies on a rank, every rank holds a stage, every action makes sense in its cell.

    Raises:
        ScheduleError: one of them does not.
    """
    name = schedule.name
    ranks = len(schedule.ranks)
    for stage, rank in enumerate(schedule.placement):
        if not 0 <= rank < ranks:
            raise ScheduleError(
                f"{name}: stage {stage} is placed on rank {rank}, but the table has ranks 0 to "
                f"{ranks - 1}"
            )
    if idle := sorted(set(range(ranks)) - set(schedule.placement)):
        raise ScheduleError(
            f"{name}: rank {idle[0]} holds no stage; use fewer ranks or place a stage there"
        )
    for cell, action in schedule.cells():
        if problem := _problem(action, cell[0], schedule):
            fault, instead = problem
            fault = f"{at(cell)}: {action} {fault}"
            raise rejection(schedule, fault, cell, why=_SENSE, instead=instead)


def _problem(action: Action, rank: int, schedule: Schedule) -> tuple[str, str] | None:
    """What is wrong with an action by itself, and what to write instead; None if nothing."""
    stages = schedule.stages
    microbatches = schedule.microbatches
    placement = schedule.placement
    if action.kind not in KINDS:
        return f"is of unknown kind {action.kind!r}", f"one of {', '.join(KINDS)}"
    if not 0 <= action.stage < stages:
        return f"names stage {action.stage} of {stages}", f"a stage from 0 to {stages - 1}"
    if not 0 <= action.microbatch < microbatches:
        return (
            f"names microbatch {action.microbatch} of {microbatches}",
            f"one from 0 to {microbatches - 1}",
        )
    if placement[action.stage] != rank:
        holder = placement[action.stage]
        return f"is of stage {action.stage}, which rank {holder} holds", f"move it to rank {holder}"
    if action.segment is not None and action.kind != "W":
        return "names a segment", "only W is scheduled by segment; leave the segment out"
    if action.kind not in COMMUNICATE:
        if action.peer is None:
            return None
        return "names a peer", "only transfers have a peer; leave it out"
    if action.peer is None or not 0 <= action.peer < stages:
        return (
            f"goes to stage {action.peer}",
            f"name the stage at its other end, from 0 to {stages - 1}",
        )
    if placement[action.peer] == rank:
        return (
            f"goes to stage {action.peer} on the same rank",
            "leave it out: a rank needs no message for what it has",
        )
    return None


def check_runs_once(schedule: Schedule, segments: Sequence[int] | None = None) -> None:
    """Every stage runs F of every microbatch once, and then either B once, or I once and W once.

    A table without any B, I and W is forward only. W may be of the whole stage or by segment;
    without ``segments`` a stage is taken to have as many as its actions name.

    Raises:
        ScheduleError: an action is missing, or stands twice.
    """
    cell_of: dict[Action, Cell] = {}
    for cell, action in schedule.cells():
        first = cell_of.setdefault(action, cell)
        if first != cell:
            raise _twice(schedule, action, first, cell)
    counts = _segment_counts(schedule, cell_of, segments)
    backward = any(action.kind in ("B", "I", "W") for action in cell_of)
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            there = _StageActions(schedule, cell_of, stage, microbatch, counts[stage])
            there.check_forward()
            if backward:
                there.check_backward()


def _twice(schedule: Schedule, action: Action, first: Cell, second: Cell) -> ScheduleError:
    rank, position = second
    instead = "leave one out"
    # The same action of another microbatch, if it is absent, is probably the one that was meant.
    for microbatch in range(schedule.microbatches):
        meant = action._replace(microbatch=microbatch)
        if meant not in schedule.ranks[first[0]]:
            instead += f", or make it {meant}, which is nowhere in the list"
            break
    return rejection(
        schedule,
        f"rank {rank} has {action} twice, at positions {first[1]} and {position}",
        first,
        second,
        why="every action of a microbatch runs once",
        instead=instead,
    )


def _segment_counts(
    schedule: Schedule,
    cell_of: dict[Action, Cell],
    segments: Sequence[int] | None,
) -> list[int]:
    """For every stage its number of segments: the given one, or as many as its actions name."""
    counts = [0] * schedule.stages if segments is None else list(segments)
    for action, cell in cell_of.items():
        if action.segment is None:
            continue
        count = counts[action.stage]
        if segments is not None and action.segment >= count:
            raise rejection(
                schedule,
                f"{at(cell)}: {action} names segment {action.segment} of {count}",
                cell,
                why=f"stage {action.stage} has {count} segment{'s' * (count != 1)}",
                instead=f"a segment from 0 to {count - 1}, or W of the whole stage",
            )
        counts[action.stage] = max(count, action.segment + 1)
    return counts


class _StageActions:
    """What a table has of one stage and microbatch."""

    def __init__(
        self,
        schedule: Schedule,
        cell_of: dict[Action, Cell],
        stage: int,
        microbatch: int,
        segments: int,
    ) -> None:
        self.schedule = schedule
        self.cell_of = cell_of
        self.rank = schedule.placement[stage]
        self.forward = Action("F", stage, microbatch)
        self.backward = Action("B", stage, microbatch)
        self.input_grad = Action("I", stage, microbatch)
        self.weight_grad = Action("W", stage, microbatch)
        self.segment_grads = [self.weight_grad._replace(segment=nth) for nth in range(segments)]

    def check_forward(self) -> None:
        if self.forward not in self.cell_of:
            raise self._lacks(f"{self.forward}", "every stage runs F of every microbatch once")

    def check_backward(self) -> None:
        """Refuse a stage that leaves a part of the backward out, or does a part twice."""
        whole_w = self.weight_grad in self.cell_of
        some = [action for action in self.segment_grads if action in self.cell_of]
        weights = [self.weight_grad] if whole_w else some
        if self.backward in self.cell_of:
            for other in (self.input_grad, *weights):
                if other in self.cell_of:
                    raise self._both(self.backward, other, "B is I and W in one")
            return
        if self.input_grad not in self.cell_of:
            absent = f"{self.input_grad}"
            if not weights:
                absent = f"{self.backward} (or {self.input_grad} and {self.weight_grad})"
            why = "some action in the table is a backward, so every microbatch needs its own"
            raise self._lacks(absent, why, self.forward)
        if whole_w and some:
            why = "W without a segment is W of all segments"
            raise self._both(self.weight_grad, some[0], why)
        if not whole_w and len(some) < max(len(self.segment_grads), 1):
            missing = [action for action in self.segment_grads if action not in self.cell_of]
            first = missing[0] if some else self.weight_grad
            why = "I leaves the weight gradients to W"
            raise self._lacks(f"{first}", why, self.input_grad, *some)

    def _lacks(self, absent: str, why: str, *present: Action) -> ScheduleError:
        where = f"behind {present[-1]}" if present else f"on rank {self.rank}"
        cells = [self.cell_of[action] for action in present]
        fault = f"rank {self.rank} never runs {absent}"
        instead = f"write {absent} {where}"
        return rejection(self.schedule, fault, *cells, why=why, instead=instead)

    def _both(self, one: Action, other: Action, why: str) -> ScheduleError:
        cells = (self.cell_of[one], self.cell_of[other])
        fault = f"rank {self.rank} has both {one} and {other}"
        return rejection(self.schedule, fault, *cells, why=why, instead="leave one out")
