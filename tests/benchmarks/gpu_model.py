"""The model of the GPU benchmark: a Llama-like language model, as params and functions; its data;
what a step costs.

In: a size by name. Out: params, a loss function, a batch, FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import funcpipe as fp

VOCABULARY, HEAD = 32000, 128


class Size(NamedTuple):
    """Width and number of blocks, length of a row, rows of a microbatch, microbatches."""

    width: int
    layers: int
    length: int
    rows: int
    microbatches: int

    @property
    def hidden(self) -> int:
        """The width inside an MLP."""
        return 4 * self.width * 2 // 3 // 256 * 256

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.length * self.rows * self.microbatches

    @property
    def flops(self) -> float:
        """Floating-point operations of a step: matrix products three times (forward, and two in
        backward), attention as the causal half of its matrices."""
        weights = (
            self.layers * (4 * self.width**2 + 3 * self.width * self.hidden)
            + VOCABULARY * self.width
        )
        return 6.0 * self.tokens * (weights + self.layers * self.length * self.width)


SIZES = {
    "tiny": Size(256, 4, 128, 2, 4),
    "small": Size(1024, 16, 1024, 2, 8),
    "medium": Size(2048, 16, 2048, 2, 8),
}


def init(size: Size, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Params on this GPU."""
    torch.manual_seed(0)
    d, f = size.width, size.hidden
    new = lambda *shape: (torch.randn(shape, device="cuda") * 0.02).bfloat16().to(dtype)  # noqa: E731
    one = lambda: torch.ones(d, device="cuda", dtype=dtype)  # noqa: E731
    blocks = [
        {
            **{"norm1": one(), "qkv": new(3 * d, d), "out": new(d, d)},
            **{"norm2": one(), "gate": new(f, d), "up": new(f, d), "down": new(d, f)},
        }
        for _ in range(size.layers)
    ]
    return {"embed": new(VOCABULARY, d), "blocks": blocks, "head": new(VOCABULARY, d)}


def data(size: Size) -> dict:
    """A batch on this GPU."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(
        VOCABULARY, (size.rows * size.microbatches, size.length + 1), generator=g
    ).cuda()
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def attention(x: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    rows, length, width = x.shape
    parts = (
        u.view(rows, length, width // HEAD, HEAD).transpose(1, 2)
        for u in F.linear(x, qkv).split(width, -1)
    )
    mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
    return F.linear(mixed.transpose(1, 2).reshape(rows, length, width), out)


def block(
    p: Any, x: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> torch.Tensor:
    width = (x.shape[-1],)
    x = between(x + attention(F.rms_norm(x, width, p["norm1"]), p["qkv"], p["out"]))
    h = F.rms_norm(x, width, p["norm2"])
    return x + F.linear(F.silu(F.linear(h, p["gate"])) * F.linear(h, p["up"]), p["down"])


def loss_fn(params: dict, batch: dict, halves: bool = False) -> fp.Mean:
    """``halves``: a block may be cut between attention and MLP too."""
    x = F.embedding(batch["tokens"], params["embed"])
    for p in params["blocks"]:
        x = fp.stage_boundary(block(p, x, fp.stage_boundary) if halves else block(p, x))
    logits = F.linear(x, params["head"]).float().flatten(0, 1)
    total = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    return fp.Mean(total, torch.full((), float(logits.shape[0]), device=logits.device))


class State(NamedTuple):
    params: Any
    opt_state: Any


OPTIMIZER = fp.optim.adamw(lr=1e-4)


def init_state(params: Any) -> State:
    return State(params, OPTIMIZER.init(params))


def step(state: State, batch: dict, loss_fn: Callable = loss_fn) -> tuple[State, dict]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
    params, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return State(params, opt_state), {"loss": loss}


step_by_halves = partial(step, loss_fn=partial(loss_fn, halves=True))
