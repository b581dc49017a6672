"""Schedules that somebody wrote down: as lists, or as a file in torch.distributed.pipelining's
format.

In: for every rank a row of actions, or of their texts. Out: a ``ScheduleFn``, which refuses any
size but the one that was written down. Nothing is proven here; `checker.py` does that when the
schedule is used.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from funcpipe._src.schedule.actions import COMPUTE, Action, Schedule, ScheduleFn
from funcpipe.errors import ScheduleError

# Where a transfer goes that does not name its peer: to the neighbour in a chain, as torch's tables
# have it.
_NEIGHBOUR = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}


def from_table(
    rows: Sequence[Iterable[Action | str]],
    placement: Sequence[int] | None = None,
    name: str = "table",
) -> ScheduleFn:
    """A schedule that is written down row by row.

    Args:
        rows: for every rank its actions, or texts such as ``"0F1"``, in order. A transfer that does
            not name its peer goes to the neighbouring stage.
        placement: ``placement[stage]`` is the rank that holds the stage; by default the rank that
            computes it.
        name: how to call it in messages.

    Returns: a schedule for exactly ``len(rows)`` ranks and as many microbatches as the rows name.

    >>> from_table([["0F0", "0B0"], ["1F0", "1B0"]])(2, 1).placement
    (0, 1)
    >>> from_table([["0F0", "0B0"]])(2, 1)
    Traceback (most recent call last):
    funcpipe.errors.ScheduleError: table: written for 1 rank and
    1 microbatch, not 2 ranks and 1 microbatch
    """
    ranks = tuple(
        tuple(_complete(Action.parse(a) if isinstance(a, str) else a) for a in row) for row in rows
    )
    every = [action for row in ranks for action in row]
    if not every:
        raise ScheduleError(f"{name}: the table has no actions")
    written = Schedule(
        name=name,
        ranks=ranks,
        placement=_placement(name, ranks) if placement is None else tuple(placement),
        microbatches=1 + max(action.microbatch for action in every),
    )

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        has, asked = (len(written.ranks), written.microbatches), (ranks, microbatches)
        if has != asked:
            raise ScheduleError(f"{name}: written for {_sizes(*has)}, not {_sizes(*asked)}")
        return written

    lay_out.__name__ = lay_out.__qualname__ = name
    return lay_out


def from_csv(path: str | os.PathLike[str]) -> ScheduleFn:
    """A schedule from a file with a line for every rank, as torch.distributed.pipelining writes
    them.

    Empty cells are bubbles and say nothing; torch's ``OVERLAP_F_B`` becomes its two actions one
    after the other; its ``UNSHARD``, ``RESHARD`` and ``REDUCE_GRAD`` are left out, since where
    weights are gathered is not a table's affair.

    Raises: ScheduleError for a cell that cannot be read, with its line.
    """
    rows: list[list[Action]] = []
    with open(path, newline="") as file:
        for line, cells in enumerate(csv.reader(file), start=1):
            try:
                rows.append([Action.parse(text) for cell in cells for text in _texts(cell)])
            except ScheduleError as error:
                raise ScheduleError(f"{os.fspath(path)}, line {line}: {error}") from None
    return from_table(rows, name=Path(path).stem)


def to_csv(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule to a file with a line for every rank, which torch.distributed.pipelining can
    read.

    Texts that torch lacks (a ``W`` of one segment, a transfer between stages that are not
    neighbours) are written as funcpipe's, which ``from_csv`` reads.
    """
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(
            [_text(action) for action in actions] for actions in schedule.ranks
        )


def _texts(cell: str) -> list[str]:
    cell = cell.strip()
    if not cell or re.fullmatch(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*", cell):
        return []
    overlapped = re.fullmatch(r"\((.*)\)OVERLAP_F_B", cell)
    return overlapped[1].split(";") if overlapped else [cell]


def _text(action: Action) -> str:
    plain = action._replace(peer=None)
    return str(plain if _complete(plain) == action else action)


def _complete(action: Action) -> Action:
    if action.peer is None and action.kind in _NEIGHBOUR:
        return action._replace(peer=action.stage + _NEIGHBOUR[action.kind])
    return action


def _placement(name: str, ranks: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    holder: dict[int, int] = {}
    for rank, actions in enumerate(ranks):
        for action in actions:
            if action.kind in COMPUTE:
                holder.setdefault(action.stage, rank)
    stages = 1 + max(holder, default=0)
    if absent := [stage for stage in range(stages) if stage not in holder]:
        raise ScheduleError(
            f"{name}: no rank computes stage {absent[0]}, though the table goes up to stage "
            f"{stages - 1}; write {absent[0]}F0 on the rank that holds it, or number the stages "
            "without a gap"
        )
    return tuple(holder[stage] for stage in range(stages))


def _sizes(ranks: int, microbatches: int) -> str:
    return (
        f"{ranks} rank{'s' * (ranks != 1)} and {microbatches} "
        f"microbatch{'es' * (microbatches != 1)}"
    )
