"""The checker: the whole text of every rejection, what it reports, and that it accepts the
library."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedule_tables import LIBRARY, edges_for, library, table

from funcpipe._src.schedule import Action, Schedule, chain, check, insert_communication
from funcpipe.errors import ScheduleError

# Every bad table with the whole text that rejects it.
BAD = {
    "missing receive": (
        ["0F0 0SEND_F0 0RECV_B0 0B0", "1F0 1B0 1SEND_B0"],
        """\
mine: rank 0, position 1: 0SEND_F0>1 is sent to rank 1, which never receives it
  rank 0: 0F0 [0SEND_F0>1] 0RECV_B0<1 0B0
  why: every send needs one receive, and every receive one send
  instead: write 1RECV_F0<0 on rank 1 before what reads it""",
    ),
    "missing send": (
        ["0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"],
        """\
mine: rank 1, position 0: 1RECV_F0<0 waits for rank 0, which never sends it
  rank 1: [1RECV_F0<0] 1F0 1B0 …
  why: every send needs one receive, and every receive one send
  instead: write 0SEND_F0>1 on rank 0 behind what makes it""",
    ),
    "missing message": (
        ["0F0 0RECV_B0 0B0", "1F0 1B0 1SEND_B0"],
        """\
mine: rank 1, position 0: 1F0 needs 0F0 of rank 0, and rank 1 never receives it
  rank 1: [1F0] 1B0 1SEND_B0>0
  why: 1F0 reads what 0F0 makes
  instead: write 1RECV_F0<0 before 1F0, and 0SEND_F0>1 on rank 0""",
    ),
    "message that nobody reads": (
        ["0F0 0SEND_F0>2 0B0", "1F0 1B0", "2RECV_F0<0 2F0 2B0"],
        """\
mine: rank 0, position 1: 0SEND_F0>2 sends what stage 2 does not read
  rank 0: 0F0 [0SEND_F0>2] 0B0
  why: by the edges between the stages, no action of its target reads what is sent
  instead: leave out the send and its receive, or send to a stage that reads it""",
    ),
    "duplicate forward": (
        ["0F0 0F0 0B0 0B1", "1F0 1B0 1F1 1B1"],
        """\
mine: rank 0 has 0F0 twice, at positions 0 and 1
  rank 0: [0F0] [0F0] 0B0 0B1
  why: every action of a microbatch runs once
  instead: leave one out, or make it 0F1, which is nowhere in the list""",
    ),
    "missing forward": (
        ["0F0 0B0 0B1", "1F0 1F1 1B0 1B1"],
        """\
mine: rank 0 never runs 0F1
  why: every stage runs F of every microbatch once
  instead: write 0F1 on rank 0""",
    ),
    "missing backward": (
        ["0F0 0F1 0B0", "1F0 1F1 1B0 1B1"],
        """\
mine: rank 0 never runs 0B1 (or 0I1 and 0W1)
  rank 0: 0F0 [0F1] 0B0
  why: some action in the table is a backward, so every microbatch needs its own
  instead: write 0B1 (or 0I1 and 0W1) behind 0F1""",
    ),
    "missing weight gradient": (
        ["0F0 0I0 0F1 0I1 0W1"],
        """\
mine: rank 0 never runs 0W0
  rank 0: 0F0 [0I0] 0F1 0I1 …
  why: I leaves the weight gradients to W
  instead: write 0W0 behind 0I0""",
    ),
    "missing segment": (
        ["0F0 0I0 0W0.0 0W0.1 0F1 0I1 0W1.1"],
        """\
mine: rank 0 never runs 0W1.0
  rank 0: … 0W0.1 0F1 [0I1] [0W1.1]
  why: I leaves the weight gradients to W
  instead: write 0W1.0 behind 0W1.1""",
    ),
    "backward both ways": (
        ["0F0 0B0 0W0"],
        """\
mine: rank 0 has both 0B0 and 0W0
  rank 0: 0F0 [0B0] [0W0]
  why: B is I and W in one
  instead: leave one out""",
    ),
    "W whole and by segment": (
        ["0F0 0I0 0W0 0W0.0"],
        """\
mine: rank 0 has both 0W0 and 0W0.0
  rank 0: 0F0 0I0 [0W0] [0W0.0]
  why: W without a segment is W of all segments
  instead: leave one out""",
    ),
    "receive order swapped": (
        [
            "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
            "1RECV_F1 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
        ],
        """\
