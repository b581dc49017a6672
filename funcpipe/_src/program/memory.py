"""Memory: the bytes that a program holds, instruction by instruction, as
`funcpipe._src.runtime.interpreter` holds them.

In: instructions with what each frees; perhaps what a backend changes. Out: `Usage`, or a curve.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from funcpipe._src.graph.ids import ValueId
from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    RECV,
    REDUCE,
    WAIT,
    Bucket,
    Instruction,
    Program,
    Usage,
    tensors_of,
)


@dataclass(frozen=True)
class Change:
    """How a backend runs an instruction otherwise than it is written.

    Args:
        peak: bytes that the unit takes for itself at its peak.
        writes, frees: the values that hold something after it, and those that do no more.
        dtype: in which a sum is held.
        last_dtype: in which its last summand leaves it, where that is another one.
    """

    peak: int = 0
    writes: tuple[ValueId, ...] = ()
    frees: tuple[ValueId, ...] = ()
    dtype: torch.dtype | None = None
    last_dtype: torch.dtype | None = None


class Changes(NamedTuple):
    """All that a backend does otherwise (`funcpipe._src.backends.fusion`).

    Args:
        of_instruction: by the number of the instruction.
        gradient_gemms: the gradients that are added to their sums without being made first.
    """

    of_instruction: Mapping[int, Change]
    gradient_gemms: frozenset[ValueId]


def usage(instructions: Sequence[Instruction], changes: Changes | None = None) -> Usage:
    """What a program takes.

    Args:
        instructions: with what each frees.
        changes: those of a backend.
    """
    memory = _Memory(instructions, changes.gradient_gemms if changes else frozenset())
    for number, instruction in enumerate(instructions):
        memory.step(instruction, changes.of_instruction.get(number) if changes else None)
    return Usage(
        activations=memory.peak,
        residuals=memory.residuals,
        gathered=memory.gathered.peak,
        gradients=memory.sums.peak,
        step=memory.step_peak,
    )


def held(program: Program) -> Iterator[tuple[int, int]]:
    """For every instruction the bytes of activations and residuals while it runs, and after it."""
    memory = _Memory(program.instructions)
    for instruction in program.instructions:
        memory.peak = memory.values.now
        memory.step(instruction)
        yield memory.peak, memory.values.now


class _Live:
    """Bytes that some values hold. Values may share memory, which counts once."""

    def __init__(self) -> None:
        self.users: dict[Hashable, int] = defaultdict(int)
        self.held: dict[ValueId, tuple[Hashable, int]] = {}
        self.now = self.peak = 0

    def hold(
        self,
        value: ValueId,
        memory: Hashable,
        nbytes: int,
    ) -> None:
        before = self.held.get(value)
        self.held[value] = memory, nbytes
        if not self.users[memory]:
            self.now += nbytes
        self.users[memory] += 1
        self.peak = max(self.peak, self.now)
        if before is not None:
            self._release(*before)

    def drop(self, value: ValueId) -> None:
        if value in self.held:
            self._release(*self.held.pop(value))

    def _release(self, memory: Hashable, nbytes: int) -> None:
        self.users[memory] -= 1
        if not self.users[memory]:
            self.now -= nbytes


class _Memory:
    """What a program holds, as `funcpipe._src.runtime.interpreter` holds it."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        gradient_gemms: frozenset[ValueId] = frozenset(),
    ) -> None:
        self.tensors, self.gradient_gemms = tensors_of(instructions), gradient_gemms
        self.values, self.gathered, self.sums = _Live(), _Live(), _Live()
        self.shards: dict[ValueId, tuple[int, torch.dtype]] = {}  # elements and dtype, sums too
        self.peak = self.residuals = self.step_peak = 0

    def step(self, instruction: Instruction, change: Change | None = None) -> None:
        """Follow one instruction."""
        writes, frees = instruction.writes, instruction.frees
        if instruction.unit is not None:
            own = instruction.unit.code.peak
            if change is not None:
                own, writes, frees = change.peak, change.writes, change.frees
            self.peak = max(self.peak, self.values.now + own)
            self._note_step_peak(own)
        for value in writes:
            self._write(instruction, value, change)
        self._note_step_peak()
        if instruction.op == RECV:  # until it is here, what was sent before is still held
            self._note_residuals()
        for value in frees:
            for live in (self.values, self.gathered, self.sums):
                live.drop(value)
        self._note_residuals()

    def _note_residuals(self) -> None:
        """What is held between two units."""
        self.residuals = max(self.residuals, self.values.now)
        self.peak = max(self.peak, self.values.now)

    def _note_step_peak(self, own: int = 0) -> None:
        """The peak of all at once, while a unit takes ``own`` bytes for itself."""
        now = self.values.now + own + self.gathered.now + self.sums.now
        self.step_peak = max(self.step_peak, now)

    def _write(
        self,
        instruction: Instruction,
        value: ValueId,
        change: Change | None,
    ) -> None:
        if value.kind in ("value", "sent"):
            tensor = self.tensors[value]
            nbytes = 0 if value in self.gradient_gemms else tensor.nbytes
            self.values.hold(value, (tensor.storage, value.microbatch), nbytes)
        elif instruction.op == ADD:
            self._add(instruction, change)
        elif instruction.bucket is not None:
            self._travel(instruction, value, instruction.bucket)
        else:  # a sum that another rank made
            self.sums.hold(value, value, self.tensors[value].nbytes)

    def _add(self, instruction: Instruction, change: Change | None) -> None:
        """The first summand is the sum; the second makes a new tensor, to which the others are
        added. A gradient GEMM adds to a sum that is there; and the last sum may be cast."""
        (total,) = instruction.writes
        (summand,) = instruction.reads
        gemm = summand in self.gradient_gemms
        if change is not None and change.last_dtype is not None:
            elements, _ = self.shards[total]
            self.sums.hold(total, (total, "last"), elements * change.last_dtype.itemsize)
            return
        if instruction.nth > (0 if gemm else 1):
            return
        memory, nbytes, elements, dtype = self._summand(summand)
        held_dtype = (change and change.dtype) or instruction.dtype or dtype
        self.shards[total] = elements, held_dtype
        if instruction.nth == 0 and held_dtype == dtype and not gemm:
            self.sums.hold(total, memory, nbytes)
        else:
            self.sums.hold(total, (total, instruction.nth), elements * held_dtype.itemsize)

    def _summand(self, summand: ValueId) -> tuple[Hashable, int, int, torch.dtype]:
        """Memory, bytes, elements and dtype."""
        if summand.kind == "value":
            tensor = self.tensors[summand]
            memory = (tensor.storage, summand.microbatch)
            return memory, tensor.nbytes, torch.Size(tensor.shape).numel(), tensor.dtype
        return *self.sums.held[summand], *self.shards[summand]

    def _travel(
        self,
        instruction: Instruction,
        value: ValueId,
        bucket: Bucket,
    ) -> None:
        """A collective under way takes a bucket of all ranks, and in a reduction the shards that
        arrive; a gathered arg is a part of its bucket, or a copy."""
        of_all_ranks = bucket.parts * bucket.nbytes
        if instruction.op == GATHER:
            self.gathered.hold(value, value, of_all_ranks)
            return
        if instruction.op == REDUCE:
            self.sums.hold(value, value, of_all_ranks)
            arriving = _arriving(value)
            self.sums.hold(arriving, arriving, bucket.nbytes)
            return
        assert instruction.op == WAIT
        (pending,) = instruction.reads
        entry = bucket.entries[instruction.writes.index(value)]
        if value.kind == "gathered":
            copied = bucket.parts * entry.shard_elements * bucket.dtype.itemsize
            own, shared = (value, copied), (pending, of_all_ranks)
            self.gathered.hold(value, *(own if bucket.copied else shared))
            return
        arriving = _arriving(pending)
        self.shards[value] = entry.shard_elements, bucket.dtype
        self.sums.hold(value, arriving, bucket.nbytes)
        if value == instruction.writes[-1]:
            self.sums.drop(arriving)


def _arriving(pending: ValueId) -> ValueId:
    """What a reduction under way fills."""
    return pending._replace(name=f"{pending.name}, arriving")
