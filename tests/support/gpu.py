"""What tests on GPUs share: marks, a small model and its step, a runner of it over all ranks.

In: a number of GPUs. Out: states, batches, runners; how far apart two trees are.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import funcpipe as fp
from funcpipe._src.core import pytree as tree

GPUS = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
GPU_MARKS = {1: one_gpu, 2: two_gpus}
on_one_or_two = pytest.mark.parametrize(
    "ranks", [pytest.param(n, marks=mark) for n, mark in GPU_MARKS.items()]
)
TIGHT = 1e-12  # float64: sums in another order
COMPILED = 1e-9  # float64: inductor orders sums and fuses roundings as it likes, over four steps


class State(NamedTuple):
    params: Any
    opt_state: Any
    grads: Any


OPTIMIZER = fp.optim.adamw(lr=1e-2)


def loss_fn(params: dict, batch: dict) -> fp.Mean:
    x = F.embedding(batch["tokens"], params["embed"])
    for w in params["blocks"]:
        x = fp.stage_boundary(x + torch.tanh(F.linear(F.rms_norm(x, (16,)), w)))
    logits = F.linear(x, params["embed"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    weight = batch["weight"].flatten()
    return fp.Mean((losses * weight).sum(), weight.sum())


def step(state: State, batch: dict) -> tuple[State, dict]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
    clipped, norm = fp.clip_by_global_norm(grads, 0.5)
    params, opt_state = OPTIMIZER.update(clipped, state.opt_state, state.params)
    return State(params, opt_state, grads), {"loss": loss, "norm": norm}


def init_state(params: dict) -> State:
    return State(params, OPTIMIZER.init(params), tree.map(torch.zeros_like, params))


def example(dtype: torch.dtype = torch.float64, rows: int = 8) -> tuple[dict, dict]:
    g = torch.Generator().manual_seed(0)

    def new(*shape):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * 0.3).to(dtype).cuda()

    tokens = torch.randint(20, (rows, 6), generator=g).cuda()
    weight = (torch.rand((rows, 6), generator=g) > 0.2).to(dtype).cuda()
    params = {"embed": new(20, 16), "blocks": [new(16, 16) for _ in range(4)]}
    return params, {"tokens": tokens, "labels": tokens.roll(1, 1), "weight": weight}


def error(got: Any, want: Any) -> float:
    pairs = zip(tree.leaves(got), tree.leaves(want), strict=True)
    return max(float((a.cpu() - b.cpu()).norm() / (b.cpu().norm() + 1e-300)) for a, b in pairs)


def runner(step: Any = step, **options: Any) -> Any:
    """A pipeline over all ranks; where there is one, the same loop over microbatches."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return fp.spmd(fp.accumulated(step, microbatches=4), fp.Mesh(), **options)
    return fp.spmd(fp.pipelined(step, axis="pipe", microbatches=4), fp.Mesh(pipe=ranks), **options)
