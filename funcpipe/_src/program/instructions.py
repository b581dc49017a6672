"""Instructions and programs as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.graph.partition import Unit
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.schedule.actions import Action

RUN, SEND, RECV, ADD, GATHER, REDUCE, WAIT = (
    "run",
    "send",
    "recv",
    "add",
    "gather",
    "reduce",
    "wait",
)

# What a slot holds while a program is being written: ("param", leaf), ("full", leaf, n), ("batch",
# m, leaf), ("const", value), ("value", value, m), ("sent", value, m, place), ("pending", n),
# ("shard", leaf, # partial, m), or a sum: ("head", number), ("row", number, m), ("grad", leaf,
# partial), ("whole", # leaf, partial).
Name = tuple


class Piece(NamedTuple):
    """A leaf in a bucket: its number among the params of a call, its full shape, and the elements
    of one shard."""

    leaf: int
    shape: tuple[int, ...]
    chunk: int

    @property
    def numel(self) -> int:
        """Elements of the full leaf."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Bucket:
    """Leaves that travel in one collective.

    Args:
        axes: the axes that they are sharded over, in mesh order.
        parts: the number of ranks on them.
        pieces: the leaves.
        dtype: on the wire.
        summed: for gradients: those of the axes that split the batch (reduce-scatter); on the
            others a rank takes its slice.
    """

    axes: Axes
    parts: int
    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    summed: Axes = ()

    @property
    def chunk(self) -> int:
        """Elements of one rank's part."""
        return sum(p.chunk for p in self.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of one rank's part on the wire."""
        return self.chunk * self.dtype.itemsize

    @property
    def copied(self) -> bool:
        """Whether whole leaves are copied out of what was gathered; a lone leaf is a view of it."""
        return self.parts > 1 and len(self.pieces) > 1

    def __str__(self) -> str:
        some = "1 leaf" if len(self.pieces) == 1 else f"{len(self.pieces)} leaves"
        return f"{some} of {self.dtype} over {', '.join(map(repr, self.axes))}"


@dataclass(frozen=True, eq=False)
class Row:
    """An instruction that names what it reads and writes; the fields are those of `Instruction`."""

    op: str
    action: Action
    reads: tuple[Name, ...] = ()
    writes: tuple[Name, ...] = ()
    unit: Unit | None = None
    values: tuple[Value, ...] = ()
    peer: int = -1
    bucket: Bucket | None = None
    turn: int = 0
    dtype: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class Instruction:
    """One thing a rank does.

    Args:
        op: RUN, SEND, RECV, GATHER, REDUCE, WAIT or ADD.
        action: the action of the schedule that it belongs to.
        reads, writes: slots, in the order of the unit's inputs and outputs, of the values, or of
            the bucket's pieces. GATHER and REDUCE write one slot, which WAIT reads. ADD adds
            ``reads[0]`` to ``writes[0]``. SEND writes what holds its values until a RECV reads it,
            by which the other end has them; those of the last sends it does not write.
        frees: slots that no later instruction reads.
        unit: for RUN: what runs.
        values: for SEND and RECV: what is moved, in order.
        peer: for SEND and RECV: the place on the pipe axis at the other end.
        bucket: for GATHER, REDUCE and WAIT.
        turn: for ADD: how many summands the accumulator holds already.
        dtype: for ADD: of the accumulator, where it is not the summand's.
    """

    op: str
    action: Action
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    unit: Unit | None = None
    values: tuple[Value, ...] = ()
    peer: int = -1
    bucket: Bucket | None = None
    turn: int = 0
    dtype: torch.dtype | None = None

    @property
    def text(self) -> str:
        """On one line, the same in every process."""
        values = ", ".join(f"{v} {v.dtype} {v.shape} {v.stride}" for v in self.values)
        what = self.unit or self.bucket or values
        return (
            f"{self.action} {self.op} {what} {self.reads} -> {self.writes} {self.peer} {self.turn} "
            f"{self.dtype or ''}".strip()
        )


class Usage(NamedTuple):
    """Bytes that a program takes at its peaks.

    Args:
        activations: with residuals and a unit's own intermediates.
        residuals: of that, what is held between units.
        gathered: gathered params, those under way included.
        gradients: accumulators, with gradients that are being reduced.
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
        place: the rank's place on the pipe axis.
        instructions: in order.
        rows: the same, with names: what each slot holds.
        params, batch, constants: the slots of what comes in: by leaf, by (microbatch, leaf), by
            folded value.
        heads: the slots of the sums of total, weight and averaged aux tensors, by number; those of
            other ranks come here.
        kept: the slots of aux tensors that are not summed, by (number, microbatch), those of other
            ranks too.
        partials: the slots of partial gradients, by (leaf of params, number of the partial).
        slots: the length of the list.
        usage: the bytes that it is predicted to take.
    """

    place: int
    instructions: tuple[Instruction, ...]
    rows: tuple[Row, ...]
    params: dict[int, int]
    batch: dict[tuple[int, int], int]
    constants: dict[Value, int]
    heads: dict[int, int]
    kept: dict[tuple[int, int], int]
    partials: dict[tuple[int, int], int]
    slots: int
    usage: Usage

    def __str__(self) -> str:
        peaks = ", ".join(f"{name} {count}" for name, count in self.usage._asdict().items())
        lines = [f"pipeline rank {self.place}, slots: {self.slots}, bytes at their peak: {peaks}"]
        return "\n".join([*lines, *(f"  {instruction.text}" for instruction in self.instructions)])
