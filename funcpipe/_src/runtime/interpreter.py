"""Interpreter: the loop that runs a program, instruction by instruction. It decides nothing that a
plan could decide.

In: a program bound to a communicator, and the list of slots with what the step brings. Out: the
same list, with the sums filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from funcpipe._src.backends.bind import BoundInstruction, BoundProgram
from funcpipe._src.comm import Communicator
from funcpipe._src.program import ADD, RECV, SEND

Slots = list[Any]


def run(
    bound: BoundProgram,
    slots: Slots,
    comm: Communicator,
) -> None:
    """Run a bound program."""
    run_instructions(bound.instructions, slots, comm)


def run_instructions(
    instructions: Sequence[BoundInstruction],
    slots: Slots,
    comm: Communicator,
) -> None:
    """Run some instructions of a bound program. Values leave their slots at their last use, so that
    a unit can free them while it runs."""
    made: Any
    for op, compute, reads, writes, frees, peer, channel in instructions:
        if op is ADD:
            slots[writes[0]] = compute(slots[writes[0]], slots[reads[0]])
            for slot in frees:
                slots[slot] = None
            continue
        if op is RECV:
            made = comm.recv(compute([]), peer, channel)
            for number, slot in enumerate(writes):
                slots[slot] = made[number]
            # This message tells that earlier ones have arrived at the other end.
            comm.settle([slots[slot] for slot in reads])
            for slot in frees:
                slots[slot] = None
            del made
            continue
        args = [slots[slot] for slot in reads]
        for slot in frees:
            slots[slot] = None
        made = comm.send(compute(args), peer, channel) if op is SEND else compute(args)
        for number, slot in enumerate(writes):
            slots[slot] = made[number]
        del made
        del args  # nothing outlives its slot
