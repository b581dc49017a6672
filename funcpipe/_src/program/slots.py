"""Names become slots; a slot is used again after the last instruction that reads it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from funcpipe._src.program.instructions import Instruction, Name, Program, Row
from funcpipe._src.program.memory import usage

FIXED = ("param", "batch", "const")  # what a step brings
SUMS = ("head", "row", "grad")  # what it takes away


def allocate(place: int, rows: Sequence[Row]) -> Program:
    """The program of a list of rows."""
    last: dict[Name, int] = {}
    slots: dict[Name, int] = {}
    for i, row in enumerate(rows):
        last.update((n, i) for n in (*row.reads, *row.writes))
        for n in (*row.reads, *row.writes):
            if n[0] in FIXED or n[0] in SUMS:
                slots.setdefault(n, len(slots))
    size, free = len(slots), list[int]()
    out, ends = [], list[list[Name]]()
    for i, row in enumerate(rows):
        for n in row.writes:
            if n not in slots:
                slots[n] = heapq.heappop(free) if free else size
                size = max(size, slots[n] + 1)
        names = dict.fromkeys((*row.reads, *row.writes))
        dead = [n for n in names if last[n] == i and n[0] not in FIXED and n[0] not in SUMS]
        out.append(_instruction(row, slots, dead))
        ends.append(dead)
        for n in dead:
            heapq.heappush(free, slots.pop(n))

    def pick(kind: str) -> dict:
        return {(n[1] if len(n) == 2 else n[1:]): s for n, s in slots.items() if n[0] == kind}

    return Program(
        place=place,
        instructions=tuple(out),
        rows=tuple(rows),
        params=pick("param"),
        batch=pick("batch"),
        constants=pick("const"),
        heads=pick("head"),
        kept=pick("row"),
        partials=pick("grad"),
        slots=size,
        usage=usage(zip(rows, ends, strict=True)),
    )


def _instruction(row: Row, slots: dict[Name, int], dead: Iterable[Name]) -> Instruction:
    return Instruction(
        op=row.op,
        action=row.action,
        reads=tuple(slots[n] for n in row.reads),
        writes=tuple(slots[n] for n in row.writes),
        frees=tuple(slots[n] for n in dead),
        unit=row.unit,
        values=row.values,
        peer=row.peer,
        bucket=row.bucket,
        turn=row.turn,
        dtype=row.dtype,
    )
