"""Verify: run a program on names alone, before it runs on tensors.

Proves that every slot that an instruction reads holds what its row says, that nothing is read after
it was freed, that every gather and reduction is waited for once, and that every sum gets its
summands in order.
"""

from __future__ import annotations

from funcpipe._src.program.instructions import ADD, GATHER, REDUCE, WAIT, Name, Program
from funcpipe._src.program.slots import FIXED
from funcpipe.errors import ScheduleError


def verify(program: Program) -> None:
    """ScheduleError when a program would read what is not there; such a program is a mistake of
    funcpipe's own."""
    held: dict[int, Name] = {}
    turns: dict[Name, int] = {}
    pending: set[Name] = set()
    for place, (row, i) in enumerate(zip(program.rows, program.instructions, strict=True)):
        for name, slot in zip(row.reads, i.reads, strict=True):
            if name[0] not in FIXED and held.get(slot) != name:
                raise _wrong(
                    program, place, f"reads {name} from slot {slot}, which holds {held.get(slot)}"
                )
        if row.op == ADD:
            if turns.get(row.writes[0], 0) != row.turn:
                raise _wrong(
                    program, place, f"adds summand {row.turn} to {row.writes[0]} out of turn"
                )
            turns[row.writes[0]] = row.turn + 1
        if row.op in (GATHER, REDUCE):
            pending.update(row.writes)
        if row.op == WAIT:
            pending.difference_update(row.reads)
        for slot in i.frees:
            held.pop(slot, None)
        held.update(
            (slot, name)
            for name, slot in zip(row.writes, i.writes, strict=True)
            if slot not in i.frees
        )
    if pending:
        raise _wrong(program, len(program.rows), f"never waits for {sorted(pending)}")


def _wrong(program: Program, place: int, what: str) -> ScheduleError:
    action = program.rows[place].action if place < len(program.rows) else "the end"
    return ScheduleError(
        f"rank {program.place} of the pipeline, instruction {place} ({action}): {what}"
    )
