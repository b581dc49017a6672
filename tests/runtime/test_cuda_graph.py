"""What a CUDA graph cannot hold, said before or after it was tried; what a step says that runs out
of memory."""

from __future__ import annotations

import contextlib
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.runtime import captured_steps
from funcpipe._src.runtime.captured_steps import MOST_GRAPHS
from funcpipe._src.runtime.cuda_graph import (
    MIXING,
    CapturedStep,
    HostOps,
    check_on_gpu,
    feeder,
    update,
)
from funcpipe._src.runtime.mismatch_text import too_large
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.state_buffers import Given, StateBuffers
from funcpipe.errors import StackError, TraceError


def step(p: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    loss, grad = fp.value_and_grad(
        lambda p, x: fp.Mean((x @ p).sum(), torch.tensor(float(len(x))))
    )(p, x)
    return p - grad, {"loss": loss}


# ---- what a graph cannot read, and what is moved to it


def test_leaves_elsewhere_are_refused() -> None:
    with pytest.raises(
        TraceError, match=r"batch\['n'\] is a int: a CUDA graph would repeat its value for ever"
    ):
        check_on_gpu("batch", {"n": 3})
    with pytest.raises(TraceError, match=r"state\['x'\] is on the cpu.*move it there"):
        check_on_gpu("state", {"x": torch.ones(2)})


@pytest.mark.parametrize(
    "body, found",
    [
        (
            lambda x: float(x.sum()) > 0,
            r"aten\._local_scalar_dense\.default at test_cuda_graph.py:\d+ `.*` waits for a value",
        ),
        (
            lambda x: x[x > 0],
            r"aten\.index\.Tensor at test_cuda_graph.py:\d+ `.*` waits for a value",
        ),
        (
            lambda x: x.nonzero(),
            r"aten\.nonzero\.default at test_cuda_graph.py:\d+ `.*` waits for a value",
        ),
        (
            lambda x: torch.equal(x, x),
            r"aten\.equal\.default at test_cuda_graph.py:\d+ `.*` waits for a value",
        ),
        (
            lambda x: x.repeat_interleave(torch.tensor([1, 0, 2])),
            r"aten\.repeat_interleave\.Tensor at test_cuda_graph.py:\d+ `.*` waits for a value",
        ),
        (
            lambda x: x.to("meta"),
            r"aten\._to_copy\.default at test_cuda_graph.py:\d+ `.*` copies between cpu and meta",
        ),
        (
            lambda x: torch.empty(3, device="meta").copy_(x),
            r"aten\.copy_\.default at test_cuda_graph.py:\d+ `.*` copies between cpu and meta",
        ),
        (
            lambda x: torch._foreach_copy_([torch.empty(3, device="meta")], [x]),
            r"aten\._foreach_copy_\.default at test_cuda_graph.py:\d+ `.*` copies between cpu and meta",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(body: Callable, found: str) -> None:
    start, end = (
        "the step cannot be captured into a CUDA graph: ",
        "return what the host wants to see as a metric",
    )
    with (
        HostOps("cpu"),
        pytest.raises(TraceError, match=f"^{start}{found}.*{end}.*cuda_graph=False"),
    ):
        body(torch.arange(3.0))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: torch.where(x > 0, x, 0.0) * torch.tensor(2.0),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), output_size=3),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x.to(torch.float64),
    ],
)
def test_what_can_be_captured_is_let_through(body: Callable) -> None:
    x = torch.arange(3.0)
    with HostOps("cpu"):
        out = body(x)
    assert torch.equal(out, body(x))


def test_what_other_devices_hold_may_be_read() -> None:
    with HostOps("cuda"):
        assert torch.arange(3).sum().item() == 3


def test_nothing_moves_to_a_cpu() -> None:
    data = {"x": torch.ones(2)}
    assert feeder(torch.device("cpu"))(data) is data


# ---- all ranks capture, or none


class Captured:
    """A step that rank 1 cannot capture the first time."""

    def __init__(self, rank: Rank, problem: Exception) -> None:
        self.rank, self.problem, self.released = rank, problem, 0

    def capture(self) -> None:
        if self.rank.comm.rank == 1 and not self.released:
            raise self.problem

    def release(self) -> None:
        self.released += 1


