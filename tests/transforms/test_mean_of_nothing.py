"""A mean of nothing is 0, and its gradient is zeros: on one device and on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import mean
from funcpipe.testing import assert_equivalent

FLOAT64 = 1e-12


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"a": normal(3, 4, seed=1), "b": normal(4, 4, seed=2)}
NOTHING = {"x": normal(8, 3), "label": torch.full((8,), -100)}
LITTLE = {"x": normal(8, 3), "label": torch.tensor([-100] * 6 + [1, -100])}
ADAMW = fp.optim.adamw(1e-2, eps=1e-3)


def loss_fn(p: Any, b: Any) -> Any:
    """The weight is an integer. Of four classes some have no label: a mean of nothing for each."""
    logits = fp.stage_boundary((b["x"] @ p["a"]).tanh()) @ p["b"]
    total = F.cross_entropy(logits, b["label"], ignore_index=-100, reduction="sum")
    kept = b["label"] != -100
    hits = F.one_hot(b["label"].clamp(min=0), 4) * kept[:, None]
    return fp.Mean(total, kept.sum()), fp.Mean((hits * logits).sum(0), hits.sum(0))


def step(state: Any, b: Any) -> Any:
    params, opt = state
    (loss, classes), grads = fp.value_and_grad(loss_fn, has_aux=True)(params, b)
    grads, norm = fp.clip_by_global_norm(grads, 0.5)
    return ADAMW.update(grads, opt, params), {"loss": loss, "classes": classes, "norm": norm}


def init_state(p: Any) -> Any:
    return p, ADAMW.init(p)


STACKS: dict[str, tuple[Callable, fp.Mesh]] = {
    "one device": (lambda s: s, fp.Mesh()),
    "microbatches": (fp.accumulated(microbatches=4), fp.Mesh()),
    "pipe": (fp.pipelined(axis="pipe", microbatches=4), fp.Mesh(pipe=2)),
    "sharded": (
        fp.compose(fp.data_parallel(axis="data"), fp.sharded_weights(axis="data")),
        fp.Mesh(data=2),
    ),
}


@pytest.mark.parametrize("stack", STACKS)
def test_any_stack(stack: str) -> None:
    transform, mesh = STACKS[stack]
    run = fp.simulate(transform(step), mesh)
    state = run.init(init_state, PARAMS, NOTHING)
    state, metrics = run(state, NOTHING)
    assert all((x == 0).all() for x in tree.leaves(metrics))
    params, _ = run.unplace(state)
    zeros = tree.map(torch.zeros_like, PARAMS)
    assert all(
        map(
            torch.equal,
            tree.leaves(params),
            tree.leaves(ADAMW.update(zeros, ADAMW.init(PARAMS), PARAMS)[0]),
        )
    )
    assert_equivalent(
        step, transform(step), mesh, init_state, PARAMS, [LITTLE, NOTHING, LITTLE], rtol=FLOAT64
    )


def test_a_total_beside_nothing_counts_nothing() -> None:
    """It is not divided by 0, nor by 1."""
    w = torch.tensor([1.0, 2.0])
    loss, grad = fp.value_and_grad(lambda w, x: fp.Mean((w * x).sum(), torch.tensor(0.0)))(
        w, torch.ones(2)
    )
    assert loss == 0 and torch.equal(grad, torch.zeros(2))


def test_with_a_loss_scale_the_step_counts_as_good() -> None:
    def one(w: Any, x: Any) -> Any:
        loss, grad = fp.value_and_grad(lambda w, x: fp.Mean((w * x).sum() * 0, (x > 9).sum()))(w, x)
        return w - grad, {"loss": loss}

    run = fp.simulate(
        fp.mixed_precision(fp.accumulated(one, microbatches=2), compute="float16"), fp.Mesh()
    )
    state, metrics = run(run.init(lambda w: w, torch.ones(2), torch.ones(4, 2)), torch.ones(4, 2))
    assert metrics["skipped_steps"] == 0 and metrics["loss"] == 0
    assert torch.equal(run.unplace(state).state, torch.ones(2))


def test_dtypes_stay() -> None:
    """Of quotients of 0-d tensors: integers over integers are of the default dtype."""
    for total in (torch.float32, torch.float64, torch.int64):
        for weight in (torch.float32, torch.float64, torch.int64, torch.bool):
            a, b = torch.tensor(6, dtype=total), torch.tensor(1, dtype=weight)
            got = mean(a, b)
            assert got.dtype == (a / b).dtype and got == a / b


def test_inside_torch_func() -> None:
    weights, w = torch.tensor([2.0, 0.0]), torch.tensor(3.0)

    def one(weight: torch.Tensor) -> Any:
        return fp.value_and_grad(lambda w, n: fp.Mean(w * n, n))(w, weight)

    loss, grad = torch.func.vmap(one)(weights)
    assert torch.equal(loss, torch.tensor([3.0, 0.0])) and torch.equal(
        grad, torch.tensor([1.0, 0.0])
    )
