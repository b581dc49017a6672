"""What a step takes on a GPU is what its plan says: eagerly, compiled, captured into a CUDA
graph."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gpu import GPU_MARKS

import funcpipe as fp

pytestmark = pytest.mark.gpu
NEAR = 0.10  # beside what was predicted: libraries' workspaces, and sizes that are rounded up
POOL = 0.25  # a graph's pool has gaps as well
WIDTH, ROWS, LENGTH, VOCABULARY = 1024, 16, 512, 16000
OPTIMIZER = fp.optim.adamw(lr=1e-3)

MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"backend": "inductor", "accumulate_dtype": torch.bfloat16},
    "compiled, float32 sums": {"backend": "inductor"},
    "captured": {"backend": "inductor", "cuda_graph": True},
}
STACKS = {
    "alone": (1, {}, fp.accumulated(microbatches=4)),
    "1f1b": (2, {"pipe": 2}, fp.pipelined(axis="pipe", microbatches=8)),
    "zb_h1": (
        2,
        {"pipe": 2},
        fp.pipelined(axis="pipe", microbatches=8, schedule=fp.schedules.zb_h1()),
    ),
    "sharded": (
        2,
        {"data": 2},
        fp.compose(
            fp.accumulated(microbatches=4),
            fp.data_parallel(axis="data"),
            fp.sharded_weights(axis="data", bucket_bytes=1 << 20),
        ),
    ),
}


def loss_fn(p: Any, batch: Any) -> fp.Mean:
    x = F.embedding(batch["tokens"], p["embed"])
    for w in p["blocks"]:
        q, k, v = (
            F.linear(F.rms_norm(x, (WIDTH,)), w["qkv"])
            .unflatten(-1, (3, WIDTH // 64, 64))
            .unbind(2)
        )
        x = x + F.linear(fp.attention(q, k, v, causal=True).flatten(2), w["out"])
        x = fp.stage_boundary(
            x + F.linear(F.silu(F.linear(F.rms_norm(x, (WIDTH,)), w["up"])), w["down"])
        )
    logits = F.linear(x, p["head"]).float().flatten(0, 1)
    total = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    return fp.Mean(total, torch.full((), float(len(logits)), device=logits.device))


def step(state: Any, batch: Any) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(state[0], batch)
    return OPTIMIZER.update(grads, state[1], state[0]), {"loss": loss}


def params() -> Any:
    g = torch.Generator("cuda").manual_seed(0)
    new = lambda *shape: (torch.randn(shape, generator=g, device="cuda") * 0.02).bfloat16()  # noqa: E731
    shapes = {
        "qkv": (3 * WIDTH, WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (4 * WIDTH, WIDTH),
        "down": (WIDTH, 4 * WIDTH),
    }
    blocks = [{k: new(*shape) for k, shape in shapes.items()} for _ in range(6)]
    return {"embed": new(VOCABULARY, WIDTH), "head": new(VOCABULARY, WIDTH), "blocks": blocks}


def ratios(name: str) -> dict[str, list[float]]:
    """By mode: what a step took over what was predicted; for a graph its pool as well."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    out = {}
    for mode, options in MODES.items():
        torch.cuda.empty_cache()
        _, axes, transform = STACKS[name]
        tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), device="cuda")
        batch = {"tokens": tokens, "labels": tokens}
        run = fp.spmd(transform(step), fp.Mesh(**axes), **options)
        state = run.init(lambda p: (p, OPTIMIZER.init(p)), params(), batch)
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            state, _ = run(state, batch)
            torch.cuda.synchronize()
            took = torch.cuda.max_memory_allocated() - before
        plan = run.plan(state, batch)
        memory = plan.memory[plan.placement.pipeline_rank(run.rank)]
        out[mode] = [took / memory["step"]] + [memory["graph"] / memory["step"]] * (
            "cuda_graph" in options
        )
        assert memory["graph"] >= run.graph_memory  # the most of the ranks at this place
        assert (run.graph_memory > 0) == (memory["graph"] > 0) == ("cuda_graph" in options)
        run.close()
    return out


@functools.cache
def measured(name: str) -> list[dict[str, list[float]]]:
    return fp.launch(ratios, STACKS[name][0], name, timeout=300)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=GPU_MARKS[ranks]) for name, (ranks, *_) in STACKS.items()]
)
def test_a_step_takes_what_its_plan_says(name: str, mode: str) -> None:
    for took, *pool in (rank[mode] for rank in measured(name)):
        assert abs(took - 1) <= NEAR, f"{took:.3f} times what was predicted"
        assert all(abs(x - 1) <= POOL for x in pool), (
            f"a pool of {pool[0]:.3f} times what was predicted"
        )