def capture_once(problem: Exception) -> tuple[str, float]:
    """What is said, and how far off the state is that goes on."""
    run = fp.spmd(fp.data_parallel(step, axis="data"), fp.Mesh(data=2), device="cpu")
    p, x = torch.ones(3, 2), torch.arange(12.0).view(4, 3)
    state = run.init(lambda p: p, p, x)
    captured: Any = Captured(Rank(run.plan(state, x), run._comm), problem)
    said = ""
    try:
        run._guarded(run._capture, captured, run._buffers.read(state))
    except fp.errors.FuncpipeError as error:
        said = repr(error)
    state, _ = run(state, x)
    run._capture(captured, run._buffers.read(state))
    far = float((run.unplace(state) - step(p, x)[0]).abs().max())
    run.close()
    return said, far


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem, own, theirs",
    [
        (
            TraceError("no host"),
            r"TraceError('no host')",
            "rank 1 failed to capture its step: no host",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "DeviceMemoryError('rank 1 is out of memory",
            "rank 1 failed to capture its step: rank 1 is out of memory",
        ),
    ],
)
def test_a_rank_that_cannot_capture_stops_no_other(
    problem: Exception, own: str, theirs: str
) -> None:
    (said0, far0), (said1, far1) = fp.launch(capture_once, 2, problem, timeout=60)
    assert said0.startswith("MismatchError") and theirs in said0 and said1.startswith(own)
    assert far0 == far1 == 0


# ---- the steps of a runner, where what a graph holds is run again instead


class Again(CapturedStep):
    """Its own graph: a replay runs the step, on the graph's batch."""

    def __init__(self, rank: Rank, home: StateBuffers, pool: Any) -> None:
        self.rank, self.home = rank, home
        self.free = rank.plan.placement.free(rank.comm.rank)
        self.batch: Any = None
        self.graph: Any = None

    def _first(self, given: Given, batch: Any) -> tuple[Any, Any]:
        self.home.enter(given)
        self.batch = tree.map_tensors(torch.clone, batch)
        self.replay()
        return self.home.leave(), self.metrics

    def capture(self) -> None:
        self.graph = self

    def replay(self) -> None:
        self.metrics = update(self.rank, self.home, self.batch, self.free)

    def reset(self) -> None:
        GIVEN_BACK.append(self)


def runner_of(step: Callable) -> Any:
    run = fp.spmd(fp.data_parallel(step, axis="data"), fp.Mesh(data=2), device="cpu", timeout=30)
    run._cuda_graph = True
    captured_steps.CapturedStep = Again  # type: ignore[misc, assignment]
    captured_steps.pool_bytes = lambda pool: 0  # type: ignore[assignment]
    torch.cuda.synchronize = lambda: WAITED.append(True)  # type: ignore[assignment]
    return run


WAITED: list[bool] = []
GIVEN_BACK: list[Again] = []


def steps_of_all_kinds() -> tuple[float, list[str], list[int], int]:
    """How far off the state is, what was said, how often graphs were waited for (the last time for
    a search outside of them), and how
    many a new init gave back: two shapes in turn, with errors and a recording in between."""
    run, rank = runner_of(step), int(os.environ["RANK"])
    p, said, waited = torch.ones(3, 2, dtype=torch.float64), [], []
    batches = [
        torch.randn(4 + 2 * (k % 2), 3, generator=torch.Generator().manual_seed(k)).double()
        for k in range(12)
    ]
    state, want, far = run.init(lambda p: p, p, batches[0]), p, 0.0
    old = state
    for k, x in enumerate(batches):
        if k == 6:
            for bad in ((state, batches[k + rank]), (old if rank else state, x)):
                try:
                    run(*bad)
                except fp.errors.FuncpipeError as error:
                    said.append(str(error))
        old = state
        WAITED.clear()
        with run.record() if k == 9 else contextlib.nullcontext():
            state, metrics = run(state, x)
        waited.append(len(WAITED))
        want, expected = step(want, x)
        far = max(
            far,
            float((metrics["loss"] - expected["loss"]).abs()),
            float((state - want).abs().max()),
        )
    WAITED.clear()
    assert fp.find_nonfinite(run, state, batches[0]) is None
    waited.append(len(WAITED))
    run.init(lambda p: p, p, batches[0])
    given_back = len(GIVEN_BACK)
    run.close()
    return far, said, waited, given_back


def test_captured_steps_of_two_shapes_with_errors_in_between() -> None:
    (far0, said0, waited0, back0), (far1, said1, waited1, back1) = fp.launch(
        steps_of_all_kinds, 2, timeout=60
    )
    assert far0 <= 1e-12 and far1 <= 1e-12
    assert (
        said0[0] == said1[0]
        and "batch is float64[4, 3] on rank 0 and float64[6, 3] on rank 1" in said0[0]
    )
    assert (
        "rank 1 cannot use the state that it was given" in said0[1]
        and "updated it in place" in said1[1]
    )
    assert waited0 == waited1 == [1, 1] + [0] * 7 + [1] + [0] * 2 + [1]
    assert back0 == back1 == 2


