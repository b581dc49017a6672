"""`mixed_precision`: casts and sums are those that one would write by hand, on any mesh and in any
stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from funcpipe.transforms import mixed_precision
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused, same_bits
from support.precision import (
    CHAIN,
    DATA,
    FLOAT32,
    FLOAT64,
    SHARDED,
    TIED,
    by_hand,
    close,
    ran,
    recording,
    scale_of,
    training,
    untied,
)
from support.transformers import Transformer

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.program import GATHER, REDUCE
from funcpipe.errors import BatchError, StackError
from funcpipe.testing import Model, meshes, microbatch_counts, models, schedules

# ---- as by hand


@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
@given(
    model=models(),
    power=st.integers(-3, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    dynamic=st.booleans(),
)
def test_one_device_computes_what_one_writes_by_hand(
    compute: str, model: Model, power: int, dtype: torch.dtype, dynamic: bool
) -> None:
    """Bitwise; but gradients of tied leaves are added up in the masters' dtype here, by hand in the
    compute dtype."""
    step, init_state = recording(model)
    params, batch, scale = model.init(3, dtype), model.batch(0, 3), 2.0**power
    step = mixed_precision(step, compute=compute, loss_scale="dynamic" if dynamic else scale)
    full, (metrics,) = ran(
        step, fp.Mesh(), init_state, params, [batch], scale_of(scale) if dynamic else None
    )
    (kept, grads) = full.state if dynamic else full
    loss, wanted = by_hand(model, params, batch, getattr(torch, compute), scale)
    assert metrics["loss"].dtype == torch.float32
    assert torch.equal(metrics["loss"], loss) and same_bits(kept, params)
    if untied(model):
        assert same_bits(grads, wanted)
    else:
        close(grads, wanted, {"bfloat16": 2**-6, "float16": 2**-9, "float32": FLOAT32}[compute])


@given(models(), microbatch_counts(3), st.booleans(), st.booleans(), st.data())
def test_any_mesh_computes_what_one_device_does(
    model: Model, microbatches: int, sharded: bool, dynamic: bool, data: st.DataObject
) -> None:
    """The same microbatches, so the same values in the compute dtype; masters and gradients are
    float64."""
    step, init_state = training(model)
    mesh = data.draw(meshes(pipe=len(model.segments) + 1, data=2), label="mesh")
    parts = microbatches * mesh.axis_size("data")
    schedule = data.draw(schedules(), label="schedule")
    lower = mixed_precision(compute="float32", loss_scale="dynamic" if dynamic else None)
    stack = [
        fp.pipelined(axis="pipe", microbatches=microbatches, schedule=schedule),
        DATA,
        *[SHARDED] * sharded,
    ]
    stack.insert(data.draw(st.integers(0, len(stack)), label="place in the stack"), lower)
    batches = [model.batch(seed, 2 * parts) for seed in range(3)]
    params = model.init(7)
    alone = ran(
        lower(fp.accumulated(step, microbatches=parts)), fp.Mesh(), init_state, params, batches
    )
    found = ran(fp.compose(*stack)(step), mesh, init_state, params, batches)
    close(found[0], alone[0], FLOAT64)
    for got, want in zip(found[1], alone[1], strict=True):
        assert torch.isclose(got.pop("loss"), want.pop("loss"), rtol=FLOAT32, atol=0)
        close(got, want, FLOAT64)


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@given(models(), microbatch_counts(3), st.data())
def test_bits_do_not_depend_on_the_cut(
    compute: str, model: Model, microbatches: int, data: st.DataObject
) -> None:
    step, init_state = recording(model)
    params, batches = model.init(7, torch.float32), [model.batch(0, 2 * microbatches)]
    lower = mixed_precision(compute=compute, loss_scale=64.0)
    alone = ran(
        lower(fp.accumulated(step, microbatches=microbatches)),
        fp.Mesh(),
        init_state,
        params,
        batches,
    )
    ranks = data.draw(st.integers(1, len(model.segments) + 1), label="ranks")
    schedule = data.draw(schedules(), label="schedule")
    pipeline = fp.pipelined(lower(step), axis="pipe", microbatches=microbatches, schedule=schedule)
    assert same_bits(ran(pipeline, fp.Mesh(pipe=ranks), init_state, params, batches), alone)


@pytest.mark.parametrize(
    "options", [{}, {"reduce": "last"}, {"regather": "step"}, {"param_dtype": torch.bfloat16}]
)
def test_shards_are_cast_before_they_travel(options: dict[str, Any]) -> None:
    """The same bits as weights held whole, half the bytes to gather; gradients are reduced in
    float32."""
    step, init_state = recording(TIED)
    params, batch = TIED.init(7, torch.float32), TIED.batch(0, 8)
    step = fp.accumulated(DATA(mixed_precision(step, compute="bfloat16")), microbatches=2)
    whole = ran(step, fp.Mesh(data=2), init_state, params, [batch])
    step = fp.sharded_weights(step, axis="data", **options)
    assert same_bits(ran(step, fp.Mesh(data=2), init_state, params, [batch]), whole)
    run = fp.simulate(step, fp.Mesh(data=2))
    plan = run.plan(run.init(init_state, params, batch), batch)
    buckets = [(i.op, i.bucket.dtype) for i in plan.calls[0].programs[0].instructions if i.bucket]
    assert {(op, d) for op, d in buckets if d.is_floating_point and op in (GATHER, REDUCE)} == {
        (GATHER, torch.bfloat16), (REDUCE, torch.float32),
    }  # fmt: skip


def test_a_dtype_of_sharded_weights_wins() -> None:
    step, init_state = recording(CHAIN)
    params, batch = CHAIN.init(7, torch.float32), CHAIN.batch(0, 8)
    sharded = fp.sharded_weights(axis="data", param_dtype=torch.float32, reduce_dtype=torch.float64)
    run = fp.simulate(
        fp.compose(sharded, DATA, mixed_precision(compute="bfloat16", batch=False))(step),
        fp.Mesh(data=2),
    )
    plan = run.plan(run.init(init_state, params, batch), batch)
    dtypes = {i.op: i.bucket.dtype for i in plan.calls[0].programs[0].instructions if i.bucket}
    assert (dtypes[GATHER], dtypes[REDUCE]) == (torch.float32, torch.float64)


@pytest.mark.parametrize("split", [fp.seq_all_to_all, fp.seq_ring])
def test_split_sequences(split: Callable) -> None:
    model = Transformer(layers=2, rows=4, heads=4, kv_heads=2, places="learned")
    lower = mixed_precision(compute="float32", loss_scale="dynamic")
    batches = [model.batch(seed) for seed in range(2)]
    stack = [
        fp.pipelined(axis="pipe", microbatches=2),
        split(axis="seq", dims=model.dims),
        fp.sharded_weights(axis="seq"),
    ]
    alone = ran(
        lower(fp.accumulated(model.step, microbatches=2)),
        fp.Mesh(),
        model.init_state,
        model.init(7),
        batches,
    )
    found = ran(
        fp.compose(lower, *stack)(model.step),
        fp.Mesh(pipe=2, seq=2),
        model.init_state,
        model.init(7),
        batches,
    )
    close(found[0].state, alone[0].state, FLOAT32)
    assert alone[0].skipped == 0 and same_bits(found[0][1:], alone[0][1:])


# ---- what is cast


def seen_dtypes(**options: Any) -> tuple[dict[str, torch.dtype], Any]:
    """The dtypes that a loss function sees, by name, and the gradients' full state."""
    seen: dict[str, torch.dtype] = {}
    params = {
        "w": torch.ones(3, 3), "norm": torch.ones(3), "half": torch.ones(3, dtype=torch.float16), "scale": torch.tensor(2.0),
        "wide": torch.ones(3, dtype=torch.float64), "ids": torch.arange(3), "c": torch.ones(3, dtype=torch.complex64),
    }  # fmt: skip
    batch = {"x": torch.ones(4, 3), "n": torch.ones(4), "i": torch.arange(4), "k": 3}

    def loss_fn(p: Any, b: Any) -> fp.Mean:
        for k, x in (p | b).items():  # the first time it is traced, later looked at
            seen.setdefault(k, x.dtype if torch.is_tensor(x) else torch.bool)
        y = (
            (b["x"].float() @ p["w"].float())
            * p["norm"]
            * p["half"]
            * p["scale"]
            * p["wide"]
            * p["c"].real
        )
        return fp.Mean(y.float().sum(), b["n"].sum())

    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state[0], b)
        return (state[0], grads), {"loss": loss}

    full, _ = ran(
        mixed_precision(step, **options),
        fp.Mesh(),
        lambda p: (p, optree.tree_map(torch.zeros_like, p)),
        params,
        [batch],
    )
    return seen, full


