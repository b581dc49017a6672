"""One rank's step: the user's function, run under a context in which ``value_and_grad`` is a
program.

In: a plan, a communicator, a rank's state and the global batch. Out: the rank's new state and the
metrics, which are the same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.fusion import changes
from funcpipe._src.backends.grad_mean import divide
from funcpipe._src.collectives import axes_of, bind_rank, channels_of
from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import Overwritable
from funcpipe._src.core.context import Join, PlainContext, bind_context, current
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import (
    Mean,
    Microbatches,
    Rows,
    differentiable,
    divisor_of,
    is_summary,
    mean,
)
from funcpipe._src.core.mesh import Axes
from funcpipe._src.core.reductions import join_shown
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.trace import fill_aux
from funcpipe._src.planning.batch_split import signature
from funcpipe._src.planning.lowered import PlannedCall
from funcpipe._src.planning.placement import LeafLayout
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.plan_bytes import most
from funcpipe._src.planning.variants import stale
from funcpipe._src.program import SEND, Usage, ended, usage
from funcpipe._src.runtime.interpreter import Bound, Slots, bind, execute
from funcpipe._src.runtime.metrics import complete
from funcpipe.errors import StateError


class Rank:
    """A rank of a plan: programs bound to its communicator, constants computed, ready to run
    steps."""

    def __init__(self, plan: Plan, comm: Communicator, backend: Backend | None = None) -> None:
        self.plan, self.comm, self.backend = plan, comm, backend or Backend()
        # What runs programs instead of `execute`, while a recording is open.
        self.observer: Callable[[list[Bound], Slots, Communicator], None] | None = None
        mesh, axis = comm.mesh, plan.resolved.pipe_axis
        self.place = plan.placement.pipeline_rank(comm.rank)
        self.ranks = mesh.group(comm.rank, (axis,)) if axis else (comm.rank,)
        self.split_axes = plan.resolved.split_axes
        with bind_rank(comm):
            self.calls = [
                _BoundCall(self, c.of_rank(comm.rank), str(k)) for k, c in enumerate(plan.calls)
            ]

    def step(
        self, state: Any, batch: Any, overwritable: Iterable[torch.Tensor] = ()
    ) -> tuple[Any, Any]:
        """Run the step once; optimizers may write to the leaves of the state that are
        ``overwritable``."""
        context = RunContext(self, overwritable)
        with bind_context(context), bind_rank(self.comm):
            state, metrics = self.plan.resolved.step(state, batch)
        seen, planned = (
            (context.calls, context.sums),
            (len(self.calls), len(self.plan.placement.analysis.sums)),
        )
        if seen != planned:
            raise StateError(
                f"the step called value_and_grad {seen[0]} times and global sums {seen[1]} times, "
                f"but {planned[0]} and {planned[1]} times when it was planned: a step does the "
                "same every time"
            )
        return state, complete(metrics, self.plan.placement, self.comm)

    @property
    def usage(self) -> Usage:
        """What the programs take, as the backend runs them."""
        return most(usage(ended(c.program), changes(c.program, self.backend)) for c in self.calls)

    def prepare(self) -> None:
        """Make the communicator ready for the collectives of this plan; all ranks call it alike."""
        used = {self.split_axes, tuple(self.comm.mesh.axes)}
        for layout in self.plan.placement.layouts:
            used |= {layout.axes, tuple(a for a in self.split_axes if a not in layout.axes)}
            used.add(tuple(a for a in layout.axes if a in self.split_axes))
        cuts = {units for call in self.plan.calls for units in call.distinct_units}
        graphs = [unit.code.module.graph for cut in cuts for unit in cut.units.values()]
        used |= {part.axes for c in self.plan.calls for _, part in c.rows.values()}
        used = used.union(*map(axes_of, graphs))
        lanes = self._lanes().union(*(channels_of(g, self.comm.mesh) for g in graphs))
        self.comm.prepare(sorted(a for a in used if a), sorted(lanes))

    def _lanes(self) -> set[tuple[int, int, str]]:
        """Every (source, destination, channel) of the mesh: all ranks make communicators for them
        alike."""
        out: set[tuple[int, int, str]] = set()
        mesh, axis = self.comm.mesh, self.plan.resolved.pipe_axis
        for rank in range(mesh.size if axis else 0):
            ranks, place = mesh.group(rank, axis or ()), self.plan.placement.pipeline_rank(rank)
            for call in self.calls:
                for i in call.planned.programs[place].instructions:
                    if i.op == SEND:
                        out.add((rank, ranks[i.peer], call.name + i.action.kind[-1]))
                out |= {
                    (rank, ranks[b], call.name + "tied") for a, b in call.tied_moves() if a == place
                }
        return out


_PASS = "Pass the state that run.init, run.place or the last step returned"


class _BoundCall:
    """One ``value_and_grad`` on one rank."""

    def __init__(self, rank: Rank, planned: PlannedCall, name: str) -> None:
        self.rank, self.planned, self.name = rank, planned, name
        self.program = planned.programs[rank.place]
        self.bound: list[Bound] = bind(self.program, rank.ranks, name, rank.comm, rank.backend)
        self.constants = {slot: planned.constant(v) for v, slot in self.program.constants.items()}
        self.signature = planned.signature
        placement, rank_ = rank.plan.placement, rank.comm.rank
        self.held = [
            placement.shape(rank_, i) if placement.holds(rank_, i) else None
            for i in planned.call.params
        ]

    def __call__(self, params: Any, batch: Any) -> Any:
        leaves = self._leaves(params)
        slots = self._slots(leaves, batch)
        (self.rank.observer or execute)(self.bound, slots, self.rank.comm)
        heads = self._heads(slots)
        weight = heads[1] if self.planned.joint.has_weight else None
        grads = self._grads(leaves, slots)
        divisor = self._divisor(weight)
        if divisor is not None:
            divide(grads, divisor, self.rank.backend)
        loss = (
            heads[0].clone() if weight is None else mean(heads[0], weight)
        )  # a copy: a message must not change
        out = tree.unflatten(self.planned.call.params_spec, grads)
        if not self.planned.call.has_aux:
            return loss, out
        return (loss, self._aux(heads, slots)), out

    def check_values(self, loss_fn: Callable) -> None:
        """StaleValues where the loss reads other Python values than those that it was planned
        for."""
        reading = self.planned.call.reading
        if reading is not None:
            values = reading.follower.values(loss_fn)
            if values != reading.values:
                raise stale(reading, values)

    def _divisor(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """What sums of gradients are divided by: weight and loss scale. A power of two changes no
        bits."""
        weight = None if weight is None else divisor_of(weight)
        scaled, p = current().loss_scale, self.rank.plan.resolved.precision
        scale = None if scaled is None else scaled.scale
        if scale is None and p is not None and p.constant != 1:
            scale = torch.full((), p.constant, device=self.rank.comm.device)
        if scale is None:
            return weight
        return scale if weight is None else weight * scale

    def _leaves(self, params: Any) -> list[torch.Tensor | None]:
        call = self.planned.call
        try:
            leaves = tree.leaves_up_to(call.params_spec, params)
        except ValueError as error:
            raise StateError(
                f"{self._who}: params have another structure than planned: {error} {_PASS}"
            ) from None
        for k, (x, shape, dtype) in enumerate(zip(leaves, self.held, call.dtypes, strict=True)):
            if x is None and shape is None:
                continue
            if (
                shape is None
                or not isinstance(x, torch.Tensor)
                or x.shape != shape
                or x.dtype != dtype
            ):
                path = self.rank.plan.placement.analysis.paths[call.params[k]]
                held = (
                    "is not held by this rank"
                    if shape is None
                    else f"should be a tensor of shape {shape} and dtype {dtype}"
                )
                raise StateError(f"{self._who}: params{path} {held}, but is {describe(x)}. {_PASS}")
        return leaves

    @property
    def _who(self) -> str:
        return f"value_and_grad {self.name} on rank {self.rank.comm.rank}"

    def _slots(self, leaves: Sequence[torch.Tensor | None], batch: Any) -> Slots:
        planned, program = self.planned, self.program
        if signature(batch) != self.signature:
            raise StateError(
                f"value_and_grad {self.name} got a batch of other shapes or values than when the "
                "step was planned: what a step passes to it may depend on the shapes of the batch "
                "only"
            )
        slots: Slots = [None] * program.slots
        for i, slot in program.params.items():
            x, dtype = leaves[i], planned.weights.casts.get(i)
            slots[slot] = x if x is None or dtype is None else x.to(dtype)
        for slot, x in self.constants.items():
            slots[slot] = x
        micro = planned.split.local_leaves(batch, self.rank.comm.rank)
        for (m, i), slot in program.batch.items():
            moving = planned.moving[m]
            scaled = current().loss_scale if i == len(moving) else None
            slots[slot] = scaled.scale if scaled else micro[m][moving[i]]
        return slots

    # ---- what is summed over ranks

    def _heads(self, slots: Slots) -> dict[int, torch.Tensor]:
        """Total, weight and the sums of averaged aux values, over all microbatches and ranks. Those
        of this pipeline came by message (`funcpipe._src.program.output_broadcast`)."""
        sums = {h: slots[self.program.heads[h]] for h in sorted(self.planned.summed)}
        if not self.rank.split_axes:
            return sums
        out: dict[int, torch.Tensor] = {}
        for _, group in groupby(
            sorted(sums, key=lambda h: str(sums[h].dtype)), lambda h: sums[h].dtype
        ):
            numbers = list(group)
            some = [sums[h] for h in numbers]
            packed = self.rank.comm.all_reduce(
                torch.cat([x.reshape(-1) for x in some]), self.rank.split_axes
            )
            each = packed.split([x.numel() for x in some])
            out |= {h: x.view(sums[h].shape) for h, x in zip(numbers, each, strict=True)}
        return out

    def _aux(self, heads: dict[int, torch.Tensor], slots: Slots) -> Any:
        traced = self.planned.joint
        first = 1 + traced.has_weight

        def finish(x: Any) -> Any:
            if isinstance(x, Mean):
                return mean(heads[first + int(x.total)], heads[first + int(x.weight)])
            if isinstance(x, Rows):
                return self._rows(first + int(x.x), x.dim, slots)
            return fill_aux(x, lambda i: self._rows(first + i, None, slots))

        return tree.map(finish, traced.aux, is_leaf=is_summary)

    def _rows(self, h: int, dim: int | None, slots: Slots) -> torch.Tensor:
        """The rows of every microbatch, shard by shard, on every rank; those of ready microbatches
        one after the other."""
        comm = self.rank.comm
        pieces = [slots[self.program.kept[h, m]] for m in range(len(self.planned.losses))]
        # A message must not change, so that a single piece is copied.
        out = pieces[0].clone() if dim is None else torch.cat(pieces, dim)
        resolved, splits = self.rank.plan.resolved, self.planned.split
        if h in self.planned.rows:
            out = _in_order(comm, out, *self.planned.rows[h])
        if not resolved.row_axes or dim is None:
            return out
        held = _gathered(
            comm, out, dim, resolved.row_axes, self._row_counts(h, dim) if splits.dealt else ()
        )
        if isinstance(self.planned.call.batch, Microbatches) and not splits.dealt:
            # Every ready microbatch was cut over ranks: one after another, as on one device.
            each = [x.split([piece.shape[dim] for piece in pieces], dim) for x in held]
            held = [x for of_microbatch in zip(*each, strict=True) for x in of_microbatch]
        return torch.cat(held, dim)

    def _row_counts(self, h: int, dim: int) -> list[int]:
        """How many rows every place on the axes over which microbatches are dealt has of a head."""
        mesh, row_axes = self.rank.comm.mesh, self.rank.plan.resolved.row_axes
        call = self.rank.plan.calls[int(self.name)]
        alike = [call.of_rank(rank) for rank in mesh.group(self.rank.comm.rank, row_axes)]
        return [planned.output_size(h, dim) for planned in alike]

    # ---- gradients

    def _grads(
        self, leaves: Sequence[torch.Tensor | None], slots: Slots
    ) -> list[torch.Tensor | None]:
        held = [i for i, x in enumerate(leaves) if x is not None]
        sums = self._tied(held, leaves, slots)
        for slot in self.program.partials.values():
            slots[slot] = None
        for i in held:
            x = leaves[i]
            assert x is not None
            if sums.get(i) is None:
                sums[i] = torch.zeros_like(x)
        self._all_reduce(sums, [i for i in held if differentiable(sums[i])])  # type: ignore[arg-type]
        return [sums.get(i) for i in range(len(leaves))]

    def _tied(
        self, held: list[int], leaves: Sequence[torch.Tensor | None], slots: Slots
    ) -> dict[int, torch.Tensor | None]:
        """The sum of a leaf's partial gradients on each rank that holds it.

        The running sum passes through the stages in the order in which autograd would add, so that
        its bits do not depend on where the stages lie; then the last rank hands it to the other
        owners.
        """
        comm, ranks, here = self.rank.comm, self.rank.ranks, self.rank.place
        sums: dict[int, torch.Tensor | None] = {}
        tied = []
        for i in held:
            hops = self.planned.hops(i)
            for n, (place, partials) in enumerate(hops):
                if place != here:
                    continue
                terms = [slots[self.program.partials[i, k]] for k in partials]
                if n:
                    terms.insert(0, self._receive(terms[0], ranks[hops[n - 1][0]]))
                sums[i] = _add(terms)
                if n + 1 < len(hops):
                    comm.send([_dense(sums[i])], ranks[hops[n + 1][0]], self.name + "tied")
            if hops and len(self._layout(i).owners) > 1:
                tied.append((i, hops[-1][0]))
        for i, last in tied:
            others = [p for p in self._layout(i).owners if p != last]
            if (
                here == last
            ):  # copies: a message must not change, and the step may write to its own gradient
                for p in others:
                    comm.send([_dense(sums[i]).clone()], ranks[p], self.name + "tied")
            else:
                sums[i] = self._receive(leaves[i], ranks[last])
        return sums

    def tied_moves(self) -> set[tuple[int, int]]:
        """Between which places on the pipe axis gradients of tied leaves travel."""
        out: set[tuple[int, int]] = set()
        for i in range(len(self.planned.call.params)):
            places = [place for place, _ in self.planned.hops(i)]
            out.update(pairwise(places))
            out |= {(places[-1], p) for p in self._layout(i).owners if places and p != places[-1]}
        return out

    def _receive(self, like: torch.Tensor | None, source: int) -> torch.Tensor:
        assert like is not None
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return self.rank.comm.recv([out], source, self.name + "tied")[0]

    def _all_reduce(self, sums: dict[int, torch.Tensor], moving: list[int]) -> None:
        """Sums over the axes that split the batch and do not shard the leaf, once per step, alike
        leaves together."""
        groups: dict[tuple[torch.dtype, Axes], list[int]] = {}
        for i in moving:
            axes = tuple(a for a in self.rank.split_axes if a not in self._layout(i).axes)
            if axes:
                groups.setdefault((sums[i].dtype, axes), []).append(i)
        for (_, axes), some in groups.items():
            packed = torch.cat([sums[i].reshape(-1) for i in some])
            packed = self.rank.comm.all_reduce(packed, axes)
            for i, x in zip(some, packed.split([sums[i].numel() for i in some]), strict=True):
                sums[i] = x.view(sums[i].shape)

    def _layout(self, i: int) -> LeafLayout:
        return self.rank.plan.placement.layouts[self.planned.call.params[i]]


def _gathered(
    comm: Communicator, x: torch.Tensor, dim: int, axes: Axes, counts: Sequence[int]
) -> list[torch.Tensor]:
    """The rows of every place on axes, along a dim. ``counts``: how many each has, where they
    differ."""
    if len(set(counts)) < 2:
        return list(comm.all_gather(x.contiguous(), axes))
    dim %= x.dim()
    padded = x.new_zeros(*x.shape[:dim], max(counts), *x.shape[dim + 1 :])
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return [
        rows.narrow(dim, 0, n)
        for rows, n in zip(comm.all_gather(padded, axes), counts, strict=True)
    ]


def _in_order(comm: Communicator, x: torch.Tensor, dim: int, part: SequenceLayout) -> torch.Tensor:
    """All positions, in order, of which every member holds its own along a dim."""
    longest = max(part.length(m) for m in range(part.members))
    padded = x.new_zeros(*x.shape[:dim], longest, *x.shape[dim + 1 :])
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    out = x.new_empty(*x.shape[:dim], part.size, *x.shape[dim + 1 :])
    for m, held in enumerate(comm.all_gather(padded, part.axes)):
        start = 0
        for a, b in part.ranges(m):
            out.narrow(dim, a, b - a).copy_(held.narrow(dim, start, b - a))
            start += b - a
    return out


def _dense(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x.contiguous()


def _add(terms: list[torch.Tensor]) -> torch.Tensor:
    out = terms[0]
    for x in terms[1:]:
        out = out + x
    return out


class RunContext(PlainContext):
    """The context of a step that runs on a rank."""

    def __init__(self, rank: Rank, overwritable: Iterable[torch.Tensor]) -> None:
        self.rank, self.calls, self.sums = rank, 0, 0
        self.overwritable = Overwritable(overwritable)

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
        if self.calls >= len(self.rank.calls):
            raise StateError(
                "the step calls value_and_grad more often than when it was planned: it does the "
                "same every time"
            )
        call = self.rank.calls[self.calls]
        call.check_values(loss_fn)
        self.calls += 1
        return call(params, batch)

    def reduce(
        self, leaves: Any, local: Callable[[list[torch.Tensor | None]], torch.Tensor], op: str
    ) -> tuple[Join, torch.Tensor]:
        placement, comm = self.rank.plan.placement, self.rank.comm
        if self.sums >= len(placement.analysis.sums):
            raise StateError(
                "the step takes more global sums than when it was planned: it does the same every "
                "time"
            )
        known = placement.analysis.sums[self.sums]
        self.sums += 1
        leaves = known.spec.flatten_up_to(leaves)
        counted = [
            x if x is not None and placement.counts(comm.rank, i) else None
            for i, x in zip(known.params, leaves, strict=True)
        ]
        with (
            comm.device
        ):  # where a rank that counts nothing makes its zeros: no copy in a captured step
            out = local(counted).to(device=comm.device, dtype=known.dtype)
        apart = self.sums - 1 in placement.apart
        shown = [
            x is not None or i is None or not apart
            for i, x in zip(known.params, leaves, strict=True)
        ]
        out = comm.all_reduce(out, tuple(comm.mesh.axes), op) if comm.mesh.size > 1 else out
        return functools.partial(join_shown, known.spec, shown), out
