"""Verify: follows a program slot by slot, before it runs on tensors.

Proves that every slot that an instruction reads holds the value it names, that nothing is read
after it was freed, that every collective is waited for once, and that every sum gets its summands
in order.

In: a `Program`. Out: nothing, or `ScheduleError`.
"""

from __future__ import annotations

from collections import defaultdict

from funcpipe._src.graph.ids import ValueId
from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    INPUTS,
    REDUCE,
    WAIT,
    Instruction,
    Program,
)
from funcpipe.errors import ScheduleError


def verify(program: Program) -> None:
    """Check a program.

    Raises:
        ScheduleError: it would read what is not there; such a program is a mistake of funcpipe.
    """
    held: dict[int, ValueId] = {}
    summands: dict[ValueId, int] = defaultdict(int)
    pending: set[ValueId] = set()
    for number, instruction in enumerate(program.instructions):
        for value in instruction.reads:
            slot = program.slot_of[value]
            if value.kind not in INPUTS and held.get(slot) != value:
                fault = f"reads {value} from slot {slot}, which holds {held.get(slot)}"
                raise _wrong(program, number, fault)
        if instruction.op == ADD:
            (total,) = instruction.writes
            if summands[total] != instruction.nth:
                raise _wrong(program, number, f"adds summand {instruction.nth} to {total} too soon")
            summands[total] += 1
        if instruction.op in (GATHER, REDUCE):
            pending.update(instruction.writes)
        if instruction.op == WAIT:
            pending.difference_update(instruction.reads)
        _hold(program, instruction, held)
    if pending:
        names = ", ".join(sorted(map(str, pending)))
        raise _wrong(program, len(program.instructions), f"never waits for {names}")


def _hold(
    program: Program,
    instruction: Instruction,
    held: dict[int, ValueId],
) -> None:
    """Note what slots hold after an instruction."""
    for value in instruction.frees:
        held.pop(program.slot_of[value], None)
    for value in instruction.writes:
        if value not in instruction.frees:
            held[program.slot_of[value]] = value


def _wrong(
    program: Program,
    number: int,
    fault: str,
) -> ScheduleError:
    instructions = program.instructions
    action = instructions[number].action if number < len(instructions) else "the end"
    return ScheduleError(
        f"rank {program.pipeline_rank} of the pipeline, instruction {number} ({action}): {fault}"
    )