def test_what_is_cast() -> None:
    seen, (params, grads) = seen_dtypes(compute="bfloat16")
    low = torch.bfloat16
    assert seen == {
        "w": low, "norm": low, "half": low, "scale": low, "wide": low, "ids": torch.int64, "c": torch.complex64,
        "x": low, "n": low, "i": torch.int64, "k": torch.bool,
    }  # fmt: skip
    assert [x.dtype for x in tree.leaves(grads)] == [x.dtype for x in tree.leaves(params)]
    assert same_bits(grads["ids"], torch.zeros(3, dtype=torch.int64)) and same_bits(
        params["ids"], torch.arange(3)
    )


def test_what_is_kept() -> None:
    seen, _ = seen_dtypes(
        compute="bfloat16", keep=lambda path: "norm" in path, batch=lambda path: path == "['x']"
    )
    assert (seen["w"], seen["norm"], seen["x"], seen["n"]) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    seen, _ = seen_dtypes(compute="float32", batch=False)  # leaves with fewer bits stay
    assert (seen["half"], seen["wide"], seen["n"]) == (torch.float16, torch.float32, torch.float32)


def test_paths_to_keep_are_those_of_the_state() -> None:
    """Also where a part of the params is passed."""
    paths: set[str] = set()

    def loss_fn(p: Any, b: Any) -> torch.Tensor:
        assert p["w"].dtype == torch.bfloat16
        return (p["w"] * b).sum()

    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state["inner"], b)
        return state, {"loss": loss, "norm": fp.global_norm(grads)}

    params = {"inner": {"w": torch.ones(3)}, "other": torch.ones(2)}
    ran(
        mixed_precision(step, compute="bfloat16", keep=lambda p: bool(paths.add(p))),
        fp.Mesh(),
        lambda p: p,
        params,
        [torch.ones(3)],
    )
    assert paths == {"['inner']['w']"}


