"""Names become slots; a slot is used again after the last instruction that reads it. Bytes are counted on the way."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch

from funcpipe.program.instructions import ADD, GATHER, REDUCE, WAIT, Bucket, Instruction, Name, Program, Row

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
        gathered_bytes=memory.gathered.peak,
        grad_bytes=memory.sums.peak,
    )


def held(program: Program) -> Iterator[tuple[int, int]]:
    """For every instruction the bytes of activations and residuals while it runs, and after it."""
    memory = _Memory()
    for row, i in zip(program.rows, program.instructions, strict=True):
        names = dict(zip((*row.reads, *row.writes), (*i.reads, *i.writes), strict=True))
        memory.peak = memory.values.now
        memory.step(row, [n for n, slot in names.items() if slot in i.frees])
        yield memory.peak, memory.values.now


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


class _Live:
    """Bytes of what some names hold. Names may share memory, which counts once."""

    def __init__(self) -> None:
        self.users: dict[Hashable, int] = defaultdict(int)
        self.held: dict[Name, tuple[Hashable, int]] = {}
        self.now = self.peak = 0

    def hold(self, name: Name, memory: Hashable, nbytes: int) -> None:
        before = self.held.get(name)
        self.held[name] = memory, nbytes
        self.now += nbytes if not self.users[memory] else 0
        self.users[memory] += 1
        self.peak = max(self.peak, self.now)
        if before is not None:
            self._release(*before)

    def drop(self, name: Name) -> None:
        if name in self.held:
            self._release(*self.held.pop(name))

    def _release(self, memory: Hashable, nbytes: int) -> None:
        self.users[memory] -= 1
        self.now -= nbytes if not self.users[memory] else 0


class _Memory:
    """What a program holds, as `funcpipe.runtime.execute` holds it."""

    def __init__(self) -> None:
        self.values, self.gathered, self.sums = _Live(), _Live(), _Live()
        self.elements: dict[Name, tuple[int, torch.dtype]] = {}
        self.peak = self.kept = 0

    def step(self, row: Row, dead: Iterable[Name]) -> None:
        if row.unit is not None:
            self.peak = max(self.peak, self.values.now + row.unit.code.peak)
        for n in row.writes:
            self._write(row, n)
        for n in dead:
            for live in (self.values, self.gathered, self.sums):
                live.drop(n)
        self.kept = max(self.kept, self.values.now)
        self.peak = max(self.peak, self.values.now)

    def _write(self, row: Row, n: Name) -> None:
        if n[0] == "value":
            self.values.hold(n, (n[1].storage, n[2]), n[1].nbytes)
        elif row.op == ADD:
            self._add(row, n)
        elif row.bucket is not None:
            self._travel(row, n, row.bucket)

    def _add(self, row: Row, n: Name) -> None:
        """The first summand is the sum; the second makes a new one, to which the others are added."""
        if row.turn > 1:
            return
        source = row.reads[0]
        memory: Hashable
        if source[0] == "value":
            value = source[1]
            held, dtype = value.nbytes, value.dtype
            memory = (value.storage, source[2])
            elements = torch.Size(value.shape).numel()
        else:
            memory, held = self.sums.held[source]
            elements, dtype = self.elements[source]
        wanted = row.dtype or dtype
        self.elements[n] = elements, wanted
        if row.turn == 0 and wanted == dtype:
            self.sums.hold(n, memory, held)
        else:
            self.sums.hold(n, (n, row.turn), elements * wanted.itemsize)

    def _travel(self, row: Row, n: Name, bucket: Bucket) -> None:
        """What is under way takes a bucket on all ranks, and in a reduction the shards that arrive; a whole leaf is a part
        of its bucket, or a copy."""
        whole, piece = bucket.parts * bucket.nbytes, bucket.pieces[row.writes.index(n)]
        arriving = ("arriving", *row.reads[0]) if row.op == WAIT else ("arriving", *n)
        if row.op == GATHER:
            self.gathered.hold(n, n, whole)
        elif row.op == REDUCE:
            self.sums.hold(n, n, whole)
            self.sums.hold(arriving, arriving, bucket.nbytes)
        elif n[0] == "full":
            copied = bucket.parts * piece.chunk * bucket.dtype.itemsize
            self.gathered.hold(n, *((n, copied) if bucket.copied else (row.reads[0], whole)))
        else:
            self.elements[n] = piece.chunk, bucket.dtype
            self.sums.hold(n, arriving, bucket.nbytes)
            if n == row.writes[-1]:
                self.sums.drop(arriving)
