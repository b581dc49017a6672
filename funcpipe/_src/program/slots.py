"""Slots: every value gets a slot; a slot is used again after the last instruction that reads it.

In: instructions. Out: `Program`: the same instructions with what each frees, and a slot per value.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from funcpipe._src.graph.ids import OfArg, ValueId
from funcpipe._src.program.instructions import INPUTS, RESULTS, Instruction, Program
from funcpipe._src.program.memory import usage


def allocate_slots(
    pipeline_rank: int,
    instructions: Sequence[Instruction],
) -> Program:
    """The program of a list of instructions."""
    freed = with_frees(instructions)
    slot_of: dict[ValueId, int] = {}
    for slot, value in enumerate(_outside(freed)):
        slot_of[value] = slot
    free: list[int] = []
    slots = len(slot_of)
    for instruction in freed:
        for value in instruction.writes:
            if value not in slot_of:
                slot_of[value] = heapq.heappop(free) if free else slots
                slots = max(slots, slot_of[value] + 1)
        for value in instruction.frees:
            heapq.heappush(free, slot_of[value])
    return Program(
        pipeline_rank=pipeline_rank,
        instructions=freed,
        slot_of=slot_of,
        slots=slots,
        inputs=tuple(value for value in slot_of if value.kind in INPUTS),
        outputs=tuple(value for value in slot_of if is_output(value)),
        partial_grads=tuple(value for value in slot_of if is_partial_grad(value)),
        usage=usage(freed),
    )


def is_partial_grad(value: ValueId) -> bool:
    """Whether a value is the sum of a partial gradient over microbatches."""
    return value.kind == "sum" and isinstance(value.name, OfArg)


def is_output(value: ValueId) -> bool:
    """Whether a value is what a step takes away beside gradients."""
    return value.kind in RESULTS and not is_partial_grad(value)


def with_frees(
    instructions: Sequence[Instruction],
) -> tuple[Instruction, ...]:
    """The instructions, each with the values that no later one reads."""
    last: dict[ValueId, int] = {}
    for number, instruction in enumerate(instructions):
        for value in (*instruction.reads, *instruction.writes):
            last[value] = number
    out = []
    for number, instruction in enumerate(instructions):
        ended = []
        for value in dict.fromkeys((*instruction.reads, *instruction.writes)):
            if last[value] == number and not _is_outside(value):
                ended.append(value)
        out.append(replace(instruction, frees=tuple(ended)))
    return tuple(out)


def _outside(instructions: Sequence[Instruction]) -> dict[ValueId, None]:
    """What a step brings and takes away, in the order in which instructions name it."""
    found: dict[ValueId, None] = {}
    for instruction in instructions:
        for value in (*instruction.reads, *instruction.writes):
            if _is_outside(value):
                found[value] = None
    return found


def _is_outside(value: ValueId) -> bool:
    return value.kind in INPUTS or value.kind in RESULTS