def test_sums_leave_the_loss_function_in_float32() -> None:
    """257 rows in three microbatches, counted in bfloat16 by none; aux values that are means
    too."""

    def loss_fn(w: torch.Tensor, b: Any) -> Any:
        y = (b["x"] * w).sum()
        return fp.Mean(y, b["n"].sum()), {
            "y": fp.Mean(y, b["n"].sum()),
            "rows": fp.Rows(b["x"] * w),
        }

    def step(w: Any, b: Any) -> Any:
        (loss, aux), grad = fp.value_and_grad(loss_fn, has_aux=True)(w, b)
        return w - grad, {"loss": loss, **aux}

    rows = 3 * 257
    batch = {"x": torch.ones(rows, 1), "n": torch.ones(rows)}
    step = mixed_precision(
        fp.accumulated(step, microbatches=3), compute="bfloat16", batch=lambda path: "x" in path
    )
    w, (metrics,) = ran(step, fp.Mesh(), lambda p: p, torch.ones(1), [batch])
    assert (
        metrics["y"].dtype == metrics["loss"].dtype == torch.float32
        and metrics["rows"].dtype == torch.bfloat16
    )
    assert (
        torch.equal(metrics["loss"], metrics["y"]) and metrics["loss"] == 256 / 257
    )  # a total of bfloat16 rounds in a part
    assert torch.equal(w, torch.ones(1) - 256 / 257)


