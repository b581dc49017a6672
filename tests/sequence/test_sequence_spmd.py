"""Sequence parallelism in real processes: as on one device, and with the bits of the simulation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.transformers import Transformer
from support.worlds import in_processes

import funcpipe as fp
from funcpipe.testing import assert_equivalent

ROWS = 4
MODEL = Transformer(
    layers=1, length=10, rows=ROWS, heads=4, kv_heads=2, call="three", packed=True, aux=True
)
ROTARY = Transformer(layers=1, length=7, rows=ROWS, heads=3, kv_heads=1, remat=True)
PADDED = Transformer(length=8, rows=ROWS, heads=2, causal=False, mask="padding")


def heads(model: Transformer) -> Callable:
    return fp.seq_all_to_all(axis="seq", dims=model.dims)


def ring(model: Transformer, zigzag: bool = True) -> Callable:
    return fp.seq_ring(axis="ring", dims=model.dims, zigzag=zigzag)


PIPE, DATA = fp.pipelined(axis="pipe", microbatches=2), fp.data_parallel(axis="data")
CASES: dict[str, tuple[Transformer, fp.Mesh, list[Callable], float]] = {
    "heads of two ranks": (ROTARY, fp.Mesh(seq=2), [heads(ROTARY)], 1e-12),
    "ring of two ranks": (PADDED, fp.Mesh(ring=2), [ring(PADDED, zigzag=False)], 1e-10),
    "heads": (MODEL, fp.Mesh(seq=4), [heads(MODEL)], 1e-12),
    "heads, fewer than ranks": (ROTARY, fp.Mesh(seq=4), [heads(ROTARY)], 1e-12),
    "ring": (ROTARY, fp.Mesh(ring=4), [ring(ROTARY)], 1e-10),
    "ring, in order": (PADDED, fp.Mesh(ring=4), [ring(PADDED, zigzag=False)], 1e-10),
    "both": (MODEL, fp.Mesh(seq=2, ring=2), [heads(MODEL), ring(MODEL)], 1e-10),
    "pipeline": (PADDED, fp.Mesh(pipe=2, seq=2), [heads(PADDED), PIPE], 1e-12),
    "ISP": (
        MODEL,
        fp.Mesh(data=2, seq=2),
        [heads(MODEL), DATA, fp.sharded_weights(axis="seq")],
        1e-12,
    ),
    "FSDP": (
        ROTARY,
        fp.Mesh(data=2, seq=2),
        [fp.sharded_weights(axis=("data", "seq")), heads(ROTARY), DATA],
        1e-12,
    ),
}


def run_case(name: str) -> tuple[float, Any]:
    model, mesh, transforms, rtol = CASES[name]
    step, batches = fp.compose(*transforms)(model.step), [model.batch(k) for k in range(2)]
    made: list[Any] = []

    def runner(step: Callable, mesh: fp.Mesh) -> Any:
        made.append(fp.spmd(step, mesh, device="cpu", timeout=60))
        return made[0]

    report = assert_equivalent(
        model.step, step, mesh, model.init_state, model.init(7), batches, rtol, runner=runner
    )
    placed = made[0].place(model.init_state(model.init(7)))
    state, metrics = made[0](placed, batches[0])
    full = made[0].unplace(state)
    made[0].close()
    return report.error, (full, metrics)


def work(size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: run_case(name) for name, case in CASES.items() if case[1].size == size}


@functools.cache
def found(size: int) -> list[dict[str, Any]]:
    """What every one of so many processes found."""
    return fp.launch(work, size, size, timeout=600)


def case(name: str) -> Any:
    return pytest.param(name, marks=in_processes(CASES[name][1].size))


@pytest.mark.parametrize("name", list(map(case, CASES)))
def test_processes_have_the_bits_of_the_simulation(name: str) -> None:
    model, mesh, transforms, rtol = CASES[name]
    run = fp.simulate(fp.compose(*transforms)(model.step), mesh)
    state, metrics = run(run.init(model.init_state, model.init(7), model.batch(0)), model.batch(0))
    wanted = torch.utils._pytree.tree_leaves((run.unplace(state), metrics))
    for rank, some in enumerate(found(mesh.size)):
        error, seen = some[name]
        assert error <= rtol, (name, rank)
        assert all(
            torch.equal(a, b)
            for a, b in zip(torch.utils._pytree.tree_leaves(seen), wanted, strict=True)
            if b is not None
        )
