"""Profiles: how long each distinct unit of a step runs here, by running it.

In: a runner that was initialised, a batch. Out: `Costs`, the same on every rank. Units run as they
would among others, with what
the backend fuses: with the sums that take in their gradients, and F with what runs back to back
with it (`backends/fusion.py`). They run alone, on the batch and on random tensors of the right
shapes and memory order, in a CUDA graph if the runner captures its step,
and then in turn, as long as it takes a GPU to reach the clock that it holds, on several *sets* of
tensors: within a step, what a unit reads has left the caches. Equal units are measured once.

Terms. A *piece* is what is timed at once: one unit, or two that are one, and the sums behind them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.fusion import pairs
from funcpipe._src.collectives import bind_rank, names_axes
from funcpipe._src.comm import Communicator
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.graph.partition import Key, Units
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program import ADD, RUN, Program, lower
from funcpipe._src.program.instructions import Name
from funcpipe._src.runtime.interpreter import Bound, Slots, bind, execute
from funcpipe._src.schedule.costs import Costs
from funcpipe._src.schedule.library import one_f_one_b, zb_h1
from funcpipe.errors import PlanError

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.runtime.runner import Runner

_REPEATS = 9  # of a piece in one graph, so that it is timed as it runs among others
_SETS = 3  # of tensors in turn: more than a cache holds
_LINKS = {"cuda": (3.5e11, 2e-5)}  # bandwidth and latency: of NCCL over NVLink, in a CUDA graph
_WARM = 1.0  # seconds of work before a GPU's clock is that of a step in the midst of others
# The third of four microbatches is timed: its gradients are neither the first nor the last ones of
# their sums.
_MICROBATCHES, _TIMED = 4, 2


def profile_units(run: Runner, state: Any, batch: Any, rounds: int = 5, call: int = 0) -> Costs:
    """Measure every distinct F, B, I and W of a step.

    Args:
        run: what `fp.simulate` or `fp.spmd` made, initialised. In `spmd` every rank calls this
            alike.
        state, batch: what ``run`` would be called with; the step is not run.
        rounds: how often each unit is timed, after one run that is not, or in CUDA graphs a second
            of them; the median counts.
        call: which ``value_and_grad`` of the step.

    Returns:
        costs in seconds, adding up gradients included. The link is not measured: on GPUs messages
        take what they were seen to take between two H200s (20 us, and 350 GB/s), on CPUs nothing;
        ``dataclasses.replace(costs, bandwidth=..., latency=...)`` sets another one. For
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
    batch = read_batch(batch)
    plan = run.plan(state, batch)
    if call not in range(len(plan.calls)):
        raise PlanError(
            f"cannot profile value_and_grad {call}: the step has {len(plan.calls)}, counted from 0"
        )
    cut = run._made.separate_units(plan, call)
    programs = [_alone(cut, plan.calls[call], schedule) for schedule in (zb_h1(), one_f_one_b())]
    together = any(names_axes(unit.code.module.graph) for unit in cut.units.values())

    def known_of(comm: Communicator) -> dict[Name, torch.Tensor]:
        """What is known of a rank's inputs: the batch and constants. Numbers of rows decide what
        looking them up costs."""
        planned = plan.calls[call]
        leaves = planned.split.local_leaves(batch, 0)[0]  # of the rank whose shapes the units have
        moving = [leaves[i] for i in planned.moving[0]]
        return {("batch", i): x for i, x in enumerate(moving)} | {
            ("const", v): fn() for v, fn in cut.constants.items()
        }

    def measure(comm: Communicator, backend: Backend) -> list[float]:
        ready: dict[tuple, list[Callable[[], None]]] = {}
        captured = backend.captured and not together
        with bind_rank(comm), torch.no_grad():
            given = known_of(comm)
            alike: dict[tuple, torch.Tensor] = {}
            for program in programs:
                bound = bind(program, (comm.rank,), "profile", comm, backend)
                for piece in _pieces(program, backend):
                    if piece.key not in ready:
                        count: Counter[tuple] = Counter()
                        ready[piece.key] = [
                            _ready(piece, program, bound, comm, given, alike, count)
                            for _ in range(_SETS if captured else 1)
                        ]
            timed = _replayed if captured else _median
            return timed(list(ready.values()), comm.device, rounds)

    found = run._everywhere(measure, together)
    pieces = [piece for program in programs for piece in _pieces(program, run._backend)]
    times = map(statistics.median, zip(*found, strict=True))
    known = dict(zip(dict.fromkeys(piece.key for piece in pieces), times, strict=True))
    out: dict[Key, float] = {}
    for piece in pieces:
        _share(known[piece.key], piece, cut, out)
    bandwidth, latency = _LINKS.get(run.device.type, (math.inf, 0.0))
    return Costs(out, bandwidth, latency)


class _Piece(NamedTuple):
    """Some instructions of a program, from one place to before another; the units among them; equal
    pieces have one key."""

    start: int
    end: int
    units: tuple[Key, ...]
    key: tuple


def _alone(cut: Units, call: PlannedCall, schedule: Callable) -> Program:
    """The program of one rank that has all segments."""
    table = schedule(1, _MICROBATCHES)
    return lower((cut,) * _MICROBATCHES, (tuple(range(cut.segments)),), table, 0, call.summed, {})


