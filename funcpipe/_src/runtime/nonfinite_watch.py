"""Watch for non-finite values: runs the programs of a rank, and looks at all that they make.

An *event* is a value that is not finite, where it is made. Events are compared by where they stand
in the flow of data, not by when they happen: what enters a ``value_and_grad`` comes before its
units, units go by microbatch and then in the order of one microbatch, sums come after units,
results after sums. So the first event does not depend on the schedule.

In: a rank, and a step that runs under `Watch`. Out: its events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from funcpipe._src.backends.bind import BoundProgram
from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import Microbatches
from funcpipe._src.graph.ids import OfArg, ValueId
from funcpipe._src.planning.lowered import PlannedCall
from funcpipe._src.program import ADD, RUN, WAIT, Instruction
from funcpipe._src.program.slots import is_output
from funcpipe._src.runtime.interpreter import Slots, run_instructions
from funcpipe._src.runtime.nonfinite_ops import Origin, Origins, fault_of, run_with_origins
from funcpipe._src.runtime.rank import Rank

_INPUT, _WORK, _RESULT = range(3)  # the order of what happens in a value_and_grad
_LAST = 1 << 30  # after all units of a microbatch, or after all calls


class Nonfinite(NamedTuple):
    """The first value of a step that is not finite.

    Args:
        what: its name: ``params['w']``, ``batch['x']``, a value of a unit, "the gradient of
            params['w']", a leaf of the state.
        rank: which rank has it, the lowest.
        call: in which ``value_and_grad``, counted from 0; None outside.
        unit: the unit that made it, such as ``"F3"``: forward of segment 3; None where none did.
        microbatch: in which microbatch; None where it belongs to none.
        op: the op in the unit that it comes from; None where it came into the unit, or without one.
        text: shape and dtype, and how many of its values are not finite.

    ``str`` of it is a sentence.
    """

    what: str
    rank: int
    call: int | None
    unit: str | None
    microbatch: int | None
    op: str | None
    text: str

    def __str__(self) -> str:
        where = [f"rank {self.rank}"]
        if self.call is not None:
            where.append(f"value_and_grad {self.call}")
        if self.microbatch is not None:
            where.append(f"microbatch {self.microbatch}")
        if self.unit is not None:
            where.append(f"unit {self.unit}")
        op = "" if self.op is None else f"; it comes from {self.op}"
        return f"{', '.join(where)}: {self.what}, {self.text}{op}"


class Event(NamedTuple):
    """A value that is not finite, and a key by which events are ordered."""

    key: tuple
    found: Nonfinite


class Where(NamedTuple):
    """Where a value is made.

    Args:
        order: of the value in the flow of data.
        call, unit, microbatch: as in `Nonfinite`.
    """

    order: tuple
    call: int | None = None
    unit: str | None = None
    microbatch: int | None = None


@dataclass
class Watch:
    """Notes the events of a step of a rank."""

    rank: Rank
    events: list[Event] = field(default_factory=list)

    def program(self, bound: BoundProgram, slots: Slots, comm: Communicator) -> None:
        """Run a program, as the interpreter does, and look at all that it makes."""
        for number, call in enumerate(self.rank.calls):
            if call.bound is bound:
                CallWatch(self, number).run(bound, slots, comm)

    def results(self, call: int, loss: torch.Tensor, grads: Any) -> None:
        """Look at what a ``value_and_grad`` returned."""
        CallWatch(self, call).results(loss, grads)

    def state(self, old: Any, new: Any) -> None:
        """Look at what became of the state."""
        placement = self.rank.plan.placement
        before = placement.state_leaves(old, "find_nonfinite")
        after = placement.state_leaves(new, "find_nonfinite")
        for number, path in enumerate(placement.analysis.state_paths):
            if fault_of(before[number]) is None:
                where = Where((_LAST, number))
                self.note(where, f"state{path} after the step", after[number])

    def note(
        self,
        where: Where,
        what: str,
        value: Any,
        origin: Origin | None = None,
    ) -> None:
        """Note an event if a value is not finite."""
        fault = fault_of(value)
        if fault is None:
            return
        if origin is None:
            origin = Origin(None, meant=fault.is_low)
        found = Nonfinite(
            what=what,
            rank=self.rank.comm.rank,
            call=where.call,
            unit=where.unit,
            microbatch=where.microbatch,
            op=origin.op,
            text=fault.text,
        )
        key = origin.meant, where.order, found.rank
        self.events.append(Event(key, found))


class CallWatch:
    """Looks at what one ``value_and_grad`` of a step makes.

    Args:
        watch: notes the events.
        number: of the ``value_and_grad``.
    """

    def __init__(self, watch: Watch, number: int) -> None:
        self.watch = watch
        self.number = number
        call = watch.rank.calls[number]
        self.program = call.program
        self.planned = call.planned
        self.param_slots, self.batch_slots = call.param_slots, call.batch_slots
        paths = watch.rank.plan.placement.analysis.paths
        params = self.planned.call.params
        self.paths = [paths[param] for param in params]

    def run(self, bound: BoundProgram, slots: Slots, comm: Communicator) -> None:
        """Run the program, and look at all that it makes."""
        self._inputs(slots)
        both = zip(bound.instructions, self.program.instructions, strict=True)
        for instruction, row in both:
            origins: Origins = []
            if row.op == RUN:
                assert row.unit is not None
                run = partial(run_with_origins, row.unit.code.module, origins)
                instruction = instruction._replace(run=run)
            run_instructions([instruction], slots, comm)
            if row.op in (RUN, ADD, WAIT):
                made = [slots[slot] for slot in instruction.writes]
                self._made(row, made, origins)

    def results(self, loss: torch.Tensor, grads: Any) -> None:
        """Look at what was returned."""
        self.watch.note(self._where(_RESULT, -1), "the loss", loss)
        leaves = tree.leaves_up_to(self.planned.call.params_spec, grads)
        for param, grad in enumerate(leaves):
            where = self._where(_RESULT, param)
            self.watch.note(where, f"the gradient of params{self.paths[param]}", grad)

    def _where(self, *order: int) -> Where:
        return Where((self.number, *order), self.number)

    def _inputs(self, slots: Slots) -> None:
        """Look at the params and microbatches that the program begins with."""
        for param, slot, _ in self.param_slots:
            where = self._where(_INPUT, -1, param)
            self.watch.note(where, f"params{self.paths[param]}", slots[slot])
        paths = _batch_paths(self.planned)
        for microbatch, number, slot in self.batch_slots:
            moving = self.planned.moving[microbatch]
            what = "the loss scale"
            if number < len(moving):
                what = f"batch{paths[microbatch][moving[number]]}"
            where = self._where(_INPUT, microbatch, number)
            where = where._replace(microbatch=microbatch)
            self.watch.note(where, what, slots[slot])

    def _made(
        self,
        row: Instruction,
        made: list[Any],
        origins: Origins,
    ) -> None:
        """Look at what an instruction made."""
        unit = None if row.unit is None else str(row.unit)
        microbatch = row.action.microbatch
        position = self._position(row)
        for number, name in enumerate(row.writes):
            kind = _INPUT if name.kind == "gathered" else _WORK
            order = (self.number, kind, microbatch, position, number)
            where = Where(order, self.number, unit, microbatch)
            what = self._name(name, row)
            origin = origins[number] if origins else None
            self.watch.note(where, what, made[number], origin)

    def _position(self, row: Instruction) -> int:
        """Where the unit of an instruction stands in the order of one microbatch."""
        if row.unit is None:
            return _LAST
        units = self.planned.microbatch_units[row.action.microbatch].units
        key = row.unit.kind, row.unit.segment
        return list(units).index(key)

    def _name(self, value: ValueId, row: Instruction) -> str:
        """What a value of the program is, in words."""
        if is_output(value):
            assert isinstance(value.name, int)
            return f"{_output_name(self.planned, value.name)}, summed so far"
        if isinstance(value.name, OfArg):
            path = self.paths[value.name.arg]
            if value.kind == "gathered":
                return f"params{path}, gathered"
            return f"the gradient of params{path}, summed so far"
        assert value.microbatch is not None
        units = self.planned.microbatch_units[value.microbatch]
        for number, output in enumerate(units.heads):
            if output.name == value.name:
                return _output_name(self.planned, number)
        for param, partials in enumerate(units.grads):
            if any(partial.name == value.name for partial in partials):
                return f"the gradient of params{self.paths[param]}"
        forward = row.unit is not None and row.unit.kind == "F"
        half = "forward" if forward else "backward"
        return f"a value of the {half} pass ({value.name})"


def _output_name(planned: PlannedCall, number: int) -> str:
    """What an output of a loss function is called."""
    names = ["the loss"]
    if planned.joint.has_weight:
        names = ["Mean.total", "Mean.weight"]
    return names[number] if number < len(names) else "an aux value"


def _batch_paths(planned: PlannedCall) -> list[list[str]]:
    """The paths of the leaves of every microbatch."""
    batch = planned.call.batch
    if isinstance(batch, Microbatches):
        parts = [batch.parts[ready] for ready in planned.ready]
        return list(map(tree.paths, parts))
    return [tree.paths(batch)] * len(planned.microbatch_units)