def steps_with_other_numbers() -> tuple[float, list[bool], int, list[str]]:
    """How far off the state is, which steps were replays, how many graphs are held, what was warned
    of: a rate that the step reads and a factor that its loss reads take turns."""
    settings = types.SimpleNamespace(rate=0.1, factor=1.0)

    def scaled(p: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        return fp.Mean(settings.factor * (x @ p).square().sum(), torch.tensor(float(len(x))))

    def step(p: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        loss, grad = fp.value_and_grad(scaled)(p, x)
        return p - settings.rate * grad, {"loss": loss}

    run = runner_of(step)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    want = torch.ones(3, dtype=torch.float64)
    state, far, replayed = run.init(lambda p: p, want, x), 0.0, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate, factor in (
            [(0.1, 1.0)] * 3 + [(0.2, 1.0)] * 3 + [(0.2, 2.0)] * 3 + [(0.1, 1.0)] * 2
        ):
            settings.rate, settings.factor = rate, factor
            graphs = {key: step.graph is not None for key, step in run._graphs.steps.items()}
            state, _ = run(state, x)
            replayed.append(len(graphs) == len(run._graphs.steps) and all(graphs.values()))
            want, _ = step(want, x)
            far = max(far, float((state - want).abs().max()))
        for k in range(6):
            settings.rate = 0.01 * (k + 1)
            state, _ = run(state, x)
            want, _ = step(want, x)
            far = max(far, float((state - want).abs().max()))
    held = len(run._graphs.steps)
    run.close()
    return far, replayed, held, [str(w.message) for w in caught]


def test_a_graph_does_not_keep_an_old_number() -> None:
    for far, replayed, held, said in fp.launch(steps_with_other_numbers, 2, timeout=60):
        assert far <= 1e-12
        assert replayed == [False, False, True] * 3 + [True, True]
        assert held <= 2 * MOST_GRAPHS
        assert said == [
            "the step reads `settings.rate` from Python, which has changed 5 times, and each value "
            "makes another CUDA graph. Pass it as a tensor in the batch or state"
        ]


class Released(Again):
    """A step without a graph; what was released is noted."""

    def __init__(self, rank: Any, home: Any, pool: Any) -> None:
        self.rank = rank

    def release(self) -> None:
        GIVEN_BACK.append(self)


def test_the_oldest_graph_goes_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one plan; those of other plans stay."""
    monkeypatch.setattr(captured_steps, "CapturedStep", Released)
    steps = captured_steps.CapturedSteps(comm=None, pool=None)  # type: ignore[arg-type]
    rank, other, buffers = object(), object(), StateBuffers()
    steps.step_of(other, (0,), buffers)  # type: ignore[arg-type]
    for version in range(MOST_GRAPHS + 2):
        steps.step_of(rank, (version,), buffers)  # type: ignore[arg-type]
        held = [number for key, (number,) in steps.steps if key == id(rank)]
        first = max(version + 1 - MOST_GRAPHS, 0)
        assert held == list(range(first, version + 1))
    assert (id(other), (0,)) in steps.steps


# ---- events of NCCL in graphs


def without_a_gpu() -> list[tuple[str, str]]:
    """What is said, and what NCCL would read: where the user had set nothing, and something."""
    out = []
    for mine in (None, "1"):
        os.environ.pop(MIXING, None)
        if mine is not None:
            os.environ[MIXING] = mine
        with pytest.raises(StackError) as caught:
            fp.spmd(step, fp.Mesh(), device="cpu", cuda_graph=True)
        out.append((str(caught.value), os.environ[MIXING]))
    return out


def test_a_capture_turns_mixing_off_unless_the_user_has_set_it() -> None:
    (said, unset), (_, own) = fp.launch(without_a_gpu, 1, timeout=60)[0]
    assert said == "spmd: cuda_graph=True needs a GPU, but this rank computes on the cpu"
    assert (unset, own) == ("0", "1")


# ---- errors


def test_too_little_memory_says_what_the_plan_needs() -> None:
    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    x = torch.ones(4, 3)
    state = run.init(lambda p: p, torch.ones(3, 2), x)
    rank = Rank(run.plan(state, x), run._ranks.communicators[0])
    text = too_large(rank, state, torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"))
    assert text.startswith(
        "rank 0 is out of memory on cpu: beside its state of 24 B the plan predicts "
    )
    assert text.endswith("or checkpoint the blocks. CUDA out of memory. Tried")


def test_too_little_memory_for_a_copy_of_the_experts_for_every_token() -> None:
    def loss_fn(experts: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        chosen = experts[(x.sum(1) > 0).long()]
        return fp.Mean((x[:, None] @ chosen).square().sum(), torch.tensor(float(len(x))))

    def step(experts: torch.Tensor, x: torch.Tensor) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(experts, x)
        return experts - grads, {"loss": loss}

    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    x = torch.ones(8, 3)
    state = run.init(lambda p: p, torch.ones(2, 3, 4), x)
    rank = Rank(run.plan(state, x), run._ranks.communicators[0])
    text = too_large(rank, state, torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"))
    assert (
        "192 B of a microbatch are copies of experts' weights, one for every token, as "
        "batched_mm makes them: use grouped "
        'products (F.grouped_mm; in transformers config._experts_implementation = "grouped_mm"). '
        "CUDA out"
    ) in text
