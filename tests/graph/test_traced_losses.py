"""Losses of every kind that PyTorch allows: what a tracer, a cut or a marker might trip over.

Each runs on pipelines of one, two and three stages, with whole and split backwards. With one
microbatch the bits are those of one device, in losses, gradients, metrics and params alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.models import grid
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe.testing import assert_equivalent

# Sums over microbatches are taken in another order than on one device: see test_equivalence.py.
FLOAT64 = 1e-12
BITWISE = 0.0

ROWS, D = 4, 6
cut = fp.stage_boundary


def ends(x: torch.Tensor, batch: Any) -> fp.Mean:
    return fp.Mean((x * batch["y"]).square().sum(), torch.ones_like(batch["y"][:, 0]).sum())


def strides(p: Any, batch: Any) -> Any:
    """A boundary changes no strides: what is expanded or transposed stays so."""
    x = cut(p["v"].expand(len(batch["y"]), D))
    out = cut({"x": x.t(), "y": x.reshape(-1) * 2})
    return ends((out["x"].t() + out["y"].view(-1, D)) @ p["w"] * batch["x"], batch)


def around(p: Any, batch: Any) -> Any:
    """A tensor twice through a boundary and once around it: its gradient is added up as if there
    were none."""
    x = torch.tanh(batch["x"] @ p["w"])
    a, b = cut((x, x))
    a, b, v = cut((a.sin(), b * x, b.view(-1)))
    return ends(a * b + v.view_as(a).cos() * p["v"] + x, batch)


def checkpointed(p: Any, batch: Any) -> Any:
    x = batch["x"]
    for scale in (1.0, 0.5, 2.0):
        x = cut(
            checkpoint(
                lambda x, w, s=scale: torch.tanh(x @ w * s).sin() + x,
                x,
                p["w"],
                use_reentrant=False,
            )
        )
    return ends(x, batch)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


def custom_function(p: Any, batch: Any) -> Any:
    x = cut(Cube.apply(batch["x"] @ p["w"]))
    x = cut(Cube.apply(x * p["v"]))
    return ends(x @ p["w"] + x, batch)


def attention(p: Any, batch: Any) -> Any:
    q = (batch["x"] @ p["w"]).view(-1, 1, 2, D // 2).expand(-1, 2, -1, -1)
    out = cut(F.scaled_dot_product_attention(*cut((q, q, q * p["v"][:3]))))
    return ends(out.sum(1).reshape(-1, D), batch)


def batch_through_boundaries(p: Any, batch: Any) -> Any:
    batch = cut(batch)
    x, y = cut((batch["x"], batch["x"] @ p["w"]))
    return ends(x * p["v"] + y, batch)


def params_through_boundaries(p: Any, batch: Any) -> Any:
    w, v = cut((p["w"], p["v"]))
    x = cut(batch["x"] @ w)
    return ends(x * v + x @ p["w"], batch)


def in_place(p: Any, batch: Any) -> Any:
    x = (batch["x"] @ p["w"]).clone()
    x += 1
    x.mul_(p["v"])
    x = cut(x)
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y = cut(y + x).clone()
    y[:, 2] = 0
    return ends(y, batch)


def gradient_inside(p: Any, batch: Any) -> Any:
    """The gradient of an energy, differentiated again."""
    x = cut(batch["x"] @ p["w"])
    force = torch.autograd.grad((torch.tanh(x) * p["v"]).square().sum(), x, create_graph=True)[0]
    return ends(cut(force + x), batch)


def vmap_inside(p: Any, batch: Any) -> Any:
    x = cut(torch.func.vmap(lambda row: torch.tanh(row @ p["w"]))(batch["x"]))
    slopes = torch.func.vmap(torch.func.grad(lambda row: (row.sin() * p["v"]).sum()))(x)
    return ends(cut(slopes + x), batch)


def dead_gradient(p: Any, batch: Any) -> Any:
    """Nothing flows back through the first boundary."""
    x = cut(batch["x"] @ p["w"])
    return ends(cut(x.detach() * p["v"]), batch)


def dead_value(p: Any, batch: Any) -> Any:
    """Nothing flows forward through the second boundary."""
    x = cut(batch["x"] @ p["w"])
    return ends(cut(torch.ones_like(x)) * p["v"], batch)


def sums_within_sums(p: Any, batch: Any) -> Any:
    """One weight under two names: the gradient of the second is a sum before it is added to the
    first's."""
    again = p["w"].clone()
    x = cut(torch.tanh(batch["x"] @ again))
    x = cut(torch.tanh(x @ again) + x)
    return ends(torch.tanh(x @ p["w"]) * x, batch)


def complex_params(p: Any, batch: Any) -> Any:
    x = cut(torch.complex(batch["x"], batch["y"]) * p["z"])
    x = cut(torch.fft.fft(x) * p["z"].conj())
    return ends(x.real + x.abs() + p["w"][0], batch)


def in_turn(p: Any, batch: Any) -> Any:
    """A recurrent cell: one weight, used in every segment, in a Python loop."""
    h = torch.zeros_like(batch["x"])
    for t in range(D):
        h = cut(torch.tanh(h @ p["w"] + batch["x"][:, t : t + 1] * p["v"]))
    return ends(h, batch)


LOSSES = [
    strides, around, checkpointed, custom_function, attention, batch_through_boundaries, params_through_boundaries,
    in_place, gradient_inside, vmap_inside, dead_gradient, dead_value, sums_within_sums, complex_params, in_turn,
]  # fmt: skip


def training(loss_fn: Callable) -> tuple[Callable, Any, list[Any]]:
    def step(params: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(params, batch)
        return optree.tree_map(lambda p, g: p - 0.01 * g, params, grads), {"loss": loss}

    g = torch.Generator().manual_seed(0)
    rand = lambda *shape, dtype=torch.float64: torch.randn(*shape, generator=g, dtype=dtype)  # noqa: E731
    params = {"w": rand(D, D) / D**0.5, "v": rand(D), "z": rand(D, dtype=torch.complex128)}
    return step, params, [{"x": rand(ROWS, D), "y": rand(ROWS, D)} for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "microbatches"), grid([fn.__name__ for fn in LOSSES], [1, 2], (), turns=True)
)
def test_loss(name: str, microbatches: int) -> None:
    step, params, batches = training(next(fn for fn in LOSSES if fn.__name__ == name))
    for ranks, schedule in [
        (1, fp.schedules.zb_h1()),
        (2, fp.schedules.one_f_one_b()),
        (3, fp.schedules.zb_h1()),
    ]:
        transformed = fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule)
        whole = microbatches == 1
        assert_equivalent(
            step, transformed, fp.Mesh(pipe=ranks), lambda p: p, params, batches,
            rtol=BITWISE if whole else FLOAT64, bitwise=whole,
        )  # fmt: skip
