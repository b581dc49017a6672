"""Profiles: how long each distinct unit of a step runs here, by running it.

In: a runner that was initialised, a batch. Out: `Costs`, the same on every rank. Units run alone, on random tensors of the
right shapes and memory order, with the runner's backend, in a CUDA graph if the runner captures its step; equal units are
measured once.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from funcpipe.collectives import bind_rank, names_axes
from funcpipe.comm import Communicator
from funcpipe.errors import PlanError
from funcpipe.graph.code import Value
from funcpipe.graph.cut import Cut
from funcpipe.runtime.backend import Backend
from funcpipe.schedule.costs import Costs

if TYPE_CHECKING:
    from funcpipe.runtime.runner import Runner

_REPEATS = 8  # of a unit in one graph, so that it is timed as it runs among others


def profile_units(run: Runner, state: Any, batch: Any, rounds: int = 5, call: int = 0) -> Costs:
    """Measure every distinct F, B, I and W of a step.

    Args:
        run: what `fp.simulate` or `fp.spmd` made, initialised. In `spmd` every rank calls this alike.
        state, batch: what ``run`` would be called with; the step is not run.
        rounds: how often each unit is timed, after one run that is not; the median counts.
        call: which ``value_and_grad`` of the step.

    Returns:
        costs in seconds, with free messages; ``dataclasses.replace(costs, bandwidth=..., latency=...)`` adds a link. For
        `Plan.predict` and ``fp.schedules.auto(costs=...)``. The shapes are those of microbatch 0.

    Raises:
        PlanError: the step has no such ``value_and_grad``.

    >>> import funcpipe as fp
    >>> def loss_fn(w, x):
    ...     x = fp.stage_boundary(x @ w[0])
    ...     return fp.Mean((x @ w[1]).square().sum(), torch.tensor(float(len(x))))
    >>> def step(w, x):
    ...     return w, {"loss": fp.value_and_grad(loss_fn)(w, x)[0]}
    >>> run = fp.simulate(fp.pipelined(step, axis="pipe", microbatches=2), fp.Mesh(pipe=2))
    >>> w, x = [torch.ones(3, 3), torch.ones(3, 3)], torch.ones(4, 3)
    >>> state = run.init(lambda w: w, w, x)
    >>> costs = fp.profile_units(run, state, x)
    >>> run.plan(state, x).predict(costs).step_time > 0
    True
    """
    plan = run.plan(state, batch)
    if call not in range(len(plan.calls)):
        raise PlanError(f"cannot profile value_and_grad {call}: the step has {len(plan.calls)}, counted from 0")
    cut = run._made.split_cut(plan, call)
    codes = {unit.code.key: (unit.code, unit.inputs) for unit in cut.units.values()}
    together = any(names_axes(code.module.graph) for code, _ in codes.values())

    def measure(comm: Communicator, backend: Backend) -> dict[str, float]:
        with bind_rank(comm), torch.no_grad():
            timed = _replayed if backend.captured and not together else _median
            return {key: timed(backend(code), inputs, comm.device, rounds) for key, (code, inputs) in codes.items()}

    found = run._everywhere(measure, together)
    times = {key: statistics.median(some[key] for some in found) for key in codes}
    return _costs(cut, times)


def _costs(cut: Cut, times: dict[str, float]) -> Costs:
    return Costs({key: times[unit.code.key] for key, unit in cut.units.items()})


def _median(fn: Any, inputs: tuple[Value, ...], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        args = [_like(v, device) for v in inputs]
        _finish(device)
        start = time.perf_counter()
        out = fn(args)
        _finish(device)
        times.append(time.perf_counter() - start)
        del out
    return statistics.median(times[1:])


def _replayed(fn: Any, inputs: tuple[Value, ...], device: torch.device, rounds: int) -> float:
    """The time of a unit in a CUDA graph, which the host does not slow down."""
    args, graph = [_like(v, device) for v in inputs], torch.cuda.CUDAGraph()
    fn(list(args))  # compiles kernels, makes workspaces
    _finish(device)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_REPEATS):
            fn(list(args))
    times = []
    for _ in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        _finish(device)
        times.append(start.elapsed_time(end) / 1e3 / _REPEATS)
    graph.reset()
    return statistics.median(times[1:])


def _like(v: Value, device: torch.device) -> torch.Tensor:
    """A tensor of a value's shape: small random numbers, or zeros where it may be an index."""
    out = torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device=device)
    return out.normal_(std=0.02) if v.dtype.is_floating_point else out.zero_()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
