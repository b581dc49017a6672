"""Steps in which the results of one ``value_and_grad`` stand in the batch of the next one: losses
of two passes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused

import funcpipe as fp
from funcpipe.errors import BatchError, StateError, TraceError
from funcpipe.testing import assert_equivalent

FLOAT64 = 1e-12
WHOLE = {"x": 0, "y": 0, "one": None}  # how leaves are split


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"a": normal(3, 4, seed=1), "b": normal(4, seed=2)}
X = normal(8, 3)
BATCHES = [X, X.flip(0)]


def rows(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(len(x)), dtype=torch.float64)


def predict(p: Any, x: torch.Tensor) -> torch.Tensor:
    return fp.stage_boundary((x @ p["a"]).tanh()) @ p["b"]


def loss_fn(p: Any, b: Any) -> Any:
    y = predict(p, b["x"])
    loss = fp.Mean(((y - b["y"]).square() * b["one"]).sum(), rows(y))
    return loss, {"rows": fp.Rows(y), "mean": fp.Mean(y.exp().sum(), rows(y))}


def plain_loss(p: Any, b: Any) -> fp.Mean:
    return loss_fn(p, b)[0]


def first_batch(x: torch.Tensor) -> dict:
    return {"x": x, "y": torch.zeros(len(x), dtype=x.dtype), "one": torch.ones((), dtype=x.dtype)}


def descend(p: Any, grads: Any) -> Any:
    return optree.tree_map(lambda p, g: p - 0.1 * g, p, grads)


def feeding(what: str) -> Callable:
    """A step whose second call gets one result of the first."""

    def step(p: Any, x: torch.Tensor) -> Any:
        batch = first_batch(x)
        if what == "loss":
            batch["one"], _ = fp.value_and_grad(plain_loss)(p, batch)
        else:
            (_, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(p, batch)
            if what == "rows":
                batch["y"] = (aux["rows"] - aux["rows"].mean()) / (aux["rows"].std() + 0.1)
            else:
                batch["one"] = {"mean": aux["mean"], "norm": fp.global_norm(grads)}[what]
        loss, grads = fp.value_and_grad(plain_loss)(p, batch)
        return descend(p, grads), {"loss": loss}

    return step


def chain(p: Any, x: torch.Tensor) -> Any:
    """Three calls: results of two of them, elementwise ones of the batch, and params that were
    updated in between."""
    (one, aux), g = fp.value_and_grad(loss_fn, has_aux=True)(p, first_batch(x))
    moved = optree.tree_map(lambda p, g: p - 0.3 * g, p, g)
    second = {"x": x * aux["mean"], "y": aux["rows"], "one": one}
    (two, aux), h = fp.value_and_grad(loss_fn, has_aux=True)(moved, second)
    third = {
        "x": x,
        "y": aux["rows"].argsort().argsort().to(x.dtype),
        "one": two + fp.global_norm(h),
    }
    loss, grads = fp.value_and_grad(plain_loss)(p, third)
    return descend(p, optree.tree_map(torch.add, grads, h)), {"loss": loss, "two": two}


STACKS: dict[str, tuple[Any, fp.Mesh]] = {
    "microbatches": (fp.accumulated(microbatches=2, dims=WHOLE), fp.Mesh()),
    "data": (fp.data_parallel(axis="data", dims=WHOLE), fp.Mesh(data=2)),
    "pipe": (fp.pipelined(axis="pipe", microbatches=4, dims=WHOLE), fp.Mesh(pipe=2)),
    "remat": (
        fp.compose(fp.pipelined(axis="pipe", microbatches=2, dims=WHOLE), fp.remat(policy="block")),
        fp.Mesh(pipe=2),
    ),
    "all": (
        fp.compose(
            fp.pipelined(axis="pipe", microbatches=2, dims=WHOLE),
            fp.data_parallel(axis="data", dims=WHOLE),
            fp.sharded_weights(axis="data"),
        ),
        fp.Mesh(pipe=2, data=2),
    ),
}


def check(step: Callable, stack: tuple[Any, fp.Mesh], batches: Any = BATCHES) -> None:
    transform, mesh = stack
    assert_equivalent(step, transform(step), mesh, lambda p: p, PARAMS, batches, rtol=FLOAT64)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("what", ["loss", "rows", "mean", "norm"])
def test_a_result_in_the_next_batch(what: str, stack: str) -> None:
    check(feeding(what), STACKS[stack])


@pytest.mark.parametrize("stack", STACKS)
def test_three_calls_in_a_chain(stack: str) -> None:
    check(chain, STACKS[stack])


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.integers(1, 2),
    st.permutations(range(3)),
)
def test_any_stack(microbatches: int, data: int, pipe: int, order: list[int]) -> None:
    some = [
        fp.pipelined(axis="pipe", microbatches=microbatches, dims=WHOLE),
        fp.data_parallel(axis="data", dims=WHOLE),
        fp.sharded_weights(axis="data"),
    ]
    check(
        chain, (fp.compose(*(some[k] for k in order)), fp.Mesh(pipe=pipe, data=data)), batches=[X]
    )


def test_against_autograd() -> None:
    """PPO: advantages normalised over the whole batch, from a first pass; the reference knows
    nothing of funcpipe."""
    step = feeding("rows")
    transform, mesh = STACKS["all"]
    run = fp.simulate(transform(step), mesh)
    state, metrics = run(run.init(lambda p: p, PARAMS, X), X)
    p = optree.tree_map(lambda x: x.clone().requires_grad_(), PARAMS)
    y = predict(p, X)
    target = ((y - y.mean()) / (y.std() + 0.1)).detach()
    loss = (y - target).square().mean()
    grads = torch.autograd.grad(loss, [p["a"], p["b"]])
    want = {k: p[k].detach() - 0.1 * g for k, g in zip("ab", grads, strict=True)}
    torch.testing.assert_close(run.unplace(state), want, rtol=FLOAT64, atol=FLOAT64)
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("transform", [fp.seq_all_to_all, fp.seq_ring], ids=["heads", "ring"])
def test_positions_are_split_again(transform: Callable) -> None:
    """Rows whose positions are split come back in order, and are split like the batch's. They need
    not divide."""
    dims = {"x": 1, "y": 1, "one": None}

    def loss_fn(p: Any, b: Any) -> Any:
        x = fp.stage_boundary((b["x"] @ p["a"]).tanh())
        heads = x.unflatten(-1, (2, 2)).transpose(1, 2)
        heads = torch.nn.functional.scaled_dot_product_attention(
            heads, heads, heads, is_causal=True
        )
        y = heads.transpose(1, 2).flatten(2) @ p["b"]
        n = torch.full_like(y, 1.0).sum()
        return fp.Mean(((y - b["y"]).square() * b["one"]).sum(), n), fp.Rows(y)

    def step(p: Any, x: torch.Tensor) -> Any:
        batch = {"x": x, "y": torch.zeros_like(x[..., 0]), "one": torch.ones((), dtype=x.dtype)}
        (loss, y), _ = fp.value_and_grad(loss_fn, has_aux=True)(p, batch)
        (loss, _), grads = fp.value_and_grad(loss_fn, has_aux=True)(
            p, {"x": x, "y": y / y.std(), "one": loss}
        )
        return descend(p, grads), {"loss": loss}

    some = fp.compose(fp.accumulated(microbatches=2, dims=WHOLE), transform(axis="seq", dims=dims))
    check(step, (some, fp.Mesh(seq=2)), batches=[normal(4, 5, 3)])


# ---- dtypes


def test_results_have_the_dtypes_that_they_have_when_the_step_runs() -> None:
    """Under mixed precision rows come in the compute dtype, losses in float32."""
    seen = []

    def step(p: Any, x: torch.Tensor) -> Any:
        (loss, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(p, first_batch(x))
        seen.append((loss.dtype, aux["rows"].dtype, aux["mean"].dtype))
        loss, grads = fp.value_and_grad(plain_loss)(
            p, {"x": x, "y": 0.5 * aux["rows"], "one": loss}
        )
        return descend(p, grads), {"loss": loss}

    params, x = optree.tree_map(torch.Tensor.float, (PARAMS, X))
    transform, mesh = STACKS["data"]
    run = fp.simulate(
        fp.mixed_precision(transform(step), compute="bfloat16", batch=lambda path: "x" in path),
        mesh,
    )
    state, metrics = run(run.init(lambda p: p, params, x), x)
    assert len({*seen}) == 1 and seen[0][1] == torch.bfloat16
    want, told = step(params, x)
    assert abs(metrics["loss"] - told["loss"]) < 0.02 * told["loss"]
    assert torch.linalg.vector_norm(run.unplace(state)["a"] - want["a"]) < 0.05


def test_a_loss_has_its_own_dtype() -> None:
    """Not that of new tensors: the first call has no aux, and its loss is float64."""
    assert torch.get_default_dtype() == torch.float32
    check(feeding("loss"), STACKS["microbatches"])


# ---- weights


def weighted(p: Any, b: Any) -> fp.Mean:
    return fp.Mean((b["y"] * predict(p, b["x"]).square()).sum(), b["y"].sum())


def weighing(p: Any, x: torch.Tensor) -> Any:
    (loss, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(p, first_batch(x))
    loss, grads = fp.value_and_grad(weighted)(p, {"x": x, "y": aux["rows"].abs(), "one": loss})
    return descend(p, grads), {"loss": loss}


@pytest.mark.parametrize("stack", ["microbatches", "data", "all"])
def test_weights_of_rows_from_an_earlier_call(stack: str) -> None:
    check(weighing, STACKS[stack])


def start(step: Callable, stack: tuple[Any, fp.Mesh] = STACKS["microbatches"]) -> Any:
    transform, mesh = stack
    return fp.simulate(transform(step), mesh).init(lambda p: p, PARAMS, X)


def test_a_weight_of_results_that_does_not_add_up_is_refused() -> None:
    def largest(p: Any, b: Any) -> fp.Mean:
        return weighted(p, b)._replace(weight=b["y"].max())

    def step(p: Any, x: torch.Tensor) -> Any:
        (loss, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(p, first_batch(x))
        loss, grads = fp.value_and_grad(largest)(p, {"x": x, "y": aux["rows"].abs(), "one": loss})
        return descend(p, grads), {"loss": loss}

    with refused(
        BatchError, "add up to", "batch['y'] comes from an earlier value_and_grad", "made-up values"
    ):
        start(step)


# ---- what is refused


def test_means_have_no_rows() -> None:
    def counted(p: Any, x: torch.Tensor) -> Any:
        y = (x @ p["a"]).tanh()
        return fp.Mean((y @ p["b"]).sum(), rows(y)), fp.Mean(y.sum(0), rows(y))

    def centred(p: Any, b: Any) -> fp.Mean:
        y = (b["x"] @ p["a"]).tanh() - b["mean"]
        return fp.Mean((y @ p["b"]).square().sum(), rows(y))

    def step(p: Any, x: torch.Tensor) -> Any:
        (_, mean), _ = fp.value_and_grad(counted, has_aux=True)(p, x)
        loss, grads = fp.value_and_grad(centred)(p, {"x": x, "mean": mean})
        return descend(p, grads), {"loss": loss}

    with refused(
        BatchError, "accumulated: batch['mean'] of shape (4,)", "has no rows", "None in dims=..."
    ):
        start(step, (fp.accumulated(microbatches=4), fp.Mesh()))
    check(step, (fp.accumulated(microbatches=1), fp.Mesh()))


def test_a_summand_of_results_alone_is_refused() -> None:
    """It would be counted once for every part."""

    def loss_fn(p: Any, b: Any) -> fp.Mean:
        return plain_loss(p, b)._replace(
            total=plain_loss(p, b).total + b["one"] * p["a"].square().sum()
        )

    def step(p: Any, x: torch.Tensor) -> Any:
        loss, _ = fp.value_and_grad(plain_loss)(p, first_batch(x))
        loss, grads = fp.value_and_grad(loss_fn)(p, first_batch(x) | {"one": loss})
        return descend(p, grads), {"loss": loss}

    with refused(
        BatchError,
        "at test_two_calls.py",
        "and the same in every part",
        "counted once for every microbatch and shard",
    ):
        start(step)


def test_gradients_go_through_params() -> None:
    def step(p: Any, x: torch.Tensor) -> Any:
        _, grads = fp.value_and_grad(plain_loss)(p, first_batch(x))
        return p, {
            "loss": fp.value_and_grad(plain_loss)(p, {"x": x, "y": grads["b"], "one": x.sum()})[0]
        }

    with refused(StateError, "batch['y'] is params['b']", "pass it through params"):
        start(step)


def test_a_loss_that_closes_over_a_result_is_refused() -> None:
    def step(p: Any, x: torch.Tensor) -> Any:
        found, _ = fp.value_and_grad(plain_loss)(p, first_batch(x))
        loss, grads = fp.value_and_grad(lambda p, b: fp.Mean(predict(p, b).sum() * found, rows(b)))(
            p, x
        )
        return descend(p, grads), {"loss": loss}

    with refused(TraceError, "did not come in through its arguments", "it closes over 'found'"):
        start(step, (fp.accumulated(microbatches=2), fp.Mesh()))


def inner_mean(p: Any, x: torch.Tensor) -> fp.Mean:
    """Learning to learn: the loss after a step along the gradient."""

    def inner(p: Any, x: torch.Tensor) -> fp.Mean:
        return fp.Mean(predict(p, x).square().sum(), rows(x))

    _, grads = fp.value_and_grad(inner)(p, x)
    return inner(descend(p, grads), x)


def inner_sum(p: Any, x: torch.Tensor) -> fp.Mean:
    _, grads = fp.value_and_grad(lambda p, x: predict(p, x).square().sum())(p, x)
    return fp.Mean(predict(descend(p, grads), x).sum(), rows(x))


def inner_of_batch(p: Any, x: torch.Tensor) -> fp.Mean:
    """Forces: a gradient for every row, of a sum over them."""
    _, force = fp.value_and_grad(
        lambda x, _: predict(optree.tree_map(torch.detach, p), x).square().sum()
    )(x, None)
    return fp.Mean((predict(p, x) * force.sum(1)).sum(), rows(x))


def inner_by_row(p: Any, x: torch.Tensor) -> fp.Mean:
    def one(x: torch.Tensor) -> torch.Tensor:
        _, grads = fp.value_and_grad(lambda p, x: predict(p, x[None]).square().sum())(p, x)
        return predict(descend(p, grads), x[None]).sum()

    return fp.Mean(torch.func.vmap(one)(x).square().sum(), rows(x))


def single(loss_fn: Callable) -> Callable:
    def step(p: Any, x: torch.Tensor) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(p, x)
        return descend(p, grads), {"loss": loss}

    return step


def compare(step: Callable, microbatches: int) -> None:
    run = fp.simulate(fp.accumulated(step, microbatches=microbatches), fp.Mesh())
    state, metrics = run(run.init(lambda p: p, PARAMS, X), X)
    torch.testing.assert_close(
        (run.unplace(state), metrics), step(PARAMS, X), rtol=FLOAT64, atol=FLOAT64
    )


UNNAMED = (fp.accumulated(microbatches=2), fp.Mesh())


@pytest.mark.parametrize("loss_fn", [inner_mean, inner_sum])
def test_a_gradient_of_a_part_inside_a_loss_is_refused(loss_fn: Callable) -> None:
    words = (
        "called inside a loss function at test_two_calls.py:",
        "whose batch is split",
        "Call it in the step",
    )
    with refused(BatchError, *words):
        start(single(loss_fn), UNNAMED)
    compare(single(loss_fn), 1)


@pytest.mark.parametrize("loss_fn", [inner_of_batch, inner_by_row])
def test_a_gradient_of_every_row_inside_a_loss(loss_fn: Callable) -> None:
    compare(single(loss_fn), 2)


# ---- other batches


def ready_step(p: Any, b: Any) -> Any:
    """Ready microbatches: rows come one microbatch after the other, as on one device."""
    (loss, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(
        p, fp.Microbatches([first_batch(x) for x in b.parts])
    )
    y = aux["rows"] / aux["rows"].std()
    parts = zip(b.parts, y.split([len(x) for x in b.parts]), strict=True)
    second = fp.Microbatches([{"x": x, "y": y, "one": loss} for x, y in parts])
    loss, grads = fp.value_and_grad(plain_loss)(p, second)
    return descend(p, grads), {"loss": loss, "y": y}


@pytest.mark.parametrize("data", [1, 2])
def test_ready_microbatches(data: int) -> None:
    some = fp.compose(
        fp.accumulated(microbatches=None, dims=WHOLE), fp.data_parallel(axis="data", dims=WHOLE)
    )
    check(ready_step, (some, fp.Mesh(data=data)), batches=[fp.Microbatches([X[:4], X[4:6], X[2:]])])


def mixing(p: Any, x: torch.Tensor) -> Any:
    (_, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(p, first_batch(x))
    batch = first_batch(x) | {"y": aux["rows"] - x[:, 0]}
    return p, {"loss": fp.value_and_grad(plain_loss)(p, batch)[0]}


def local_rows() -> list[Any]:
    rank = int(os.environ["RANK"])
    mesh, mine = fp.Mesh(data=2), X[4 * rank : 4 * rank + 4]
    some = fp.compose(
        fp.accumulated(microbatches=2, dims=WHOLE),
        fp.data_parallel(axis="data", dims=WHOLE),
        fp.sharded_weights(axis="data"),
    )
    found: list[Any] = []
    for step in (chain, weighing, mixing):
        run = fp.spmd(some(step), mesh, batch="local", timeout=60)
        try:
            state, _ = run(run.init(lambda p: p, optree.tree_map(torch.clone, PARAMS), mine), mine)
            found.append(run.unplace(state))
        except fp.errors.FuncpipeError as error:
            found.append(str(error))
        run.close()
    return found


def test_batches_of_a_rank_s_own_rows() -> None:
    """``batch="local"``: rows of results are those of all ranks, and every rank takes its own of
    them again."""
    found = fp.launch(local_rows, 2, timeout=120)
    for states in found:
        for step, state in zip((chain, weighing), states, strict=False):
            want, _ = step(PARAMS, X)
            torch.testing.assert_close(state, want, rtol=FLOAT64, atol=FLOAT64)
        assert (
            "aten.sub at test_two_calls.py:" in states[2] and "the rows of all ranks" in states[2]
        )
        assert "batch='local'" in states[2] and "combine them there" in states[2]
