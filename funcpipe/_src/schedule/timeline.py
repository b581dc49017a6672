"""The cost model: when every action of a table starts and ends, given what each costs.

In: a schedule, the time of every compute action, and how long each message takes to move.
Out: a ``Timeline``, in the unit of the costs.

A message moves once it was sent and its receiver has come to the receive; the receiver does nothing
else meanwhile. So it is with NCCL when ranks receive right before use. A send takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from funcpipe._src.schedule.actions import COMPUTE, Action, Edge, Schedule
from funcpipe._src.schedule.actions import chain as chain_edges
from funcpipe._src.schedule.communication import Message, insert_communication, message_of
from funcpipe._src.schedule.simulate_transfers import simulate_transfers
from funcpipe.errors import ScheduleError

# What an action costs, in the caller's unit of time
Cost = Callable[[Action], float]


class Span(NamedTuple):
    """When an action runs; a receive runs until its message is there."""

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
        ends = [spans[-1].end for spans in self.spans if spans]
        return max(ends, default=0.0)

    @cached_property
    def period(self) -> float:
        """How long a step takes in steady state, where many follow one another.

        It is the longest that a rank needs from where it has something to do to its end. Ranks do
        not wait for each other between steps, so each may repeat its actions after that time. The
        steps before and after fill what it idles before its first and after its last action.
        """
        lengths = [spans[-1].end - self._begin(spans[0]) for spans in self.spans if spans]
        return max(lengths, default=0.0)

    def _begin(self, first: Span) -> float:
        """When a rank has something to do: a receive does nothing before its message is sent."""
        if first.action.kind in COMPUTE:
            return first.start
        return max(first.start, self._sent_at[message_of(first.action)])

    @cached_property
    def _sent_at(self) -> dict[Message, float]:
        sent_at = {}
        for span in chain.from_iterable(self.spans):
            if span.action.kind.startswith("SEND"):
                sent_at[message_of(span.action)] = span.start
        return sent_at

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For every rank how long it computes."""
        busy = []
        for spans in self.spans:
            compute = [span for span in spans if span.action.kind in COMPUTE]
            busy.append(sum(span.end - span.start for span in compute))
        return tuple(busy)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they do not compute, between 0 and 1."""
        total = len(self.spans) * self.makespan
        return 1 - sum(self.busy) / total if total else 0.0

    def scaled(self, factor: float) -> Timeline:
        """The same timeline with every time multiplied, as for another unit."""
        ranks = []
        for spans in self.spans:
            scaled = (Span(action, start * factor, end * factor) for action, start, end in spans)
            ranks.append(tuple(scaled))
        return Timeline(self.schedule, tuple(ranks))


def timeline(
    schedule: Schedule,
    cost: Cost,
    transfer: Cost | float = 0.0,
    edges: Iterable[Edge] | None = None,
) -> Timeline:
    """When every action of a schedule starts and ends.

    Args:
        schedule: the table; transfers are inserted if it has none.
        cost: the time of a compute action.
        transfer: how long the message of a ``SEND`` action takes to move once both its ends are
            there: one number, or a function of that action.
        edges: what depends on what, to insert transfers; a plain chain by default.

    Raises:
        ScheduleError: the table never ends.

    >>> from funcpipe._src.schedule.library import gpipe
    >>> line = timeline(gpipe()(2, 3), unit_costs())
    >>> line.makespan, line.busy, line.bubble
    (12.0, (9.0, 9.0), 0.25)
    >>> from funcpipe._src.schedule.library import zb_v
    >>> line = timeline(zb_v()(2, 3), unit_costs(F=0.5, I=0.5, W=0.5))
    >>> line.makespan, line.period  # rank 1 begins later than rank 0, and ends later
    (9.5, 9.0)
    """
    edges = chain_edges(schedule.stages) if edges is None else edges
    schedule = insert_communication(schedule, edges)
    simulation = simulate_transfers(schedule)
    if not simulation.ended(schedule):
        raise ScheduleError(
            f"{schedule.name}: the table never ends; funcpipe.schedules.check says where and why"
        )
    free_at = [0.0] * len(schedule.ranks)
    sent: dict[Message, tuple[float, float]] = {}  # when, and how long it takes to move
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    for rank, position in simulation.order:
        action = schedule.ranks[rank][position]
        start = free_at[rank]
        if action.kind in COMPUTE:
            free_at[rank] = start + cost(action)
        elif action.kind.startswith("SEND"):
            takes = transfer(action) if callable(transfer) else transfer
            sent[message_of(action)] = (start, takes)
        else:
            since, takes = sent[message_of(action)]
            free_at[rank] = max(start, since) + takes
        spans[rank].append(Span(action, start, free_at[rank]))
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
        segments: for every stage its number of segments: a ``W`` of one segment costs ``W`` divided
            by it.

    >>> cost = unit_costs(F=1, I=1, W=2, segments=[4])
    >>> cost(Action("B", 0, 0)), cost(Action("W", 0, 0)), cost(Action("W", 0, 0, segment=3))
    (3.0, 2.0, 0.5)
    """
    of_stage = {"F": float(F), "I": float(I), "W": float(W), "B": float(I + W)}

    def cost(action: Action) -> float:
        time = of_stage[action.kind]
        if action.segment is None:
            return time
        if segments is None:
            raise ScheduleError(
                f"{action} is one segment of a stage: unit_costs needs segments= to price it"
            )
        return time / segments[action.stage]

    return cost
