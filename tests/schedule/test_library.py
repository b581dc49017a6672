"""The library: the formulas of its docstrings, the order of gradients, and tables written down by
hand."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedule_tables import LIBRARY, library, schedule_fns

from funcpipe._src.schedule import (
    Action,
    Schedule,
    chain,
    check,
    from_csv,
    from_table,
    gpipe,
    insert_communication,
    interleaved_1f1b,
    one_f_one_b,
    timeline,
    to_csv,
    unit_costs,
)
from funcpipe.errors import ScheduleError


def _of(ranks: int, microbatches: int, idle: int) -> tuple[int, int]:
    return idle, 6 * microbatches + idle


# By name: the bubble as (idle, idle + busy), and what a rank holds at most.
FORMULAS = {
    "gpipe": (lambda P, M, v: (P - 1, M + P - 1), lambda r, P, M, v: M),
    "one_f_one_b": (lambda P, M, v: (P - 1, M + P - 1), lambda r, P, M, v: P - r),
    "interleaved_1f1b": (
        lambda P, M, v: (P - 1, v * M + P - 1),
        lambda r, P, M, v: (v + 1) * P - 1 - 2 * r if v > 1 else P - r,
    ),
    "looped_bfs": (lambda P, M, v: (P - 1, v * M + P - 1), lambda r, P, M, v: v * M),
    "zb_h1": (lambda P, M, v: (P - 1, 3 * M + P - 1), lambda r, P, M, v: P),
    "interleaved_zb": (
        lambda P, M, v: (P - 1, 3 * v * M + P - 1),
        lambda r, P, M, v: (v + 1) * P - 1 if v > 1 else P,
    ),
    "zb_v": (lambda P, M, v: (P - 1, 6 * M + P - 1), lambda r, P, M, v: 2 * P),
    "dual_pipe_v": (lambda P, M, v: (P - 1, 6 * M + P - 1), lambda r, P, M, v: 2 * P + 1),
    "v_half": (
        lambda P, M, v: _of(P, M, {1: 0, 2: 3}.get(P, 3 * P - 4)),
        lambda r, P, M, v: P + 2 - P % 2,
    ),
    "v_min": (
        lambda P, M, v: _of(P, M, (P > 1) * (4 * P - 3 if P % 3 == 0 else 4 * P - 5)),
        lambda r, P, M, v: 2 * -(-P // 3) + 2 * (P % 3 != 1),
    ),
    "forward_only": (lambda P, M, v: (P - 1, v * M + P - 1), lambda r, P, M, v: 1),
}


@pytest.mark.parametrize("name", sorted(LIBRARY))
@given(ranks=st.integers(1, 12), rounds=st.integers(2, 5), v=st.integers(1, 4))
def test_formulas(name: str, ranks: int, rounds: int, v: int) -> None:
    """Bubble and memory are those of the docstrings, wherever these say they are."""
    factory, takes_v = LIBRARY[name]
    schedule = (factory(v) if takes_v else factory())(ranks, rounds * ranks)
    bubble, live = FORMULAS[name]
    idle, whole = bubble(ranks, rounds * ranks, v)
    assert timeline(schedule, unit_costs()).bubble == pytest.approx(idle / whole)
    expected = tuple(live(rank, ranks, rounds * ranks, v) for rank in range(ranks))
    held = check(schedule).peak_live
    assert max(held) == max(expected)
    assert held == expected or name == "v_min"  # some of its ranks hold one less


@given(ranks=st.integers(1, 10), data=st.data(), v=st.integers(1, 4))
def test_interleaved_bubble_for_any_number(ranks: int, data: st.DataObject, v: int) -> None:
    """Turns that get longer instead of shorter cost no time, whatever M >= P is."""
    microbatches = data.draw(st.integers(ranks, 4 * ranks))
    line = timeline(interleaved_1f1b(v)(ranks, microbatches), unit_costs())
    assert line.bubble == pytest.approx((ranks - 1) / (v * microbatches + ranks - 1))


@given(library())
def test_order_of_microbatches(schedule: Schedule) -> None:
    """F, I, B and W of a stage come in microbatch order, so that sums are the same for all
    schedules."""
    seen: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row in schedule.ranks:
        for action in row:
            kind = action.kind if action.kind in "FI" else "gradient"
            seen[action.stage, kind].append(action.microbatch)
    assert all(microbatches == sorted(microbatches) for microbatches in seen.values())


@given(schedule_fns(), st.integers(1, 8), st.integers(1, 16))
def test_names_and_sizes(schedule_fn, ranks: int, microbatches: int) -> None:
    schedule = schedule_fn(ranks, microbatches)
    assert schedule.name == schedule_fn.__name__
    assert (len(schedule.ranks), schedule.microbatches) == (ranks, microbatches)
    assert schedule == schedule_fn(ranks, microbatches)
    assert not schedule.communicates
    for sizes in ((0, 1), (1, 0), (-1, 4)):
        with pytest.raises(ScheduleError, match="needs at least 1 rank and 1 microbatch, got"):
            schedule_fn(*sizes)


@pytest.mark.parametrize("name", [name for name in LIBRARY if LIBRARY[name][1]])
def test_at_least_one_stage(name: str) -> None:
    with pytest.raises(ScheduleError, match="a rank holds at least 1 stage, got v=0"):
        LIBRARY[name][0](0)(2, 4)


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_all_sizes(name: str) -> None:
    """Every size up to 16 ranks (thorough), or up to 5, for microbatch numbers around multiples of
    both."""
    thorough = settings().max_examples > 100
    factory, takes_v = LIBRARY[name]
    for v in range(1, 5) if takes_v else [1]:
        for ranks in range(1, 17 if thorough else 6):
            for microbatches in (*range(1, 10), *((15, 16, 17, 31, 33, 64) if thorough else ())):
                check((factory(v) if takes_v else factory())(ranks, microbatches))


def test_a_schedule_of_ones_own() -> None:
    """A table from texts, and from actions, is used like any other."""
    schedule_fn = from_table(
        [["0F0", "0F1", "0B0", "0B1"], [Action("F", 1, 0), "1B0", "1F1", "1B1"]]
    )
    assert schedule_fn(2, 2) == from_table(one_f_one_b()(2, 2).ranks)(2, 2)
    assert check(schedule_fn(2, 2)).peak_live == (2, 1)


def test_bad_tables() -> None:
    with pytest.raises(ScheduleError) as caught:
        from_table([["0F0"], ["2F0"]])
    assert str(caught.value) == (
        "table: no rank computes stage 1, though the table goes up to stage 2; write 1F0 on the "
        "rank that holds it, or number the stages without a gap"
    )
    with pytest.raises(ScheduleError, match="mine: the table has no actions"):
        from_table([[], []], name="mine")
    with pytest.raises(
        ScheduleError, match="written for 2 ranks and 3 microbatches, not 2 ranks and 4"
    ):
        from_table(gpipe()(2, 3).ranks)(2, 4)


@given(schedule=library(ranks=5, microbatches=6, v=2), sends=st.booleans())
def test_csv_reads_back(
    schedule: Schedule, sends: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if sends:
        schedule = insert_communication(schedule, chain(schedule.stages))
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    to_csv(schedule, path)
    again = from_csv(path)(len(schedule.ranks), schedule.microbatches)
    assert (again.ranks, again.placement, again.name) == (
        schedule.ranks,
        schedule.placement,
        "table",
    )


def test_csv_is_torchs(tmp_path: Path) -> None:
    """Both ways: torch reads what we write, and we read what torch writes, bubbles, overlaps and
    all."""
    actions = pytest.importorskip("torch.distributed.pipelining.schedules")._Action
    full = insert_communication(one_f_one_b()(3, 4), chain(3))
    to_csv(full, tmp_path / "ours.csv")
    rows = [line.split(",") for line in (tmp_path / "ours.csv").read_text().splitlines()]
    read = [[actions.from_str(cell) for cell in row] for row in rows]
    assert [[a.stage_index for a in row] for row in read] == [
        [a.stage for a in row] for row in full.ranks
    ]
    theirs = "0UNSHARD,0F0,,,0I0,0W0,0REDUCE_GRAD\n,1F0,(1F1;1B0)OVERLAP_F_B,1B1,,1SEND_B0,\n"
    (tmp_path / "theirs.csv").write_text(theirs)
    table = from_csv(tmp_path / "theirs.csv")(2, 2)
    assert str(table) == "rank 0: 0F0 0I0 0W0\nrank 1: 1F0 1F1 1B0 1B1 1SEND_B0>0"
    (tmp_path / "bad.csv").write_text("0F0\n1F0,1Q0\n")
    with pytest.raises(ScheduleError, match=r"bad\.csv, line 2: cannot read an action from '1Q0'"):
        from_csv(tmp_path / "bad.csv")
