"""Fusion: what a compiled backend does with the units of a program beyond running them one after
another.

- A gradient that is a matrix product (or an embedding's) and that nothing but its sum reads is
  never made: its unit hands out a gradient GEMM, and ADD takes that into the sum in one pass
  (`grad_accumulation.py`). A gradient that is reduced is made in the dtype in which it travels.
- F and B (or I) of a segment that run back to back, as in the last stage, are compiled as one
  (`joined_units.py`).
- Sums of gradients are held in more bits (`accumulate.py`).

In: a program, a backend. Out: which gradients are GEMMs, which units run as one, and what that
changes about memory. Instructions keep their order and their slots.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from funcpipe._src.backends.accumulate import (
    additions,
    final_dtype,
    is_gradient,
    last_summands,
    sum_dtype,
)
from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.grad_accumulation import Form, form_of, outputs_of
from funcpipe._src.backends.joined_units import Wire, join_units
from funcpipe._src.graph.ids import ValueId
from funcpipe._src.graph.unit_code import Code
from funcpipe._src.program import ADD, GATHER, REDUCE, Change, Changes, Instruction, Program


def changes(program: Program, backend: Backend) -> Changes | None:
    """What fusion changes about memory; None for nothing."""
    if not backend.fuses:
        return None
    gemms = gradient_gemms(program, backend)
    found: dict[int, Change] = {}
    for number, instruction in enumerate(program.instructions):
        if instruction.unit is not None:
            numbers = numbers_of(gemms, instruction.writes)
            found[number] = Change(
                peak=backend.peak(instruction.unit.code, numbers),
                writes=instruction.writes,
                frees=instruction.frees,
            )
    lasts = last_summands(program)
    for number, add in additions(program):
        last = lasts[add.writes[0]]
        dtype = sum_dtype(add, last, backend, program)
        final = final_dtype(add, last, backend, program)
        found[number] = Change(dtype=dtype, last_dtype=final)
    for pair in fused_pairs(program):
        found.update(_changes_of(pair, program, backend, gemms))
    return Changes(found, gemms)


def _changes_of(
    pair: FusedPair,
    program: Program,
    backend: Backend,
    gemms: frozenset[ValueId],
) -> dict[int, Change]:
    """Both run in place of the first."""
    first = program.instructions[pair.first]
    second = program.instructions[pair.second]
    numbers = numbers_of(gemms, pair.writes)
    peak = backend.peak(pair.code, numbers)
    early, late = [], []
    for value in second.frees:
        made = value in pair.kept or value not in first.writes
        if value in second.reads:
            early.append(value)
        elif made:
            late.append(value)
    return {
        pair.first: Change(peak, pair.writes, (*first.frees, *early)),
        pair.second: Change(0, (), tuple(late)),
    }


def numbers_of(
    gemms: frozenset[ValueId],
    outputs: Sequence[ValueId],
) -> tuple[int, ...]:
    """The numbers of the outputs that a unit hands out as gradient GEMMs."""
    numbers = []
    for number, value in enumerate(outputs):
        if value in gemms:
            numbers.append(number)
    return tuple(numbers)


# ---- gradient GEMMs


def gradient_gemms(program: Program, backend: Backend) -> frozenset[ValueId]:
    """The values that are handed out as gradient GEMMs: those that a reduction alone reads, or a
    sum, all of whose summands are such."""
    if not backend.fuses:
        return frozenset()
    forms = _Forms(program)
    found: set[ValueId] = set()
    for instruction in program.instructions:
        if instruction.op == REDUCE:
            found.update(forms.reduced(instruction))
    sums: dict[ValueId, list[Instruction]] = defaultdict(list)
    for _, add in additions(program):
        if is_gradient(add.writes[0]):
            sums[add.writes[0]].append(add)
    for adds in sums.values():
        last = len(adds) - 1
        summands = [add.reads[0] for add in adds]
        dtypes = [sum_dtype(add, last, backend, program) for add in adds]
        if all(map(forms.fits, summands, dtypes)):
            found.update(summands)
    return frozenset(found)


class _Forms:
    """How the values of a program are matrix products."""

    def __init__(self, program: Program) -> None:
        self.made_by: dict[ValueId, tuple[Code, int]] = {}
        self.readers = _readers(program)
        self.known: dict[tuple[str, int], Form | None] = {}
        for instruction in program.instructions:
            if instruction.unit is not None:
                for number, value in enumerate(instruction.writes):
                    self.made_by[value] = instruction.unit.code, number

    def fits(self, value: ValueId, dtype: torch.dtype | None) -> bool:
        """Whether a value is a matrix product that a sum of a dtype takes in, and nobody else
        reads it."""
        if value not in self.made_by or dtype is None:
            return False
        if self.readers[value] > 1:
            return False
        form = self._form(*self.made_by[value])
        return form is not None and form.adds_to(dtype)

    def reduced(self, instruction: Instruction) -> list[ValueId]:
        """What fits of the gradients that are reduced."""
        bucket = instruction.bucket
        assert bucket is not None
        return [value for value in instruction.reads if self.fits(value, bucket.dtype)]

    def _form(self, code: Code, number: int) -> Form | None:
        key = (code.key, number)
        if key not in self.known:
            outputs = outputs_of(code.module.graph)
            self.known[key] = form_of(outputs[number])
        return self.known[key]


# ---- units that run back to back


@dataclass(frozen=True)
class FusedPair:
    """Two units that run as one, in place of the first.

    Args:
        first, second: the numbers of their instructions.
        code: of both.
        reads: what they read from outside.
        kept: the outputs of the first that others than the second read.
        writes: what the code makes: those, then the outputs of the second.
    """

    first: int
    second: int
    code: Code
    reads: tuple[ValueId, ...]
    kept: tuple[ValueId, ...]
    writes: tuple[ValueId, ...]


def fused_pairs(program: Program) -> Iterator[FusedPair]:
    """The units of a program that run as one."""
    readers = _readers(program)
    codes: dict[str, Code] = {}
    joined: dict[tuple, Code] = {}
    for numbers in adjacent_units(program):
        first, second = (program.instructions[number] for number in numbers)
        assert first.unit is not None and second.unit is not None
        reads = _outside_reads(first, second)
        wires = tuple(_wire(value, first, reads) for value in second.reads)
        kept = []
        for number, value in enumerate(first.writes):
            other_readers = readers[value] - (value in second.reads)
            if other_readers:
                kept.append(number)
        key = (first.unit.code, second.unit.code, wires, tuple(kept))
        if key not in joined:
            joined[key] = join_units(*key, codes)
        kept_values = tuple(first.writes[number] for number in kept)
        yield FusedPair(
            *numbers,
            code=joined[key],
            reads=reads,
            kept=kept_values,
            writes=(*kept_values, *second.writes),
        )


def _readers(program: Program) -> Counter[ValueId]:
    """How often instructions read a value."""
    readers: Counter[ValueId] = Counter()
    for instruction in program.instructions:
        readers.update(instruction.reads)
    return readers


def _outside_reads(first: Instruction, second: Instruction) -> tuple[ValueId, ...]:
    """What two units read that the first of them does not make."""
    reads = dict.fromkeys(first.reads)
    for value in second.reads:
        if value not in first.writes:
            reads[value] = None
    return tuple(reads)


def _wire(
    value: ValueId,
    first: Instruction,
    reads: tuple[ValueId, ...],
) -> Wire:
    if value in first.writes:
        return Wire(True, first.writes.index(value))
    return Wire(False, reads.index(value))


def adjacent_units(program: Program) -> Iterator[tuple[int, int]]:
    """The numbers of F and B, or I, of one segment and microbatch with nothing between them but
    sums, and gathers for later units, which then start a little later."""
    instructions = program.instructions
    for number, first in enumerate(instructions):
        if first.unit is None or first.unit.kind != "F":
            continue
        for behind in range(number + 1, len(instructions)):
            second = instructions[behind]
            if second.op in (ADD, GATHER):
                continue
            if _is_backward_of(first, second):
                yield number, behind
            break


def _is_backward_of(first: Instruction, second: Instruction) -> bool:
    if first.unit is None or second.unit is None:
        return False
    if second.unit.kind not in "BI":
        return False
    same_segment = first.unit.segment == second.unit.segment
    same_microbatch = first.action.microbatch == second.action.microbatch
    return same_segment and same_microbatch
