"""Ready microbatches whose rows do not divide over data ranks are dealt whole: equal to one
device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.models import refused

import funcpipe as fp
from funcpipe.errors import BatchError, CutError
from funcpipe.testing import assert_equivalent

D = 3
W = {
    "a": torch.linspace(-1, 1, 9, dtype=torch.float64).view(D, D),
    "b": torch.linspace(0, 1, D, dtype=torch.float64),
}
DATA = fp.data_parallel(axis="data")
SHARDED = fp.compose(DATA, fp.sharded_weights(axis="data"))


def parts_of(*rows: int) -> fp.Microbatches:
    return fp.Microbatches(
        [{"x": torch.sin(torch.arange(n * D).double() * (n + 1)).view(n, D)} for n in rows]
    )


def loss_fn(p: Any, b: Any) -> Any:
    x = fp.stage_boundary((b["x"] @ p["a"]).tanh())
    each = (x @ p["b"]).square()
    weight = torch.tensor(float(len(x)))
    return fp.Mean(each.sum(), weight), {
        "each": fp.Rows(each),
        "last": fp.Rows(x.T, -1),
        "mean": fp.Mean(x.sum(0), weight),
    }


def step(p: Any, b: Any) -> Any:
    (loss, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(p, b)
    grads, norm = fp.clip_by_global_norm(grads, 1.0)
    return optree.tree_map(lambda x, g: x - 0.1 * g, p, grads), {"loss": loss, "norm": norm, **aux}


def keep(p: Any) -> Any:
    return p


def check(stack: Callable, mesh: fp.Mesh, *batches: fp.Microbatches) -> None:
    assert_equivalent(step, stack(step), mesh, keep, W, batches)


ready = fp.accumulated(microbatches=None)


@settings(max_examples=4, deadline=None)
@example([2, 4], [2, 2], False)  # cut: rows in aux are in the order of one device all the same
@example([3, 5], [2, 6], True)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=2),
    st.lists(st.integers(1, 5), min_size=2, max_size=2),
    st.booleans(),
)
def test_parts_of_any_rows(first: list[int], second: list[int], sharded: bool) -> None:
    check(
        fp.compose(ready, SHARDED if sharded else DATA), fp.Mesh(data=2), parts_of(*first, *second)
    )


def test_under_a_pipeline_and_over_two_axes() -> None:
    pipe = fp.pipelined(axis="pipe", microbatches=None, schedule=fp.schedules.zb_h1())
    check(
        fp.compose(pipe, SHARDED),
        fp.Mesh(pipe=2, data=2),
        parts_of(3, 5, 2, 6),
        parts_of(1, 1, 2, 3),
    )
    check(
        fp.compose(ready, fp.data_parallel(axis=("data", "more"))),
        fp.Mesh(data=2, more=2),
        parts_of(3, 5, 2, 6),
    )


def test_parts_go_to_ranks_in_order_and_rows_that_divide_are_cut_as_before() -> None:
    run = fp.simulate(fp.compose(ready, DATA)(step), fp.Mesh(data=2))
    batch = parts_of(3, 5, 2, 6)
    state = run.init(keep, W, batch)
    call = run.plan(state, batch).calls[0]
    rows = [[len(x) for (x,) in call.split.local_leaves(batch, rank)] for rank in (0, 1)]
    assert rows == [[3, 5], [2, 6]] and call.of_rank(1).ready == (2, 3)
    run(state, batch)
    batch = parts_of(4, 2, 2, 6)
    call = run.plan(state, batch).calls[0]
    assert [[len(x) for (x,) in call.split.local_leaves(batch, rank)] for rank in (0, 1)] == [
        [2, 1, 1, 3]
    ] * 2


def test_a_plan_counts_the_rank_with_the_longest_parts() -> None:
    run = fp.simulate(fp.compose(ready, DATA)(step), fp.Mesh(data=2))
    state = run.init(keep, W, parts_of(1, 1))
    few, many = (run.plan(state, parts_of(3, n)).memory[0]["activations"] for n in (3, 300))
    assert many > few


def test_parts_that_can_be_neither_cut_nor_dealt() -> None:
    run = fp.simulate(fp.compose(ready, DATA)(step), fp.Mesh(data=2))
    with refused(
        BatchError,
        "batch['x'] of shape (3, 3)",
        "into 2 shards over 'data'",
        "dealt whole where their number",
    ):
        run.init(keep, W, parts_of(3, 2, 2))
    with refused(BatchError, "dims={'y': 0} is not a prefix"):
        fp.simulate(
            fp.compose(ready, fp.data_parallel(axis="data", dims={"y": 0}))(step), fp.Mesh(data=2)
        ).init(keep, W, parts_of(3, 2))


def test_parts_that_take_other_ways_through_the_loss() -> None:
    def branching(p: Any, b: Any) -> fp.Mean:
        x = b["x"] @ p["a"]
        if len(x) > 3:
            x = fp.stage_boundary(x)
        return fp.Mean((x @ p["b"]).sum(), torch.tensor(float(len(x))))

    def other(p: Any, b: Any) -> Any:
        loss, _ = fp.value_and_grad(branching)(p, b)
        return p, {"loss": loss}

    with refused(CutError, "microbatch 1 takes another way"):
        fp.simulate(fp.compose(ready, DATA)(other), fp.Mesh(data=2)).init(keep, W, parts_of(3, 5))


@pytest.mark.parametrize("part", [0, 3])
def test_a_part_that_is_not_finite_is_named(part: int) -> None:
    run = fp.simulate(fp.compose(ready, DATA)(step), fp.Mesh(data=2))
    batch = parts_of(3, 5, 2, 6)
    state = run.init(keep, W, batch)
    batch.parts[part]["x"][0, 0] = float("nan")
    found = fp.find_nonfinite(run, state, batch)
    assert (
        found is not None
        and (found.rank, found.microbatch) == (part // 2, part % 2)
        and "batch" in found.what
    )


def trained_in_processes() -> Any:
    """Arrays of numpy, dealt, with a number that is summed over ranks, by the runner of a
    process."""

    def counted(p: Any, b: Any) -> Any:
        loss, aux = loss_fn(p, b)
        return loss, {**aux, "ranks": fp.Mean(fp.psum(1, "data") * loss.weight, loss.weight)}

    def in_ranks(p: Any, b: Any) -> Any:
        (loss, aux), grads = fp.value_and_grad(counted, has_aux=True)(p, b)
        size = fp.global_sum(grads, lambda leaves: sum(torch.complex(x, -x).sum() for x in leaves))
        return optree.tree_map(lambda x, g: x - 0.1 * g, p, grads), {
            "loss": loss,
            "size": size,
            **aux,
        }

    run = fp.spmd(fp.compose(ready, SHARDED)(in_ranks), fp.Mesh(data=2), device="cpu", timeout=30)
    batch = fp.Microbatches([{"x": np.asarray(part["x"])} for part in parts_of(3, 5, 2, 6).parts])
    state, metrics = run(run.init(keep, W, batch), batch)
    out = run.unplace(state), metrics
    run.close()
    return out


def test_in_processes() -> None:
    def one_device(p: Any, b: Any) -> Any:
        (loss, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(p, b)
        size = sum(torch.complex(x, -x).sum() for x in optree.tree_leaves(grads))
        return optree.tree_map(lambda x, g: x - 0.1 * g, p, grads), {
            "loss": loss,
            "size": size,
            **aux,
        }

    want, metrics = one_device(W, parts_of(3, 5, 2, 6))
    for state, got in fp.launch(trained_in_processes, 2, timeout=60):
        assert got.pop("ranks") == 2
        for a, b in zip(
            optree.tree_leaves((state, got)), optree.tree_leaves((want, metrics)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_collective_would_join_two_microbatches() -> None:
    def joining(p: Any, b: Any) -> Any:
        y = b["x"] @ p["b"]
        return fp.Mean((y * fp.psum(y.sum(), "data")).sum(), torch.tensor(float(len(y))))

    def descend(p: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(joining)(p, b)
        return optree.tree_map(lambda x, g: x - 0.1 * g, p, grads), {"loss": loss}

    run = fp.simulate(fp.compose(ready, DATA)(descend), fp.Mesh(data=2))
    with refused(
        BatchError,
        "fp.psum over 'data' at test_dealt.py",
        "dealt to ranks, whole",
        "one device has each",
    ):
        run.init(keep, W, parts_of(3, 5, 2, 4))