mine: rank 1 receives 1RECV_F1<0 (position 0) before 1RECV_F0<0 (position 1), but rank 0 sends them the other\
 way round
  rank 0: 0F0 [0SEND_F0>1] 0F1 [0SEND_F1>1] 0RECV_B0<1 0B0 …
  rank 1: [1RECV_F1<0] [1RECV_F0<0] 1F0 1B0 …
  why: what one rank sends another arrives in the order in which it was sent
  instead: receive 1RECV_F0<0 first, or swap the two sends""",
    ),
    "B before F": (
        ["0B0 0F0"],
        """\
mine: rank 0, position 0: 0B0 comes before 0F0 (position 1), which it needs
  rank 0: [0B0] [0F0]
  why: 0B0 reads what 0F0 makes
  instead: write 0F0 before 0B0""",
    ),
    "W before I": (
        ["0F0 0W0 0I0"],
        """\
mine: rank 0, position 1: 0W0 comes before 0I0 (position 2), which it needs
  rank 0: 0F0 [0W0] [0I0]
  why: 0W0 reads what 0I0 makes
  instead: write 0I0 before 0W0""",
    ),
    "used before it is received": (
        ["0F0 0SEND_F0 0RECV_B0 0B0", "1F0 1RECV_F0 1B0 1SEND_B0"],
        """\
mine: rank 1, position 0: 1F0 comes before 1RECV_F0<0 (position 1), which it needs
  rank 1: [1F0] [1RECV_F0<0] 1B0 1SEND_B0>0
  why: 1F0 reads what 0F0 makes
  instead: write 1RECV_F0<0 before 1F0""",
    ),
    "sent before it is made": (
        ["0SEND_F0 0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"],
        """\
mine: rank 0, position 0: 0SEND_F0>1 comes before 0F0 (position 1), which it needs
  rank 0: [0SEND_F0>1] [0F0] 0RECV_B0<1 0B0
  why: 0SEND_F0>1 reads what 0F0 makes
  instead: write 0F0 before 0SEND_F0>1""",
    ),
    "cycle": (
        ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"],
        """\
mine: deadlock: rank 0 and rank 1 wait for each other
  rank 0 stands at position 1, 0B0: it waits for 1B0 of rank 1; ready behind it: 0F1
    rank 0: 0F0 [0B0] 0F1 0B1
  rank 1 stands at position 1, 1F1: it waits for 0F1 of rank 0; ready behind it: 1B0
    rank 1: 1F0 [1F1] 1B0 1B1
  instead: on rank 1 write 1B0 before 1F1""",
    ),
    "cycle through transfers": (
        [
            "0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1",
            "1RECV_F0 1F0 1B0 1RECV_F1 1F1 1SEND_B0 1B1 1SEND_B1",
        ],
        """\
mine: deadlock: rank 0 and rank 1 wait for each other
  rank 0 stands at position 2, 0RECV_B0<1: it waits for 1B0 of rank 1; ready behind it: 0B0, 0F1
    rank 0: 0F0 0SEND_F0>1 [0RECV_B0<1] 0B0 0F1 …
  rank 1 stands at position 3, 1RECV_F1<0: it waits for 0F1 of rank 0; ready behind it: nothing
    rank 1: … 1F0 1B0 [1RECV_F1<0] 1F1 1SEND_B0>0 …
  instead: on rank 1 write 1SEND_B0>0 before 1RECV_F1<0""",
    ),
    "transfer within a rank": (
        ["0F0 0SEND_F0>1 1RECV_F0 1F0"],
        """\
mine: rank 0, position 1: 0SEND_F0>1 goes to stage 1 on the same rank
  rank 0: 0F0 [0SEND_F0>1] 1RECV_F0<0 1F0
  why: an action names a stage that its rank holds, a microbatch of the step, and a transfer its peer
  instead: leave it out: a rank needs no message for what it has""",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_table(case: str) -> None:
    rows, text = BAD[case]
    with pytest.raises(ScheduleError) as caught:
        check(table(*rows))
    assert str(caught.value) == text


def test_wrong_rank() -> None:
    """A stage's action on a rank that does not hold it."""
    schedule = table("0F0 0F1 0B0 0B1 1F1", "1F0 1B0 1B1")
    with pytest.raises(ScheduleError) as caught:
        check(replace(schedule, placement=(0, 1)))
    assert str(caught.value) == (
        """\
mine: rank 0, position 4: 1F1 is of stage 1, which rank 1 holds
  rank 0: … 0B0 0B1 [1F1]
  why: an action names a stage that its rank holds, a microbatch of the step, and a transfer its peer
  instead: move it to rank 1"""
    )


