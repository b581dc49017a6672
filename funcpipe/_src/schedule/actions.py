"""Actions and schedules as data: for every rank of the pipe axis, the order of what it does.

A rank holds one stage of the model or several. An action computes for one stage and microbatch:
``F`` the forward, ``B`` the full backward, ``I`` the input gradient, ``W`` the weight gradient
(``B`` = ``I`` + ``W``). Other actions send or receive what an ``F``, ``B`` or ``I`` made.
People write schedules without sends and receives; `communication.py` adds those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain as concatenate
from typing import NamedTuple

from funcpipe.errors import ScheduleError

COMPUTE = ("F", "B", "I", "W")
COMMUNICATE = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
KINDS = COMPUTE + COMMUNICATE

_ACTION = re.compile(
    r"\s*(?P<stage>\d+)"
    r"(?P<kind>F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)"
    r"(?P<microbatch>\d+)"
    r"(?:\.(?P<segment>\d+))?"
    r"(?:[<>](?P<peer>\d+))?\s*"
)


class Action(NamedTuple):
    """One thing that a rank does.

    Args:
        kind: one of ``KINDS``. ``SEND_F`` and ``RECV_F`` move what ``F`` made, ``SEND_B`` and
            ``RECV_B`` what ``B`` or ``I`` made.
        stage: the stage that computes; of a transfer, the stage at this rank's end.
        microbatch: counted from 0.
        segment: for ``W`` only: the segment, counted from 0 within the stage; None means all.
        peer: for a transfer only: the stage at the other end.

    >>> str(Action("F", 0, 3)), str(Action("W", 1, 0, segment=2))
    ('0F3', '1W0.2')
    >>> str(Action("SEND_F", 0, 3, peer=1))
    '0SEND_F3>1'
    """

    kind: str
    stage: int
    microbatch: int
    segment: int | None = None
    peer: int | None = None

    def __str__(self) -> str:
        text = f"{self.stage}{self.kind}{self.microbatch}"
        if self.segment is not None:
            text += f".{self.segment}"
        if self.peer is not None:
            arrow = ">" if self.kind.startswith("SEND") else "<"
            text += f"{arrow}{self.peer}"
        return text

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that a text names, also as torch.distributed.pipelining writes it
        (``0F1``, ``1SEND_B0``).

        Raises:
            ScheduleError: the text names no action.

        >>> Action.parse("2RECV_F5<1")
        Action(kind='RECV_F', stage=2, microbatch=5, segment=None, peer=1)
        """
        found = _ACTION.fullmatch(text)
        if not found:
            raise ScheduleError(
                f"cannot read an action from {text!r}; write it like '0F1', '2B0', '1SEND_F3>2'"
            )
        stage, kind, microbatch, segment, peer = found.groups()
        return cls(
            kind,
            int(stage),
            int(microbatch),
            segment=None if segment is None else int(segment),
            peer=None if peer is None else int(peer),
        )


# Where an action stands: (rank, position among the rank's actions, counted from 0).
Cell = tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """For every rank of the pipe axis the order of its actions; ``str()`` shows a line a rank.

    Args:
        name: for messages.
        ranks: ``ranks[rank]`` are the actions of that rank, in order.
        placement: ``placement[stage]`` is the rank that holds the stage.
        microbatches: how many microbatches a step has.
    """

    name: str
    ranks: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    microbatches: int

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.placement)

    def __str__(self) -> str:
        lines = []
        for rank, actions in enumerate(self.ranks):
            lines.append(f"rank {rank}: {' '.join(map(str, actions))}")
        return "\n".join(lines)

    @property
    def communicates(self) -> bool:
        """Whether the table names its sends and receives."""
        return any(action.kind in COMMUNICATE for action in concatenate.from_iterable(self.ranks))

    def cells(self) -> Iterator[tuple[Cell, Action]]:
        """Every action with where it stands, rank by rank."""
        for rank, actions in enumerate(self.ranks):
            for position, action in enumerate(actions):
                yield (rank, position), action


# (ranks of the pipe axis, microbatches) -> Schedule
ScheduleFn = Callable[[int, int], Schedule]

# The forward or backward of a stage: ("F" | "B", stage). "B" stands for B, I and W.
HalfStage = tuple[str, int]
# What depends on what between stages: (the half that makes values, the half that reads them).
Edge = tuple[HalfStage, HalfStage]


def chain(stages: int) -> frozenset[Edge]:
    """The edges of a plain chain: activations go to the next stage, their gradients back.

    >>> sorted(chain(2))
    [(('B', 1), ('B', 0)), (('F', 0), ('F', 1))]
    """
    edges: set[Edge] = set()
    for stage in range(stages - 1):
        edges.add((("F", stage), ("F", stage + 1)))
        edges.add((("B", stage + 1), ("B", stage)))
    return frozenset(edges)
