"""Programs: the units of a loss and a schedule, lowered to what one rank does.

An instruction is an action of the schedule with its inputs, outputs and peers filled in: run a
unit, send or receive a message, gather the shards of params, reduce gradients to shards, add to a
sum. It reads and writes values, which are named by ids. Every value lies in one slot of a list as
long as it is needed; then another value may take the slot, so there are as many slots as values
that are needed at once, not one per microbatch. Sums are taken in microbatch order, whatever the
schedule: a summand that comes early waits.

In: for every microbatch its `Units`, the segments of every stage, a checked schedule with its sends
and receives, which args are sharded, and a pipeline rank. Out: `Program`.

- `instructions.py`: the data.
- `lowering.py`: `lower_rank`, from units and schedule to a program.
- `output_broadcast.py`: the messages that bring loss and aux to all ranks.
- `weight_sharding.py`: the gathers and reductions of sharded args.
- `slots.py`: a slot for every value.
- `memory.py`: the bytes that a program takes.
- `verify.py`: follows a program slot by slot: every slot holds what its reader expects.
- `dependencies.py`: what stages and params need of one another.
- `shard_shapes.py`: which elements of a leaf a rank holds.
"""

from funcpipe._src.program.dependencies import (
    check_alike,
    check_same_order,
    owners,
    partial_segments,
    stage_edges,
)
from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    RECV,
    REDUCE,
    RUN,
    SEND,
    WAIT,
    Bucket,
    BucketEntry,
    Instruction,
    Program,
    Usage,
)
from funcpipe._src.program.lowering import lower_rank
from funcpipe._src.program.memory import Change, Changes, usage
from funcpipe._src.program.weight_sharding import ShardedArg, Sharding

__all__ = [
    "ADD",
    "GATHER",
    "RECV",
    "REDUCE",
    "RUN",
    "SEND",
    "WAIT",
    "Bucket",
    "BucketEntry",
    "Change",
    "Changes",
    "Instruction",
    "Program",
    "ShardedArg",
    "Sharding",
    "Usage",
    "check_alike",
    "check_same_order",
    "lower_rank",
    "owners",
    "partial_segments",
    "stage_edges",
    "usage",
]
