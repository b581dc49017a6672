"""The core on real GPUs: equal to one device, in simulation, over NCCL, and captured into a CUDA graph.

Skipped where there are not enough GPUs. Run with: pytest tests/gpu
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import funcpipe as fp
from funcpipe import tree
from funcpipe.comm.mail import unmarked
from funcpipe.runtime import memsets

GPUS = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
GPU_MARKS = {1: one_gpu, 2: two_gpus}
on_one_or_two = pytest.mark.parametrize("ranks", [pytest.param(n, marks=mark) for n, mark in GPU_MARKS.items()])
pytestmark = pytest.mark.gpu
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
    new = lambda *shape: (torch.randn(shape, generator=g, dtype=torch.float64) * 0.3).to(dtype).cuda()  # noqa: E731
    tokens = torch.randint(20, (rows, 6), generator=g).cuda()
    weight = (torch.rand((rows, 6), generator=g) > 0.2).to(dtype).cuda()
    params = {"embed": new(20, 16), "blocks": [new(16, 16) for _ in range(4)]}
    return params, {"tokens": tokens, "labels": tokens.roll(1, 1), "weight": weight}


def reference(steps: int = 4, rows: int = 8) -> tuple[State, list[dict]]:
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
    "alone": ((), [fp.accumulated(microbatches=4)]),
    "pipe": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4)]),
    "zb_h1": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule=fp.schedules.zb_h1())]),
    "zb_v": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule=fp.schedules.zb_v())]),
    "auto": (("pipe",), [fp.pipelined(axis="pipe", microbatches=4, schedule="auto")]),
    "data": (("data",), [fp.data_parallel(axis="data")]),
    "sharded": (
        ("data",),
        [fp.accumulated(microbatches=2), fp.data_parallel(axis="data"), fp.sharded_weights(axis="data")],
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
    return [mode for mode in MODES if mode != "compiled graph" or name in ("alone", "zb_h1", "auto", "sharded")]


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
    "name, mode", [pytest.param(name, m, marks=GPU_MARKS[ranks_of(name)]) for name in STACKS for m in modes(name)]
)
def test_in_processes(name: str, mode: str) -> None:
    found = [rank[name, mode] for rank in launched(ranks_of(name))]
    assert max(e for e, _, _ in found) <= (COMPILED if "backend" in MODES[mode] else TIGHT)
    assert all(rank[1] == found[0][1] for rank in found)
    assert all((nbytes > 0) == ("cuda_graph" in MODES[mode]) for _, _, nbytes in found)


# ---- what a captured step does with states and batches


def runner(step: Any = step, **options: Any) -> Any:
    """A pipeline over all ranks; where there is one, the same loop over microbatches."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return fp.spmd(fp.accumulated(step, microbatches=4), fp.Mesh(), **options)
    return fp.spmd(fp.pipelined(step, axis="pipe", microbatches=4), fp.Mesh(pipe=ranks), **options)


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
    (step_,) = run._captured.values()
    driver = memsets._driver()
    nodes = memsets._listed(driver.cuGraphGetNodes, driver.CUgraph(init_value=step_.graph.raw_cuda_graph()))
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
    """What is said of a step that cannot be captured, and how far off the state is after it: nothing is lost."""
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
    out: dict[str, Any] = {f.__name__: f() for f in (another_shape, from_the_cpu, events_in_the_graph)}
    out["old_state"] = [old_state("step"), old_state("unplace")]
    return out | {bad.__name__: not_captured(bad) for bad in (waiting, copying, once, synchronizing)}


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
        ("waiting", "aten._local_scalar_dense.default at test_gpu.py"),
        ("copying", "aten._to_copy.default at test_gpu.py"),
        ("once", "aten._local_scalar_dense.default at test_gpu.py"),
        ("synchronizing", "Something in it waits for the host: torch.cuda.synchronize"),
    ],
)
def test_a_step_that_cannot_be_captured_is_refused(ranks: int, step: str, what: str) -> None:
    for k, rank in enumerate(capture(ranks)):
        text, far = rank[step]
        assert "the step cannot be captured into a CUDA graph" in text and what in text
        assert text.startswith("rank 0 failed to capture its step: ") == (step == "once" and k > 0)
        assert far <= TIGHT


# ---- halves: beside a float32 reference


def half_step(state: State, batch: dict) -> tuple[State, dict]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
    return State(state.params, state.opt_state, grads), {"loss": loss}


def gradients(dtype: torch.dtype) -> Any:
    params, batch = example(dtype)
    return fp.value_and_grad(loss_fn)(params, batch)[1]


