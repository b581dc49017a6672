"""Execute: the loop that runs a program, instruction by instruction. Nothing is decided here that a
plan could decide.

In: a program bound to a communicator, and the list of slots with what the step brings. Out: the
same list, with the accumulators filled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.fusion import Work, fused
from funcpipe._src.backends.grad_accumulation import made
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.tensor_layout import is_dense, message_strides
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program import ADD, GATHER, RECV, REDUCE, SEND, Instruction, Program
from funcpipe._src.runtime import weight_buckets as shards

Slots = list[Any]


class Bound(NamedTuple):
    """An instruction with its peers' ranks and buffers filled in. ADD runs on what its sum holds,
    and what is added."""

    op: str
    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]
    peer: int
    channel: str


def bind(
    program: Program, ranks: tuple[int, ...], name: str, comm: Communicator, backend: Backend
) -> list[Bound]:
    """The instructions of a program for one rank.

    Args:
        program: of the rank's place on the pipe axis.
        ranks: the rank at every place on that axis.
        name: of the ``value_and_grad``, so that two of them have channels of their own.
        comm: the rank's communicator.
        backend: what runs units.
    """
    work, sums = fused(program, backend)
    return [
        Bound(
            i.op,
            *(work.get(k) or Work(sums.get(k) or _runner(i, comm), i.reads, i.writes, i.frees)),
            ranks[i.peer] if i.peer >= 0 else -1,
            name + i.action.kind[-1],
        )
        for k, i in enumerate(program.instructions)
    ]


def _runner(i: Instruction, comm: Communicator) -> Callable[[list[Any]], Any]:
    """What an instruction that moves values does with what it reads."""
    if i.op in (SEND, RECV):
        wires = [_Wire(v) for v in i.values]
        if i.op == SEND:
            return lambda xs: [w.dense(x) for w, x in zip(wires, xs, strict=True)]
        return lambda _: [w.empty() for w in wires]
    assert i.bucket is not None
    if i.op == GATHER:
        return shards.gather(i.bucket, comm)
    if i.op == REDUCE:
        reduce, dtype = shards.reduce(i.bucket, comm), i.bucket.dtype
        return lambda xs: reduce([made(x, dtype) for x in xs])
    return lambda xs: xs[0].wait()


class _Wire:
    """How a value travels: in the traced memory order if that is dense, else row by row; the reader
    was traced so."""

    def __init__(self, v: Value) -> None:
        meta = torch.empty_strided(v.shape, v.stride, dtype=v.dtype, device="meta")
        self.like = meta if is_dense(meta) else meta.contiguous()
        self.shape, self.strides = v.shape, self.like.stride()
        self.empty = partial(
            torch.empty_strided, self.shape, self.strides, dtype=v.dtype, device=v.device
        )

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        if x.stride() == self.strides or message_strides(x) == message_strides(self.like):
            return x
        return self.empty().copy_(x)


def execute(program: list[Bound], slots: Slots, comm: Communicator) -> None:
    """Run a bound program. Values leave their slots at their last use, so that a unit can free them
    while it runs."""
    made: Any
    for op, run, reads, writes, frees, peer, channel in program:
        if op is ADD:
            slots[writes[0]] = run(slots[writes[0]], slots[reads[0]])
            for i in frees:
                slots[i] = None
            continue
        if op is RECV:
            made = comm.recv(run([]), peer, channel)
            for k, i in enumerate(writes):
                slots[i] = made[k]
            comm.settle([slots[i] for i in reads])  # messages that have arrived, as this one tells
            for i in frees:
                slots[i] = None
            del made
            continue
        args = [slots[i] for i in reads]
        for i in frees:
            slots[i] = None
        made = comm.send(run(args), peer, channel) if op is SEND else run(args)
        for k, i in enumerate(writes):
            slots[i] = made[k]
        del made
        del args  # nothing outlives its slot
