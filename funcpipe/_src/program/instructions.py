"""Instructions: what a rank does for one ``value_and_grad``, as data.

In: nothing. Out: `Instruction` and `Program`, which print themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.graph.ids import ArgId, ValueId
from funcpipe._src.graph.partition import Unit
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program.shard_shapes import shard_elements
from funcpipe._src.schedule.actions import Action

RUN = "run"
SEND = "send"
RECV = "recv"
ADD = "add"
GATHER = "gather"
REDUCE = "reduce"
WAIT = "wait"

INPUTS = ("param", "batch", "const")  # kinds of values that a step brings
RESULTS = ("sum", "row")  # kinds of values that it takes away


class BucketEntry(NamedTuple):
    """One arg in a bucket.

    Args:
        arg: which.
        shape: of the arg, unsharded.
        shard_elements: of one rank's shard, padding included.
    """

    arg: ArgId
    shape: tuple[int, ...]
    shard_elements: int

    @classmethod
    def of(cls, arg: int, shape: tuple[int, ...], parts: int) -> BucketEntry:
        """An arg that is sharded over so many ranks."""
        elements = shard_elements(torch.Size(shape).numel(), parts)
        return cls(ArgId(arg), shape, elements)

    @property
    def numel(self) -> int:
        """Elements of the arg, unsharded."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Bucket:
    """Args that travel in one collective.

    Args:
        axes: the axes that they are sharded over, in mesh order.
        parts: the number of ranks on them.
        entries: the args.
        dtype: in which they travel.
        summed: for gradients: those of the axes that split the batch (reduce-scatter); on the
            others a rank takes its slice.
    """

    axes: Axes
    parts: int
    entries: tuple[BucketEntry, ...]
    dtype: torch.dtype
    summed: Axes = ()

    @property
    def shard_elements(self) -> int:
        """Elements that one rank brings or gets."""
        return sum(entry.shard_elements for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes that one rank brings or gets."""
        return self.shard_elements * self.dtype.itemsize

    @property
    def copied(self) -> bool:
        """Whether args are copied out of what was gathered; a single one is a view of it."""
        return self.parts > 1 and len(self.entries) > 1

    def __str__(self) -> str:
        count = len(self.entries)
        leaves = "1 leaf" if count == 1 else f"{count} leaves"
        return f"{leaves} of {self.dtype} over {', '.join(map(repr, self.axes))}"


@dataclass(frozen=True, eq=False)
class Instruction:
    """One thing a rank does.

    Args:
        op: RUN, SEND, RECV, GATHER, REDUCE, WAIT or ADD.
        action: the action of the schedule that it belongs to.
        reads, writes: in the order of the unit's inputs and outputs, of the values of a message, or
            of the bucket's entries. GATHER and REDUCE write one value, which WAIT reads. ADD adds
            ``reads[0]`` to ``writes[0]``. SEND writes what holds its values until a RECV reads it,
            which tells that the other rank has them; the last sends write nothing.
        frees: what no later instruction reads.
        unit: for RUN: what runs.
        values: for SEND and RECV: what is moved, in order.
        peer: for SEND and RECV: the pipeline rank at the other end.
        bucket: for GATHER, REDUCE and WAIT.
        nth: for ADD: how many summands the sum holds already.
        dtype: for ADD: of the sum, where it is not the summand's.
    """

    op: str
    action: Action
    reads: tuple[ValueId, ...] = ()
    writes: tuple[ValueId, ...] = ()
    frees: tuple[ValueId, ...] = ()
    unit: Unit | None = None
    values: tuple[Value, ...] = ()
    peer: int = -1
    bucket: Bucket | None = None
    nth: int = 0
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        """One line, the same in every process."""
        words = [f"{self.action} {self.op}", self._what, f"{_listed(self.reads)} ->"]
        words.append(_listed(self.writes))
        if self.frees:
            words.append(f"frees {_listed(self.frees)}")
        return " ".join(word for word in words if word)

    @property
    def _what(self) -> str:
        if self.unit is not None:
            return str(self.unit)
        if self.bucket is not None:
            return str(self.bucket)
        if self.op == ADD:
            dtype = "" if self.dtype is None else f" in {self.dtype}"
            return f"summand {self.nth}{dtype}"
        way = "to" if self.op == SEND else "from"
        moved = ", ".join(f"{value} {value.stride}" for value in self.values)
        return f"{way} rank {self.peer}: {moved}:"


def _listed(values: tuple[ValueId, ...]) -> str:
    return f"({', '.join(map(str, values))})"


class Usage(NamedTuple):
    """Bytes that a program takes at its peaks.

    Args:
        activations: with residuals and a unit's own intermediates.
        residuals: of that, what is held between units.
        gathered: gathered params, those under way included.
        gradients: sums, with gradients that are being reduced.
        step: all of them at once.
    """

    activations: int
    residuals: int
    gathered: int
    gradients: int
    step: int


@dataclass(frozen=True, eq=False)
class Program:
    """What one rank does for one ``value_and_grad``.

    Args:
        pipeline_rank: the rank's number on the pipe axis.
        instructions: in order.
        slot_of: for every value its slot, which holds nothing else as long as the value is needed.
        slots: how many slots there are.
        inputs: what a step brings: params, leaves of microbatches, constants.
        outputs: sums of the total, the weight and averaged aux tensors, and the aux tensors that
            are kept for every microbatch; those of other pipeline ranks arrive here too.
        partial_grads: sums of partial gradients.
        usage: the bytes that it is predicted to take.
    """

    pipeline_rank: int
    instructions: tuple[Instruction, ...]
    slot_of: Mapping[ValueId, int]
    slots: int
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
    partial_grads: tuple[ValueId, ...]
    usage: Usage

    @cached_property
    def tensors(self) -> Mapping[ValueId, Value]:
        """Shape, dtype and bytes of what units make and messages bring."""
        return tensors_of(self.instructions)

    def __str__(self) -> str:
        named = self.usage._asdict().items()
        peaks = ", ".join(f"{name} {nbytes}" for name, nbytes in named)
        rank = f"pipeline rank {self.pipeline_rank}"
        lines = [f"{rank}, slots: {self.slots}, bytes at their peak: {peaks}"]
        for instruction in self.instructions:
            lines.append(f"  {instruction}")
        return "\n".join(lines)


def tensors_of(instructions: Iterable[Instruction]) -> dict[ValueId, Value]:
    """Shape, dtype and bytes of what units make and messages bring."""
    found: dict[ValueId, Value] = {}
    for instruction in instructions:
        if instruction.unit is not None:
            found.update(zip(instruction.writes, instruction.unit.outputs, strict=True))
        elif instruction.writes and instruction.op in (SEND, RECV):
            found.update(zip(instruction.writes, instruction.values, strict=True))
    return found
