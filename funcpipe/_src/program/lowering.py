"""Lowering: from the units of a loss and a schedule to the program of one rank.

In: for every microbatch its `Units`, the segments of every stage, a checked schedule with its sends
and receives, which args are sharded, and a pipeline rank. Out: `Program`, verified.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from funcpipe._src.graph.ids import ArgId, OfArg, ValueId
from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program.dependencies import Stages, half_of, makers_of, stage_of_segments
from funcpipe._src.program.instructions import ADD, RECV, RUN, SEND, Instruction, Program
from funcpipe._src.program.output_broadcast import Output, broadcasts
from funcpipe._src.program.slots import allocate_slots
from funcpipe._src.program.verify import verify
from funcpipe._src.program.weight_sharding import Sharding, insert_collectives
from funcpipe._src.schedule.actions import Action, Schedule
from funcpipe._src.schedule.communication import arrivals


def lower_rank(
    cuts: Sequence[Units],
    stages: Stages,
    schedule: Schedule,
    pipeline_rank: int,
    summed: frozenset[int],
    sharding: Sharding,
    accumulate_dtypes: Mapping[int, torch.dtype] | None = None,
) -> Program:
    """The program of a pipeline rank.

    Args:
        cuts: the units of every microbatch.
        stages: for every stage its segments, in order.
        schedule: checked, with its sends and receives.
        pipeline_rank: the rank on the pipe axis.
        summed: the numbers of the outputs that are summed over microbatches; the others are kept as
            rows.
        sharding: the args that are sharded.
        accumulate_dtypes: for other args, the dtype in which their gradients are added up where
            that is not the units' own.
    """
    dtypes = accumulate_dtypes or {}
    lowering = _Lowering(cuts, stages, schedule, pipeline_rank, summed, dtypes)
    instructions = insert_collectives(lowering.instructions_in_order(), sharding)
    program = allocate_slots(pipeline_rank, instructions)
    verify(program)
    return program


@dataclass
class _Lowering:
    cuts: Sequence[Units]
    stages: Stages
    schedule: Schedule
    pipeline_rank: int
    summed: frozenset[int]
    accumulate_dtypes: Mapping[int, torch.dtype]

    def __post_init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.stage_of = stage_of_segments(self.stages)
        self.makers = {units: makers_of(units) for units in self.cuts}
        self.results = {units: _results_of(units) for units in self.cuts}
        self.first_with: dict[Units, int] = {}  # the first microbatch that has these units
        for microbatch, units in enumerate(self.cuts):
            self.first_with.setdefault(units, microbatch)
        self.arrivals = arrivals(self.schedule, self.pipeline_rank)
        self.confirmed: set[Action] = set()  # sends that are known to have arrived later
        self.confirmed.update(*self.arrivals.values())
        # Of every sum the next summand; summands that came too early, by microbatch.
        self.next_summand: dict[ValueId, int] = defaultdict(int)
        self.early: dict[ValueId, dict[int, Instruction]] = defaultdict(dict)
        self.messages: dict[tuple, tuple[Value, ...]] = {}

    def instructions_in_order(self) -> list[Instruction]:
        actions = self.schedule.ranks[self.pipeline_rank]
        broadcast = self._outputs()
        outputs = broadcasts(self.schedule, self.pipeline_rank, broadcast)
        for number, action in enumerate(actions):
            self.instructions += outputs.get(number, ())
            if action.kind.startswith("SEND"):
                self._send(action)
            elif action.kind.startswith("RECV"):
                self._receive(action)
            else:
                self._run(action)
        self.instructions += outputs.get(len(actions), ())
        return self.instructions

    def _outputs(self) -> dict[ValueId, Output]:
        """What all ranks need: sums over microbatches, and rows of each."""
        found: dict[ValueId, Output] = {}
        for microbatch, units in enumerate(self.cuts):
            makers = self.makers[units]
            for number, value in enumerate(units.heads):
                stage = self.stage_of[makers[value].segment]
                name = self._output_id(number, microbatch)
                found[name] = Output(stage, value)
        return found

    def _output_id(self, number: int, microbatch: int) -> ValueId:
        if number in self.summed:
            return ValueId("sum", number)
        return ValueId("row", number, microbatch)

    # ---- units and sums

    def _run(self, action: Action) -> None:
        units, microbatch = self.cuts[action.microbatch], action.microbatch
        segments = self.stages[action.stage]
        if action.segment is not None:
            segments = [segments[action.segment]]
        for segment in segments if action.kind == "F" else reversed(segments):
            unit = units.units[action.kind, segment]
            reads = tuple(self._id(value, microbatch) for value in unit.inputs)
            writes = tuple(_made(value, microbatch) for value in unit.outputs)
            run = Instruction(RUN, action, reads, writes, unit=unit)
            self.instructions.append(run)
            results = self.results[units]
            for value in unit.outputs:
                for name in results.get(value, ()):
                    self._add(name, value, action)

    def _add(
        self,
        name: int | OfArg,
        value: Value,
        action: Action,
    ) -> None:
        """Add a value to the sum of an output or of a partial gradient, in microbatch order."""
        microbatch = action.microbatch
        summand = _made(value, microbatch)
        dtype = None
        if isinstance(name, OfArg):
            dtype = self.accumulate_dtypes.get(name.arg)
        elif name not in self.summed:
            row = ValueId("row", name, microbatch)
            only = Instruction(ADD, action, (summand,), (row,))
            self.instructions.append(only)
            return
        total = ValueId("sum", name)
        early = self.early[total]
        early[microbatch] = Instruction(
            ADD,
            action,
            reads=(summand,),
            writes=(total,),
            nth=microbatch,
            dtype=dtype,
        )
        while self.next_summand[total] in early:
            nth = self.next_summand[total]
            self.instructions.append(early.pop(nth))
            self.next_summand[total] += 1

    def _id(self, value: Value, microbatch: int) -> ValueId:
        if value.kind == "param":
            return ValueId("param", value.index)
        if value.kind == "batch":
            return ValueId("batch", value.index, microbatch)
        if value.kind == "const":
            first = self.first_with[self.cuts[microbatch]]
            return ValueId("const", value.name, first)
        return _made(value, microbatch)

    # ---- messages between stages

    def _send(self, action: Action) -> None:
        values, peer = self._sent_values(action)
        self.instructions.append(
            Instruction(
                SEND,
                action,
                reads=tuple(_made(value, action.microbatch) for value in values),
                writes=self._sent(action) if action in self.confirmed else (),
                values=values,
                peer=peer,
            )
        )

    def _receive(self, action: Action) -> None:
        assert action.peer is not None
        half, microbatch = action.kind[-1], action.microbatch
        values = self._message(half, action.peer, self.pipeline_rank, microbatch)
        arrived: list[ValueId] = []
        for send in self.arrivals[action]:
            arrived += self._sent(send)
        self.instructions.append(
            Instruction(
                RECV,
                action,
                reads=tuple(arrived),
                writes=tuple(_made(value, microbatch) for value in values),
                values=values,
                peer=self.schedule.placement[action.peer],
            )
        )

    def _sent(self, send: Action) -> tuple[ValueId, ...]:
        """What holds the values of a message until it has arrived."""
        values, peer = self._sent_values(send)
        names = (f"{value.name} to {peer}" for value in values)
        return tuple(ValueId("sent", name, send.microbatch) for name in names)

    def _sent_values(self, send: Action) -> tuple[tuple[Value, ...], int]:
        """The values of a message, and the pipeline rank that gets them."""
        assert send.peer is not None
        peer = self.schedule.placement[send.peer]
        half = send.kind[-1]
        values = self._message(half, send.stage, peer, send.microbatch)
        return values, peer

    def _message(
        self,
        half: str,
        stage: int,
        reader: int,
        microbatch: int,
    ) -> tuple[Value, ...]:
        """What a stage makes that any stage of a pipeline rank reads: the same at both ends, in the
        same order."""
        units = self.cuts[microbatch]
        key = (units, half, stage, reader)
        if key not in self.messages:
            read = self._read_on(units, reader)
            made = [value for value in read if self._is_made_by(units, value, half, stage)]
            self.messages[key] = tuple(made)
        return self.messages[key]

    def _read_on(self, units: Units, pipeline_rank: int) -> dict[Value, None]:
        """What the units of a pipeline rank read, in order."""
        read: dict[Value, None] = {}
        for unit in units.units.values():
            stage = self.stage_of[unit.segment]
            if self.schedule.placement[stage] == pipeline_rank:
                read.update(dict.fromkeys(unit.inputs))
        return read

    def _is_made_by(
        self,
        units: Units,
        value: Value,
        half: str,
        stage: int,
    ) -> bool:
        maker = self.makers[units].get(value)
        if maker is None:
            return False
        return half_of(maker) == half and self.stage_of[maker.segment] == stage


def _made(value: Value, microbatch: int) -> ValueId:
    return ValueId("value", value.name, microbatch)


def _results_of(units: Units) -> dict[Value, list[int | OfArg]]:
    """For every value the outputs and the partial gradients that it is."""
    found: dict[Value, list[int | OfArg]] = defaultdict(list)
    for number, value in enumerate(units.heads):
        found[value].append(number)
    for arg, partials in enumerate(units.grads):
        for nth, value in enumerate(partials):
            name = OfArg(ArgId(arg), nth)
            found[value].append(name)
    return found
