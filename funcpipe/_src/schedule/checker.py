"""The proof that a table can run: everything once, everything in time, every message paired, no
deadlock.

What is proven, in this order, before anything runs: every action makes sense and stands on the rank
that holds its stage; every stage runs every microbatch exactly once; on its rank every action comes
after what it needs; every send has one receive, in the same order at both ends; no ranks wait for
each other in a circle.
The channels are those of NCCL and gloo used one way: a send never blocks, messages on a channel
(from rank, to rank, kind) stay in order, a receive blocks.

In: a schedule, with or without transfers, and the edges between its stages. Out: a ``Report``, or a
ScheduleError that names rank, position and action, why, and what to write instead. Time is linear
in the number of actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from funcpipe._src.schedule import check_actions as rules
from funcpipe._src.schedule.actions import Action, Edge, Schedule, chain
from funcpipe._src.schedule.check_deadlock import ends
from funcpipe._src.schedule.check_order import order, pairing
from funcpipe.errors import ScheduleError


@dataclass(frozen=True)
class Report:
    """What a table that passed needs.

    Args:
        peak_live: for every rank the most (stage, microbatch) whose F is done and whose B, or all
            of whose W, is not. Forward only, nothing outlives its F: 1.
        peak_waiting: for every rank the most (stage, microbatch) whose I is done and whose W is
            not.
        messages: how many messages a step sends.
        actions: how many F, B, I and W a step runs.
    """

    peak_live: tuple[int, ...]
    peak_waiting: tuple[int, ...]
    messages: int
    actions: int


def check(
    schedule: Schedule, edges: Iterable[Edge] | None = None, segments: Sequence[int] | None = None
) -> Report:
    """Prove that a table can run, or say why not.

    Args:
        schedule: a table; transfers are put in if it has none.
        edges: what depends on what between stages; a plain chain by default.
        segments: for every stage its number of segments, for tables that schedule W by segment.

    Raises: ScheduleError with a counterexample in words.

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
    rules.shape(schedule)
    rules.units(schedule, segments)
    pairing(schedule, edges)
    order(schedule, edges)
    return _report(ends(schedule, edges))


def _report(schedule: Schedule) -> Report:
    every = [action for actions in schedule.ranks for action in actions]
    backward = any(action.kind in "BW" for action in every)
    peaks = [_peaks(actions) for actions in schedule.ranks]
    return Report(
        peak_live=tuple(live for live, _ in peaks) if backward else (1,) * len(peaks),
        peak_waiting=tuple(waiting for _, waiting in peaks),
        messages=sum(action.kind.startswith("SEND") for action in every),
        actions=sum(action.peer is None for action in every),
    )


def _peaks(actions: Sequence[Action]) -> tuple[int, int]:
    """The most live (stage, microbatch) of a rank, and the most that wait for W."""
    live = waiting = peak_live = peak_waiting = 0
    final = set(_finals(actions))
    for position, action in enumerate(actions):
        live += action.kind == "F"
        waiting += action.kind == "I"
        peak_live, peak_waiting = max(peak_live, live), max(peak_waiting, waiting)
        if position in final:
            live -= 1
            waiting -= action.kind == "W"
    return peak_live, peak_waiting


def _finals(actions: Sequence[Action]) -> Iterator[int]:
    """The positions of the last backward action of every (stage, microbatch)."""
    last = {
        (a.stage, a.microbatch): position
        for position, a in enumerate(actions)
        if a.kind in ("B", "W")
    }
    yield from last.values()
