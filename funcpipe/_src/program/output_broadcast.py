"""Heads: what one place on the pipe axis makes of a loss and all ranks need: total and weight,
averages and rows in aux.

They travel as messages, sent soon after the last summand, and received where what a place receives
anyway tells that they have been sent; at the end of its program where nothing does. So no rank
waits for another to end: one that is done goes on to its optimizer and to the next step while
others still work on this one. Where steps follow one another, what a rank idles at the end of one
and at the beginning of the next is then filled, unless all idle there (`Timeline.period`).

Their actions, ``SEND_H`` and ``RECV_H``, stand in programs alone: no schedule has them.

In: a schedule, and which stage makes which head. Out: rows, and where among the actions of a place
they stand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program.instructions import RECV, SEND, Name, Row
from funcpipe._src.schedule.actions import COMPUTE, Action, Schedule
from funcpipe._src.schedule.communication import message_of
from funcpipe._src.schedule.simulate_transfers import simulate_transfers


class Head(NamedTuple):
    """What travels: the stage that makes it, and what it looks like."""

    stage: int
    value: Value


def messages(schedule: Schedule, place: int, heads: Mapping[Name, Head]) -> dict[int, list[Row]]:
    """The rows of a place that bring every head to every place, by the number of the action before
    which they stand.

    Args:
        schedule: with its sends and receives.
        place: on the pipe axis.
        heads: by name: ``("head", number)`` or ``("row", number, microbatch)``; in the same order
            on all ranks.
    """
    made: dict[int, dict[Name, Head]] = defaultdict(dict)
    for name, head in heads.items():
        made[schedule.placement[head.stage]][name] = head
    out: dict[int, list[Row]] = defaultdict(list)
    for maker, some in sorted(made.items()):
        at = _ready(schedule.ranks[maker], {head.stage for head in some.values()})
        if maker == place:
            others = [p for p in range(len(schedule.ranks)) if p != place]
            out[at] += [_message(SEND, schedule, place, other, some) for other in others]
        else:
            out[_known(schedule, maker, at)[place]].append(
                _message(RECV, schedule, place, maker, some)
            )
    return out


def _message(
    op: str, schedule: Schedule, place: int, other: int, heads: Mapping[Name, Head]
) -> Row:
    here, there = (schedule.placement.index(p) for p in (place, other))
    reads, writes = (tuple(heads), ()) if op == SEND else ((), tuple(heads))
    action = Action(f"{op.upper()}_H", here, 0, peer=there)
    return Row(op, action, reads, writes, values=tuple(h.value for h in heads.values()), peer=other)


def _ready(row: Sequence[Action], stages: Set[int]) -> int:
    """Behind the action that follows the last forward of these stages: F and B of the last segment
    stay back to back, and may be one unit."""
    done = max(k for k, a in enumerate(row) if a.kind == "F" and a.stage in stages)
    for k in range(done + 1, len(row)):
        if row[k].kind in COMPUTE or row[k].kind.startswith("RECV"):
            return k + (row[k].kind in COMPUTE)
    return len(row)


def _known(schedule: Schedule, maker: int, at: int) -> list[int]:
    """For every place the number of actions after which it knows that a place has come to its
    action ``at``."""
    out = [len(row) for row in schedule.ranks]
    known, carried = [False] * len(out), {}
    for place, k in simulate_transfers(schedule).order:
        action = schedule.ranks[place][k]
        if place == maker:
            known[place] = k >= at
        if action.kind.startswith("SEND"):
            carried[message_of(action)] = known[place]
        elif action.kind.startswith("RECV") and carried[message_of(action)] and not known[place]:
            known[place], out[place] = True, k + 1
    return out
