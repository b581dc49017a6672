"""The common test of transforms: any model, on any mesh, under any schedule, computes what it
computes on one device.

`FUNCPIPE_PROFILE=thorough` draws 250 cases for each of the random tests here, the default 15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.training_steps import (
    STEPS,
    batches,
    descending,
    equal,
    loss_and_grads,
    pieces,
    pipelines,
    training,
)

import funcpipe as fp
from funcpipe.testing import (
    Layer,
    Model,
    assert_equivalent,
    meshes,
    microbatch_counts,
    models,
)

# Sums over microbatches and over the leaves of a norm are taken in another order than on one
# device: some roundings of 2**-53 each, in three steps that build on one another.
FLOAT64 = 1e-12
# Nothing is summed in another order: the same bits, whatever the dtype.
BITWISE = 0.0

# ---- any model, any pipeline


@given(models(), microbatch_counts(4), st.booleans(), st.data())
def test_three_training_steps(
    model: Model, microbatches: int, sharded: bool, data: st.DataObject
) -> None:
    step, init_state = training(model)
    mesh = data.draw(meshes(pipe=pieces(model), data=2), label="mesh")
    pipeline = data.draw(pipelines(model, microbatches, mesh.axis_size("pipe")), label="pipeline")
    transformed = fp.data_parallel(pipeline(step), axis="data")
    if sharded:
        transformed = fp.sharded_weights(transformed, axis="data")
    parts = microbatches * mesh.axis_size("data")
    rows = parts * data.draw(st.integers(1, 3), label="rows of a microbatch")
    params = model.init(seed=7)
    assert_equivalent(
        step,
        transformed,
        mesh,
        init_state,
        params,
        batches(model, rows),
        rtol=FLOAT64,
        bitwise=parts == 1,
    )


@given(
    models(tops=("none", "scale", "cast")),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_one_microbatch_has_the_same_bits(
    model: Model, dtype: torch.dtype, data: st.DataObject
) -> None:
    step, init_state = descending(model)
    ranks = data.draw(st.integers(1, pieces(model)), label="ranks")
    transformed = data.draw(pipelines(model, 1, ranks), label="pipeline")(step)
    params = model.init(seed=7, dtype=dtype)
    assert_equivalent(
        step,
        transformed,
        fp.Mesh(pipe=ranks),
        init_state,
        params,
        batches(model, 2),
        rtol=BITWISE,
        bitwise=True,
    )


@given(models(tops=("none", "scale", "cast")), microbatch_counts(4), st.data())
def test_bits_do_not_depend_on_the_cut(
    model: Model, microbatches: int, data: st.DataObject
) -> None:
    """Nor on the schedule: gradients are sums over microbatches in order, in whatever order they
    are computed."""
    step, init_state = descending(model)
    params, batch = model.init(seed=7, dtype=torch.float32), model.batch(0, 2 * microbatches)

    def gradients(transformed: Callable, mesh: fp.Mesh) -> Any:
        run = fp.simulate(transformed, mesh)
        return run.unplace(run(run.init(init_state, params, batch), batch)[0])

    alone = gradients(fp.accumulated(step, microbatches=microbatches), fp.Mesh())
    for ranks in data.draw(
        st.lists(st.integers(1, pieces(model)), min_size=2, max_size=2), label="ranks"
    ):
        pipeline = data.draw(pipelines(model, microbatches, ranks), label="pipeline")
        assert equal(gradients(pipeline(step), fp.Mesh(pipe=ranks)), alone)


@given(models(), microbatch_counts(5))
def test_accumulated(model: Model, microbatches: int) -> None:
    step, init_state = training(model)
    transformed = fp.accumulated(step, microbatches=microbatches)
    data = batches(model, 2 * microbatches)
    assert_equivalent(
        step,
        transformed,
        fp.Mesh(),
        init_state,
        model.init(),
        data,
        rtol=FLOAT64,
        bitwise=microbatches == 1,
    )


@given(models(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_microbatches_of_different_shapes(
    model: Model, rows: list[int], data: st.DataObject
) -> None:
    step, init_state = training(model)
    ranks = data.draw(st.integers(1, min(3, pieces(model))), label="ranks")
    transformed = data.draw(pipelines(model, len(rows), ranks), label="pipeline")(step)
    ready = [
        fp.Microbatches([model.batch(10 * k + i, n) for i, n in enumerate(rows)])
        for k in range(STEPS)
    ]
    assert_equivalent(
        step, transformed, fp.Mesh(pipe=ranks), init_state, model.init(), ready, rtol=FLOAT64
    )


@given(models(max_segments=3), models(max_segments=3), microbatch_counts(3), st.data())
def test_several_calls_in_a_step(
    a: Model, b: Model, microbatches: int, data: st.DataObject
) -> None:
    """On subtrees of the params, and on params that the step has moved already; one loss contains
    the other."""

    def both(params: Any, batch: Any) -> fp.Mean:
        means = [
            fp.stage_boundary(model.loss_fn(params[k], batch)) for k, model in (("a", a), ("b", b))
        ]
        first, second = (
            mean[0] if model.has_aux else mean for mean, model in zip(means, (a, b), strict=True)
        )
        return fp.Mean(first.total + second.total, first.weight)

    def step(params: Any, batch: Any) -> Any:
        loss, grads, aux = loss_and_grads(a, params["a"], batch)
        moved = optree.tree_map(
            lambda p, g: p - 0.1 * g if p.is_floating_point() else p, params["a"], grads
        )
        moved = {"a": moved, "b": params["b"]}
        joint, grads = fp.value_and_grad(both)(moved, batch)
        params = optree.tree_map(
            lambda p, g: p - 0.1 * g if p.is_floating_point() else p, moved, grads
        )
        return params, {
            "loss": loss,
            "joint": joint,
            "aux": aux,
            "norm": fp.global_norm(grads["b"]),
        }

    ranks = data.draw(st.integers(1, min(pieces(a), pieces(b))), label="ranks")
    transformed = fp.pipelined(step, axis="pipe", microbatches=microbatches)
    params = {"a": a.init(1), "b": b.init(2)}
    assert_equivalent(
        step, transformed, fp.Mesh(pipe=ranks), lambda p: p, params, batches(a, 2 * microbatches),
        rtol=FLOAT64, bitwise=microbatches == 1,
    )  # fmt: skip


# ---- what else must hold

CHAIN = Model(
    tuple((Layer("linear", (k, k)), Layer("norm", (k, k))) for k in range(3)), tied_head=True, aux=1
)


def test_two_runners_in_one_process() -> None:
    """Interleaved: neither knows of the other."""
    step, init_state = training(CHAIN)
    params, data = CHAIN.init(), batches(CHAIN, 8)
    ways = [(2, 4, fp.schedules.gpipe()), (4, 2, fp.schedules.zb_h1())]

    def start(ranks: int, microbatches: int, schedule: Any) -> tuple[Any, Any]:
        transformed = fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule)
        run = fp.simulate(transformed, fp.Mesh(pipe=ranks))
        return run, run.init(init_state, params, data[0])

    alone = []
    for way in ways:
        run, state = start(*way)
        for batch in data:
            state, _ = run(state, batch)
        alone.append(run.unplace(state)["params"])
    runs = [start(*way) for way in ways]
    for batch in data:
        runs = [(run, run(state, batch)[0]) for run, state in runs]
    assert all(
        equal(run.unplace(state)["params"], full)
        for (run, state), full in zip(runs, alone, strict=True)
    )


def test_weight_gradients_by_segment() -> None:
    """W of a stage may run segment by segment, at any time after I."""
    step, init_state = descending(CHAIN)
    rows = [
        ["0F0", "0F1", "0I0", "0W0.1", "0I1", "0W1.0", "0W0.0", "0W1.1"],
        ["1F0", "1I0", "1F1", "1W0.0", "1I1", "1W1.1", "1W1.0", "1W0.1"],
    ]
    transformed = fp.pipelined(
        step, axis="pipe", microbatches=2, schedule=fp.schedules.from_table(rows), stages=[2, 2]
    )
    params, data = CHAIN.init(), batches(CHAIN, 4)
    assert_equivalent(step, transformed, fp.Mesh(pipe=2), init_state, params, data, rtol=FLOAT64)


def test_a_state_moves_to_another_mesh() -> None:
    step, init_state = training(CHAIN)
    params, data = CHAIN.init(), batches(CHAIN, 6)

    def start(ranks: int) -> tuple[Any, Any]:
        run = fp.simulate(fp.pipelined(step, axis="pipe", microbatches=3), fp.Mesh(pipe=ranks))
        return run, run.init(init_state, params, data[0])

    (two, state), (four, _) = start(2), start(4)
    moved = four.place(two.unplace(two(state, data[0])[0]))
    state, metrics = four(moved, data[1])
    alone = step(step(init_state(params), data[0])[0], data[1])
    torch.testing.assert_close((four.unplace(state), metrics), alone, rtol=FLOAT64, atol=FLOAT64)


def test_a_new_batch_shape_later() -> None:
    step, init_state = training(CHAIN)
    transformed = fp.pipelined(step, axis="pipe", microbatches=2)
    data = [CHAIN.batch(k, rows) for k, rows in enumerate([4, 8, 4, 2])]
    assert_equivalent(
        step, transformed, fp.Mesh(pipe=2), init_state, CHAIN.init(), data, rtol=FLOAT64
    )


def test_dims() -> None:
    """Leaves may be split along other dims, or not at all."""

    def loss_fn(w: torch.Tensor, batch: Any) -> fp.Mean:
        x = fp.stage_boundary(batch["x"].T @ w + batch["bias"])
        return fp.Mean((x.square() * batch["y"]).sum(), torch.ones_like(x).sum())

    def step(w: torch.Tensor, batch: Any) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, batch)
        return optree.tree_map(lambda w, g: w - 0.1 * g, w, grad), {"loss": loss}

    g = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 4), "y": (4, 2), "bias": (2,)}
    batch = {k: torch.rand(shape, generator=g, dtype=torch.float64) for k, shape in shapes.items()}
    transformed = fp.pipelined(
        step, axis="pipe", microbatches=4, dims={"x": 1, "y": 0, "bias": None}
    )
    w = torch.rand(3, 2, generator=g, dtype=torch.float64)
    assert_equivalent(
        step, transformed, fp.Mesh(pipe=2), lambda w: w, w, [batch] * STEPS, rtol=FLOAT64
    )


# ---- plain when plain


@given(models(tops=("none", "scale", "cast")), st.sampled_from([torch.float32, torch.float64]))
def test_untransformed_is_autograd(model: Model, dtype: torch.dtype) -> None:
    params, batch = model.init(3, dtype), model.batch(0, 3)
    loss, grads, _ = loss_and_grads(model, params, batch)
    leaves, spec = optree.tree_flatten(params)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in leaves]
    out = model.loss_fn(optree.tree_unflatten(spec, leaves), batch)
    mean = out[0] if model.has_aux else out
    wanted = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad(mean.total, wanted, allow_unused=True, materialize_grads=True))
    true = [
        (next(found) / mean.weight).to(x.dtype) if x.requires_grad else torch.zeros_like(x)
        for x in leaves
    ]
    assert torch.equal(loss, mean.total / mean.weight)
    assert equal(grads, optree.tree_unflatten(spec, true))


def test_torch_func_goes_through_an_untransformed_step() -> None:
    """Also beside a runner, and after one that failed: nothing of them is left behind."""
    params, batch = CHAIN.init(), CHAIN.batch(0, 4)

    def after(rate: torch.Tensor) -> torch.Tensor:
        """The loss after one step with a learning rate."""
        _, grads, _ = loss_and_grads(CHAIN, params, batch)
        moved = optree.tree_map(lambda p, g: p - rate * g, params, grads)
        return loss_and_grads(CHAIN, moved, batch)[0]

    step, init_state = descending(CHAIN)
    run = fp.simulate(fp.pipelined(step, axis="pipe", microbatches=2), fp.Mesh(pipe=2))
    run(run.init(init_state, params, batch), batch)
    with pytest.raises(fp.errors.BatchError):
        fp.simulate(fp.accumulated(step, microbatches=3), fp.Mesh()).init(init_state, params, batch)

    rates = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    one_by_one = torch.stack([after(rate) for rate in rates])
    torch.testing.assert_close(torch.func.vmap(after)(rates), one_by_one, rtol=FLOAT64, atol=0)
    h = 1e-6
    slope = (after(rates[1] + h) - after(rates[1] - h)) / (2 * h)
    # The error of a central difference: h**2 times a third derivative, and rounding over h.
    torch.testing.assert_close(torch.func.grad(after)(rates[1]), slope, rtol=1e-6, atol=0)


def test_a_step_may_write_to_its_gradients():
    """The owners of a tied leaf each have its gradient in memory of their own, also where no weight
    divides it."""

    def loss_fn(params, x):
        hidden = fp.stage_boundary(torch.tanh(x @ params["tied"]))
        return (torch.tanh(hidden @ params["own"]) @ params["tied"]).square().sum()

    def step(params, x):
        loss, grads = fp.value_and_grad(loss_fn)(params, x)
        optree.tree_map(lambda g: g.mul_(0.5), grads)
        return optree.tree_map(lambda p, g: p - g, params, grads), {"loss": loss}

    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    params, batches = {"own": new(4, 4), "tied": new(4, 4)}, [new(3, 4), new(3, 4)]
    fast = fp.pipelined(step, axis="pipe", microbatches=1)
    fp.testing.assert_equivalent(step, fast, fp.Mesh(pipe=2), lambda p: p, params, batches)
