"""Leaf by leaf: freezing, learning rates and weight decays by path, averages, statistics; on one
device and on meshes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import optree
import pytest
import torch
import torchopt
from hypothesis import given
from support.models import refused
from support.optim import assert_same, random_grads, random_params, train
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe.errors import OptimError
from funcpipe.optim import (
    Factors,
    Optimizer,
    adamw,
    ema,
    freeze,
    from_optax,
    per_leaf,
    sgd,
    statistics,
    warmup_cosine,
)
from funcpipe.testing import Model, assert_equivalent, meshes, models

# Sums over microbatches and over the leaves of a norm are taken in another order: see
# test_equivalence.py.
FLOAT64 = 1e-12
# Leaves that are float32, or a norm of them: 2**-24 in each of ten updates.
FLOAT32 = 1e-6

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
LR = {"['embed']": 0.5, "['blocks'][0]['w']": 0.0, "['blocks'][1]['w']": 3.0}
DECAY = {"['blocks'][0]['norm']": 2.0, "['blocks'][1]['w']": 0.0, "['scale']": 0.25}
FROZEN = {"['embed']", "['blocks'][1]['norm']"}


def lr(path: str) -> float:
    return LR.get(path, 1.0)


def weight_decay(path: str) -> float:
    return DECAY.get(path, 1.0)


def train_torch(
    make: Callable, params: Any, rate: float, decay: float, schedule: Callable | None = None
) -> Any:
    """Ten updates by torch, a parameter group for every leaf; frozen ones have no gradient."""
    params = optree.tree_map(lambda p: p.clone().requires_grad_(), params)
    paths, leaves = tree.paths(params), tree.leaves(params)
    groups = [
        {"params": [p], "lr": rate * lr(path), "weight_decay": decay * weight_decay(path)}
        for path, p in zip(paths, leaves, strict=True)
    ]
    optimizer = make(groups)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for i in range(10):
        for path, p, g in zip(paths, leaves, tree.leaves(random_grads(params, i)), strict=True):
            p.grad = None if path in FROZEN else g
        optimizer.step()
        if scheduler:
            scheduler.step()
    return optree.tree_map(lambda p: p.detach(), params)


def chosen(optimizer: Optimizer) -> Optimizer:
    return freeze(per_leaf(optimizer, lr, weight_decay), FROZEN.__contains__)


# ---- freeze and per_leaf: the numbers of torch's parameter groups


@DTYPES
def test_adamw_is_bitwise_torchs_with_groups(dtype):
    params = random_params(dtype)
    ours, state = train(chosen(adamw(1e-2, weight_decay=0.3, decay=lambda leaf: True)), params, 10)
    theirs = train_torch(
        lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True), params, 1e-2, 0.3
    )
    assert_same(ours, theirs)
    held = {path for path in tree.paths(params) if path not in FROZEN}
    assert set(tree.paths(state.m)) == set(tree.paths(state.v)) == held and state.step == 10


@DTYPES
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str
)
def test_sgd_is_bitwise_torchs_with_groups(dtype, settings):
    params = random_params(dtype)
    ours, _ = train(chosen(sgd(0.1, weight_decay=0.1, **settings)), params, 10)
    theirs = train_torch(
        lambda groups: torch.optim.SGD(groups, foreach=False, **settings), params, 0.1, 0.1
    )
    assert_same(ours, theirs)


def test_schedules_go_with_factors():
    params, schedule = random_params(torch.float64), warmup_cosine(1.0, 3, 8)
    ours, _ = train(
        chosen(adamw(lambda n: 1e-2 * schedule(n), weight_decay=0.3, decay=lambda leaf: True)),
        params,
        10,
    )
    theirs = train_torch(
        lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        params, 1e-2, 0.3, lambda n: float(schedule(torch.tensor(float(n)))),
    )  # fmt: skip
    assert_same(ours, theirs, FLOAT64)


@pytest.mark.parametrize("make", [torchopt.adam, torchopt.sgd])
def test_a_pair_with_factors_has_other_learning_rates(make):
    params = random_params(torch.float64)
    ours, _ = train(per_leaf(from_optax(make(1e-2)), lr), params, 10)
    for k, (path, leaf) in enumerate(zip(tree.paths(params), tree.leaves(ours), strict=True)):
        other, _ = train(from_optax(make(1e-2 * lr(path))), params, 10)
        rtol = 0.0 if lr(path) in (0.0, 1.0) else FLOAT64
        torch.testing.assert_close(leaf, tree.leaves(other)[k], rtol=rtol, atol=rtol)


def test_frozen_leaves_are_handed_through():
    params = random_params()
    optimizer = freeze(adamw(1e-2), FROZEN.__contains__)
    grads = random_grads(params, 0) | {"embed": None}
    new, _ = optimizer.update(grads, optimizer.init(params), params)
    same = {
        path
        for path, a, b in zip(tree.paths(new), tree.leaves(new), tree.leaves(params), strict=True)
        if a is b
    }
    assert same == FROZEN


@pytest.mark.parametrize(
    "all_of_them", [lambda path: True, lambda path: False], ids=["all", "none"]
)
def test_all_or_nothing_frozen(all_of_them):
    params = random_params()
    ours, state = train(freeze(adamw(1e-2), all_of_them), params, 3)
    assert_same(ours, params if all_of_them("") else train(adamw(1e-2), params, 3)[0])
    assert state.step == 3


def test_the_order_of_wrappers_changes_nothing_and_factors_multiply():
    params = random_params(torch.float64)
    inner = adamw(1e-2, weight_decay=0.3)
    expected = train(chosen(inner), params, 5)
    assert_same(
        train(per_leaf(freeze(inner, FROZEN.__contains__), lr, weight_decay), params, 5), expected
    )
    apart = per_leaf(per_leaf(freeze(inner, FROZEN.__contains__), lr), weight_decay=weight_decay)
    assert_same(train(apart, params, 5), expected)
    twice = per_leaf(
        per_leaf(inner, lambda path: 0.5, lambda path: 4.0), lambda path: 2.0, lambda path: 0.25
    )
    assert_same(train(twice, params, 5), train(inner, params, 5))


def test_the_state_does_not_depend_on_factors():
    params = random_params()
    states = [
        optimizer.init(params)
        for optimizer in (adamw(1e-2), per_leaf(adamw(1e-2), lr, weight_decay))
    ]
    assert_same(*states)


def test_paths_are_asked_for_once():
    asked = []
    optimizer = per_leaf(adamw(1e-2), lambda path: asked.append(path) or 1.0)
    train(optimizer, random_params(), 3)
    assert sorted(asked) == sorted(tree.paths(random_params()))


def test_a_users_own_optimizer_may_take_factors():
    def update(grads: Any, state: Any, params: Any, factors: Any = None) -> Any:
        scale = iter(factors or [Factors()] * len(tree.leaves(params)))
        return optree.tree_map(lambda p, g: p - next(scale).lr * g, params, grads), state

    params = {"a": torch.ones(2), "b": torch.ones(2)}
    new, _ = per_leaf(
        Optimizer(lambda p: (), update), lambda path: 0.5 if "a" in path else 0.25
    ).update(params, (), params)
    assert_same(new, {"a": torch.full((2,), 0.5), "b": torch.full((2,), 0.75)})


# ---- averages


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_average_is_bitwise_torchs(dtype):
    params, average = random_params(dtype), ema(0.99)
    module = torch.nn.ParameterList([p.clone() for p in tree.leaves(params)])
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    theirs.update_parameters(module)  # the first one copies
    state = average.init(params)
    for i in range(10):
        params = random_grads(params, i)
        state = average.update(state, params)
        for p, new in zip(module, tree.leaves(params), strict=True):
            p.data.copy_(new)
        theirs.update_parameters(module)
    assert_same(tree.leaves(state.average), [p.detach() for p in theirs.module])
    assert state.step == 10


def test_a_scheduled_average_begins_sooner():
    average = ema(lambda step: ((1 + step) / (10 + step)).clamp(max=0.5))
    params, state = random_params(torch.float64), average.init(random_params(torch.float64))
    expected = tree.leaves(params)
    for i in range(12):
        params = random_grads(params, i)
        beta = min((1 + i) / (10 + i), 0.5)
        expected = [
            beta * e + (1 - beta) * p for e, p in zip(expected, tree.leaves(params), strict=True)
        ]
        state = average.update(state, params)
    assert_same(tree.leaves(state.average), expected, FLOAT64)


def test_low_precision_leaves_are_averaged_in_float32():
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    average = ema(0.999)
    state = average.init(params)
    for _ in range(10):
        state = average.update(state, {"w": torch.full((3,), 2.0, dtype=torch.bfloat16)})
    torch.testing.assert_close(
        state.average["w"], torch.full((3,), 2 - 0.999**10), rtol=FLOAT32, atol=0
    )


def test_an_average_modifies_nothing_and_follows_frozen_leaves():
    params = {
        "w": torch.ones(2, 2),
        "ids": torch.arange(3),
        "none": None,
        "name": "x",
        "empty": torch.ones(0, 3),
    }
    average = ema(0.5)
    state = average.init(params)
    shared = {
        x.data_ptr() for x in tree.leaves(params) if isinstance(x, torch.Tensor) and x.numel()
    }
    assert not shared & {x.data_ptr() for x in tree.leaves(state) if isinstance(x, torch.Tensor)}
    new = params | {"w": torch.zeros(2, 2), "ids": torch.arange(3) + 5}
    before = tree.map_tensors(torch.clone, (state, new))
    after = average.update(state, new)
    assert torch.equal(after.average["w"], torch.full((2, 2), 0.5)) and torch.equal(
        after.average["ids"], new["ids"]
    )
    assert after.average["none"] is None and after.average["name"] == "x"
    for x, y in zip(tree.leaves((state, new)), tree.leaves(before), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@given(rows=st.integers(1, 5), parts=st.integers(1, 3))
def test_slices_are_averaged_as_the_whole(rows, parts):
    whole, average = {"w": random_params(torch.float64)["embed"].repeat(rows * parts, 1)}, ema(0.9)
    new = {"w": whole["w"] * 2 + 1}
    expected = average.update(average.init(whole), new).average["w"]
    pieces = [{"w": x} for x in whole["w"].chunk(parts)]
    moved = [{"w": x} for x in new["w"].chunk(parts)]
    got = [
        average.update(average.init(a), b).average["w"] for a, b in zip(pieces, moved, strict=True)
    ]
    torch.testing.assert_close(torch.cat(got), expected, rtol=FLOAT64, atol=FLOAT64)


# ---- statistics


@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf"), float("nan"), 1e-3]), max_size=6
        ),
        max_size=4,
    ),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_statistics_by_hand(rows, dtype):
    leaves = [torch.tensor(row, dtype=dtype) for row in rows]
    found = statistics({"x": leaves, "none": None, "ids": torch.arange(3)})
    for k, x in enumerate(leaves):
        finite = x[x.isfinite()].double()
        norm, largest, zeros, bad = (part["x"][k] for part in found)
        assert {t.dtype for t in (norm, largest, zeros, bad)} == {torch.float64}
        torch.testing.assert_close(norm, x.double().norm(), rtol=FLOAT32, atol=0, equal_nan=True)
        assert largest == (finite.abs().max() if len(finite) else 0.0)
        assert zeros == (x == 0).double().sum() / max(x.numel(), 1)
        assert bad == (~x.isfinite()).double().sum() / max(x.numel(), 1)
    assert [part["ids"].item() for part in found] == [0.0] * 4 and found.norm["none"] is None


def test_norms_make_up_the_global_norm():
    params = random_params(torch.float64)
    norms = torch.stack(tree.leaves(statistics(params).norm))
    torch.testing.assert_close(norms.norm(), fp.global_norm(params), rtol=FLOAT64, atol=0)


# ---- the common test: on any mesh what it is on one device


def by_length(path: str) -> float:
    """Some factor of a path, the same for some leaves."""
    return 1.0 + len(path) % 3


AVERAGE = ema(lambda step: ((1 + step) / (4 + step)).clamp(max=0.9))
OPTIMIZERS = {
    # eps above rounding: see test_equivalence.py
    "adamw": freeze(
        per_leaf(adamw(1e-2, eps=1e-3), by_length, by_length), lambda path: "['V'][0]" in path
    ),
    "sgd": per_leaf(
        freeze(sgd(1e-2, momentum=0.9, weight_decay=0.1), lambda path: "embed" in path), by_length
    ),
    "torchopt": per_leaf(from_optax(torchopt.adam(1e-2, eps=1e-3)), by_length),
    "frozen": freeze(adamw(1e-2), lambda path: True),
}


def training(model: Model, optimizer: Optimizer) -> tuple[Callable, Callable]:
    def init_state(params: Any) -> dict[str, Any]:
        return {"params": params, "opt": optimizer.init(params), "ema": AVERAGE.init(params)}

    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state["params"], batch)
        params, opt = optimizer.update(grads, state["opt"], state["params"])
        metrics = {"loss": out, "grads": statistics(grads), "params": statistics(params)}
        return {"params": params, "opt": opt, "ema": AVERAGE.update(state["ema"], params)}, metrics

    return step, init_state


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@given(models(max_segments=3), st.integers(1, 2), st.data())
def test_on_any_mesh(
    optimizer: Optimizer, model: Model, microbatches: int, data: st.DataObject
) -> None:
    step, init_state = training(model, optimizer)
    mesh = data.draw(meshes(pipe=len(model.segments) + 1, data=2), label="mesh")
    parallel = fp.compose(
        fp.pipelined(axis="pipe", microbatches=microbatches),
        fp.data_parallel(axis="data"),
        fp.sharded_weights(axis="data"),
    )
    batches = [model.batch(k, 2 * microbatches * mesh.axis_size("data")) for k in range(3)]
    assert_equivalent(step, parallel(step), mesh, init_state, model.init(7), batches, rtol=FLOAT64)


@pytest.mark.parametrize("shard", [True, False])
def test_what_is_not_finite_is_seen_on_every_rank(shard: bool) -> None:
    """Shards of five elements over four ranks: one rank holds one, one holds none."""

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        return fp.Mean((batch["x"] @ params["w"]).sum(), batch["x"].new_ones(()) * len(batch["x"]))

    def step(params: Any, batch: Any) -> Any:
        loss, _ = fp.value_and_grad(loss_fn)(params, batch)
        return params, {"loss": loss, "params": statistics(params)}

    bad = torch.tensor([0.0, float("inf"), float("nan"), -7.0, 0.0], dtype=torch.float64)
    params = {
        "w": torch.ones(3, dtype=torch.float64),
        "bad": bad,
        "none": None,
        "ids": torch.arange(3),
    }
    batch = {"x": torch.ones(4, 3, dtype=torch.float64)}
    parallel = fp.data_parallel(step, axis="data")
    parallel = fp.sharded_weights(parallel, axis="data") if shard else parallel
    run = fp.simulate(parallel, fp.Mesh(data=4))
    _, metrics = run(run.init(lambda p: p, params, batch), batch)
    found = [part["bad"].item() for part in metrics["params"]]
    assert found[0] != found[0] and found[1:] == [7.0, 0.4, 0.4]
    assert metrics["params"].norm["none"] is None and metrics["params"].norm["w"] == 3**0.5
    assert len(run._placement.analysis.reductions) == 2  # reductions, however many leaves


@pytest.mark.gpu
def test_averages_and_statistics_on_a_gpu_can_be_captured():
    params = optree.tree_map(lambda p: p.cuda(), random_params())
    state = AVERAGE.init(params)

    def body() -> Any:
        return AVERAGE.update(state, params), statistics(params)

    expected = body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = body()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)


# ---- what is refused


def test_factors_are_numbers_of_0_or_more():
    params = {"w": torch.ones(2)}
    for factor, text in [
        (-1.0, "-1.0"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "True"),
        ("x", "'x'"),
    ]:
        for name in ("lr", "weight_decay"):
            optimizer = per_leaf(adamw(1e-2), **{name: lambda path, factor=factor: factor})
            message = f"per_leaf: {name} of params['w'] is {text}; a factor is a number, 0 or more"
            with refused(OptimError, message):
                optimizer.update(params, optimizer.init(params), params)


def test_an_optimizer_without_factors():
    plain = Optimizer(lambda p: (), lambda grads, state, params: (params, state))
    with refused(
        OptimError,
        "per_leaf: the update of this optimizer takes no factors; write it as update(grads, state",
    ):
        per_leaf(plain)


def test_the_weight_decay_of_a_pair():
    optimizer, params = (
        per_leaf(from_optax(torchopt.sgd(0.1)), weight_decay=lambda path: 0.0),
        {"w": torch.ones(2)},
    )
    with refused(
        OptimError,
        "from_optax: the updates of a pair contain its weight decay already",
        "an lr alone",
    ):
        optimizer.update(params, optimizer.init(params), params)


def test_averages_that_do_not_fit():
    average, w = ema(0.5), torch.ones(2)
    with refused(
        OptimError, "the average has no leaf ['b'], but params has one; both need the same tree"
    ):
        average.update(average.init({"w": w}), {"w": w, "b": w})
    with refused(
        OptimError, "the average['w'] is float32[2] on cpu, but params['w'] is float32[3] on cpu"
    ):
        average.update(average.init({"w": w}), {"w": torch.ones(3)})


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_out_of_range(decay):
    with refused(OptimError, f"ema: decay={decay!r}; it is at least 0 and at most 1"):
        ema(decay)
