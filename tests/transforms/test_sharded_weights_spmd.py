"""Sharding in real processes: the bits of the simulation; batches of a rank's own; ranks that
differ are refused.

Two processes are started once, and four for the slow tier; each runs every case and every check of
its size, and hands back what it saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from support.worlds import in_processes

import funcpipe as fp
from funcpipe.testing import Layer, Model, assert_equivalent

# Sums over microbatches, stages and shards are taken in another order than on one device: see
# test_sharded_weights.py.
FLOAT64 = 1e-12

MODEL = Model(
    tuple(
        (Layer("linear", (k, k)), Layer("permute", (k,)), Layer("norm", (k, k + 3)))
        for k in range(3)
    ),
    tied_head=True,
    aux=1,
    unused=True,
    zero_rows=True,
)
OPTIMIZER = fp.optim.adamw(1e-2, eps=1e-3)
PARAMS, BATCHES = MODEL.init(), [MODEL.batch(k, 16) for k in range(3)]


def init_state(params: Any) -> dict[str, Any]:
    return {"params": params, "opt": OPTIMIZER.init(params)}


def stepping(loss_fn: Callable) -> Callable:
    def step(state: dict[str, Any], batch: Any) -> Any:
        (loss, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(state["params"], batch)
        grads, norm = fp.clip_by_global_norm(grads, 0.5)
        params, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
        return {"params": params, "opt": opt}, {"loss": loss, "norm": norm, "aux": aux}

    return step


step = stepping(MODEL.loss_fn)


def sharded(axis: Any = "data", **options: Any) -> Callable:
    return fp.sharded_weights(axis=axis, **options)


PIPE, DATA = fp.pipelined(axis="pipe", microbatches=4), fp.data_parallel(axis="data")
TWICE, TWO, FOUR = fp.accumulated(microbatches=2), fp.Mesh(data=2), fp.Mesh(data=4)
CASES: dict[str, tuple[fp.Mesh, list[Callable]]] = {
    "data=2": (TWO, [TWICE, DATA, sharded(bucket_bytes=200)]),
    "data=2, together": (TWO, [TWICE, DATA, sharded(regather="step", reduce="last")]),
    "pipe=2 data=2": (
        fp.Mesh(pipe=2, data=2),
        [PIPE, DATA, sharded(regather="step", reduce="last")],
    ),
    "data=2 pipe=2": (fp.Mesh(data=2, pipe=2), [sharded(prefetch=2), DATA, PIPE]),
    "data=4": (FOUR, [TWICE, DATA, sharded(bucket_bytes=200)]),
    "a=2 b=2, own leaves": (
        fp.Mesh(a=2, b=2),
        [
            fp.data_parallel(axis=("a", "b")),
            sharded(("a", "b"), only=lambda path: "embed" in path),
            sharded("a", only=lambda path: "embed" not in path, regather="step"),
        ],
    ),
    "data=4 low": (
        FOUR,
        [TWICE, DATA, sharded(param_dtype=torch.float32, reduce_dtype=torch.bfloat16)],
    ),
    "rows not in mesh order": (
        fp.Mesh(a=2, b=2),
        [fp.data_parallel(axis=("b", "a")), sharded("b")],
    ),
    "S not in V": (fp.Mesh(x=2, data=2), [DATA, sharded(("data", "x"))]),
    "one of two data axes, and another": (
        fp.Mesh(x=2, a=2, b=1),
        [fp.data_parallel(axis=("a", "b")), sharded(("a", "x"), prefetch=0)],
    ),
}


def spmd(step: Callable, mesh: fp.Mesh, **options: Any) -> Any:
    return fp.spmd(step, mesh, device="cpu", timeout=30, **options)


def run_case(name: str, start: Callable) -> tuple[Any, Any, Any]:
    """Three steps. Returns metrics, state and full state."""
    mesh, stack = CASES[name]
    run = start(fp.compose(*stack)(step), mesh)
    state, metrics = run.init(init_state, PARAMS, BATCHES[0]), []
    for batch in BATCHES:
        state, new = run(state, batch)
        metrics.append(new)
    full = run.unplace(state)
    assert equal(run.place(full), state)
    return metrics, state, full


def run_local(name: str) -> tuple[Any, Any]:
    """Three steps on a rank's own rows. Returns metrics and full state."""
    mesh, stack = CASES[name]
    run = spmd(fp.compose(*stack)(step), mesh, batch="local")
    index, parts = mesh.index(run.rank, "data"), mesh.axis_size("data")
    mine = [
        optree.tree_map(lambda x: x.chunk(parts)[index] if rows(x) else x, batch)
        for batch in BATCHES
    ]
    state, metrics = run.init(init_state, PARAMS, mine[0]), []
    for batch in mine:
        state, new = run(state, batch)
        metrics.append(new)
    return metrics, run.unplace(state)


