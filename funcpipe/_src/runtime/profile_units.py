"""Profiles: how long each distinct unit of a step runs here, by running it.

Units run as they would among others, with what the backend fuses: B with the sums that take in its
gradients, and F with what runs back to back with it (`backends/fusion.py`). They run alone, on the
batch and on random tensors of the right shapes and memory order. Where the runner captures its
step, they run in a CUDA graph, and then in turn, as long as it takes a GPU to reach the clock that
it holds, on several sets of tensors: within a step, what a unit reads has left the caches. Equal
units are measured once.

In: a runner that was initialised, a batch. Out: `Costs`, the same on every rank.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.collectives import bind_rank, names_axes
from funcpipe._src.comm import Communicator
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.graph.ids import ValueId
from funcpipe._src.graph.partition import Key, Units
from funcpipe._src.program import Program, lower_rank
from funcpipe._src.runtime.profile_pieces import MICROBATCHES, Piece, pieces_of, ready_pieces
from funcpipe._src.runtime.profile_timing import median_times, replayed_times
from funcpipe._src.schedule.costs import Costs
from funcpipe._src.schedule.library import one_f_one_b, zb_h1
from funcpipe.errors import PlanError

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.runtime.runner import Runner

_SETS = 3  # of tensors in turn: more than a cache holds
_LINKS = {"cuda": (3.5e11, 2e-5)}  # bandwidth and latency: of NCCL over NVLink, in a CUDA graph
_NO_LINK = (math.inf, 0.0)


def profile_units(
    run: Runner,
    state: Any,
    batch: Any,
    rounds: int = 5,
    call: int = 0,
) -> Costs:
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
    planned = plan.calls[call]
    units = run._made.separate_units(plan, call)
    programs = [
        _alone(units, planned, zb_h1()),
        _alone(units, planned, one_f_one_b()),
    ]
    graphs = [unit.code.module.graph for unit in units.units.values()]
    together = any(map(names_axes, graphs))

    def measure(comm: Communicator, backend: Backend) -> list[float]:
        captured = backend.captured and not together
        sets = _SETS if captured else 1
        with bind_rank(comm), torch.no_grad():
            known = _known_inputs(planned, units, batch)
            ready = ready_pieces(programs, comm, backend, known, sets)
            if captured:
                return replayed_times(ready, comm.device, rounds)
            return median_times(ready, comm.device, rounds)

    by_rank = run._everywhere(measure, together)
    pieces: list[Piece] = []
    for program in programs:
        pieces += pieces_of(program, run._backend)
    keys = dict.fromkeys(piece.key for piece in pieces)
    times = map(statistics.median, zip(*by_rank, strict=True))
    time_of = dict(zip(keys, times, strict=True))
    costs: dict[Key, float] = {}
    for piece in pieces:
        _share(time_of[piece.key], piece, units, costs)
    bandwidth, latency = _LINKS.get(run.device.type, _NO_LINK)
    return Costs(costs, bandwidth, latency)


def _known_inputs(
    planned: PlannedCall,
    units: Units,
    batch: Any,
) -> dict[ValueId, torch.Tensor]:
    """The inputs whose content is known: the batch and constants. Numbers of rows decide what
    looking them up costs."""
    known: dict[ValueId, torch.Tensor] = {}
    leaves = planned.split.local_leaves(batch, 0)[0]  # of the rank whose shapes the units have
    for number, leaf in enumerate(planned.moving[0]):
        known[ValueId("batch", number)] = leaves[leaf]
    for value, compute in units.constants.items():
        known[ValueId("const", value.name)] = compute()
    return known


def _alone(units: Units, call: PlannedCall, schedule: Callable) -> Program:
    """The program of one rank that has all segments."""
    table = schedule(1, MICROBATCHES)
    stages = (tuple(range(units.segments)),)
    cuts = (units,) * MICROBATCHES
    return lower_rank(cuts, stages, table, 0, call.summed, {})


def _share(
    took: float,
    piece: Piece,
    units: Units,
    costs: dict[Key, float],
) -> None:
    """Put down what a piece took, for each of its units: of two that are one, by their FLOPs, or
    what F has left over."""
    first, *rest = piece.units
    if not rest:
        costs.setdefault(first, took)
        return
    second = rest[0]
    if first in costs:
        costs.setdefault(second, max(took - costs[first], 0.0))
        return
    flops = units.units[first].code.flops
    both = flops + units.units[second].code.flops
    costs[first] = took * flops / both if both else took / 2
    costs[second] = took - costs[first]
