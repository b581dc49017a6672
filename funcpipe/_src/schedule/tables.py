"""Tables: schedules written by hand, as lists or in a file of torch.distributed.pipelining.

In: for every rank its actions, or their texts.
Out: a ``ScheduleFn`` for exactly the size that was written. `checker.py` proves it when it is used.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from funcpipe._src.schedule.actions import COMPUTE, Action, Schedule, ScheduleFn
from funcpipe.errors import ScheduleError

# A transfer without a peer goes to a neighbouring stage, as in torch's tables.
_NEIGHBOUR = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}

# How torch writes what a table does not need to say: where weights are gathered and dropped.
_SHARDING = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_OVERLAPPED = re.compile(r"\((.*)\)OVERLAP_F_B")


def from_table(
    rows: Sequence[Iterable[Action | str]],
    placement: Sequence[int] | None = None,
    name: str = "table",
) -> ScheduleFn:
    """A schedule that is written down rank by rank.

    Args:
        rows: for every rank its actions, or texts such as ``"0F1"``, in order. A transfer that does
            not name its peer goes to the neighbouring stage.
        placement: ``placement[stage]`` is the rank that holds the stage; by default the rank that
            computes it.
        name: for messages.

    Returns:
        a schedule for exactly ``len(rows)`` ranks and as many microbatches as the rows name.

    Raises:
        ScheduleError: a text names no action, there are none, or no rank computes some stage.

    >>> from_table([["0F0", "0B0"], ["1F0", "1B0"]])(2, 1).placement
    (0, 1)
    >>> from_table([["0F0", "0B0"]])(2, 1)
    Traceback (most recent call last):
    funcpipe.errors.ScheduleError: table: written for 1 rank and
    1 microbatch, not 2 ranks and 1 microbatch
    """
    ranks = tuple(_parsed(actions) for actions in rows)
    every = list(chain.from_iterable(ranks))
    if not every:
        raise ScheduleError(f"{name}: the table has no actions")
    written = Schedule(
        name=name,
        ranks=ranks,
        placement=_placement(name, ranks) if placement is None else tuple(placement),
        microbatches=1 + max(action.microbatch for action in every),
    )

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        size = (len(written.ranks), written.microbatches)
        asked = (ranks, microbatches)
        if size != asked:
            raise ScheduleError(f"{name}: written for {_sizes(*size)}, not {_sizes(*asked)}")
        return written

    lay_out.__name__ = lay_out.__qualname__ = name
    return lay_out


def from_csv(path: str | os.PathLike[str]) -> ScheduleFn:
    """A schedule from a file with a line a rank, as torch.distributed.pipelining writes it.

    Empty cells, which torch writes for bubbles, are skipped. torch's ``OVERLAP_F_B`` becomes its
    two actions, one after the other. Its ``UNSHARD``, ``RESHARD`` and ``REDUCE_GRAD`` are skipped:
    transforms decide where weights are gathered.

    Raises:
        ScheduleError: a cell cannot be read; the text names its line.
    """
    rows: list[list[Action]] = []
    with open(path, newline="") as file:
        for line, cells in enumerate(csv.reader(file), start=1):
            try:
                texts = chain.from_iterable(map(_texts, cells))
                rows.append([Action.parse(text) for text in texts])
            except ScheduleError as error:
                raise ScheduleError(f"{os.fspath(path)}, line {line}: {error}") from None
    return from_table(rows, name=Path(path).stem)


def to_csv(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write a schedule to a file with a line a rank, as torch.distributed.pipelining reads it.

    torch has no text for a ``W`` of one segment, nor for a transfer between stages that are not
    neighbours. These are written as funcpipe's, which ``from_csv`` reads.
    """
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        for actions in schedule.ranks:
            writer.writerow(map(_text, actions))


def _parsed(actions: Iterable[Action | str]) -> tuple[Action, ...]:
    parsed = []
    for action in actions:
        if isinstance(action, str):
            action = Action.parse(action)
        parsed.append(_with_peer(action))
    return tuple(parsed)


def _texts(cell: str) -> list[str]:
    """The actions of a cell of torch's tables."""
    cell = cell.strip()
    if not cell or _SHARDING.fullmatch(cell):
        return []
    overlapped = _OVERLAPPED.fullmatch(cell)
    return overlapped[1].split(";") if overlapped else [cell]


def _text(action: Action) -> str:
    """The text of an action, without its peer where that is the neighbouring stage."""
    plain = action._replace(peer=None)
    return str(plain if _with_peer(plain) == action else action)


def _with_peer(action: Action) -> Action:
    """The action; a transfer that names no peer gets the neighbouring stage."""
    if action.peer is None and action.kind in _NEIGHBOUR:
        return action._replace(peer=action.stage + _NEIGHBOUR[action.kind])
    return action


def _placement(name: str, ranks: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """For every stage the rank that computes it."""
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
