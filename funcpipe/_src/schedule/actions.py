"""Actions and schedules as data.

Terms. A *stage* is what a schedule moves as one; a *rank* here is a place on the pipe axis, and
holds one stage or several. An *action* is one thing a rank does: ``F`` forward, ``B`` full
backward, ``I`` input gradient and ``W`` weight gradient (``B`` = ``I`` + ``W``) of one stage and
microbatch, or the sending or receiving of what such an action made.

A *schedule* is, for every rank, the order of its actions: data, not code. Without sends and
receives it is what a person writes; `communication.py` adds those.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from funcpipe.errors import ScheduleError

COMPUTE = ("F", "B", "I", "W")
COMMUNICATE = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
KINDS = COMPUTE + COMMUNICATE


class Action(NamedTuple):
    """One thing a rank does.

    Args:
        kind: one of ``KINDS``.
        stage: the stage it belongs to: the one that computes, or the end of a transfer that lies on
            this rank.
        microbatch: counted from 0.
        segment: for ``W`` only: the segment of the stage, counted from 0 within the stage; None
            means all of them.
        peer: for a transfer only: the stage at its other end.

    ``SEND_F``/``RECV_F`` move what ``F`` made, ``SEND_B``/``RECV_B`` what ``B`` or ``I`` made.

    >>> str(Action("F", 0, 3)), str(Action("SEND_F", 0, 3, peer=1)), str(Action("W", 1, 0, segment=2))
    ('0F3', '0SEND_F3>1', '1W0.2')
    """

    kind: str
    stage: int
    microbatch: int
    segment: int | None = None
    peer: int | None = None

    def __str__(self) -> str:
        part = "" if self.segment is None else f".{self.segment}"
        peer = (
            ""
            if self.peer is None
            else (">" if self.kind.startswith("SEND") else "<") + str(self.peer)
        )
        return f"{self.stage}{self.kind}{self.microbatch}{part}{peer}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action of a text; torch.distributed.pipelining's texts (``0F1``, ``1SEND_B0``) are
        read too.

        >>> Action.parse("2RECV_F5<1")
        Action(kind='RECV_F', stage=2, microbatch=5, segment=None, peer=1)
        """
        found = re.fullmatch(
            r"\s*(\d+)(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)(\d+)(?:\.(\d+))?(?:[<>](\d+))?\s*", text
        )
        if not found:
            raise ScheduleError(
                f"cannot read an action from {text!r}; write it like '0F1', '2B0', '1SEND_F3>2'"
            )
        stage, kind, microbatch, segment, peer = found.groups()
        number = lambda s: None if s is None else int(s)  # noqa: E731
        return cls(kind, int(stage), int(microbatch), number(segment), number(peer))


@dataclass(frozen=True)
class Schedule:
    """For every rank on the pipe axis the order of its actions; ``str()`` shows a line a rank.

    Args:
        name: how to call it in messages.
        ranks: ``ranks[r]`` are the actions of rank ``r``, in order.
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
        return "\n".join(
            f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.ranks)
        )

    @property
    def communicates(self) -> bool:
        """Whether the table names its sends and receives."""
        return any(a.kind in COMMUNICATE for actions in self.ranks for a in actions)


# A schedule of the library, ready to be laid out: (ranks on the pipe axis, microbatches) ->
# Schedule
ScheduleFn = Callable[[int, int], Schedule]

# What depends on what between stages: ("F" | "B", stage) made it, ("F" | "B", stage) reads it. "B"
# stands for B, I and W.
Edge = tuple[tuple[str, int], tuple[str, int]]


def chain(stages: int) -> frozenset[Edge]:
    """The edges of a plain chain: activations to the next stage, their gradients back.

    >>> sorted(chain(2))
    [(('B', 1), ('B', 0)), (('F', 0), ('F', 1))]
    """
    forward = {(("F", s), ("F", s + 1)) for s in range(stages - 1)}
    return frozenset(forward | {(("B", s + 1), ("B", s)) for s in range(stages - 1)})
