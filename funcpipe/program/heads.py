"""Heads: what one place on the pipe axis makes of a loss and all ranks need: total and weight, averages and rows in aux.

They travel as messages. A place sends them soon after the last summand, and the others receive them at the very end of their
programs, when they have long arrived. So no rank waits for another to end: one that is done goes on to its optimizer and to the
next step while others still work on this one. Where steps follow one another, what a rank idles at the end of one and at the
beginning of the next is then filled, unless all idle there (`Timeline.period`).

In: the rows of a place, and which place makes which head. Out: the rows with those messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from funcpipe.graph.code import Value
from funcpipe.program.instructions import RECV, RUN, SEND, Name, Row
from funcpipe.schedule.actions import Action


class Head(NamedTuple):
    """What travels: the place that makes it, and what it looks like."""

    place: int
    value: Value


def share(rows: Sequence[Row], place: int, heads: Mapping[Name, Head], firsts: Sequence[int]) -> list[Row]:
    """The rows of a place with the messages that bring every head to every place.

    Args:
        rows: of the place.
        place: which one.
        heads: by name: ``("head", number)`` or ``("row", number, microbatch)``; in the same order on all ranks.
        firsts: for every place its first stage, under whose name the messages go.
    """
    out = list(rows)
    others = [p for p in range(len(firsts)) if p != place]
    if mine := {n: h for n, h in heads.items() if h.place == place}:
        at = _after(rows, mine)
        out[at:at] = [_message(SEND, place, other, mine, firsts) for other in others]
    for other in others:
        if theirs := {n: h for n, h in heads.items() if h.place == other}:
            out.append(_message(RECV, place, other, theirs, firsts))
    return out


def _message(op: str, place: int, other: int, heads: Mapping[Name, Head], firsts: Sequence[int]) -> Row:
    action = Action(f"{op.upper()}_H", firsts[place], 0, peer=firsts[other])
    names = tuple(heads)
    reads, writes = (names, ()) if op == SEND else ((), names)
    return Row(op, action, reads, writes, values=tuple(h.value for h in heads.values()), peer=other)


def _after(rows: Sequence[Row], names: Mapping[Name, Head]) -> int:
    """Behind the action that follows the last summand: F and B of the last segment stay back to back, and may be one unit."""
    done = max(k for k, row in enumerate(rows) if not names.keys().isdisjoint(row.writes))
    actions = {rows[done].action}
    for k in range(done + 1, len(rows)):
        if rows[k].op not in (RUN, RECV) or rows[k].action in actions:
            continue
        if len(actions) == 2 or rows[k].op == RECV:
            return k
        actions.add(rows[k].action)
    return len(rows)