def rows(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def equal(a: Any, b: Any) -> bool:
    if optree.tree_structure(a) != optree.tree_structure(b):
        return False
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return optree.tree_all(optree.tree_map(same, a, b))


# ---- ranks that differ


def other_loss(params: Any, batch: Any) -> Any:
    mean, aux = MODEL.loss_fn(params, batch)
    return fp.Mean(mean.total * 1.5, mean.weight), aux


ODD: dict[str, tuple[Callable, Callable]] = {
    "regather": (DATA(sharded()(step)), DATA(sharded(regather="step")(step))),
    "reduce": (DATA(sharded()(step)), DATA(sharded(reduce="last")(step))),
    "bucket_bytes": (DATA(sharded()(step)), DATA(sharded(bucket_bytes=1)(step))),
    "not sharded": (DATA(sharded()(step)), DATA(step)),
    "dims": (
        DATA(sharded()(step)),
        fp.data_parallel(sharded()(step), axis="data", dims={"ids": 0, "t": None}),
    ),
    "only": (
        DATA(sharded(only=lambda path: True)(step)),
        DATA(sharded(only=lambda path: "embed" not in path)(step)),
    ),
    "loss": (DATA(sharded()(step)), DATA(sharded()(stepping(other_loss)))),
    "schedule": (
        fp.pipelined(step, axis="data", microbatches=2),
        fp.pipelined(step, axis="data", microbatches=2, schedule=fp.schedules.gpipe()),
    ),
}


LOCAL = {2: ["data=2"], 4: ["pipe=2 data=2", "data=4"]}
# By mesh size the rank that runs another step than the others, and in which ways.
ANOTHER = {2: 1, 4: 2}
WAYS = {2: ["regather", "schedule"], 4: list(ODD)}


def refused(name: str, size: int) -> tuple[str, str]:
    """The error of ``init`` when a rank runs another step than the others."""
    run = spmd(ODD[name][dist.get_rank() == ANOTHER[size]], fp.Mesh(data=size))
    try:
        run.init(init_state, PARAMS, BATCHES[0])
    except fp.errors.FuncpipeError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def work(size: int) -> dict[str, Any]:
    """What every process runs."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {
        name: run_case(name, spmd) for name, case in CASES.items() if case[0].size == size
    }
    out["local"] = {name: run_local(name) for name in LOCAL[size]}
    out["odd"] = {name: refused(name, size) for name in WAYS[size]}
    mesh, stack = CASES[f"data={size}"]
    transformed = fp.compose(*stack)(step)
    found = assert_equivalent(
        step, transformed, mesh, init_state, PARAMS, BATCHES, rtol=FLOAT64, runner=spmd
    )
    out["compared"] = found.compared
    return out


@functools.cache
def ran(size: int) -> list[dict[str, Any]]:
    """What every one of so many ranks saw."""
    return fp.launch(work, size, size, timeout=240)


def case(name: str) -> Any:
    return pytest.param(name, marks=in_processes(CASES[name][0].size))


SIZES = pytest.mark.parametrize(
    "size", [pytest.param(size, marks=in_processes(size)) for size in (2, 4)]
)


# ---- tests


@pytest.mark.parametrize("name", list(map(case, CASES)))
def test_processes_compute_what_the_simulation_computes(name: str) -> None:
    """Bitwise: metrics, every rank's state, and the full state on every rank."""
    metrics, states, full = run_case(name, fp.simulate)
    for rank, result in enumerate(ran(CASES[name][0].size)):
        assert equal(result[name], (metrics, states[rank], full))


@pytest.mark.parametrize("name", [name for name in CASES if "low" not in name])
def test_the_simulation_computes_what_one_device_computes(name: str) -> None:
    mesh, stack = CASES[name]
    assert_equivalent(
        step, fp.compose(*stack)(step), mesh, init_state, PARAMS, BATCHES, rtol=FLOAT64
    )


@SIZES
def test_assert_equivalent_in_processes(size: int) -> None:
    assert all(result["compared"] for result in ran(size))


@pytest.mark.parametrize("name", list(map(case, [*LOCAL[2], *LOCAL[4]])))
def test_a_batch_of_a_ranks_own_rows(name: str) -> None:
    """Bitwise what the same rows give in a global batch."""
    for result in ran(CASES[name][0].size):
        metrics, _, full = result[name]
        assert equal(result["local"][name], (metrics, full))


def ways() -> list[Any]:
    return [
        pytest.param(size, name, marks=in_processes(size)) for size in WAYS for name in WAYS[size]
    ]


@pytest.mark.parametrize(("size", "name"), ways())
def test_ranks_that_would_run_different_programs_are_refused(size: int, name: str) -> None:
    """Before the first step, on all ranks, with the difference."""
    said = {result["odd"][name] for result in ran(size)}
    assert len(said) == 1, said
    kind, text = said.pop()
    assert kind == fp.errors.MismatchError.__name__, (kind, text)
    assert all(part.format(another=ANOTHER[size]) in text for part in DIFFERENCE[name]), text


DIFFERENCE = {
    "regather": ["rank 0", "regather='microbatch'", "rank {another}", "regather='step'"],
    "reduce": ["reduce='each'", "reduce='last'"],
    "bucket_bytes": ["bucket_bytes=None", "bucket_bytes=1"],
    "not sharded": ["sharded_weights(axis=('data',)"],
    "dims": ["dims=0", "dims={{'ids': 0, 't': None}}"],
    "only": ["in where params lie: \"params['embed']: LeafLayout(", "axes=('data',)", "axes=()"],
    "loss": ["in what the loss function at", "(value_and_grad 0) reads from Python:"],
    "schedule": ["in the schedule of value_and_grad 0:"],
}
