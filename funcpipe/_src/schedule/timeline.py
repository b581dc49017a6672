"""The cost model: when every action of a table starts and ends, given what each costs.

In: a schedule, the time of every compute action, and how long a message takes to move. Out: a
``Timeline``.
A message moves once it was sent and its receiver has come to its receive, which does nothing else
meanwhile: so it is with NCCL's, which ranks receive at their use. Sends take no time of their rank.
The times are the caller's own unit, whatever the costs are given in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from funcpipe._src.schedule.actions import COMPUTE, Action, Edge, Schedule, chain
from funcpipe._src.schedule.communication import Message, insert_communication, message_of
from funcpipe._src.schedule.simulate_transfers import walk
from funcpipe.errors import ScheduleError

# What an action costs, in the caller's unit of time
Cost = Callable[[Action], float]


class Span(NamedTuple):
    """When an action runs; a receive runs from when its rank comes to it until the message is
    there."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every action of a schedule runs.

    Args:
        schedule: the table, with its transfers.
        spans: for every rank the start and end of each of its actions, in order.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """When the last rank ends."""
        return max((span.end for spans in self.spans for span in spans), default=0.0)

    @cached_property
    def period(self) -> float:
        """Of a step in steady state, where many follow one another: the longest that a rank needs
        from where it has something to do to its end. Ranks do not wait for each other between
        steps, so all of them may repeat what they do after so long; what a rank idles before its
        first action or after its last is then filled by the step before and the one behind."""
        sent = {
            message_of(s.action): s.start
            for row in self.spans
            for s in row
            if s.action.kind.startswith("SEND")
        }

        def begin(first: Span) -> float:
            return (
                first.start
                if first.action.kind in COMPUTE
                else max(first.start, sent[message_of(first.action)])
            )

        return max((row[-1].end - begin(row[0]) for row in self.spans if row), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For every rank how long it computes."""
        compute = [
            [s.end - s.start for s in spans if s.action.kind in COMPUTE] for spans in self.spans
        ]
        return tuple(map(sum, compute))

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they do not compute, between 0 and 1."""
        whole = len(self.spans) * self.makespan
        return 1 - sum(self.busy) / whole if whole else 0.0

    def scaled(self, factor: float) -> Timeline:
        """The same with every time multiplied, as for another unit."""
        spans = tuple(
            tuple(Span(s.action, s.start * factor, s.end * factor) for s in row)
            for row in self.spans
        )
        return Timeline(self.schedule, spans)


def timeline(
    schedule: Schedule,
    cost: Cost,
    transfer: Cost | float = 0.0,
    edges: Iterable[Edge] | None = None,
) -> Timeline:
    """When every action of a schedule starts and ends.

    Args:
        schedule: the table; transfers are put in if it has none.
        cost: the time of a compute action.
        transfer: how long the message of a ``SEND`` action takes to move, when both its ends are
            there: one number, or a function of that action.
        edges: what depends on what, to put transfers in; a plain chain by default.

    Raises: ScheduleError for a table that never ends.

    >>> from funcpipe._src.schedule.library import gpipe
    >>> line = timeline(gpipe()(2, 3), unit_costs())
    >>> line.makespan, line.busy, line.bubble
    (12.0, (9.0, 9.0), 0.25)
    >>> from funcpipe._src.schedule.library import zb_v
    >>> line = timeline(zb_v()(2, 3), unit_costs(F=0.5, I=0.5, W=0.5))
    >>> line.makespan, line.period  # rank 1 begins later than rank 0, and ends later
    (9.5, 9.0)
    """
    edges = chain(schedule.stages) if edges is None else edges
    schedule = insert_communication(schedule, edges)
    found = walk(schedule)
    if any(at < len(actions) for at, actions in zip(found.stands, schedule.ranks, strict=True)):
        raise ScheduleError(
            f"{schedule.name}: the table never ends; funcpipe.schedules.check says where and why"
        )

    free = [0.0] * len(schedule.ranks)
    sent: dict[Message, tuple[float, float]] = {}  # when, and how long it takes to move
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    for rank, position in found.order:
        action, start = schedule.ranks[rank][position], free[rank]
        if action.kind in COMPUTE:
            free[rank] = start + cost(action)
        else:
            message = message_of(action)
            if action.kind.startswith("SEND"):
                sent[message] = start, transfer(action) if callable(transfer) else transfer
            else:
                since, takes = sent[message]
                free[rank] = max(start, since) + takes
        spans[rank].append(Span(action, start, free[rank]))
    return Timeline(schedule, tuple(map(tuple, spans)))


def unit_costs(
    F: float = 1.0,
    I: float = 1.0,  # noqa: E741
    W: float = 1.0,
    segments: Sequence[int] | None = None,
) -> Cost:
    """The same costs for every stage and microbatch; ``B`` costs ``I + W``.

    Args:
        F, I, W: what the action of a whole stage costs.
        segments: for every stage its number of segments, so that a ``W`` of one segment costs ``W /
            number``.

    >>> cost = unit_costs(F=1, I=1, W=2, segments=[4])
    >>> cost(Action("B", 0, 0)), cost(Action("W", 0, 0)), cost(Action("W", 0, 0, segment=3))
    (3.0, 2.0, 0.5)
    """
    whole = {"F": float(F), "I": float(I), "W": float(W), "B": float(I + W)}

    def cost(action: Action) -> float:
        if action.segment is None:
            return whole[action.kind]
        if segments is None:
            raise ScheduleError(
                f"{action} is one segment of a stage: unit_costs needs segments= to price it"
            )
        return whole[action.kind] / segments[action.stage]

    return cost
