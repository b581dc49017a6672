"""The core on real GPUs: equal to one device, in simulation, over NCCL, and captured into a CUDA
graph.

Skipped where there are not enough GPUs. Run with: pytest tests/gpu
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from support.gpu import (
    COMPILED,
    GPU_MARKS,
    TIGHT,
    State,
    error,
    example,
    init_state,
    loss_fn,
    on_one_or_two,
    one_gpu,
    runner,
    step,
)

import funcpipe as fp
from funcpipe._src.core import pytree as tree

pytestmark = pytest.mark.gpu


def reference(steps: int = 4, rows: int = 8) -> tuple[State, list[dict]]:
    params, batch = example(rows=rows)
    state, seen = init_state(params), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state, seen


STACKS = {
    "alone": ((), [fp.accumulated(microbatches=4)]),
    "pipe": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4)]),
    "zb_h1": (
        ("pipe",),
        [fp.pipelined(axis="pipe", microbatches=4, schedule=fp.schedules.zb_h1())],
    ),
    "zb_v": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule=fp.schedules.zb_v())]),
    "auto": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule="auto")]),
    "data": (("data",), [fp.data_parallel(axis="data")]),
    "sharded": (
        ("data",),
        [
            fp.accumulated(microbatches=2),
            fp.data_parallel(axis="data"),
            fp.sharded_weights(axis="data"),
        ],
    ),
}


def run_steps(run: Any, steps: int = 4, rows: int = 8) -> tuple[Any, list[dict]]:
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


# ---- in processes, over NCCL: one launch runs every stack in every way


MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "graph": {"cuda_graph": True},
    "compiled graph": {"cuda_graph": True, "backend": "inductor"},
}


def modes(name: str) -> list[str]:
    """Compiling takes a while: some stacks say whether it works."""
    return [
        mode
        for mode in MODES
        if mode != "compiled graph" or name in ("alone", "zb_h1", "auto", "sharded")
    ]


def ranks_of(name: str) -> int:
    return 2 if STACKS[name][0] else 1


def in_processes(ranks: int) -> dict[tuple[str, str], tuple[float, list, int]]:
    """For every stack and mode: the error, the losses, and the bytes of graphs."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    out = {}
    for name, (axes, stack) in STACKS.items():
        for mode in modes(name) if ranks_of(name) == ranks else ():
            options = MODES[mode]
            run = fp.spmd(fp.compose(*stack)(step), fp.Mesh(**dict.fromkeys(axes, 2)), **options)
            got = run_steps(run)
            losses = [float(m["loss"]) for m in got[1]]
            out[name, mode] = error(got, reference()), losses, run.graph_memory
            run.close()
    return out


@functools.cache
def launched(ranks: int) -> list[dict]:
    return fp.launch(in_processes, ranks, ranks, timeout=400)


@pytest.mark.parametrize(
    "name, mode",
    [
        pytest.param(name, m, marks=GPU_MARKS[ranks_of(name)])
        for name in STACKS
        for m in modes(name)
    ],
)
def test_in_processes(name: str, mode: str) -> None:
    found = [rank[name, mode] for rank in launched(ranks_of(name))]
    assert max(e for e, _, _ in found) <= (COMPILED if "backend" in MODES[mode] else TIGHT)
    assert all(rank[1] == found[0][1] for rank in found)
    assert all((nbytes > 0) == ("cuda_graph" in MODES[mode]) for _, _, nbytes in found)


# ---- halves: beside a float32 reference


def half_step(state: State, batch: dict) -> tuple[State, dict]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
    return State(state.params, state.opt_state, grads), {"loss": loss}


def gradients(dtype: torch.dtype) -> Any:
    params, batch = example(dtype)
    return fp.value_and_grad(loss_fn)(params, batch)[1]


def halves() -> dict[str, float]:
    """How far bfloat16 gradients are from those in float32: plain PyTorch's, ours, ours summed in
    float32."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    want, out = (
        gradients(torch.float32),
        {"torch": error(gradients(torch.bfloat16), gradients(torch.float32))},
    )
    for name, sums in (("ours", torch.bfloat16), ("ours in float32", None)):
        run = runner(half_step, cuda_graph=True, backend="inductor", accumulate_dtype=sums)
        params, batch = example(torch.bfloat16)
        state, _ = run(run.init(init_state, params, batch), batch)
        found = run.unplace(state).grads
        assert all(x.dtype == torch.bfloat16 for x in tree.leaves(found))
        out[name] = error(found, want)
        run.close()
    return out


@on_one_or_two
def test_halves_are_as_near_as_those_of_plain_pytorch(ranks: int) -> None:
    for found in fp.launch(halves, ranks, timeout=300):
        assert found["ours"] <= 2 * found["torch"]
        assert found["ours in float32"] <= found["ours"]


@one_gpu
def test_halves_into_float32_accumulators() -> None:
    """``mm`` and ``addmm`` with ``out_dtype``: products of halves are not rounded before they are
    added."""
    from funcpipe._src.backends.grad_accumulation import Factors

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=g).bfloat16().cuda() for _ in range(2))
    product, exact = Factors(a, b.t()), a.double() @ b.t().double()
    sums = product.materialize(torch.float32)
    assert sums.dtype == torch.float32
    assert (sums - exact).norm() <= 1e-6 * exact.norm()
    assert product.accumulate_into(sums) is sums
    assert (sums - 2 * exact).norm() <= 1e-6 * exact.norm()
