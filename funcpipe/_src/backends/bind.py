"""Binding: fills a program with what only a rank knows: what runs, its slots, its peers' ranks.

In: a program, a communicator, a backend. Out: `BoundProgram`, which
`funcpipe._src.runtime.interpreter` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from funcpipe._src.backends import weight_buckets
from funcpipe._src.backends.accumulate import adders
from funcpipe._src.backends.backend import Backend, Run
from funcpipe._src.backends.fusion import fused_pairs, gradient_gemms, numbers_of
from funcpipe._src.backends.grad_accumulation import materialized
from funcpipe._src.backends.weight_buckets import Tensors
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.tensor_layout import is_dense, message_strides
from funcpipe._src.graph.ids import ValueId
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program import GATHER, RECV, REDUCE, SEND, Instruction, Program

Values = tuple[ValueId, ...]
Mover = Callable[[list[Any]], Any]


class BoundInstruction(NamedTuple):
    """An instruction as a rank runs it.

    Args:
        op: of the instruction.
        run: from what the slots in ``reads`` hold to what goes to ``writes``. ADD runs on what its
            sum holds, and what is added.
        reads, writes, frees: slots.
        peer: the rank at the other end of a message.
        channel: of a message.
    """

    op: str
    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]
    peer: int
    channel: str


@dataclass(frozen=True, eq=False)
class BoundProgram:
    """A program as a rank runs it.

    Args:
        instructions: in order, one for each of the program.
        slots: how many slots they use.
    """

    instructions: tuple[BoundInstruction, ...]
    slots: int


class _Work(NamedTuple):
    """What runs in place of an instruction, and on which values."""

    run: Callable[..., Any]
    reads: Values
    writes: Values
    frees: Values


def bind(
    program: Program,
    comm: Communicator,
    backend: Backend,
    ranks: Sequence[int],
    name: str,
) -> BoundProgram:
    """The program of one rank, ready to run.

    Args:
        program: of the rank's pipeline rank.
        comm: the rank's communicator.
        backend: what runs units.
        ranks: the rank at every pipeline rank.
        name: of the ``value_and_grad``, so that two of them have channels of their own.
    """
    bound = []
    works = _works(program, comm, backend)
    for instruction, work in zip(program.instructions, works, strict=True):
        bound.append(
            BoundInstruction(
                op=instruction.op,
                run=work.run,
                reads=_slots(program, work.reads),
                writes=_slots(program, work.writes),
                frees=_slots(program, work.frees),
                peer=ranks[instruction.peer] if instruction.peer >= 0 else -1,
                channel=channel_of(instruction, name),
            )
        )
    return BoundProgram(tuple(bound), program.slots)


def channel_of(instruction: Instruction, name: str) -> str:
    """The channel on which a message of a ``value_and_grad`` travels."""
    return name + instruction.action.kind[-1]


def _slots(program: Program, values: Values) -> tuple[int, ...]:
    return tuple(map(program.slot_of.__getitem__, values))


def _works(
    program: Program,
    comm: Communicator,
    backend: Backend,
) -> list[_Work]:
    """What runs in place of every instruction."""
    gemms = gradient_gemms(program, backend)
    adder_of = adders(program, backend, gemms)
    fused = _fused_works(program, backend, gemms)
    works = []
    for number, instruction in enumerate(program.instructions):
        if number in fused:
            works.append(fused[number])
            continue
        run: Callable[..., Any]
        if instruction.unit is not None:
            numbers = numbers_of(gemms, instruction.writes)
            run = backend(instruction.unit.code, numbers)
        elif number in adder_of:
            run = adder_of[number]
        else:
            run = _mover(instruction, comm)
        works.append(_Work(run, instruction.reads, instruction.writes, instruction.frees))
    return works


# ---- units that run as one


def _fused_works(
    program: Program,
    backend: Backend,
    gemms: frozenset[ValueId],
) -> dict[int, _Work]:
    """Both units of a pair run in place of the first; the second only puts down what it made."""
    works: dict[int, _Work] = {}
    if not backend.fuses:
        return works
    for pair in fused_pairs(program):
        first = program.instructions[pair.first]
        second = program.instructions[pair.second]
        numbers = numbers_of(gemms, pair.writes)
        both = _Both(backend(pair.code, numbers), len(pair.kept))
        early = tuple(value for value in second.frees if value in pair.reads)
        frees = (*early, *first.frees)
        works[pair.first] = _Work(both.first, pair.reads, pair.kept, frees)
        works[pair.second] = _Work(both.second, (), second.writes, second.frees)
    return works


class _Both:
    """Two units as one: the first call runs both, the second hands out what is left."""

    def __init__(self, run: Run, kept: int) -> None:
        self.run, self.kept = run, kept
        self.left: list[Any] = []

    def first(self, inputs: list[Any]) -> Sequence[Any]:
        outputs = self.run(inputs)
        self.left.append(outputs[self.kept :])
        return outputs[: self.kept]

    def second(self, _: list[Any]) -> Sequence[Any]:
        return self.left.pop()


# ---- what moves values


def _mover(instruction: Instruction, comm: Communicator) -> Mover:
    """What an instruction that moves values does with what it reads."""
    if instruction.op in (SEND, RECV):
        layouts = [_Layout(value) for value in instruction.values]
        return partial(_dense if instruction.op == SEND else _empty, layouts)
    bucket = instruction.bucket
    assert bucket is not None
    if instruction.op == GATHER:
        return weight_buckets.gather(bucket, comm)
    if instruction.op == REDUCE:
        reduce = weight_buckets.reduce(bucket, comm)
        return partial(_reduce, reduce, bucket.dtype)
    return _wait


class _Layout:
    """How a value travels: in the traced memory order if that is dense, else row by row; the reader
    was traced so."""

    def __init__(self, value: Value) -> None:
        like = torch.empty_strided(
            value.shape,
            value.stride,
            dtype=value.dtype,
            device="meta",
        )
        self.like = like if is_dense(like) else like.contiguous()
        self.strides = self.like.stride()
        self.empty = partial(
            torch.empty_strided,
            value.shape,
            self.strides,
            dtype=value.dtype,
            device=value.device,
        )

    def dense(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.stride() == self.strides:
            return tensor
        if message_strides(tensor) == message_strides(self.like):
            return tensor
        return self.empty().copy_(tensor)


def _dense(layouts: list[_Layout], tensors: Tensors) -> Tensors:
    pairs = zip(layouts, tensors, strict=True)
    return [layout.dense(tensor) for layout, tensor in pairs]


def _empty(layouts: list[_Layout], _: list[Any]) -> Tensors:
    return [layout.empty() for layout in layouts]


def _reduce(
    reduce: Callable,
    dtype: torch.dtype,
    grads: list[Any],
) -> Any:
    return reduce([materialized(grad, dtype) for grad in grads])


def _wait(pending: list[Any]) -> Any:
    return pending[0].wait()
