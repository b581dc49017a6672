"""Rows that may meet: declared batch statistics, named axes, ready microbatches; in planned steps,
beside one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.row_losses import refused

import funcpipe as fp
from funcpipe.errors import BatchError

N, D = 8, 4


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(x[..., 0].numel()))


def step_of(total: Callable) -> Callable:
    def step(w: Any, x: Any) -> Any:
        loss, grads = fp.value_and_grad(lambda w, x: fp.Mean(total(w, x), rows_of(x)))(w, x)
        return optree.tree_map(lambda p, g: p - 0.1 * g, w, grads), {"loss": loss}

    return step


def run(step: Callable, mesh: fp.Mesh, x: Any) -> Any:
    simulated = fp.simulate(step, mesh)
    state, metrics = simulated(simulated.init(lambda w: w, rand(D, D, seed=1), x), x)
    return simulated.unplace(state), metrics["loss"]


def check(step: Callable, transformed: Callable, mesh: fp.Mesh, x: Any, one: Any = None) -> None:
    """A transformed step computes what a step does on one device."""
    state, metrics = step(rand(D, D, seed=1), x if one is None else one)
    for a, b in zip(run(transformed, mesh, x), (state, metrics["loss"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def balance(share: torch.Tensor) -> torch.Tensor:
    return share.mean(0).square().sum()


def balanced(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    share = (x @ w).softmax(-1)
    return share[:, 0].sum() + rows_of(x) * fp.batch_statistic(balance)(share)


def centred(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return fp.batch_statistic(lambda y: y - y.mean(0))(x @ w).square().sum()


@pytest.mark.parametrize("total", [balanced, centred])
def test_to_a_batch_statistic_each_part_is_a_batch_of_its_own(total: Callable) -> None:
    step, x = step_of(total), rand(N, D)
    pieces = fp.Microbatches(list(x.chunk(4)))
    check(
        step,
        fp.data_parallel(fp.accumulated(step, microbatches=2), axis="data"),
        fp.Mesh(data=2),
        x,
        pieces,
    )
    check(step, fp.pipelined(step, axis="pipe", microbatches=4), fp.Mesh(pipe=1), x, pieces)
    check(
        step, fp.data_parallel(step, axis="data"), fp.Mesh(data=1), x
    )  # one part: the batch of one device


def test_a_batch_statistic_is_declared_where_it_is_and_no_further() -> None:
    step = step_of(lambda w, x: fp.batch_statistic(torch.sin)((x @ w).roll(1, 0)).sum())
    with refused("aten.roll"):
        run(fp.accumulated(step, microbatches=2), fp.Mesh(), rand(N, D))
    step = step_of(lambda w, x: x.sum() + fp.batch_statistic(balance)(x @ w))
    with refused("aten.add", "counted once for every microbatch and shard"):
        run(fp.accumulated(step, microbatches=2), fp.Mesh(), rand(N, D))
    step = step_of(lambda w, x: fp.batch_statistic(lambda y: y @ y.T)(x @ w).sum())
    with refused("batch-statistic", "shape (4, 4) in a part, and (8, 8) on one device"):
        run(fp.accumulated(step, microbatches=2), fp.Mesh(), rand(N, D))


def contrastive(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    u = F.normalize(x @ w, dim=1)
    others = fp.all_gather(u.sin(), "data")
    number = fp.axis_index("data") * len(x) + torch.arange(len(x))
    return F.cross_entropy(5 * u @ others.T, number, reduction="sum")


def centred_over_ranks(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = x @ w
    return (y - fp.pmean(y.mean(0), "data")).square().sum()


def normalised_over_ranks(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = x @ w
    y = (y - fp.pmax(y.detach().amax(0), "data")).exp()
    return (y / fp.psum(y.sum(0), "data") * x).sum()


NAMED = [contrastive, centred_over_ranks, normalised_over_ranks]


@pytest.mark.parametrize("total", NAMED)
def test_rows_meet_over_named_axes(total: Callable) -> None:
    step, x = step_of(total), rand(N, D)
    check(step, fp.data_parallel(step, axis="data"), fp.Mesh(data=2), x)
    check(
        step,
        fp.data_parallel(fp.pipelined(step, axis="pipe", microbatches=1), axis="data"),
        fp.Mesh(pipe=1, data=4),
        x,
    )


@pytest.mark.parametrize("total", NAMED)
def test_named_axes_do_not_join_microbatches(total: Callable) -> None:
    step = fp.data_parallel(fp.accumulated(step_of(total), microbatches=2), axis="data")
    with refused("at test_rows_planned.py"):
        run(step, fp.Mesh(data=2), rand(N, D))


def test_only_what_joins_all_ranks_makes_rows_whole() -> None:
    step = fp.data_parallel(
        step_of(lambda w, x: (fp.psum((x @ w).sum(0), "a") * x).sum()), axis=("a", "b")
    )
    with refused("aten.mul"):
        run(step, fp.Mesh(a=2, b=2), rand(N, D))
    step = fp.data_parallel(
        step_of(lambda w, x: (fp.all_gather(x @ w, ("b", "a")) @ x.T).exp().sum()), axis=("a", "b")
    )
    with refused("all_gather"):
        run(step, fp.Mesh(a=2, b=2), rand(N, D))


def test_rows_of_a_ready_microbatch_may_meet_but_not_over_data_ranks() -> None:
    step = step_of(lambda w, x: ((x @ w) @ (x @ w).T).square().sum())
    ready = fp.Microbatches([rand(4, D), rand(6, D, seed=2)])
    check(step, fp.accumulated(step, microbatches=None), fp.Mesh(), ready)
    with refused("mm"):
        run(
            fp.data_parallel(fp.accumulated(step, microbatches=None), axis="data"),
            fp.Mesh(data=2),
            ready,
        )


def test_two_transforms_that_split_along_two_dims() -> None:
    """Each is proven by itself."""
    x = rand(4, 6, D)

    def stacked(total):
        return fp.data_parallel(fp.accumulated(step_of(total), microbatches=2, dims=1), axis="data")

    run(stacked(lambda w, x: (x @ w).tanh().sum()), fp.Mesh(data=2), x)
    for dim in (0, 1):
        with refused("softmax", "at test_rows_planned.py"):
            run(stacked(lambda w, x, dim=dim: ((x @ w).softmax(dim) * x).sum()), fp.Mesh(data=2), x)


def test_a_batch_without_rows() -> None:
    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
            return fp.Mean((x @ w).square().sum(), torch.tensor(float(len(x))))

        loss, grad = fp.value_and_grad(loss_fn)(w, x)
        return w - grad, {"loss": loss}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    with pytest.raises(BatchError, match="the batch has no rows: pass batches that have some"):
        run.init(lambda w: w, torch.ones(3), torch.zeros(0, 3))
