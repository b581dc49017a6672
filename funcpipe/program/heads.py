"""Heads: the sums that one place on the pipe axis makes and all ranks need: total and weight of the loss, averages in aux.

They travel as messages. A place sends its sums soon after the last summand, and the others receive them at the very end of their
programs, when they have long arrived. So no rank waits for another to end: one that is done goes on to its optimizer and to the
next step while others still work on this one, and where steps follow one another, what a rank idles at the end of one and at the
beginning of the next is no loss as long as it idles there alone.

In: the rows of a place, and which place makes which head. Out: the rows with those messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from funcpipe.graph.code import Value
from funcpipe.program.instructions import RECV, RUN, SEND, Row
from funcpipe.schedule.actions import Action


def share(
    rows: Sequence[Row], place: int, made: Mapping[int, int], values: Sequence[Value], firsts: Sequence[int]
) -> list[Row]:
    """The rows of a place with the messages that bring every head to every place.

    Args:
        rows: of the place.
        place: which one.
        made: for every head that is summed, the place that makes it.
        values: by head.
        firsts: for every place its first stage, under whose name the messages go.
    """
    out = list(rows)
    mine = tuple(h for h in sorted(made) if made[h] == place)
    if mine:
        at = _after(rows, mine)
        out[at:at] = [_message(SEND, place, other, mine, values, firsts) for other in _others(place, firsts)]
    for other in _others(place, firsts):
        if theirs := tuple(h for h in sorted(made) if made[h] == other):
            out.append(_message(RECV, place, other, theirs, values, firsts))
    return out


def _others(place: int, firsts: Sequence[int]) -> list[int]:
    return [p for p in range(len(firsts)) if p != place]


def _message(
    op: str, place: int, other: int, heads: tuple[int, ...], values: Sequence[Value], firsts: Sequence[int]
) -> Row:
    names = tuple(("head", h) for h in heads)
    action = Action(f"{op.upper()}_H", firsts[place], 0, peer=firsts[other])
    reads, writes = (names, ()) if op == SEND else ((), names)
    return Row(op, action, reads, writes, values=tuple(values[h] for h in heads), peer=other)


def _after(rows: Sequence[Row], heads: tuple[int, ...]) -> int:
    """Behind the action that follows the last summand: F and B of the last segment stay back to back, and may be one unit."""
    names = {("head", h) for h in heads}
    done = max(k for k, row in enumerate(rows) if names & set(row.writes))
    actions = {rows[done].action}
    for k in range(done + 1, len(rows)):
        if rows[k].op not in (RUN, RECV) or rows[k].action in actions:
            continue
        if len(actions) == 2 or rows[k].op == RECV:
            return k
        actions.add(rows[k].action)
    return len(rows)
