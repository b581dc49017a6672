"""The checker: proves that a table can run, before anything runs.

In: a schedule, with or without transfers, and the edges between its stages.
Out: a ``Report``, or a ScheduleError that names rank, position and action, why, and what to write
instead. Time is linear in the number of actions.

Proven, in this order: every action makes sense and stands on the rank that holds its stage; every
stage runs every microbatch exactly once (`check_actions.py`); every send has one receive, in the
same order at both ends; on its rank every action comes after what it needs (`check_order.py`); no
ranks wait for each other in a circle (`check_deadlock.py`).

The channels are those of NCCL and gloo used one way: a send never blocks, a receive blocks, and
messages of one kind from one rank to another stay in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from funcpipe._src.schedule.actions import Action, Edge, Schedule, chain
from funcpipe._src.schedule.check_actions import check_each_action, check_runs_once
from funcpipe._src.schedule.check_deadlock import check_deadlock
from funcpipe._src.schedule.check_order import check_order, check_pairing
from funcpipe.errors import ScheduleError


@dataclass(frozen=True)
class Report:
    """What a table that passed needs.

    Args:
        peak_live: for every rank the most (stage, microbatch) whose F is done and whose B, or last
            W, is not; 1 for a table of forwards only, where nothing outlives its F.
        peak_waiting: for every rank the most (stage, microbatch) whose I is done and whose last W
            is not.
        messages: how many messages a step sends.
        actions: how many F, B, I and W a step runs.
    """

    peak_live: tuple[int, ...]
    peak_waiting: tuple[int, ...]
    messages: int
    actions: int


def check(
    schedule: Schedule,
    edges: Iterable[Edge] | None = None,
    segments: Sequence[int] | None = None,
) -> Report:
    """Prove that a table can run, or say why not.

    Args:
        schedule: a table; transfers are inserted if it has none.
        edges: what depends on what between stages; a plain chain by default.
        segments: for every stage its number of segments, for tables that schedule W by segment.

    Raises:
        ScheduleError: it cannot; the text has a counterexample.

    >>> from funcpipe._src.schedule.library import one_f_one_b
    >>> check(one_f_one_b()(4, 8))
    Report(peak_live=(4, 3, 2, 1), peak_waiting=(0, 0, 0, 0), messages=48, actions=64)
    >>> from funcpipe._src.schedule.tables import from_table
    >>> check(from_table([["0B0", "0F0"]], name="mine")(1, 1))
    Traceback (most recent call last):
    funcpipe.errors.ScheduleError: mine: rank 0, position 0: 0B0
    comes before 0F0 (position 1), which it needs
      rank 0: [0B0] [0F0]
      why: 0B0 reads what 0F0 makes
      instead: write 0F0 before 0B0
    """
    edges = chain(schedule.stages) if edges is None else frozenset(edges)
    if segments is not None and len(segments) != schedule.stages:
        raise ScheduleError(
            f"{schedule.name}: has {schedule.stages} stages, but segments= counts {len(segments)}"
        )
    check_each_action(schedule)
    check_runs_once(schedule, segments)
    check_pairing(schedule, edges)
    check_order(schedule, edges)
    return _report(check_deadlock(schedule, edges))


def _report(schedule: Schedule) -> Report:
    actions = [action for _, action in schedule.cells()]
    peaks = [_peaks(of_rank) for of_rank in schedule.ranks]
    peak_live = tuple(live for live, _ in peaks)
    if all(action.kind not in ("B", "W") for action in actions):
        peak_live = (1,) * len(peaks)
    return Report(
        peak_live=peak_live,
        peak_waiting=tuple(waiting for _, waiting in peaks),
        messages=sum(action.kind.startswith("SEND") for action in actions),
        actions=sum(action.peer is None for action in actions),
    )


def _peaks(actions: Sequence[Action]) -> tuple[int, int]:
    """The most live (stage, microbatch) of a rank, and the most that wait for W."""
    live = waiting = 0
    peak_live = peak_waiting = 0
    last = _last_backwards(actions)
    for position, action in enumerate(actions):
        if action.kind == "F":
            live += 1
        elif action.kind == "I":
            waiting += 1
        peak_live = max(peak_live, live)
        peak_waiting = max(peak_waiting, waiting)
        if position in last:
            live -= 1
            waiting -= action.kind == "W"
    return peak_live, peak_waiting


def _last_backwards(actions: Sequence[Action]) -> set[int]:
    """The positions of the last backward action of every (stage, microbatch)."""
    last: dict[tuple[int, int], int] = {}
    for position, action in enumerate(actions):
        if action.kind in ("B", "W"):
            last[action.stage, action.microbatch] = position
    return set(last.values())
