"""Names become slots; a slot is used again after the last instruction that reads it. Bytes are counted on the way."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

from funcpipe.program.instructions import ADD, GATHER, REDUCE, WAIT, Instruction, Name, Program, Row

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
    size, free = len(slots), []
    memory = _Memory()
    out = []
    for i, row in enumerate(rows):
        for n in row.writes:
            if n not in slots:
                slots[n] = heapq.heappop(free) if free else size
                size = max(size, slots[n] + 1)
        names = dict.fromkeys((*row.reads, *row.writes))
        dead = [n for n in names if last[n] == i and n[0] not in FIXED and n[0] not in SUMS]
        out.append(_instruction(row, slots, dead))
        memory.step(row, dead)
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
        peak_bytes=memory.peak,
        kept_bytes=memory.kept,
        gathered_bytes=memory.gathered_peak,
        grad_bytes=memory.sums,
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


class _Memory:
    """Bytes of what is live. Values that share memory count once."""

    def __init__(self) -> None:
        self.users: dict[tuple, int] = defaultdict(int)
        self.now = self.peak = self.kept = self.sums = self.gathered = self.gathered_peak = 0
        self.sizes: dict[Name, int] = {}

    def step(self, row: Row, dead: Iterable[Name]) -> None:
        if row.unit is not None:
            self.peak = max(self.peak, self.now + row.unit.code.peak)
        for n in row.writes:
            self._write(row, n)
        self.gathered_peak = max(self.gathered_peak, self.gathered)
        for n in dead:
            self._drop(n)
        self.kept = max(self.kept, self.now)
        self.peak = max(self.peak, self.now)

    def _write(self, row: Row, n: Name) -> None:
        if n[0] == "value":
            key = (n[1].storage, n[2])
            self.users[key] += 1
            self.now += n[1].nbytes if self.users[key] == 1 else 0
        elif row.op == ADD and n not in self.sizes:
            source = row.reads[0]
            value = source[1] if source[0] == "value" else None
            width = row.dtype.itemsize if row.dtype else value.dtype.itemsize if value else 1
            size = value.nbytes // value.dtype.itemsize * width if value else self.sizes.get(source, 0)
            self.sizes[n] = size
            self.sums += size
        elif row.op == WAIT and row.bucket is not None:
            piece = row.bucket.pieces[row.writes.index(n)]
            elements = piece.numel if n[0] == "full" else piece.chunk
            self.sizes[n] = elements * row.bucket.dtype.itemsize
            self.gathered += self.sizes[n] if n[0] == "full" else 0
            self.sums += self.sizes[n] if n[0] == "grad" else 0
        elif row.op in (GATHER, REDUCE) and row.bucket is not None:
            whole = sum(p.numel for p in row.bucket.pieces) if row.op == GATHER else 0
            self.sizes[n] = whole * row.bucket.dtype.itemsize
            self.gathered += self.sizes[n]

    def _drop(self, n: Name) -> None:
        if n[0] == "value":
            key = (n[1].storage, n[2])
            self.users[key] -= 1
            self.now -= n[1].nbytes if self.users[key] == 0 else 0
        elif n[0] in ("full", "pending"):
            self.gathered -= self.sizes.get(n, 0)
