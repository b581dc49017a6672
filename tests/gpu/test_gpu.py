"""The core on real GPUs: equal to one device, in simulation, over NCCL, and captured into a CUDA graph.

Skipped where there are not enough GPUs. Run with: pytest tests/gpu
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import funcpipe as fp
from funcpipe import tree

GPUS = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
pytestmark = pytest.mark.gpu
TIGHT = 1e-12  # float64: sums in another order
COMPILED = 1e-9  # float64: inductor orders sums and fuses roundings as it likes, over three steps


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
    new = lambda *shape: (torch.randn(shape, generator=g, dtype=torch.float64) * 0.3).to(dtype).cuda()  # noqa: E731
    tokens = torch.randint(20, (rows, 6), generator=g).cuda()
    weight = (torch.rand((rows, 6), generator=g) > 0.2).to(dtype).cuda()
    params = {"embed": new(20, 16), "blocks": [new(16, 16) for _ in range(4)]}
    return params, {"tokens": tokens, "labels": tokens.roll(1, 1), "weight": weight}


def reference(steps: int = 3, rows: int = 8) -> tuple[State, list[dict]]:
    params, batch = example(rows=rows)
    state, seen = init_state(params), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state, seen


def error(got: Any, want: Any) -> float:
    pairs = zip(tree.leaves(got), tree.leaves(want), strict=True)
    return max(float((a.cpu() - b.cpu()).norm() / (b.cpu().norm() + 1e-300)) for a, b in pairs)


STACKS = {
    "pipe": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4)]),
    "zb_h1": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule=fp.schedules.zb_h1())]),
    "zb_v": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule=fp.schedules.zb_v())]),
    "data": (("data",), [fp.data_parallel(axis="data")]),
    "sharded": (
        ("data",),
        [fp.accumulated(microbatches=2), fp.data_parallel(axis="data"), fp.sharded_weights(axis="data")],
    ),
}


def run_steps(run: Any, steps: int = 3, rows: int = 8) -> tuple[Any, list[dict]]:
    params, batch = example(rows=rows)
    state, seen = run.init(init_state, params, batch), []
    for _ in range(steps):
        state, metrics = run(state, batch)
        seen.append(metrics)
    return run.unplace(state), seen


@one_gpu
@pytest.mark.parametrize("name", STACKS)
def test_simulated_on_one_gpu(name: str) -> None:
    axes, stack = STACKS[name]
    run = fp.simulate(fp.compose(*stack)(step), fp.Mesh(**dict.fromkeys(axes, 2)))
    assert error(run_steps(run), reference()) <= TIGHT


def on_two(name: str, options: dict) -> tuple[float, list]:
    axes, stack = STACKS[name]
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run = fp.spmd(fp.compose(*stack)(step), fp.Mesh(**dict.fromkeys(axes, 2)), **options)
    got = run_steps(run)
    found = error(got, reference())
    losses = [float(m["loss"]) for m in got[1]]
    run.close()
    return found, losses


@two_gpus
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_over_nccl(name: str, graph: bool) -> None:
    out = fp.launch(on_two, 2, name, {"cuda_graph": graph}, timeout=180)
    assert max(e for e, _ in out) <= TIGHT
    assert out[0][1] == out[1][1]


@two_gpus
def test_compiled_units_over_nccl() -> None:
    out = fp.launch(on_two, 2, "zb_h1", {"cuda_graph": True, "backend": "inductor"}, timeout=300)
    assert max(e for e, _ in out) <= COMPILED


def another_shape() -> float:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run = fp.spmd(fp.pipelined(step, axis="pipe", microbatches=4), fp.Mesh(pipe=2), cuda_graph=True)
    params, small = example(rows=8)
    _, large = example(rows=16)
    state, want = run.init(init_state, params, small), init_state(params)
    for batch in (small, large, small):
        state, metrics = run(state, batch)
        want, expected = step(want, batch)
    found = error((run.unplace(state), metrics), (want, expected))
    run.close()
    return found


@two_gpus
def test_a_new_shape_is_captured_anew() -> None:
    assert max(fp.launch(another_shape, 2, timeout=180)) <= TIGHT


def waits_for_the_host() -> str:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    def bad(state: State, batch: dict) -> tuple[State, dict]:
        state, metrics = step(state, batch)
        if torch.cuda.is_current_stream_capturing() and float(batch["weight"].sum()) < 0:
            raise AssertionError
        return state, metrics

    run = fp.spmd(fp.pipelined(bad, axis="pipe", microbatches=4), fp.Mesh(pipe=2), cuda_graph=True)
    params, batch = example()
    try:
        run(run.init(init_state, params, batch), batch)
    except fp.errors.FuncpipeError as problem:
        return str(problem)
    return ""


@two_gpus
def test_a_step_that_waits_is_refused() -> None:
    assert all("cannot be captured" in text for text in fp.launch(waits_for_the_host, 2, timeout=180))
