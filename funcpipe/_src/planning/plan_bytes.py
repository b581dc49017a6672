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


# ---- memory


def memory(plan: Plan, pipeline_rank: int) -> dict[str, int]:
    """Predicted bytes of a pipeline rank: see `Plan.memory`."""
    usage = plan.found.get(pipeline_rank)
    if usage is None:
        usage = most(_usages(plan, pipeline_rank))
    dtypes, layouts = plan.placement.analysis.dtypes, plan.placement.layouts
    held = {param for param, layout in enumerate(layouts) if pipeline_rank in layout.owners}
    params = sum(_held_bytes(plan, param, dtypes[param]) for param in held)
    copies = [_cast_bytes(plan, call, held) for call in plan.calls]
    return {
        **usage._asdict(),
        "params": params + max(copies, default=0),
        "graph": plan.graphs.get(pipeline_rank, 0),
    }


def _usages(plan: Plan, pipeline_rank: int) -> list[Usage]:
    """Of every call, for every set of local shapes."""
    found = []
    for call in plan.calls:
        for variant in (call, *call.variants.values()):
            found.append(variant.programs[pipeline_rank].usage)
    return found


def most(some: Iterable[Usage]) -> Usage:
    """The most that programs take which run one after another."""
    nothing = Usage(0, 0, 0, 0, 0)
    return Usage(*map(max, zip(nothing, *some, strict=True)))


def _cast_bytes(plan: Plan, call: PlannedCall, held: set[int]) -> int:
    """Of the copies of held leaves in another dtype."""
    total = 0
    for arg, dtype in call.weights.casts.items():
        param = call.call.params[arg]
        if param in held:
            total += _held_bytes(plan, param, dtype)
    return total


def _held_bytes(plan: Plan, param: int, dtype: torch.dtype) -> int:
    """The most that a rank holds of a param."""
    layout = plan.placement.layouts[param]
    shards = plan.resolved.mesh.axis_size(layout.axes)
    elements = -(-math.prod(layout.shape) // shards)
    return elements * dtype.itemsize


# ---- traffic


def traffic(plan: Plan, pipeline_rank: int) -> dict[Axes, int]:
    """Bytes that a pipeline rank receives in a step: see `Plan.traffic`."""
    total: Counter[Axes] = Counter()
    for call in plan.calls:
        for instruction in call.programs[pipeline_rank].instructions:
            total.update(_received(plan.resolved, instruction))
        for arg in range(len(call.call.params)):
            total.update(_summed_grads(plan, call, arg, pipeline_rank))
    return {axes: count for axes, count in total.items() if count}


def _received(resolved: ResolvedStep, instruction: Instruction) -> dict[Axes, int]:
    """By an instruction of the program."""
    bucket, unit = instruction.bucket, instruction.unit
    if instruction.op == RUN and unit is not None:
        return received(unit.code.module.graph, resolved.mesh)
    if instruction.op == RECV and resolved.pipe_axis is not None:
        return {(resolved.pipe_axis,): sum(value.nbytes for value in instruction.values)}
    if instruction.op in (GATHER, REDUCE) and bucket is not None:
        axes = bucket.axes if instruction.op == GATHER else bucket.summed
        others = resolved.mesh.axis_size(axes) - 1
        return {axes: others * bucket.nbytes}
    return {}


def _summed_grads(plan: Plan, call: PlannedCall, arg: int, pipeline_rank: int) -> dict[Axes, int]:
    """After the program, by a leaf's gradient: over the pipeline ranks that share the leaf, then
    over the axes that split the batch and do not shard it."""
    resolved = plan.resolved
    out: dict[Axes, int] = {}
    param, dtype = call.call.params[arg], call.call.dtypes[arg]
    layout = plan.placement.layouts[param]
    size = _held_bytes(plan, param, dtype)
    times = _tied_sums(call, arg, layout.owners, pipeline_rank)
    if times and resolved.pipe_axis is not None:
        out[(resolved.pipe_axis,)] = times * size
    axes = tuple(axis for axis in resolved.split_axes if axis not in layout.axes)
    if axes and pipeline_rank in layout.owners and dtype.is_floating_point:
        ranks = resolved.mesh.axis_size(axes)
        out[axes] = 2 * (ranks - 1) * size // ranks
    return out


def _tied_sums(call: PlannedCall, arg: int, owners: Sequence[int], pipeline_rank: int) -> int:
    """How often a pipeline rank receives a tied leaf's gradient: a running sum on the way, then the
    whole sum."""
    hops = [rank for rank, _ in call.hops(arg)]
    times = hops[1:].count(pipeline_rank)
    made_here = not hops or hops[-1] == pipeline_rank
    shared = len(owners) > 1 and pipeline_rank in owners
    return times + (shared and not made_here)