def test_sent_twice() -> None:
    """One message is enough for two stages of a rank that read the same values."""
    schedule = table("0F0 0SEND_F0>1 0SEND_F0>2", "1RECV_F0<0 1F0 2RECV_F0<0 2F0")
    edges = {(("F", 0), ("F", 1)), (("F", 0), ("F", 2)), (("F", 1), ("F", 2))}
    with pytest.raises(ScheduleError) as caught:
        check(schedule, edges)
    assert str(caught.value) == (
        """\
mine: rank 0, position 2: 0SEND_F0>2 sends rank 1 what 0SEND_F0>1 at position 1 sent already
  rank 0: 0F0 [0SEND_F0>1] [0SEND_F0>2]
  why: one message is enough for all stages of a rank
  instead: leave out the second send and its receive"""
    )


def _with(**changes) -> Schedule:
    return replace(table("0F0 0B0", "1F0 1B0"), **changes)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (
            _with(placement=(0, 2)),
            "mine: stage 1 is placed on rank 2, but the table has ranks 0 to 1",
        ),
        (
            _with(placement=(0, 0)),
            "mine: rank 1 holds no stage; use fewer ranks or place a stage there",
        ),
        (_with(placement=(0,), ranks=((Action("F", 1, 0),),)), "1F0 names stage 1 of 1"),
        (_with(placement=(0,), ranks=((Action("F", 0, 7),),)), "0F7 names microbatch 7 of 1"),
        (_with(placement=(0,), ranks=((Action("F", 0, 0, 2),),)), "0F0.2 names a segment"),
        (_with(placement=(0,), ranks=((Action("F", 0, 0, peer=0),),)), "names a peer"),
        (_with(placement=(0,), ranks=((Action("SEND_F", 0, 0),),)), "goes to stage None"),
        (_with(placement=(0,), ranks=((Action("X", 0, 0),),)), "is of unknown kind 'X'"),
    ],
)
def test_senseless_table(schedule: Schedule, text: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(text)):
        check(schedule)


def test_segments() -> None:
    """With the true number of segments, a missing one is missed and an extra one refused."""
    schedule = table("0F0 0I0 0W0.0 0W0.1")
    assert check(schedule, segments=[2]) == check(schedule)
    with pytest.raises(ScheduleError, match=re.escape("rank 0 never runs 0W0.2")):
        check(schedule, segments=[3])
    with pytest.raises(ScheduleError, match=re.escape("0W0.1 names segment 1 of 1")):
        check(schedule, segments=[1])
    with pytest.raises(ScheduleError, match=re.escape("has 1 stages, but segments= counts 2")):
        check(schedule, segments=[1, 1])


def test_edges_in_a_circle() -> None:
    """Edges that no order can satisfy are a deadlock of two ranks with nothing ready."""
    edges = {(("F", 0), ("F", 1)), (("F", 1), ("F", 0))}
    with pytest.raises(ScheduleError, match="no order of these actions would end"):
        check(table("0F0", "1F0"), edges)


def test_shortest_circle() -> None:
    """Of four ranks that stand still, only the two that wait for each other are shown."""
    with pytest.raises(ScheduleError, match="deadlock: rank 1 and rank 2 wait for each other"):
        check(table("0F0 0B0 0F1 0B1", "1F0 1B0 1F1 1B1", "2F0 2F1 2B0 2B1", "3F0 3B0 3F1 3B1"))


def test_report() -> None:
    report = check(table("0F0 0F1 0I0 0I1 0W0.0 0W0.1 0W1"))
    assert (report.peak_live, report.peak_waiting, report.messages, report.actions) == (
        (2,),
        (2,),
        0,
        7,
    )
    assert check(table("0F0 0F1", "1F0 1F1")).peak_live == (1, 1)


@given(library())
def test_library_passes(schedule: Schedule) -> None:
    report = check(schedule)
    assert check(insert_communication(schedule, chain(schedule.stages))) == report


@given(st.data())
def test_library_passes_with_skips(data: st.DataObject) -> None:
    schedule = data.draw(library(ranks=6, microbatches=8))
    check(schedule, data.draw(edges_for(schedule.stages)))


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_fast(name: str) -> None:
    """Linear: 16 ranks, 128 microbatches and 4 stages a rank are some 50,000 actions."""
    factory, takes_v = LIBRARY[name]
    schedule = (factory(4) if takes_v else factory())(16, 128)
    start = time.process_time()
    check(schedule)
    assert time.process_time() - start < 3.0  # a third of a second on an idle machine
