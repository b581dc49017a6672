"""Receives that begin early: the message is there, the channel's order is kept, one computation early at most."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tables_for_tests import library, table

from funcpipe.schedule import Schedule, auto, timeline, unit_costs
from funcpipe.schedule.actions import COMPUTE
from funcpipe.schedule.communication import channel_of, message_of
from funcpipe.schedule.early import early

HALVES = unit_costs(F=0.5, I=0.5, W=0.5)


@given(library(ranks=4, microbatches=6), st.tuples(*[st.floats(0.1, 3)] * 3), st.floats(0, 2))
def test_early_receives(schedule: Schedule, times: tuple[float, float, float], delay: float) -> None:
    line = timeline(schedule, unit_costs(*times), delay)
    found = early(line, delay)
    sent = {message_of(s.action): s.start + delay for row in line.spans for s in row if s.action.kind[:4] == "SEND"}
    for row, some in zip(line.spans, found, strict=True):
        place = {s.action: k for k, s in enumerate(row)}
        at = {receive: k for k, receives in some.items() for receive in receives}
        begun: dict[Any, list[tuple[int, int]]] = {}
        for receive in (s.action for s in row if s.action.kind[:4] == "RECV"):
            k = at.get(receive, place[receive])
            channel = channel_of(message_of(receive), line.schedule.placement)
            begun.setdefault(channel, []).append((k, place[receive]))
            between = [s.action for s in row[k : place[receive]] if s.action.kind in COMPUTE]
            if receive in at:
                assert sent[message_of(receive)] <= row[k].start
                assert len(between) == 1 or [a.kind for a in between] in (["F", "B"], ["F", "I"])
            else:
                assert not between
        assert all(order == sorted(order) for order in begun.values())


def test_a_message_that_is_on_its_way_is_received_at_its_use() -> None:
    """Rank 1 needs microbatches as soon as they come, until it has fallen behind by one; what rank 0 gets back first has been there
    for a while, then it waits for every one."""
    rows = table("0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3")
    line = timeline(rows, unit_costs(F=1, I=0.25, W=0.25), transfer=0.1)
    found = [[str(a) for receives in some.values() for a in receives] for some in early(line, 0.1)]
    assert found == [["0RECV_B0<1"], ["1RECV_F3<0"]]


def test_most_messages_of_a_schedule_without_bubbles_are_there_early() -> None:
    line = timeline(auto()(2, 8), HALVES)
    count = sum(a.kind.startswith("RECV") for row in line.schedule.ranks for a in row)
    assert sum(len(receives) for some in early(line) for receives in some.values()) > count / 2
