"""Actions and schedules as data: texts that read back, and the edges of a chain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedule_tables import table

from funcpipe._src.schedule import Action, chain
from funcpipe._src.schedule.actions import COMMUNICATE, COMPUTE
from funcpipe.errors import ScheduleError

_number = st.integers(0, 999)
actions = st.one_of(
    st.builds(Action, st.sampled_from(COMPUTE), _number, _number, st.none() | _number, st.none()),
    st.builds(
        Action, st.sampled_from(COMMUNICATE), _number, _number, st.none(), st.none() | _number
    ),
)


@given(actions)
def test_text_reads_back(action: Action) -> None:
    assert Action.parse(str(action)) == action
    assert Action.parse(f" {action} ") == action


@pytest.mark.parametrize(
    "text", ["", "F0", "0F", "0X1", "0SENDF1", "0F1 0F2", "-1F0", "0F1>", "1.0F2"]
)
def test_text_that_is_none(text: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Action.parse(text)
    assert str(caught.value) == (
        f"cannot read an action from {text!r}; write it like '0F1', '2B0', '1SEND_F3>2'"
    )


def test_schedule_knows_what_it_is() -> None:
    schedule = table("0F0 0F1", "1F0 1F1")
    assert (schedule.stages, schedule.microbatches, schedule.communicates) == (2, 2, False)
    assert table("0F0 0SEND_F0", "1RECV_F0 1F0").communicates


@given(st.integers(1, 20))
def test_chain_goes_there_and_back(stages: int) -> None:
    edges = chain(stages)
    assert len(edges) == 2 * (stages - 1)
    assert all(abs(maker[1] - reader[1]) == 1 and maker[0] == reader[0] for maker, reader in edges)