def halves() -> dict[str, float]:
    """How far bfloat16 gradients are from those in float32: plain PyTorch's, ours, ours summed in float32."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    want, out = gradients(torch.float32), {"torch": error(gradients(torch.bfloat16), gradients(torch.float32))}
    for name, sums in (("ours", torch.bfloat16), ("ours in float32", None)):
        run = runner(half_step, cuda_graph=True, backend="inductor", sums=sums)
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
    """``mm`` and ``addmm`` with ``out_dtype``: products of halves are not rounded before they are added."""
    from funcpipe.runtime.products import Factors

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=g).bfloat16().cuda() for _ in range(2))
    product, exact = Factors(a, b.t()), a.double() @ b.t().double()
    sums = product.first(torch.float32)
    assert sums.dtype == torch.float32
    assert (sums - exact).norm() <= 1e-6 * exact.norm()
    assert product.onto(sums) is sums
    assert (sums - 2 * exact).norm() <= 1e-6 * exact.norm()


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
    """Where they stood; not one of another value, nor a large one, which the driver runs as a kernel by itself."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()
    x, large = torch.zeros(4, dtype=torch.int32, device="cuda"), torch.ones(1 << 14, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph, stream=stream):
        x.add_(1)
        for start, value, nbytes in ((x.data_ptr(), 0, 4), (x[1:].data_ptr(), 1, 4), (large.data_ptr(), 0, 1 << 14)):
            (failed,) = runtime.cudaMemsetAsync(start, value, nbytes, stream.cuda_stream)
            assert not int(failed)
        x.add_(2)
    assert (memsets.as_kernels(graph), memsets.as_kernels(graph)) == (1, 0)
    graph.instantiate()
    for n in (1, 2):
        graph.replay()
        assert x.tolist() == [2, 0x01010101 + 2, 3 * n, 3 * n]
        assert not large.any()


# ---- ranks in different steps


def squares(params: dict, batch: dict) -> fp.Mean:
    x = F.embedding(batch["tokens"], params["embed"])
    for w in params["blocks"]:
        x = fp.stage_boundary(x + torch.tanh(F.linear(x, w)))
    return fp.Mean((x.square() * batch["weight"][..., None]).sum(), batch["weight"].sum())


def descent(params: dict, batch: dict, slow: str = "") -> tuple[dict, dict]:
    """Nothing in it makes ranks wait for each other. One of them may be slow: it does nothing for a second or two."""
    loss, grads = fp.value_and_grad(squares)(params, batch)
    if slow and os.environ["RANK"] == slow:
        torch.cuda._sleep(2_000_000_000)
    return tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}


def ahead(slow: str) -> tuple[float, bool]:
    """How far off the params are after some steps, and whether this rank was done when the other one was."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    fast = functools.partial(descent, slow=slow)
    piped = fp.pipelined(fast, axis="pipe", microbatches=4, schedule=fp.schedules.zb_v())
    run = fp.spmd(piped, fp.Mesh(pipe=2), cuda_graph=True)
    params, batch = example()
    state = run.init(lambda p: p, params, batch)
    for _ in range(2):  # as it is, and captured
        state, _ = run(state, batch)
        torch.cuda.synchronize()
        run._comm.exchange(None)
    state, _ = run(state, batch)
    done = torch.cuda.Event()
    done.record()
    if os.environ["RANK"] != slow:
        done.synchronize()
    run._comm.exchange(None)
    was_done = done.query()
    got, want = run.unplace(state), params
    for _ in range(3):
        want, _ = descent(want, batch)
    found = error(got, want)
    run.close()
    return found, was_done


@two_gpus
@pytest.mark.parametrize("slow", [0, 1])
def test_no_rank_waits_for_another_to_end_its_step(slow: int) -> None:
    found = fp.launch(ahead, 2, str(slow), timeout=300)
    assert max(far for far, _ in found) <= TIGHT
    assert [was_done for _, was_done in found] == [rank != slow for rank in (0, 1)]


# ---- failures


def killed(options: dict) -> None:
    """Rank 1 dies within a step."""
    run = runner(timeout=60, **options)
    params, batch = example()
    state, metrics = run(run.init(init_state, params, batch), batch)
    if run.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        state, metrics = run(state, batch)
        float(metrics["loss"])


@two_gpus
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["eager", "graph"])
def test_a_rank_that_is_killed_within_a_step(options: dict) -> None:
    start = time.monotonic()
    with pytest.raises(fp.errors.RankError, match="rank 1"):
        fp.launch(killed, 2, options, timeout=120)
    assert time.monotonic() - start < 90  # found out, not timed out


def too_large(options: dict) -> None:
    """The last rank has less memory than the step takes."""
    run = runner(timeout=60, **options)
    params, batch = example(rows=1 << 17)
    state = run.init(init_state, params, batch)
    if run.rank == run.mesh.size - 1:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() + (16 << 20)
        torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    run(state, batch)


@on_one_or_two
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["eager", "graph"])
def test_too_little_memory_says_what_the_plan_needs(options: dict, ranks: int) -> None:
    with pytest.raises(fp.errors.RankError, match=rf"rank {ranks - 1} .*out of memory.*activations.*microbatches"):
        fp.launch(too_large, ranks, options, timeout=120)
