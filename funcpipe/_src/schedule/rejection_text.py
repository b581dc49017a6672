"""How a rejected table is explained: what is wrong, the few actions that show it, why, what to
write."""

from __future__ import annotations

from collections.abc import Sequence

from funcpipe._src.schedule.actions import Action, Schedule
from funcpipe.errors import ScheduleError

# Where an action stands: (rank, position in the rank's list, counted from 0).
Place = tuple[int, int]


def refusal(schedule: Schedule, what: str, *places: Place, why: str, instead: str) -> ScheduleError:
    """The error for a rejected table, with the actions at ``places`` in brackets among their
    neighbours.

    >>> from funcpipe._src.schedule.tables import from_table
    >>> table = from_table([["0F0", "0F1", "0F2", "0B0", "0F1"]])(1, 3)
    >>> print(refusal(table, "0F1 runs twice", (0, 1), (0, 4), why="once is enough", instead="drop one"))
    table: 0F1 runs twice
      rank 0: 0F0 [0F1] 0F2 0B0 [0F1]
      why: once is enough
      instead: drop one
    """
    lines = [f"{schedule.name}: {what}"]
    for rank in sorted({rank for rank, _ in places}):
        lines.append(
            f"  rank {rank}: {excerpt(schedule.ranks[rank], [p for r, p in places if r == rank])}"
        )
    return ScheduleError("\n".join([*lines, f"  why: {why}", f"  instead: {instead}"]))


def excerpt(actions: Sequence[Action], marked: Sequence[int], around: int = 2) -> str:
    """The marked actions in brackets with a few neighbours; dots for what is left out.

    >>> row = [Action("F", 0, m) for m in range(9)]
    >>> excerpt(row, [1, 8], around=1)
    '0F0 [0F1] 0F2 … 0F7 [0F8]'
    """
    shown = sorted(
        {i for at in marked for i in range(at - around, at + around + 1) if 0 <= i < len(actions)}
    )
    words, before = [], -1
    for i in shown:
        if i != before + 1:
            words.append("…")
        words.append(f"[{actions[i]}]" if i in marked else str(actions[i]))
        before = i
    if before < len(actions) - 1:
        words.append("…")
    return " ".join(words)


def maker(schedule: Schedule, unit: tuple[str, int, int]) -> str:
    """The words for what makes a unit: of B and I the one that the table has.

    >>> from funcpipe._src.schedule.tables import from_table
    >>> maker(from_table([["0F0", "0I0", "0W0"]])(1, 1), ("B", 0, 0))
    '0I0'
    """
    kind, stage, microbatch = unit
    split = Action("I", stage, microbatch)
    return str(
        split
        if kind == "B" and split in schedule.ranks[schedule.placement[stage]]
        else split._replace(kind=kind)
    )


def at(place: Place) -> str:
    """The words for a place."""
    return f"rank {place[0]}, position {place[1]}"