def _pieces(program: Program, backend: Backend) -> Iterator[_Piece]:
    rows, joined = program.rows, dict(pairs(program)) if backend.fuses else {}
    at = 0
    while at < len(rows):
        row, start, at = rows[at], at, at + 1
        if row.op != RUN or row.action.microbatch != _TIMED:
            continue
        at = joined.get(start, start) + 1
        while at < len(rows) and rows[at].op == ADD:
            at += 1
        units = [r.unit for r in rows[start:at] if r.unit is not None]
        sums = tuple((r.turn, r.dtype) for r in rows[start:at] if r.op == ADD)
        yield _Piece(
            start,
            at,
            tuple((u.kind, u.segment) for u in units),
            (*((u.kind, u.code.key) for u in units), sums),
        )


def _ready(
    piece: _Piece,
    program: Program,
    bound: list[Bound],
    comm: Communicator,
    given: dict[Name, torch.Tensor],
    alike: dict[tuple, torch.Tensor],
    count: Counter[tuple],
) -> Callable[[], None]:
    """A function that runs a piece, on tensors that are there. Pieces share those that are
    ``alike``: all of them fit together. ``count``: how many of each kind the piece has so far; no
    two of them are the same tensor."""
    values = {
        n: v
        for row in program.rows
        if row.unit
        for n, v in zip(row.reads, row.unit.inputs, strict=True)
    }
    first = {
        row.writes[0]: bound[k]
        for k, row in enumerate(program.rows)
        if row.op == ADD and row.turn == 0
    }
    slots: Slots = [None] * program.slots
    part, made = bound[piece.start : piece.end], set[Any]()
    for row, i in zip(
        program.rows[piece.start : piece.end],
        program.instructions[piece.start : piece.end],
        strict=True,
    ):
        for name, slot in zip(row.reads, i.reads, strict=True) if row.op == RUN else ():
            if name not in made:
                known = given.get(("batch", name[2]) if name[0] == "batch" else name)
                slots[slot] = _input(values[name], known, comm.device, alike, count)
        made.update(row.writes)
    sums = list(slots)
    for row, instruction in zip(program.rows[piece.start : piece.end], part, strict=True):
        if row.op == ADD:  # the sum so far: of this gradient alone
            instruction = first[row.writes[0]]._replace(
                reads=instruction.reads, frees=instruction.frees
            )
        execute([instruction], sums, comm)
    for row, instruction in zip(program.rows[piece.start : piece.end], part, strict=True):
        if row.op == ADD:
            slots[instruction.writes[0]] = sums[instruction.writes[0]]
    return lambda: execute(part, list(slots), comm)


def _share(took: float, piece: _Piece, cut: Units, out: dict[Key, float]) -> None:
    """Put down what a piece took, for each of its units: of two that are one, by their FLOPs, or
    what F has left over."""
    first, *rest = piece.units
    if not rest:
        out.setdefault(first, took)
    elif first in out:
        out.setdefault(rest[0], max(took - out[first], 0.0))
    else:
        a, b = (cut.units[key].code.flops for key in piece.units)
        out[first] = took * a / (a + b) if a + b else took / 2
        out[rest[0]] = took - out[first]


def _median(
    pieces: list[list[Callable[[], None]]], device: torch.device, rounds: int
) -> list[float]:
    return [_median_of(run, device, rounds) for run, *_ in pieces]


def _median_of(run: Callable[[], None], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _replayed(
    pieces: list[list[Callable[[], None]]], device: torch.device, rounds: int
) -> list[float]:
    """The times of pieces in CUDA graphs, which the host does not slow down. They run in turn and
    without a break, as in a step: a GPU that has been idle, or that does the same thing all the
    time, has another clock."""
    graphs, pool = (
        [],
        torch.cuda.graph_pool_handle(),
    )  # shared: what a piece makes is gone when the next one runs
    for sets in pieces:
        sets[0]()  # compiles kernels, makes workspaces
        _finish(device)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, capture_error_mode="thread_local"):
            for run in islice(cycle(sets), _REPEATS):
                run()
    times: list[list[float]] = [[] for _ in pieces]
    warm = time.perf_counter() + _WARM
    while len(times[0]) < rounds:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(graphs) + 1)]
        events[0].record()
        for graph, event in zip(graphs, events[1:], strict=True):
            graph.replay()
            event.record()
        _finish(device)
        for k, some in enumerate(times) if time.perf_counter() > warm else ():
            some.append(events[k].elapsed_time(events[k + 1]) / 1e3 / _REPEATS)
    for graph in graphs:
        graph.reset()
    return [statistics.median(some) for some in times]


def _input(
    v: Value,
    known: torch.Tensor | None,
    device: torch.device,
    alike: dict[tuple, torch.Tensor],
    count: Counter[tuple],
) -> torch.Tensor:
    """A tensor of a value's shape: what is known to stand there, else small random numbers, or
    zeros where it may be an index."""
    if known is not None and tuple(known.shape) == v.shape:
        return known.to(device)
    kind = (v.shape, v.stride, v.dtype)
    count[kind] += 1
    key = (*kind, count[kind])
    if key not in alike:
        out = torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device=device)
        alike[key] = out.normal_(std=0.02) if v.dtype.is_floating_point else out.zero_()
    return alike[key]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
