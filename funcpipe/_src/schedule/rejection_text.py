"""Rejection text: how the checker explains a table that it refuses.

In: a schedule, the fault, the cells that show it, why it is one, what to write instead.
Out: a ``ScheduleError`` that shows those cells among their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

from funcpipe._src.schedule.actions import Action, Cell, Schedule
from funcpipe._src.schedule.communication import Unit
from funcpipe.errors import ScheduleError


def rejection(
    schedule: Schedule, fault: str, *cells: Cell, why: str, instead: str
) -> ScheduleError:
    """The error for a rejected table, with the actions at ``cells`` in brackets.

    >>> from funcpipe._src.schedule.tables import from_table
    >>> table = from_table([["0F0", "0F1", "0F2", "0B0", "0F1"]])(1, 3)
    >>> why, instead = "once is enough", "drop one"
    >>> print(rejection(table, "0F1 runs twice", (0, 1), (0, 4), why=why, instead=instead))
    table: 0F1 runs twice
      rank 0: 0F0 [0F1] 0F2 0B0 [0F1]
      why: once is enough
      instead: drop one
    """
    lines = [f"{schedule.name}: {fault}"]
    for rank in sorted({rank for rank, _ in cells}):
        marked = [position for of_rank, position in cells if of_rank == rank]
        lines.append(f"  rank {rank}: {excerpt(schedule.ranks[rank], marked)}")
    lines.append(f"  why: {why}")
    lines.append(f"  instead: {instead}")
    return ScheduleError("\n".join(lines))


def excerpt(actions: Sequence[Action], marked: Sequence[int], around: int = 2) -> str:
    """The marked actions in brackets with a few neighbours; dots for what is left out.

    >>> forwards = [Action("F", 0, microbatch) for microbatch in range(9)]
    >>> excerpt(forwards, [1, 8], around=1)
    '0F0 [0F1] 0F2 … 0F7 [0F8]'
    """
    shown: set[int] = set()
    for position in marked:
        shown.update(range(position - around, position + around + 1))
    shown.intersection_update(range(len(actions)))
    words = []
    before = -1
    for position in sorted(shown):
        if position != before + 1:
            words.append("…")
        word = str(actions[position])
        words.append(f"[{word}]" if position in marked else word)
        before = position
    if before < len(actions) - 1:
        words.append("…")
    return " ".join(words)


def maker(schedule: Schedule, unit: Unit) -> str:
    """The text of the action that makes a unit: of B and I, the one that the table has.

    >>> from funcpipe._src.schedule.tables import from_table
    >>> maker(from_table([["0F0", "0I0", "0W0"]])(1, 1), ("B", 0, 0))
    '0I0'
    """
    kind, stage, microbatch = unit
    actions = schedule.ranks[schedule.placement[stage]]
    split = Action("I", stage, microbatch)
    if kind == "B" and split in actions:
        return str(split)
    return str(Action(kind, stage, microbatch))


def at(cell: Cell) -> str:
    """The words for a cell."""
    rank, position = cell
    return f"rank {rank}, position {position}"


def text_at(schedule: Schedule, cell: Cell) -> str:
    """The text of the action in a cell."""
    rank, position = cell
    return str(schedule.ranks[rank][position])
