"""`data_parallel` and `sharded_weights`, alone and stacked: what any stack computes is what one
device computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.sharded_stacks import OPTIMIZERS, Only, stacks, training
from support.sharded_steps import (
    clipped,
    data,
    linear,
    linear_batch,
    linear_params,
    pipe,
    sharded,
    start,
)

import funcpipe as fp
from funcpipe._src.comm.simulated import InProcessCommunicator
from funcpipe._src.runtime.rank import Rank
from funcpipe.testing import Layer, Model, assert_equivalent, models

# Sums over ranks, microbatches and the leaves of a norm are taken in another order than on one
# device: some roundings of 2**-53 each, in three steps that build on one another.
FLOAT64 = 1e-12
STEPS = 3


def descending(model: Model) -> Callable:
    """A step without any sum outside the loss function."""

    def step(state: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state[0], batch)
        params = optree.tree_map(
            lambda p, g: p - 0.1 * g if p.is_floating_point() else p, state[0], grads
        )
        return (params, grads), {"out": out}

    return step


def equal(a: Any, b: Any) -> bool:
    return optree.tree_all(optree.tree_map(torch.equal, a, b))


# ---- any stack


@given(st.data(), models(max_segments=4), st.sampled_from(sorted(OPTIMIZERS)))
def test_any_stack_computes_what_one_device_computes(
    data: st.DataObject, model: Model, optimizer: str
) -> None:
    mesh, transforms, parts = data.draw(stacks(model), label="stack")
    step, init_state = training(model, optimizer)
    transformed = fp.compose(*data.draw(st.permutations(transforms)))(step)
    rows = parts * data.draw(st.integers(1, 2), label="rows of a part")
    batches = [model.batch(k, rows) for k in range(STEPS)]
    assert_equivalent(
        step,
        transformed,
        mesh,
        init_state,
        model.init(7),
        batches,
        rtol=FLOAT64,
        bitwise=parts == 1,
    )


@given(st.data(), models(max_segments=3))
def test_the_order_of_stacking_changes_nothing(data: st.DataObject, model: Model) -> None:
    mesh, transforms, parts = data.draw(stacks(model, most=4), label="stack")
    batch, params = model.batch(0, parts), model.init(7, torch.float32)

    def after(order: Sequence[Callable]) -> Any:
        run = fp.simulate(fp.compose(*order)(descending(model)), mesh)
        state, metrics = run(run.init(start, params, batch), batch)
        return run.unplace(state), metrics

    first = after(transforms)
    assert equal(after(data.draw(st.permutations(transforms), label="order")), first)


# ---- one thing at a time

CHAIN = Model(
    tuple((Layer("linear", (k, k)), Layer("norm", (k, k + 3))) for k in range(3)),
    tied_head=True,
    aux=1,
    unused=True,
)


def check(
    step: Callable,
    transforms: Sequence[Callable],
    mesh: fp.Mesh,
    params: Any,
    batches: Sequence[Any],
) -> None:
    """Equal to one device, for a step whose state is (params, grads)."""
    assert_equivalent(
        step, fp.compose(*transforms)(step), mesh, start, params, batches, rtol=FLOAT64
    )


CASES: dict[str, tuple[fp.Mesh, list[Callable]]] = {
    "HSDP": (fp.Mesh(replica=2, data=2), [fp.data_parallel(axis=("replica", "data")), sharded]),
    "S not in V": (fp.Mesh(data=2, x=3), [data, fp.sharded_weights(axis="x")]),
    "S is V and more": (fp.Mesh(x=2, data=2), [data, fp.sharded_weights(axis=("x", "data"))]),
    "V is empty": (fp.Mesh(data=3), [sharded]),
    "S is empty": (fp.Mesh(data=3), [data]),
    "rows not in mesh order": (
        fp.Mesh(a=2, b=3),
        [fp.data_parallel(axis=("b", "a")), fp.sharded_weights(axis="b")],
    ),
    "tied over stages": (fp.Mesh(data=2, pipe=4), [pipe, data, sharded]),
    "empty shards": (fp.Mesh(data=8), [data, sharded]),
    "one rank": (fp.Mesh(data=1), [data, sharded]),
    "two shardings": (
        fp.Mesh(a=2, b=2),
        [
            fp.data_parallel(axis="a"),
            fp.sharded_weights(
                axis="a", only=lambda path: "embed" in path, regather="step", bucket_bytes=1
            ),
            fp.sharded_weights(
                axis="b", only=lambda path: "embed" not in path, reduce="last", prefetch=3
            ),
        ],
    ),
    "own leaves over nested axes": (
        fp.Mesh(a=2, b=2),
        [
            fp.data_parallel(axis=("a", "b")),
            fp.sharded_weights(axis=("a", "b"), only=Only(False)),
            fp.sharded_weights(axis="a", only=Only(True)),
        ],
    ),
    "own leaves over overlapping axes, of which one splits nothing": (
        fp.Mesh(a=2, b=3, pipe=2),
        [
            pipe,
            fp.data_parallel(axis="a"),
            fp.sharded_weights(axis=("a", "b"), only=Only(False), reduce="last"),
            fp.sharded_weights(axis="b", only=Only(True)),
        ],
    ),
    "own leaves and options over one axis": (
        fp.Mesh(data=3),
        [
            data,
            fp.sharded_weights(axis="data", only=Only(False), regather="step", reduce="last"),
            fp.sharded_weights(axis="data", only=Only(True), reduce_dtype=torch.float64),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_stacks_with_a_name(name: str) -> None:
    mesh, transforms = CASES[name]
    step = descending(CHAIN)
    check(step, transforms, mesh, CHAIN.init(), [CHAIN.batch(k, 24) for k in range(2)])


@pytest.mark.parametrize(
    "options", [{}, {"regather": "step", "reduce": "last"}, {"bucket_bytes": 1, "prefetch": 0}]
)
@pytest.mark.parametrize("mesh", [fp.Mesh(data=4), fp.Mesh(pipe=2, data=4)], ids=str)
def test_leaves_of_all_kinds_and_unequal_weights(mesh: fp.Mesh, options: dict[str, Any]) -> None:
    """Shards of the batch with weight 0, 1, 3 and 10."""
    batches = [linear_batch(k, [0, 0, 1, 0, 2, 1, 5, 5]) for k in range(STEPS)]
    transforms = [data, fp.sharded_weights(axis="data", **options)]
    transforms += [pipe] if "pipe" in mesh.axes else [fp.accumulated(microbatches=2)]
    check(clipped, transforms, mesh, linear_params(), batches)


def test_a_rank_holds_an_nth_of_the_elements_of_every_leaf() -> None:
    run = fp.simulate(fp.compose(data, sharded)(clipped), fp.Mesh(data=4))
    params = linear_params()
    state = run.init(start, params, linear_batch(0, [1] * 4))
    shards = [{k: tuple(x.shape) for k, x in params.items()} for params, _ in state]
    assert shards[0] == {
        "w": (4, 1),
        "one": (1, 1),
        "scale": (),
        "order": (2,),
        "none": (0, 1),
        "unused": (2, 1, 1),
    }
    assert shards[3] == {
        "w": (3, 1),
        "one": (0, 1),
        "scale": (),
        "order": (0,),
        "none": (0, 1),
        "unused": (2, 1, 1),
    }
    assert equal(run.unplace(state)[0], params)
    assert equal(run.unplace(run.place((params, params)))[1], params)


def test_each_leaf_follows_its_own_options() -> None:
    """Two shardings of other dtypes: each leaf is gathered in its own."""
    seen: dict[str, torch.dtype] = {}

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        seen.update((name, x.dtype) for name, x in params.items())
        return fp.Mean(
            sum((x.float().sum() * batch.sum() for x in params.values()), torch.zeros(())),
            batch.sum(),
        )

    def step(params: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(params, batch)
        return optree.tree_map(torch.sub, params, grads), {"loss": loss}

    half = fp.sharded_weights(
        axis="a", only=lambda path: path == "['half']", param_dtype=torch.float16
    )
    brain = fp.sharded_weights(
        axis="b", only=lambda path: path == "['brain']", param_dtype=torch.bfloat16
    )
    run = fp.simulate(brain(half(step)), fp.Mesh(a=2, b=2))
    params, batch = {name: torch.ones(4) for name in ("half", "brain", "full")}, torch.ones(2)
    state, _ = run(run.init(lambda params: params, params, batch), batch)
    assert seen == {"half": torch.float16, "brain": torch.bfloat16, "full": torch.float32}
    assert equal(run.unplace(state), {name: torch.zeros(4) for name in params})


# ---- precision

# Gradients are made of bfloat16 values (8 bits: 2**-9 each rounding) and are themselves rounded to
# it, in another order.
BFLOAT16 = 2.0**-7


def low(loss_fn: Callable) -> Callable:
    """What `param_dtype` stands for: leaves (other than 0-d ones) cast inside the loss function."""

    def cast(params: Any, batch: Any) -> Any:
        lower = lambda p: p.bfloat16() if p.is_floating_point() and p.dim() else p  # noqa: E731
        return loss_fn(optree.tree_map(lower, params), batch)

    return cast


def wide_head(params: Any, batch: Any) -> fp.Mean:
    x = torch.tanh(fp.stage_boundary(F.linear(batch["x"].bfloat16(), params["a"])))
    x = F.linear(x, params["b"]).float() * params["scale"]
    return fp.Mean((x.square().mean(1) * batch["weight"]).sum(), batch["weight"].sum())


def mixed(loss_fn: Callable) -> Callable:
    def step(state: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state[0], batch)
        return (optree.tree_map(lambda p, g: p - 0.1 * g, state[0], grads), grads), {"loss": loss}

    return step


@pytest.mark.parametrize("reduce", ["each", "last"])
@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_bfloat16_gathers_with_float32_masters(
    reduce: str, reduce_dtype: Any, microbatches: int
) -> None:
    g = torch.Generator().manual_seed(0)
    params = {
        "a": torch.randn(16, 8, generator=g),
        "b": torch.randn(4, 16, generator=g),
        "scale": torch.tensor(0.5),
    }
    batches = [
        {"x": torch.randn(16, 8, generator=g), "weight": torch.rand(16, generator=g)}
        for _ in range(2)
    ]
    sharding = fp.sharded_weights(
        axis="data", param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype, reduce=reduce
    )
    transformed = fp.compose(data, sharding, fp.accumulated(microbatches=microbatches))(
        mixed(wide_head)
    )
    mesh = fp.Mesh(data=2)
    assert_equivalent(
        mixed(low(wide_head)), transformed, mesh, start, params, batches, rtol=BFLOAT16
    )
    run = fp.simulate(transformed, mesh)
    state, _ = run(run.init(start, params, batches[0]), batches[0])
    assert {x.dtype for x in optree.tree_leaves(state)} == {torch.float32}


def test_one_part_in_bfloat16_has_the_bits_of_a_cast() -> None:
    """Nothing is summed, so nothing but the cast rounds."""
    g = torch.Generator().manual_seed(0)
    params = {
        "a": torch.randn(16, 8, generator=g),
        "b": torch.randn(4, 16, generator=g),
        "scale": torch.tensor(0.5),
    }
    batch = {"x": torch.randn(6, 8, generator=g), "weight": torch.rand(6, generator=g)}
    transformed = fp.sharded_weights(mixed(wide_head), axis="data", param_dtype=torch.bfloat16)
    assert_equivalent(
        mixed(low(wide_head)),
        transformed,
        fp.Mesh(data=3),
        start,
        params,
        [batch],
        rtol=0.0,
        bitwise=True,
    )


# ---- other steps


def test_several_calls_on_parts_of_the_params_and_on_casts_of_them() -> None:
    """A step that calls twice: on a subtree, then on params that it has moved and cast."""

    def first(w: torch.Tensor, batch: Any) -> fp.Mean:
        return fp.Mean((batch["x"] @ w).square().sum(), batch["weight"].sum())

    def second(params: Any, batch: Any) -> fp.Mean:
        mean = linear(params, {**batch, "x": batch["x"].float()})
        return fp.Mean(mean.total, mean.weight)

    def step(params: Any, batch: Any) -> Any:
        loss, grad = fp.value_and_grad(first)(params["w"], batch)
        moved = {**params, "w": params["w"] - 0.1 * grad}
        low = optree.tree_map(lambda p: p.float() if p.is_floating_point() else p, moved)
        other, grads = fp.value_and_grad(second)(low, batch)
        new = optree.tree_map(
            lambda p, g: p - 0.1 * g.double() if p.is_floating_point() else p, moved, grads
        )
        return new, {"loss": loss, "other": other, "norm": fp.global_norm(grads)}

    stack = fp.compose(data, fp.sharded_weights(axis=("x", "data")), fp.accumulated(microbatches=2))
    batches = [linear_batch(k, [0, 1, 2, 3]) for k in range(2)]
    # The second call computes in float32: sums of a few values in another order, 2**-24 each.
    assert_equivalent(
        step,
        stack(step),
        fp.Mesh(data=2, x=2),
        lambda p: p,
        linear_params(),
        batches,
        rtol=2.0**-20,
    )


def test_ready_microbatches_of_different_shapes() -> None:
    batches = [
        fp.Microbatches([linear_batch(k, [1, 2]), linear_batch(k + 9, [3, 0, 1, 5])])
        for k in range(2)
    ]
    for mesh, micro in (
        (fp.Mesh(data=2), fp.accumulated(microbatches=None)),
        (fp.Mesh(data=2, pipe=2), fp.pipelined(axis="pipe", microbatches=None)),
    ):
        check(
            clipped,
            [data, fp.sharded_weights(axis="data", regather=2, reduce="last"), micro],
            mesh,
            linear_params(),
            batches,
        )


def test_a_new_batch_shape_later() -> None:
    batches = [linear_batch(k, range(n)) for k, n in enumerate([4, 8, 2])]
    check(clipped, [data, sharded], fp.Mesh(data=2), linear_params(), batches)


def test_every_group_that_a_step_uses_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process groups are made by all ranks together, before the first step; simulated ranks need
    none."""
    used: set[tuple[str, ...]] = set()
    ready: set[tuple[str, ...]] = set()
    meet = InProcessCommunicator._collective

    def meets(self: Any, kind: str, x: torch.Tensor, axes: Any, *rest: Any) -> Any:
        used.add(self.mesh.ordered(axes))
        return meet(self, kind, x, axes, *rest)

    monkeypatch.setattr(InProcessCommunicator, "_collective", meets)
    monkeypatch.setattr(
        InProcessCommunicator, "prepare", lambda self, axes_sets, lanes=(): ready.update(axes_sets)
    )
    mesh, step = fp.Mesh(a=2, x=2, c=2, b=2), training(CHAIN)[0]
    stack = [
        fp.data_parallel(axis=("b", "a")),
        fp.data_parallel(axis="c"),
        fp.sharded_weights(axis=("x", "a", "b")),
    ]
    run = fp.simulate(fp.compose(*stack)(step), mesh)
    batch = CHAIN.batch(0, 8)
    state = run.init(training(CHAIN)[1], CHAIN.init(), batch)
    run(state, batch)
    Rank(run.plan(state, batch), run._ranks.communicators[0]).prepare()
    assert used <= {mesh.ordered(axes) for axes in ready}
    assert (
        "a",
        "b",
    ) in used  # of (a, x, b), over which leaves are sharded, those that split the batch