def test_copies_are_counted() -> None:
    """Masters and what is cast from them; a sharded leaf has no copy."""
    step, init_state = recording(CHAIN)
    params, batch = CHAIN.init(7, torch.float32), CHAIN.batch(0, 8)

    def memory(*stack: Callable) -> dict[str, int]:
        run = fp.simulate(fp.compose(DATA, *stack)(step), fp.Mesh(data=2))
        return run.plan(run.init(init_state, params, batch), batch).memory[0]

    floating = sum(x.numel() for x in tree.leaves(params) if x.is_floating_point())
    lower = mixed_precision(compute="bfloat16")
    assert memory(lower)["params"] - memory()["params"] == 2 * floating
    assert (
        memory(lower, SHARDED)["params"] - memory(SHARDED)["params"] == 2
    )  # a 0-d leaf, which stays whole
    assert memory(lower, SHARDED)["gathered"] < memory(SHARDED)["gathered"]


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"compute": "int8"},
            "mixed_precision: compute='int8'; write 'bfloat16' or 'float16' or 'float32'",
        ),
        (
            {"compute": torch.bfloat16},
            "mixed_precision: compute=torch.bfloat16; write 'bfloat16' or",
        ),
        (
            {"loss_scale": 0},
            "mixed_precision: loss_scale=0; write 'dynamic' or a positive number, such as 2.0**12",
        ),
        ({"loss_scale": -1.0}, "mixed_precision: loss_scale=-1.0; write"),
        ({"loss_scale": float("inf")}, "mixed_precision: loss_scale=inf; write"),
        ({"loss_scale": "static"}, "mixed_precision: loss_scale='static'; write"),
        (
            {"growth_interval": 0},
            "mixed_precision: growth_interval is 0; it has to be a whole number, 1 or more",
        ),
        ({"growth": 0.5}, "mixed_precision: growth=0.5; it is a number of 1 or more"),
        ({"backoff": 1.0}, "mixed_precision: backoff=1.0; it is a number between 0 and 1"),
        (
            {"keep": "norm"},
            "mixed_precision: keep='norm'; pass a function from a parameter's path to True or False",
        ),
        ({"batch": None}, "mixed_precision: batch=None; write True, False, or a function"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: str) -> None:
    with refused(StackError, words):
        mixed_precision(**{"compute": "bfloat16"} | options)


def started(step: Callable, params: Any, batch: Any, **options: Any) -> Any:
    run = fp.simulate(mixed_precision(step, **{"compute": "float16"} | options), fp.Mesh())
    return run, run.init(lambda p: p, params, batch)


def descend(w: Any, b: Any) -> Any:
    loss, grad = fp.value_and_grad(lambda p, b: (p * b).sum())(w, b)
    return w - grad, {"loss": loss}


def test_two_on_one_step() -> None:
    step = mixed_precision(mixed_precision(descend, compute="bfloat16"), compute="float16")
    with refused(StackError, "two mixed_precision on one step", "keep one of them"):
        fp.simulate(step, fp.Mesh())


def test_a_weight_that_is_rounded() -> None:
    """257 rows are 256 in bfloat16: known before a step runs, also on one device."""

    def step(w: Any, b: Any) -> Any:
        loss, grad = fp.value_and_grad(lambda p, b: fp.Mean((p * b["x"]).sum(), b["n"].sum()))(w, b)
        return w - grad, {"loss": loss}

    batch = {"x": torch.ones(257, 2), "n": torch.ones(257)}
    with refused(
        BatchError,
        "of the whole batch is 257, but",
        "256",
        "Here parts are computed in torch.bfloat16",
        "(batch=...)",
    ):
        started(step, torch.ones(2), batch, compute="bfloat16")
    step = mixed_precision(step, compute="bfloat16", batch=lambda path: "n" not in path)
    _, (metrics,) = ran(step, fp.Mesh(), lambda p: p, torch.ones(2), [batch])
    assert metrics["loss"] == 512 / 257  # the total of 514 is rounded: it is a sum in bfloat16


def test_the_loss_as_written_sees_masters() -> None:
    """Where its weight is compared: what insists on equal dtypes does not fail. A weight of params
    is one device's own."""

    def loss_fn(w: torch.Tensor, b: Any) -> fp.Mean:
        assert w.dtype == b["x"].dtype
        return fp.Mean((b["x"] @ w).sum(), b["n"].sum() if b["plain"] else (w > 0).sum().float())

    def step(w: Any, b: Any) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, b)
        return w - grad, {"loss": loss}

    for plain in (True, False):
        batch = {"x": torch.ones(4, 4), "n": torch.ones(4), "plain": plain}
        full, _ = ran(
            mixed_precision(step, compute="bfloat16"),
            fp.Mesh(),
            lambda p: p,
            torch.ones(4, 4),
            [batch],
        )
        assert full.dtype == torch.float32
