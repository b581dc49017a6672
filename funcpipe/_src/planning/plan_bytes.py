"""Sizes: what a plan says of memory and traffic.

In: a `Plan`, a place on the pipe axis. Out: bytes by what they are for, or by the axes they travel
along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from funcpipe._src.collectives import received
from funcpipe._src.core.mesh import Axes
from funcpipe._src.program import GATHER, RECV, REDUCE, RUN, Usage

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.planning.plan import Plan


def memory(plan: Plan, place: int) -> dict[str, int]:
    """Predicted bytes of the ranks at a place on the pipe axis: see `Plan.memory`."""
    dtypes, layouts = plan.placement.analysis.dtypes, plan.placement.layouts
    variants = {v for c in plan.calls for v in (c, *c.variants.values())}
    usage = plan.found.get(place) or most(v.programs[place].usage for v in variants)
    held = {i for i, x in enumerate(layouts) if place in x.owners}
    copies = [
        sum(
            _shard_bytes(plan, c.call.params[k], d)
            for k, d in c.weights.casts.items()
            if c.call.params[k] in held
        )
        for c in plan.calls
    ]
    return {
        **usage._asdict(),
        "params": sum(_shard_bytes(plan, i, dtypes[i]) for i in held) + max(copies, default=0),
        "graph": plan.graphs.get(place, 0),
    }


def most(some: Iterable[Usage]) -> Usage:
    """The most that programs take which run one after another."""
    return Usage(*map(max, zip(Usage(0, 0, 0, 0, 0), *some, strict=True)))


def traffic(plan: Plan, place: int) -> dict[Axes, int]:
    """Bytes that they receive in a step: see `Plan.traffic`."""
    r, out = plan.resolved, Counter()  # type: ignore[var-annotated]
    for c in plan.calls:
        for i in c.programs[place].instructions:
            if i.op == RUN and i.unit is not None:
                out.update(received(i.unit.code.module.graph, r.mesh))
            elif i.op == RECV:
                out[(r.pipe_axis,)] += sum(v.nbytes for v in i.values)
            elif i.op in (GATHER, REDUCE) and i.bucket is not None:
                axes = i.bucket.axes if i.op == GATHER else i.bucket.summed
                out[axes] += (r.mesh.axis_size(axes) - 1) * i.bucket.nbytes
        for k, param in enumerate(c.call.params):
            layout, size = (
                plan.placement.layouts[param],
                _shard_bytes(plan, param, c.call.dtypes[k]),
            )
            if times := _tied_sums(c, k, layout.owners, place):
                out[(r.pipe_axis,)] += times * size
            axes = tuple(a for a in r.split_axes if a not in layout.axes)
            if place in layout.owners and axes and c.call.dtypes[k].is_floating_point:
                n = r.mesh.axis_size(axes)
                out[axes] += 2 * (n - 1) * size // n
    return {axes: n for axes, n in out.items() if n}


def _shard_bytes(plan: Plan, param: int, dtype: torch.dtype) -> int:
    """The most that a rank holds of a parameter."""
    layout = plan.placement.layouts[param]
    return (
        -(-torch.Size(layout.shape).numel() // plan.resolved.mesh.axis_size(layout.axes))
        * dtype.itemsize
    )


def _tied_sums(c: PlannedCall, leaf: int, owners: Sequence[int], place: int) -> int:
    """How often a place receives a tied leaf's gradient: a running sum on the way, then the whole
    sum."""
    hops = [p for p, _ in c.hops(leaf)]
    return hops[1:].count(place) + (
        len(owners) > 1 and place in owners and hops[-1:] not in ([], [place])
    )
