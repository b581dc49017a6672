"""Pieces of a program that are timed at once, and tensors for them to run on.

A *piece* is one unit, or two that the backend runs as one, and the sums behind them.

In: the program of one rank that has all segments. Out: for every distinct piece, functions that run
it on tensors that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.fusion import pairs
from funcpipe._src.comm import Communicator
from funcpipe._src.graph.partition import Key
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program import ADD, RUN, Program
from funcpipe._src.program.instructions import Name
from funcpipe._src.runtime.interpreter import Bound, Slots, bind, execute

# The third of four microbatches is timed: its gradients are neither the first nor the last ones of
# their sums.
MICROBATCHES, _TIMED = 4, 2

Run = Callable[[], None]
Used = Counter[tuple]
Tensors = dict[tuple, torch.Tensor]  # by shape, stride, dtype, and a number among those alike


class Piece(NamedTuple):
    """Some instructions of a program.

    Args:
        start, end: from which one to before which one.
        units: the units among them.
        key: equal pieces have one key.
    """

    start: int
    end: int
    units: tuple[Key, ...]
    key: tuple


def pieces_of(program: Program, backend: Backend) -> Iterator[Piece]:
    """The pieces of the microbatch that is timed."""
    rows = program.rows
    joined = dict(pairs(program)) if backend.fuses else {}
    end = 0
    while end < len(rows):
        start = end
        end += 1
        if rows[start].op != RUN or rows[start].action.microbatch != _TIMED:
            continue
        end = joined.get(start, start) + 1
        while end < len(rows) and rows[end].op == ADD:
            end += 1
        yield _piece(program, start, end)


def _piece(program: Program, start: int, end: int) -> Piece:
    units, codes, sums = [], [], []
    for row in program.rows[start:end]:
        if row.unit is not None:
            units.append((row.unit.kind, row.unit.segment))
            codes.append((row.unit.kind, row.unit.code.key))
        if row.op == ADD:
            sums.append((row.turn, row.dtype))
    key = (*codes, tuple(sums))
    return Piece(start, end, tuple(units), key)


def ready_pieces(
    programs: Iterable[Program],
    comm: Communicator,
    backend: Backend,
    known: dict[Name, torch.Tensor],
    sets: int,
) -> list[list[Run]]:
    """For every distinct piece, functions that run it, each on a set of tensors of its own.

    Args:
        known: inputs whose content is known.
        sets: how many for each piece.
    """
    ready: dict[tuple, list[Run]] = {}
    tensors: Tensors = {}
    for program in programs:
        bench = Bench(program, comm, backend, known, tensors)
        for piece in pieces_of(program, backend):
            if piece.key not in ready:
                ready[piece.key] = bench.ready(piece, sets)
    return list(ready.values())


class Bench:
    """A program whose pieces run on their own.

    Args:
        known: inputs whose content is known.
        tensors: the others; pieces share them, so that all of them fit together.
    """

    def __init__(
        self,
        program: Program,
        comm: Communicator,
        backend: Backend,
        known: dict[Name, torch.Tensor],
        tensors: Tensors,
    ) -> None:
        self.program = program
        self.comm = comm
        self.known = known
        self.tensors = tensors
        self.bound = bind(program, (comm.rank,), "profile", comm, backend)
        self.values: dict[Name, Value] = {}
        self.first_sums: dict[Name, Bound] = {}
        for row, instruction in zip(program.rows, self.bound, strict=True):
            if row.unit is not None:
                inputs = row.unit.inputs
                self.values.update(zip(row.reads, inputs, strict=True))
            if row.op == ADD and row.turn == 0:
                (total,) = row.writes
                self.first_sums[total] = instruction

    def ready(self, piece: Piece, sets: int) -> list[Run]:
        """Functions that run a piece, no two on the same tensors."""
        used: Used = Counter()
        return [self._ready(piece, used) for _ in range(sets)]

    def _ready(self, piece: Piece, used: Used) -> Run:
        """A function that runs a piece; ``used``: how many tensors of each kind others use."""
        slots = self._inputs(piece, used)
        part = self.bound[piece.start : piece.end]
        rows = self.program.rows[piece.start : piece.end]
        after = list(slots)
        for row, instruction in zip(rows, part, strict=True):
            if row.op == ADD:  # the sum so far: of this gradient alone
                first = self.first_sums[row.writes[0]]
                instruction = first._replace(
                    reads=instruction.reads,
                    frees=instruction.frees,
                )
            execute([instruction], after, self.comm)
        for instruction in part:
            if instruction.op == ADD:
                total = instruction.writes[0]
                slots[total] = after[total]

        def run() -> None:
            execute(part, list(slots), self.comm)

        return run

    def _inputs(self, piece: Piece, used: Used) -> Slots:
        """Slots with what the units of a piece read and do not make."""
        slots: Slots = [None] * self.program.slots
        made: set[Name] = set()
        for position in range(piece.start, piece.end):
            row = self.program.rows[position]
            instruction = self.program.instructions[position]
            reads = zip(row.reads, instruction.reads, strict=True)
            for name, slot in reads if row.op == RUN else ():
                if name not in made:
                    slots[slot] = self._input(name, used)
            made.update(row.writes)
        return slots

    def _input(self, name: Name, used: Used) -> torch.Tensor:
        key = name
        if name[0] == "batch":  # the same in every microbatch
            key = ("batch", name[2])
        known = self.known.get(key)
        value = self.values[name]
        return _input(value, known, self.comm.device, self.tensors, used)


def _input(
    value: Value,
    known: torch.Tensor | None,
    device: torch.device,
    tensors: Tensors,
    used: Used,
) -> torch.Tensor:
    """A tensor of a value's shape: what is known to stand there, else small random numbers, or
    zeros where it may be an index."""
    if known is not None and tuple(known.shape) == value.shape:
        return known.to(device)
    layout = value.shape, value.stride
    dtype = value.dtype
    kind = (*layout, dtype)
    used[kind] += 1
    key = (*kind, used[kind])
    if key not in tensors:
        tensor = torch.empty_strided(*layout, dtype=dtype, device=device)
        if dtype.is_floating_point:
            tensor.normal_(std=0.02)
        else:
            tensor.zero_()
        tensors[key] = tensor
    return tensors[key]
