"""Plan bytes: the memory and traffic that a plan predicts.

In: a `Plan`, a pipeline rank. Out: bytes by what they are for, or by the axes they travel along.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from funcpipe._src.collectives import received
from funcpipe._src.core.mesh import Axes
from funcpipe._src.program import GATHER, RECV, REDUCE, RUN, Instruction, Usage
from funcpipe._src.spec.resolve import ResolvedStep

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.planning.plan import Plan

Traffic = dict[Axes, int]  # bytes by the axes along which they travel


# ---- memory


def memory(plan: Plan, pipeline_rank: int) -> dict[str, int]:
    """Predicted bytes of a pipeline rank: see `Plan.memory`."""
    usage = plan.found.get(pipeline_rank)
    if usage is None:
        usage = most(_usages(plan, pipeline_rank))
    return {
        **usage._asdict(),
        "params": _param_bytes(plan, pipeline_rank),
        "graph": plan.graphs.get(pipeline_rank, 0),
    }


def _usages(plan: Plan, pipeline_rank: int) -> list[Usage]:
    """Of every call, for every set of local shapes."""
    found = []
    for call in plan.calls:
        variants = call.variants.values()
        for variant in (call, *variants):
            program = variant.programs[pipeline_rank]
            found.append(program.usage)
    return found


def most(some: Iterable[Usage]) -> Usage:
    """The most that programs take which run one after another."""
    nothing = Usage(0, 0, 0, 0, 0)
    by_field = zip(nothing, *some, strict=True)
    return Usage(*map(max, by_field))


def _param_bytes(plan: Plan, pipeline_rank: int) -> int:
    """Of the params that a pipeline rank holds, and of the most copies that one call makes."""
    layouts = plan.placement.layouts
    dtypes = plan.placement.analysis.dtypes
    held = set()
    nbytes = 0
    for param, layout in enumerate(layouts):
        if pipeline_rank in layout.owners:
            held.add(param)
            nbytes += _held_bytes(plan, param, dtypes[param])
    copies = 0
    for call in plan.calls:
        copies = max(copies, _cast_bytes(plan, call, held))
    return nbytes + copies


def _cast_bytes(plan: Plan, call: PlannedCall, held: set[int]) -> int:
    """Of the copies of held leaves in another dtype."""
    casts = call.weights.casts
    nbytes = 0
    for arg, dtype in casts.items():
        param = call.call.params[arg]
        if param in held:
            nbytes += _held_bytes(plan, param, dtype)
    return nbytes


def _held_bytes(plan: Plan, param: int, dtype: torch.dtype) -> int:
    """The most that a rank holds of a param."""
    layout = plan.placement.layouts[param]
    mesh = plan.resolved.mesh
    shards = mesh.axis_size(layout.axes)
    elements = math.prod(layout.shape)
    of_shard = -(-elements // shards)  # rounded up
    return of_shard * dtype.itemsize


# ---- traffic


def traffic(plan: Plan, pipeline_rank: int) -> Traffic:
    """Bytes that a pipeline rank receives in a step: see `Plan.traffic`."""
    total: Counter[Axes] = Counter()
    for call in plan.calls:
        program = call.programs[pipeline_rank]
        for instruction in program.instructions:
            total.update(_received(plan.resolved, instruction))
        params = call.call.params
        for arg in range(len(params)):
            total.update(_summed_grads(plan, call, arg, pipeline_rank))
    return {axes: nbytes for axes, nbytes in total.items() if nbytes}


def _received(resolved: ResolvedStep, instruction: Instruction) -> Traffic:
    """By an instruction of the program."""
    mesh = resolved.mesh
    pipe = resolved.pipe_axis
    op = instruction.op
    unit = instruction.unit
    bucket = instruction.bucket
    if op == RUN and unit is not None:
        graph = unit.code.module.graph
        return received(graph, mesh)
    if op == RECV and pipe is not None:
        nbytes = sum(value.nbytes for value in instruction.values)
        return {(pipe,): nbytes}
    if op in (GATHER, REDUCE) and bucket is not None:
        axes = bucket.axes if op == GATHER else bucket.summed
        others = mesh.axis_size(axes) - 1
        return {axes: others * bucket.nbytes}
    return {}


def _summed_grads(plan: Plan, call: PlannedCall, arg: int, pipeline_rank: int) -> Traffic:
    """After the program, by a leaf's gradient: over the pipeline ranks that share the leaf, then
    over the axes that split the batch and do not shard it."""
    resolved = plan.resolved
    mesh = resolved.mesh
    pipe = resolved.pipe_axis
    param = call.call.params[arg]
    dtype = call.call.dtypes[arg]
    layout = plan.placement.layouts[param]
    nbytes = _held_bytes(plan, param, dtype)
    found: Traffic = {}
    times = _tied_sums(call, arg, layout.owners, pipeline_rank)
    if times and pipe is not None:
        found[(pipe,)] = times * nbytes
    if pipeline_rank not in layout.owners or not dtype.is_floating_point:
        return found
    axes = tuple(axis for axis in resolved.split_axes if axis not in layout.axes)
    if axes:
        ranks = mesh.axis_size(axes)
        others = ranks - 1
        found[axes] = 2 * others * nbytes // ranks
    return found


def _tied_sums(call: PlannedCall, arg: int, owners: Sequence[int], pipeline_rank: int) -> int:
    """How often a pipeline rank receives a tied leaf's gradient: a running sum on the way, then the
    whole sum."""
    hops = [rank for rank, _ in call.hops(arg)]
    times = hops[1:].count(pipeline_rank)
    if hops and hops[-1] != pipeline_rank:  # the sum ends on another rank
        is_shared = len(owners) > 1
        is_owner = pipeline_rank in owners
        times += is_shared and is_owner
    return times
