"""Dropout by keys: the same bits on one device and on every mesh and schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused, start
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe.errors import TraceError
from funcpipe.testing import assert_equivalent

D, N, ROWS, RATE = 4, 6, 8, 0.4


def init() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(D, D, generator=g, dtype=torch.float64) / 2 for _ in range(3)]


def batch(step: int = 0, rows: int = ROWS) -> dict[str, torch.Tensor]:
    x = torch.randn(rows, N, D, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return {"x": x, "key": fp.random.keys(fp.random.fold_in(fp.random.key(1), step), rows)}


def block(w: torch.Tensor, x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    q = F.linear(x, w).unflatten(-1, (2, 2))
    x = x + fp.random.dropout(
        fp.attention(q, q, q, causal=True).flatten(2), RATE, fp.random.fold_in(key, "attention")
    )
    return x + fp.random.dropout(torch.tanh(F.linear(x, w)), RATE, fp.random.fold_in(key, "mlp"))


def loss(remat: bool) -> Callable:
    def loss_fn(params: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for k, w in enumerate(params):
            key = fp.random.fold_in(b["key"], k)
            x = checkpoint(block, w, x, key, use_reentrant=False) if remat else block(w, x, key)
            x = fp.stage_boundary(x)
        return fp.Mean(x.square().sum(), torch.ones_like(x[..., 0]).sum())

    return loss_fn


def stepping(loss_fn: Callable) -> Callable:
    def step(params: Any, b: Any) -> Any:
        value, grads = fp.value_and_grad(loss_fn)(params, b)
        # A small step: after a large one the next loss would grow, and rounding errors with it.
        return optree.tree_map(lambda p, g: p - 1e-3 * g, params, grads), {"loss": value}

    return step


@given(
    st.sampled_from([fp.schedules.one_f_one_b(), fp.schedules.zb_h1(), fp.schedules.gpipe()]),
    st.sampled_from([1, 2]),
    st.sampled_from(["data", "seq", "ring"]),
    st.booleans(),
    st.booleans(),
)
def test_the_same_on_every_mesh(
    schedule: Any, microbatches: int, axis: str, remat: bool, sharded: bool
) -> None:
    step = stepping(loss(remat))
    dims = {"x": 1, "key": None}
    split = {
        "data": fp.data_parallel(axis="data"),
        "seq": fp.seq_all_to_all(axis="seq", dims=dims),
        "ring": fp.seq_ring(axis="ring", dims=dims),
    }[axis]
    transformed = fp.pipelined(
        split(step), axis="pipe", microbatches=microbatches, schedule=schedule
    )
    if sharded:
        transformed = fp.sharded_weights(transformed, axis=axis)
    mesh = fp.Mesh(**{"pipe": 2, axis: 2})
    rtol = 1e-10 if axis == "ring" else 1e-12
    assert_equivalent(step, transformed, mesh, lambda p: p, init(), [batch(0), batch(1)], rtol=rtol)


def test_rate_and_scale() -> None:
    x = torch.ones(50, 400, dtype=torch.float64)
    y = fp.random.dropout(x, 0.3, fp.random.keys(fp.random.key(3), 50))
    assert abs(float((y == 0).double().mean()) - 0.3) < 0.015
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / 0.7], dtype=torch.float64))
    rows = (y == 0).double()
    assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 0.25  # no two rows alike
    assert torch.equal(fp.random.dropout(x, 0.0, fp.random.key(0)), x)


def test_every_position_may_have_a_key_of_its_own() -> None:
    def loss_fn(w: Any, b: Any) -> fp.Mean:
        x = F.linear(b["x"], w[0])
        q = x.unflatten(-1, (2, 2))
        x = fp.random.dropout(x + fp.attention(q, q, q).flatten(2), RATE, b["keys"])
        return fp.Mean(x.square().sum(), torch.ones_like(x[..., 0]).sum())

    b = {"x": batch()["x"], "keys": fp.random.keys(fp.random.key(0), ROWS * N).view(ROWS, N)}
    step = stepping(loss_fn)
    transformed = fp.seq_all_to_all(fp.data_parallel(step, axis="data"), axis="seq")
    assert_equivalent(step, transformed, fp.Mesh(data=2, seq=2), lambda p: p, init(), [b])


def test_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(D, D), nn.Dropout(0.5), nn.Sequential(nn.Tanh(), nn.Linear(D, D)), nn.Dropout(0.5)
    ).double()
    apply_fn, params, buffers = fp.from_module(model, boundaries=["1"])

    def loss_fn(p: Any, b: Any) -> fp.Mean:
        y, _ = apply_fn(p, buffers, b["x"], dropout_key=b["key"])
        return fp.Mean(y.square().sum(), torch.ones_like(y[..., 0]).sum())

    step = stepping(loss_fn)
    transformed = fp.pipelined(fp.data_parallel(step, axis="data"), axis="pipe", microbatches=2)
    assert_equivalent(step, transformed, fp.Mesh(pipe=2, data=2), lambda p: p, params, [batch()])
    dropped, _ = apply_fn(params, buffers, batch()["x"], dropout_key=batch()["key"])
    assert 0.3 < float((dropped == 0).double().mean()) < 0.7
    model.eval()
    assert not (apply_fn(params, buffers, batch()["x"], dropout_key=batch()["key"])[0] == 0).any()


# ---- refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            (torch.ones(2, 3), 1.0, fp.random.key(0)),
            r"rate=1.0; it is a probability, at least 0 and less than 1",
        ),
        (
            (torch.ones(2, 3), 0.5, torch.zeros(2)),
            r"the key is .*float32.*; take it from fp.random.keys",
        ),
        (
            (torch.ones(2, 3), 0.5, torch.zeros(3).long()),
            r"its shape is that of the leading dims of x",
        ),
        ((torch.ones(2, 3).long(), 0.5, fp.random.key(0)), r"x takes floating-point numbers"),
    ],
)
def test_what_is_no_dropout(arguments: tuple, text: str) -> None:
    with pytest.raises(TraceError, match=text):
        fp.random.dropout(*arguments)


def test_one_key_for_a_split_batch() -> None:
    def loss_fn(p: Any, b: Any) -> fp.Mean:
        x = fp.random.dropout(F.linear(b["x"], p[0]), RATE, b["key"][0])
        return fp.Mean(x.square().sum(), torch.ones_like(x[..., 0]).sum())

    step = fp.accumulated(stepping(loss_fn), microbatches=2)
    with refused(TraceError, "Give every row a key: a leaf fp.random.keys"):
        start(step, fp.Mesh(), init(), batch())
