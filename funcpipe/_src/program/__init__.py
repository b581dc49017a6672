"""Programs: the units of a loss and a schedule, lowered to what one rank does.

Terms. An *instruction* is an action with its inputs, outputs and peers filled in: run a unit, send
or receive a message, gather the shards of params, reduce gradients to shards, add to an
accumulator. It reads and writes *slots*, the numbered places of one list. The first slots hold what
a step brings (params, constants, the batch); the others are planned: a slot is free again after the
last instruction that reads it, so there are as many as values live at once, not one per microbatch.
An *accumulator* is a slot that holds a sum over microbatches: of the total, the weight, a partial
gradient.
Sums are taken in microbatch order, whatever the schedule: a value that comes early waits.

In: for every microbatch its `Cut`, the segments of every stage, a checked schedule with its sends
and receives, which leaves are sharded, and a place on the pipe axis. Out: `Program`.

- `instructions.py`: the data.
- `lowering.py`: units and schedule to *rows*, instructions that name values instead of slots.
- `output_broadcast.py`: the sums that every rank needs travel there, with no rank waiting for
  another to end.
- `weight_sharding.py`: the gathers and reductions of sharded leaves, put between those rows.
- `slots.py`: names become slots; predicted memory.
- `memory.py`: the bytes that a program takes.
- `verify.py`: runs a program on names alone: every slot holds what its reader expects.
"""

from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    RECV,
    REDUCE,
    RUN,
    SEND,
    WAIT,
    Bucket,
    Instruction,
    Piece,
    Program,
    Usage,
)
from funcpipe._src.program.lowering import (
    check_alike,
    check_same_order,
    lower,
    owners,
    partial_segments,
    stage_edges,
)
from funcpipe._src.program.memory import Change, Changes, ended, usage
from funcpipe._src.program.weight_sharding import Sharded, Sharding

__all__ = [
    "ADD",
    "GATHER",
    "RECV",
    "REDUCE",
    "RUN",
    "SEND",
    "WAIT",
    "Bucket",
    "Change",
    "Changes",
    "Instruction",
    "Piece",
    "Program",
    "Sharded",
    "Sharding",
    "Usage",
    "check_alike",
    "check_same_order",
    "ended",
    "lower",
    "owners",
    "partial_segments",
    "stage_edges",
    "usage",
]
