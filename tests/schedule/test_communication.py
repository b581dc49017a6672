"""Transfers: one message for each rank that reads, sent when made, received when first read, in
order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.schedule_tables import edges_for, library, table

from funcpipe._src.schedule import chain, check, from_table, insert_communication
from funcpipe._src.schedule.communication import channel_of, message_of, readers, unit_of


def inserted(edges, *rows: str) -> list[str]:
    full = insert_communication(table(*rows), edges)
    return [" ".join(map(str, row)) for row in full.ranks]


def test_chain() -> None:
    assert inserted(chain(2), "0F0 0F1 0B0 0B1", "1F0 1I0 1W0 1F1 1B1") == [
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1",
        "1RECV_F0<0 1F0 1I0 1SEND_B0>0 1W0 1RECV_F1<0 1F1 1B1 1SEND_B1>0",
    ]


def test_one_message_for_two_stages_of_a_rank() -> None:
    """Stages 1 and 3 on rank 1 read the same values: they are sent once, to the stage that runs
    first."""
    edges = chain(4) | {(("F", 0), ("F", 3))}
    assert inserted(edges, "0F0 2F0", "1F0 3F0") == [
        "0F0 0SEND_F0>1 2RECV_F0<1 2F0 2SEND_F0>3",
        "1RECV_F0<0 1F0 1SEND_F0>2 3RECV_F0<2 3F0",
    ]


def test_no_message_within_a_rank() -> None:
    """On a V the middle stages are neighbours on the last rank."""
    assert inserted(chain(4), "0F0 3F0", "1F0 2F0") == [
        "0F0 0SEND_F0>1 3RECV_F0<2 3F0",
        "1RECV_F0<0 1F0 2F0 2SEND_F0>3",
    ]


def test_residual_across_stages() -> None:
    """What the backward of another stage reads of a forward travels as a forward's message."""
    edges = chain(3) | {(("F", 0), ("B", 2))}
    assert inserted(edges, "0F0 0B0", "1F0 1B0", "2F0 2I0 2W0") == [
        "0F0 0SEND_F0>1 0SEND_F0>2 0RECV_B0<1 0B0",
        "1RECV_F0<0 1F0 1SEND_F0>2 1RECV_B0<2 1B0 1SEND_B0>0",
        "2RECV_F0<1 2F0 2RECV_F0<0 2I0 2SEND_B0>1 2W0",
    ]


def test_receives_keep_the_order_of_the_sends() -> None:
    """F1 is read first but was sent second: both are received before it."""
    assert inserted(chain(2), "0F0 0F1", "1F1 1F0") == [
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1",
        "1RECV_F0<0 1RECV_F1<0 1F1 1F0",
    ]


def test_nobody_to_read() -> None:
    """Edges of backwards that a forward-only table does not have send nothing."""
    edges = chain(2) | {(("F", 0), ("B", 1))}
    assert inserted(edges, "0F0", "1F0") == ["0F0 0SEND_F0>1", "1RECV_F0<0 1F0"]


def test_a_table_with_transfers_is_left_alone() -> None:
    schedule = from_table([["0F0", "0SEND_F0"], ["1F0"]])(2, 1)
    assert insert_communication(schedule, chain(2)) is schedule


@given(st.data())
def test_every_message_that_is_needed_and_no_other(data: st.DataObject) -> None:
    schedule = data.draw(library(ranks=6, microbatches=8))
    edges = data.draw(edges_for(schedule.stages))
    full = insert_communication(schedule, edges)
    done = {unit_of(action) for row in schedule.ranks for action in row}
    needed = {
        (unit, schedule.placement[stage])
        for unit in done - {None}
        for kind, stage in readers(edges).get(unit[:2], ())
        if (kind, stage, unit[2]) in done
        and schedule.placement[stage] != schedule.placement[unit[1]]
    }
    assert check(full, edges).messages == len(needed)


@given(st.data())
def test_received_when_read_and_sent_when_made(data: st.DataObject) -> None:
    """The last receive of a channel before an action is read by that action; sends follow their
    maker."""
    schedule = data.draw(library(ranks=6, microbatches=8))
    edges = data.draw(edges_for(schedule.stages))
    for row in insert_communication(schedule, edges).ranks:
        pending, maker = {}, None
        for action in row:
            if action.kind.startswith("RECV"):
                message = message_of(action)
                pending[channel_of(message, schedule.placement)] = message.unit
            elif action.kind.startswith("SEND"):
                assert message_of(action).unit == maker
            else:
                maker = unit_of(action)
                makers = [m for m, reader in edges if maker and reader == maker[:2]]
                reads = {(*m, action.microbatch) for m in makers}
                assert set(pending.values()) <= reads
                pending = {}
