"""The cost model: known bubbles, transfers, and that nothing starts before it can."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedule_tables import library, table

from funcpipe._src.schedule import (
    Action,
    Schedule,
    chain,
    dual_pipe_v,
    gpipe,
    interleaved_1f1b,
    interleaved_zb,
    one_f_one_b,
    timeline,
    unit_costs,
    v_half,
    v_min,
    zb_h1,
    zb_v,
)
from funcpipe._src.schedule.communication import message_of, sources, unit_of
from funcpipe.errors import ScheduleError

# Bubbles at 8 ranks, 32 microbatches, F = I = W.
FIGURES = [
    (gpipe(), 0.179),
    (one_f_one_b(), 0.179),
    (interleaved_1f1b(2), 0.099),
    (interleaved_1f1b(4), 0.052),
    (zb_h1(), 0.068),
    (interleaved_zb(2), 0.035),
    (zb_v(), 0.035),
    (dual_pipe_v(), 0.035),
    (v_half(), 0.094),
    (v_min(), 0.123),
]


@pytest.mark.parametrize(
    ("schedule_fn", "bubble"), FIGURES, ids=lambda x: getattr(x, "__name__", x)
)
def test_known_bubbles(schedule_fn, bubble: float) -> None:
    assert round(timeline(schedule_fn(8, 32), unit_costs()).bubble, 3) == bubble


def spans(line) -> list[str]:
    return [" ".join(f"{s.action}@{s.start:g}-{s.end:g}" for s in row) for row in line.spans]


def test_start_and_end() -> None:
    line = timeline(table("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"), unit_costs(), transfer=0.5)
    assert spans(line) == [
        "0F0@0-1 0SEND_F0>1@1-1 0F1@1-2 0SEND_F1>1@2-2 0RECV_B0<1@2-5 0B0@5-7 0RECV_B1<1@7-8.5 "
        "0B1@8.5-10.5",
        "1RECV_F0<0@0-1.5 1F0@1.5-2.5 1B0@2.5-4.5 1SEND_B0>0@4.5-4.5 1RECV_F1<0@4.5-5 1F1@5-6 "
        "1B1@6-8 1SEND_B1>0@8-8",
    ]
    assert (line.makespan, line.busy, line.bubble) == (10.5, (6, 6), pytest.approx(9 / 21))
    assert line.period == 10.5  # of rank 0; rank 1 needs 7, from when its first message moves


def test_a_message_moves_when_both_ends_are_there() -> None:
    """The second one was sent long before its receiver comes to it, and takes as long as it
    takes."""
    line = timeline(
        table("0F0 0F1", "1F0 1F1"), unit_costs(F=0.1), lambda send: 5.0 - 3 * send.microbatch
    )
    received = [(span.start, span.end) for span in line.spans[1] if span.action.kind == "RECV_F"]
    assert received == [pytest.approx((0, 5.1)), pytest.approx((5.2, 7.2))]


def test_costs() -> None:
    cost = unit_costs(F=1, I=2, W=4, segments=[2, 4])
    assert [cost(Action.parse(text)) for text in ("0F0", "0B0", "0I0", "0W0", "0W0.1", "1W0.0")] == [
        1, 6, 2, 4, 2, 1,
    ]  # fmt: skip
    with pytest.raises(
        ScheduleError, match=r"0W0\.1 is one segment of a stage: unit_costs needs segments="
    ):
        unit_costs()(Action.parse("0W0.1"))


def test_a_table_that_never_ends() -> None:
    with pytest.raises(
        ScheduleError, match=r"mine: the table never ends; funcpipe\.schedules\.check says"
    ):
        timeline(table("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), unit_costs())


@given(
    library(ranks=5, microbatches=8, v=3),
    st.dictionaries(st.sampled_from("FBIW"), st.floats(0.1, 4)),
    st.floats(0, 2),
)
def test_nothing_starts_before_it_can(
    schedule: Schedule, costs: dict[str, float], under_way: float
) -> None:
    line = timeline(schedule, lambda action: costs.get(action.kind, 1.0), under_way)
    ended = {(r, unit_of(s.action)): s.end for r, row in enumerate(line.spans) for s in row}
    arrived = {
        (r, message_of(s.action).unit): s.end
        for r, row in enumerate(line.spans)
        for s in row
        if s.action.kind.startswith("RECV")
    }
    reads = sources(chain(schedule.stages))
    for rank, row in enumerate(line.spans):
        before = 0.0
        for span in row:
            assert (
                span.start == before
            )  # a rank does nothing but its actions and waiting in its receives
            before = span.end
            unit = unit_of(span.action)
            for kind, stage in reads.get(unit[:2], ()) if unit else ():
                maker = (kind, stage, span.action.microbatch)
                holder = schedule.placement[stage]
                if holder == rank:
                    assert ended[rank, maker] <= span.start
                else:
                    assert ended[holder, maker] + under_way <= arrived[rank, maker] <= span.start
    assert line.makespan >= max(line.busy)
    assert -1e-9 <= line.bubble < 1


@given(
    library(ranks=4, microbatches=6, v=3),
    st.dictionaries(st.sampled_from("FBIW"), st.floats(0.1, 4)),
    st.floats(0, 2),
    st.integers(2, 4),
)
def test_every_further_step_takes_no_more_than_the_period(
    schedule: Schedule, costs: dict[str, float], under_way: float, steps: int
) -> None:
    """Steps behind each other: every rank goes on to the next one as soon as it is done with the
    last."""
    cost = lambda action: costs.get(action.kind, 1.0)  # noqa: E731
    one = timeline(schedule, cost, under_way)
    n = schedule.microbatches
    rows = tuple(
        tuple(a._replace(microbatch=a.microbatch + k * n) for k in range(steps) for a in row)
        for row in schedule.ranks
    )
    many = timeline(replace(schedule, ranks=rows, microbatches=steps * n), cost, under_way)
    assert max(one.busy) <= one.period * (1 + 1e-9) and one.period <= one.makespan
    assert many.makespan <= one.makespan + (steps - 1) * one.period + 1e-9
