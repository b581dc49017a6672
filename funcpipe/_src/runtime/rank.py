"""One rank's step: the user's function, run under a context in which ``value_and_grad`` is a
program.

In: a plan, a communicator, a rank's state and the global batch. Out: the rank's new state and the
metrics, which are the same on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.bind import BoundProgram, channel_of
from funcpipe._src.backends.fusion import changes
from funcpipe._src.collectives import axes_of, bind_rank, channels_of
from funcpipe._src.comm import Communicator
from funcpipe._src.core.buffer_donation import Overwritable
from funcpipe._src.core.context import Join, Local, PlainContext, bind_context
from funcpipe._src.core.mesh import Axes
from funcpipe._src.core.reductions import join_shown
from funcpipe._src.graph.partition import Units
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.plan_bytes import most
from funcpipe._src.program import SEND, Usage, usage
from funcpipe._src.runtime.bound_call import BoundCall
from funcpipe._src.runtime.grad_reduction import axes_of_sum
from funcpipe._src.runtime.interpreter import Slots
from funcpipe._src.runtime.metrics import complete
from funcpipe.errors import StateError

Channel = tuple[int, int, str]  # source, destination, name
Observer = Callable[[BoundProgram, Slots, Communicator], None]


class Rank:
    """A rank of a plan: programs bound to its communicator, constants computed, ready to run
    steps."""

    def __init__(
        self,
        plan: Plan,
        comm: Communicator,
        backend: Backend | None = None,
    ) -> None:
        self.plan, self.comm = plan, comm
        self.backend = backend or Backend()
        # What runs programs instead of the interpreter, while a recording is open.
        self.observer: Observer | None = None
        mesh, axis = comm.mesh, plan.resolved.pipe_axis
        self.pipeline_rank = plan.placement.pipeline_rank(comm.rank)
        self.ranks = mesh.group(comm.rank, (axis,)) if axis else (comm.rank,)
        self.split_axes = plan.resolved.split_axes
        self.calls: list[BoundCall] = []
        with bind_rank(comm):
            for number, call in enumerate(plan.calls):
                planned = call.of_rank(comm.rank)
                self.calls.append(BoundCall(self, planned, number))

    def step(
        self,
        state: Any,
        batch: Any,
        overwritable: Iterable[torch.Tensor] = (),
    ) -> tuple[Any, Any]:
        """Run the step once; optimizers may write to the leaves of the state that are
        ``overwritable``."""
        context = RunContext(self, overwritable)
        with bind_context(context), bind_rank(self.comm):
            state, metrics = self.plan.resolved.step(state, batch)
        analysis = self.plan.placement.analysis
        seen = context.calls, context.sums
        planned = len(self.calls), len(analysis.reductions)
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
        used = []
        for call in self.calls:
            fused = changes(call.program, self.backend)
            used.append(usage(call.program.instructions, fused))
        return most(used)

    def prepare(self) -> None:
        """Make the communicator ready for the collectives of this plan; all ranks call it alike."""
        axes = self._axes_of_step()
        channels = self._channels()
        for units in self._units():
            for unit in units.units.values():
                graph = unit.code.module.graph
                axes |= axes_of(graph)
                channels |= set(channels_of(graph, self.comm.mesh))
        axes.discard(())
        self.comm.prepare(sorted(axes), sorted(channels))

    def _units(self) -> set[Units]:
        """The units of all ranks."""
        found: set[Units] = set()
        for call in self.plan.calls:
            found.update(call.distinct_units)
        return found

    def _axes_of_step(self) -> set[Axes]:
        """The axes of collectives outside of loss functions."""
        used = {self.split_axes, tuple(self.comm.mesh.axes)}
        for layout in self.plan.placement.layouts:
            reduced = [axis for axis in layout.axes if axis in self.split_axes]
            used.add(layout.axes)
            used.add(tuple(reduced))
            used.add(axes_of_sum(layout, self.split_axes))
        for call in self.plan.calls:
            for _, positions in call.rows.values():
                used.add(positions.axes)
        return used

    def _channels(self) -> set[Channel]:
        """Every channel of the mesh: all ranks make communicators for them alike."""
        found: set[Channel] = set()
        mesh, axis = self.comm.mesh, self.plan.resolved.pipe_axis
        for rank in range(mesh.size if axis else 0):
            ranks = mesh.group(rank, axis or ())
            pipeline_rank = self.plan.placement.pipeline_rank(rank)
            for call in self.calls:
                for peer, name in _sends(call, pipeline_rank):
                    found.add((rank, ranks[peer], name))
        return found


def _sends(call: BoundCall, pipeline_rank: int) -> Iterator[tuple[int, str]]:
    """To which pipeline ranks, and on which channels, a pipeline rank sends."""
    for instruction in call.planned.programs[pipeline_rank].instructions:
        if instruction.op == SEND:
            yield instruction.peer, channel_of(instruction, call.name)
    for source, target in call.tied.moves():
        if source == pipeline_rank:
            yield target, call.tied_channel


class RunContext(PlainContext):
    """The context of a step that runs on a rank."""

    def __init__(self, rank: Rank, overwritable: Iterable[torch.Tensor]) -> None:
        self.rank, self.calls, self.sums = rank, 0, 0
        self.overwritable = Overwritable(overwritable)

    def value_and_grad(
        self,
        loss_fn: Callable,
        has_aux: bool,
        params: Any,
        batch: Any,
    ) -> Any:
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
        self,
        leaves: Any,
        local: Local,
        op: str,
    ) -> tuple[Join, torch.Tensor]:
        placement, comm = self.rank.plan.placement, self.rank.comm
        number = self.sums
        if number >= len(placement.analysis.reductions):
            raise StateError(
                "the step takes more global sums than when it was planned: it does the same every "
                "time"
            )
        known = placement.analysis.reductions[number]
        self.sums += 1
        apart = number in placement.apart
        counted: list[torch.Tensor | None] = []
        shown: list[bool] = []
        held = known.spec.flatten_up_to(leaves)
        for param, leaf in zip(known.params, held, strict=True):
            counts = leaf is not None and placement.counts(comm.rank, param)
            counted.append(leaf if counts else None)
            shown.append(leaf is not None or param is None or not apart)
        # A rank that counts nothing makes its zeros there: no copy in a captured step.
        with comm.device:
            total = local(counted).to(device=comm.device, dtype=known.dtype)
        if comm.mesh.size > 1:
            total = comm.all_reduce(total, tuple(comm.mesh.axes), op)
        return functools.partial(join_shown, known.spec, shown), total
