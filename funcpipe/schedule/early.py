"""Early receives: where a rank begins to receive a message before the action ahead of the one that reads it.

To receive takes a while even where the message is there already: on a GPU about 50 us for 16 MB, in which the rank idles if it
begins only when it needs the message. But where the message is not there yet, a receive that was begun holds processors while it
waits, which the units beside it lack. So a receive begins one action early if the message is there by then, as far as costs tell,
and else at its use.

In: a `Timeline`, and how long messages are under way. Out: by rank and position, receives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from funcpipe.schedule.actions import COMPUTE, Action
from funcpipe.schedule.communication import Channel, Message, channel_of, message_of
from funcpipe.schedule.timeline import Cost, Span, Timeline

# For a rank: by the position of an action the receives that begin ahead of it.
Early = dict[int, list[Action]]


def early(line: Timeline, transfer: Cost | float = 0.0) -> tuple[Early, ...]:
    """For every rank the receives that begin early, by the position of the action ahead of which they begin.

    Args:
        line: of a schedule with its transfers.
        transfer: how long the message of a ``SEND`` action is under way, as `timeline` was told.

    >>> from funcpipe.schedule.library import zb_h1
    >>> from funcpipe.schedule.timeline import timeline, unit_costs
    >>> line = timeline(zb_h1()(2, 4), unit_costs())
    >>> for position, receives in early(line)[0].items():
    ...     print(*receives, "ahead of", line.schedule.ranks[0][position])
    0RECV_B1<1 ahead of 0F2
    0RECV_B2<1 ahead of 0F3
    """
    there: dict[Message, float] = {}
    for spans in line.spans:
        for span in spans:
            if span.action.kind.startswith("SEND"):
                under_way = transfer(span.action) if callable(transfer) else transfer
                there[message_of(span.action)] = span.start + under_way
    return tuple(_of_rank(spans, there, line.schedule.placement) for spans in line.spans)


def _of_rank(spans: Sequence[Span], there: dict[Message, float], placement: Sequence[int]) -> Early:
    out: Early = defaultdict(list)
    begun: dict[Channel, int] = defaultdict(int)  # messages of a channel are received in order
    for k, span in enumerate(spans):
        if span.action.kind.startswith("RECV"):
            message = message_of(span.action)
            channel = channel_of(message, placement)
            at = max(_ahead(spans, k), begun[channel])
            if there[message] <= spans[at].start and any(s.action.kind in COMPUTE for s in spans[at:k]):
                out[at].append(span.action)
                begun[channel] = at
            else:
                begun[channel] = k
    return dict(out)


def _ahead(spans: Sequence[Span], k: int) -> int:
    """The position of the last computation ahead of a position; of F, where that and its backward, which may be one unit, are the
    last ones."""
    before = [j for j in range(k) if spans[j].action.kind in COMPUTE][-2:]
    if not before:
        return k
    first, last = spans[before[0]].action, spans[before[-1]].action
    joined = first.kind == "F" and last.kind in "BI" and first[1:3] == last[1:3] and before[-1] == before[0] + 1
    return before[0] if joined else before[-1]
