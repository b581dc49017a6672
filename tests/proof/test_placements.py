"""States: what their sums and products claim is true of numbers."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import pytest
import torch
from support.sequence_ranks import a_part

from funcpipe._src.proof import placements

UNEVEN = a_part(7, 3)


def tensors_of(state: Any, seed: int) -> tuple[list[float], float]:
    """Numbers of every rank, and of one device, for which a state holds."""
    g = torch.Generator().manual_seed(seed)
    each = [UNEVEN.length(m) for m in range(UNEVEN.members)]
    values = torch.randn(UNEVEN.members, generator=g, dtype=torch.float64).tolist()
    if isinstance(state, placements.Partial):
        return values, sum(values)
    if isinstance(state, placements.Average):
        return values, sum(v * n for v, n in zip(values, each, strict=True)) / UNEVEN.size
    if isinstance(state, placements.Number) and not state.constant:
        return [3.0 * n for n in each], 3.0 * UNEVEN.size
    one = state.full if isinstance(state, placements.Number) else values[0]
    return [one] * UNEVEN.members, one


def holds(state: Any, each: list[float], one: float) -> bool:
    """Whether a state is true of numbers."""
    if isinstance(state, placements.Partial):
        return abs(sum(each) - one) < 1e-9
    if isinstance(state, placements.Average):
        return abs(sum(v * UNEVEN.length(m) for m, v in enumerate(each)) / UNEVEN.size - one) < 1e-9
    if isinstance(state, placements.Number):
        return (each[0], one) == (state.local, state.full)
    return all(abs(v - one) < 1e-9 for v in each)


@pytest.mark.parametrize("op", ["add", "mul", "div"])
def test_what_sums_and_products_of_states_say_is_true(op: str) -> None:
    length = UNEVEN.length(0)
    split = placements.SplitContext({UNEVEN: (length, UNEVEN.size)}, ("seq",))
    known: list[Any] = [
        placements.Replicate(),
        placements.Partial(("seq",)),
        placements.Average(UNEVEN),
        placements.Number(2.0, 2.0),
        placements.ZERO,
    ]
    known.append(placements.Number(3.0 * length, 3.0 * UNEVEN.size))
    said = 0
    for (i, s), (j, t) in itertools.product(enumerate(known), repeat=2):
        if op == "div" and t == placements.ZERO:
            continue
        try:
            state = getattr(placements, op)(split, s, t)
        except placements.Refusal:
            continue
        (xs, x), (ys, y) = tensors_of(s, i), tensors_of(t, 10 + j)
        compute = {"add": operator.add, "mul": operator.mul, "div": operator.truediv}[op]
        assert holds(state, [compute(a, b) for a, b in zip(xs, ys, strict=True)], compute(x, y)), (
            s,
            t,
            state,
        )
        said += 1
    assert said >= 10
