"""Last rows that go to the next rank, columns of all rows, and the last rank: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import refused

import funcpipe as fp
from funcpipe.errors import BatchError
from funcpipe.testing import assert_equivalent

Y = Callable[[torch.Tensor], torch.Tensor]


def to_next(x: torch.Tensor) -> torch.Tensor:
    return fp.ppermute(x, "data", [(i, i + 1) for i in range(fp.axis_size("data") - 1)])


def around(x: torch.Tensor) -> torch.Tensor:
    n = fp.axis_size("data")
    return fp.ppermute(x, "data", [(i, (i + 1) % n) for i in range(n)])


def is_last() -> torch.Tensor:
    return fp.axis_index("data") == fp.axis_size("data") - 1


RIGHT: dict[str, Y] = {
    "row before": lambda y: y * torch.cat([to_next(y[-1:]), y[:-1]]),
    "two rows before": lambda y: y * torch.cat([to_next(y[-2:]), y[:-2]]),
    "row before, in a ring": lambda y: y * torch.cat([around(y[-1:]), y[:-1]]),
    "all but the last": lambda y: (
        y * torch.cat([torch.ones_like(y[:-1]), 1 - is_last().to(y.dtype)[None]])
    ),
    "columns of sums": lambda y: (
        y
        * fp.all_gather(
            fp.psum_scatter(torch.stack([y.sum(), y.exp().sum()]), "data").tanh(), "data"
        ).sum()
    ),
}
WRONG: dict[str, Y] = {
    "row before, behind": lambda y: y * torch.cat([y[:-1], to_next(y[-1:])]),
    "another number of rows": lambda y: y * torch.cat([to_next(y[-2:]), y[:-1]])[1:],
    "to the rank before": lambda y: y * torch.cat([fp.ppermute(y[-1:], "data", [(1, 0)]), y[:-1]]),
    "first rows": lambda y: y * torch.cat([to_next(y[:1]), y[:-1]]),
    "last row of a part": lambda y: y * y[-1:],
    "all but the last of a part": lambda y: y[:-1].square(),
    "only the last": lambda y: (
        y * torch.cat([torch.ones_like(y[:-1]), is_last().to(y.dtype)[None]])
    ),
    "the last rank": lambda y: y * is_last(),
    "the first rank": lambda y: y * (fp.axis_index("data") == 0),
}

ALL: dict[str, Y] = {
    "narrow": lambda y: y * y.narrow(0, 0, len(y)),
    "slice": lambda y: y * y[: len(y)],
    "slice from the end": lambda y: y * y[-len(y) :],
}


def step_of(of: Y) -> Callable:
    def loss_fn(w: Any, x: Any) -> fp.Mean:
        return fp.Mean(of((x @ w).tanh()).square().sum(), torch.tensor(float(len(x))))

    def step(w: Any, x: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grads, {"loss": loss}

    return step


W = torch.linspace(-1, 1, 3, dtype=torch.float64)
X = torch.sin(torch.arange(24, dtype=torch.float64)).view(8, 3)
MESH = fp.Mesh(data=2)
DATA = fp.data_parallel(axis="data")


@pytest.mark.parametrize("name", RIGHT)
def test_equal_to_one_device(name: str) -> None:
    step = step_of(RIGHT[name])
    assert_equivalent(step, DATA(step), MESH, lambda w: w, W, [X, X])


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str) -> None:
    run = fp.simulate(DATA(step_of(WRONG[name])), MESH)
    with refused(BatchError, "Mean.total", "at test_rows_edges.py"):
        run.init(lambda w: w, W, X)


@pytest.mark.parametrize("name", ALL)
def test_all_rows(name: str) -> None:
    step = step_of(ALL[name])
    stacked = DATA(fp.accumulated(step, microbatches=2))
    assert_equivalent(step, stacked, MESH, lambda w: w, W, [X, X])


@pytest.mark.parametrize("name", RIGHT)
def test_refused_over_microbatches(name: str) -> None:
    run = fp.simulate(DATA(fp.accumulated(step_of(RIGHT[name]), microbatches=2)), MESH)
    with refused(BatchError, "at test_rows_edges.py"):
        run.init(lambda w: w, W, X)
