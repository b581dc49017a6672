"""Stages: segments grouped."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused

from funcpipe._src.schedule.stage_assignment import group
from funcpipe.errors import CutError

COSTS = st.lists(st.integers(1, 20), min_size=1, max_size=9)


def dearest(costs: list[int], stages: tuple[tuple[int, ...], ...]) -> int:
    return max(sum(costs[s] for s in stage) for stage in stages)


def all_groupings(n: int, stages: int) -> list[tuple[tuple[int, ...], ...]]:
    ends = itertools.combinations(range(1, n), stages - 1)
    return [tuple(tuple(range(a, b)) for a, b in itertools.pairwise((0, *cut, n))) for cut in ends]


@given(COSTS, st.data())
def test_balanced_is_the_best_there_is(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    found = group(costs, stages, "balanced")
    assert found in all_groupings(len(costs), stages)
    assert dearest(costs, found) == min(
        dearest(costs, g) for g in all_groupings(len(costs), stages)
    )


@given(COSTS, st.data())
def test_even_differs_by_one_at_most(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    found = group(costs, stages, "even")
    assert found in all_groupings(len(costs), stages)
    sizes = [len(stage) for stage in found]
    assert max(sizes) - min(sizes) <= 1


def test_a_list_is_taken_at_its_word() -> None:
    assert group([1] * 5, 3, (1, 3, 1)) == ((0,), (1, 2, 3), (4,))


def test_segments_without_cost_still_make_stages() -> None:
    assert [len(stage) for stage in group([0] * 4, 2, "balanced")] == [2, 2]


@pytest.mark.parametrize("how", ["balanced", "even", (1, 1, 1)])
def test_too_few_segments(how: str | tuple[int, ...]) -> None:
    with refused(CutError, "3 stages need 2 boundaries or more, but the loss function has 1"):
        group([1, 1], 3, how)


@pytest.mark.parametrize("how", [(1, 1), (2, 2, 2), (4,)])
def test_a_list_that_does_not_fit(how: tuple[int, ...]) -> None:
    with refused(
        CutError,
        f"stages={list(how)} has {len(how)} entries that add up to {sum(how)}",
        "add up to 4",
    ):
        group([1] * 4, 3, how)
