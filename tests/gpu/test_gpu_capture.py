"""A captured step on real GPUs: what it does with states and batches, what it refuses, what its
graph holds."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import pytest
import torch
from support.gpu import (
    COMPILED,
    TIGHT,
    State,
    error,
    example,
    init_state,
    on_one_or_two,
    one_gpu,
    runner,
    step,
    two_gpus,
)

import funcpipe as fp
from funcpipe._src.comm.p2p import unmarked
from funcpipe._src.core import pytree as tree
from funcpipe._src.runtime import cuda_graph_memsets as memsets

pytestmark = pytest.mark.gpu


# ---- states and batches, and what is refused


def captured(options: dict, step: Any = step) -> tuple[Any, Any, dict, dict]:
    run = runner(step, cuda_graph=True, **options)
    params, batch = example()
    return run, run.init(init_state, params, batch), params, batch


def another_shape() -> float:
    """Shapes in turn; then a step that is recorded, and so not of the graph, and one more."""
    run, state, params, small = captured({"backend": "inductor"})
    _, large = example(rows=16)
    want = init_state(params)
    for k, batch in enumerate((small, large, small, large, small, large, small, large)):
        with run.record() if k == 6 else contextlib.nullcontext():
            state, metrics = run(state, batch)
        want, expected = step(want, batch)
    found = error((run.unplace(state), metrics), (want, expected))
    run.close()
    return found


def old_state(use: str) -> tuple[str, bool]:
    """What is said of a state that was donated, and whether memory stayed where it was."""
    run, first, _, batch = captured({})
    where = [x.data_ptr() for x in tree.leaves(first)]
    second, _ = run(first, batch)
    in_place = [x.data_ptr() for x in tree.leaves(second)] == where
    try:
        run(first, batch) if use == "step" else run.unplace(first)
    except fp.errors.FuncpipeError as problem:
        return str(problem), in_place
    return "", in_place


def from_the_cpu() -> float:
    """Batches that lie in pinned memory, prefetched or not."""
    run, state, params, batch = captured({})
    want, host = init_state(params), {k: v.cpu().pin_memory() for k, v in batch.items()}
    for data in (host, host, run.prefetch(host), batch):
        state, metrics = run(state, data)
        want, expected = step(want, batch)
    found = error((run.unplace(state), metrics), (want, expected))
    run.close()
    return found


def events_in_the_graph() -> int:
    run, state, _, batch = captured({})
    for _ in range(2):
        state, _ = run(state, batch)
    (step_,) = run._graphs.steps.values()
    driver = memsets._driver()
    nodes = memsets._listed(
        driver.cuGraphGetNodes, driver.CUgraph(init_value=step_.graph.raw_cuda_graph())
    )
    kinds = [memsets._asked(driver.cuGraphNodeGetType(node)).name for node in nodes]
    run.close()
    return sum("EVENT" in kind for kind in kinds)


def waiting(state: State, batch: dict) -> tuple[State, dict]:
    if float(batch["weight"].sum()) < 0:
        raise AssertionError
    return step(state, batch)


def copying(state: State, batch: dict) -> tuple[State, dict]:
    state, metrics = step(state, batch)
    return state, metrics | {"rate": torch.tensor([1.0]).cuda()}


def once(state: State, batch: dict) -> tuple[State, dict]:
    """Waits for the host on one rank only, when it is captured for the first time."""
    state, metrics = step(state, batch)
    if torch.cuda.is_current_stream_capturing() and os.environ["RANK"] == "0" and not SEEN:
        SEEN.append(True)
        float(metrics["loss"])
    return state, metrics


SEEN: list[bool] = []


def synchronizing(state: State, batch: dict) -> tuple[State, dict]:
    """What no op tells."""
    state, metrics = step(state, batch)
    torch.cuda.synchronize()
    return state, metrics


def not_captured(bad: Any) -> tuple[str, float]:
    """What is said of a step that cannot be captured, and how far off the state is after it:
    nothing is lost."""
    run, state, params, batch = captured({}, bad)
    state, _ = run(state, batch)  # the first step runs as it is
    text, want = "", step(init_state(params), batch)[0]
    try:
        run(state, batch)
    except fp.errors.FuncpipeError as problem:
        text = str(problem)
    if bad is once:
        state, want = run(state, batch)[0], step(want, batch)[0]
    found = error(run.unplace(state), want)
    run.close()
    return text, found


def all_of_capture() -> dict[str, Any]:
    out: dict[str, Any] = {
        f.__name__: f() for f in (another_shape, from_the_cpu, events_in_the_graph)
    }
    out["old_state"] = [old_state("step"), old_state("unplace")]
    return out | {
        bad.__name__: not_captured(bad) for bad in (waiting, copying, once, synchronizing)
    }


@functools.cache
def capture(ranks: int) -> list[dict]:
    return fp.launch(all_of_capture, ranks, timeout=300)


@on_one_or_two
def test_a_new_shape_is_captured_anew(ranks: int) -> None:
    assert max(rank["another_shape"] for rank in capture(ranks)) <= COMPILED


@two_gpus
def test_a_graph_has_no_events_of_nccl() -> None:
    assert [rank["events_in_the_graph"] for rank in capture(2)] == [0, 0]


@on_one_or_two
def test_batches_from_the_cpu(ranks: int) -> None:
    assert max(rank["from_the_cpu"] for rank in capture(ranks)) <= TIGHT


@on_one_or_two
def test_an_old_state_is_refused(ranks: int) -> None:
    for text, in_place in (found for rank in capture(ranks) for found in rank["old_state"]):
        assert in_place
        assert "was given to an earlier step, which has updated it in place" in text


@on_one_or_two
@pytest.mark.parametrize(
    "step, what",
    [
        ("waiting", "aten._local_scalar_dense.default at test_gpu_capture.py"),
        ("copying", "aten._to_copy.default at test_gpu_capture.py"),
        ("once", "aten._local_scalar_dense.default at test_gpu_capture.py"),
        ("synchronizing", "Something in it waits for the host: torch.cuda.synchronize"),
    ],
)
def test_a_step_that_cannot_be_captured_is_refused(ranks: int, step: str, what: str) -> None:
    for k, rank in enumerate(capture(ranks)):
        text, far = rank[step]
        assert "the step cannot be captured into a CUDA graph" in text and what in text
        assert text.startswith("rank 0 failed to capture its step: ") == (step == "once" and k > 0)
        assert far <= TIGHT


# ---- memory of messages


@one_gpu
def test_memory_of_what_has_travelled_is_used_again_within_a_graph() -> None:
    """Though torch marks it as used by another stream."""
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        x = torch.zeros(1 << 22, dtype=torch.uint8, device="cuda")
        where = x.data_ptr()
        sent = unmarked(x)
        sent.record_stream(aside)
        del x, sent
        again = torch.empty(1 << 22, dtype=torch.uint8, device="cuda").data_ptr()
    assert again == where


# ---- the launch


@one_gpu
def test_small_memsets_become_kernels() -> None:
    """Where they stood; not one of another value, nor a large one, which the driver runs as a
    kernel by itself."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()
    x, large = (
        torch.zeros(4, dtype=torch.int32, device="cuda"),
        torch.ones(1 << 14, dtype=torch.uint8, device="cuda"),
    )
    with torch.cuda.graph(graph, stream=stream):
        x.add_(1)
        for start, value, nbytes in (
            (x.data_ptr(), 0, 4),
            (x[1:].data_ptr(), 1, 4),
            (large.data_ptr(), 0, 1 << 14),
        ):
            (failed,) = runtime.cudaMemsetAsync(start, value, nbytes, stream.cuda_stream)
            assert not int(failed)
        x.add_(2)
    assert (memsets.as_kernels(graph), memsets.as_kernels(graph)) == (1, 0)
    graph.instantiate()
    for n in (1, 2):
        graph.replay()
        assert x.tolist() == [2, 0x01010101 + 2, 3 * n, 3 * n]
        assert not large.any()
