"""Memory: the bytes that a program holds, instruction by instruction, as
`funcpipe._src.runtime.interpreter` holds them.

In: the rows of a program with the names that end at each; perhaps what a backend changes. Out:
`Usage`, or a curve.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    RECV,
    REDUCE,
    WAIT,
    Bucket,
    Name,
    Row,
    Usage,
)

if TYPE_CHECKING:
    from funcpipe._src.program.instructions import Program


@dataclass(frozen=True)
class Change:
    """What a backend does otherwise than a row says.

    Args:
        peak: bytes that the unit takes for itself at its peak.
        writes, dead: the names that hold something after it, and those that do no more.
        dtype: in which a sum is held.
        last: that in which it is left, by its last summand, where that is another one.
    """

    peak: int = 0
    writes: tuple[Name, ...] = ()
    dead: tuple[Name, ...] = ()
    dtype: torch.dtype | None = None
    last: torch.dtype | None = None


class Changes(NamedTuple):
    """All that a backend does otherwise: by row; and the values that it never makes
    (`funcpipe._src.backends.fusion`)."""

    rows: Mapping[int, Change]
    products: frozenset[Name]


def usage(rows: Iterable[tuple[Row, Iterable[Name]]], changes: Changes | None = None) -> Usage:
    """What a program takes.

    Args:
        rows: each with the names that no later one reads.
        changes: those of a backend.
    """
    memory = _Memory(changes.products if changes else frozenset())
    for k, (row, dead) in enumerate(rows):
        memory.step(row, dead, changes.rows.get(k) if changes else None)
    return Usage(memory.peak, memory.kept, memory.gathered.peak, memory.sums.peak, memory.step_peak)


def ended(program: Program) -> Iterator[tuple[Row, list[Name]]]:
    """The rows of a program, each with the names that no later one reads."""
    for row, i in zip(program.rows, program.instructions, strict=True):
        names = dict(zip((*row.reads, *row.writes), (*i.reads, *i.writes), strict=True))
        yield row, [n for n, slot in names.items() if slot in i.frees]


def held(program: Program) -> Iterator[tuple[int, int]]:
    """For every instruction the bytes of activations and residuals while it runs, and after it."""
    memory = _Memory()
    for row, dead in ended(program):
        memory.peak = memory.values.now
        memory.step(row, dead)
        yield memory.peak, memory.values.now


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
    """What a program holds, as `funcpipe._src.runtime.interpreter` holds it."""

    def __init__(self, products: frozenset[Name] = frozenset()) -> None:
        self.products = products
        self.values, self.gathered, self.sums = _Live(), _Live(), _Live()
        self.elements: dict[Name, tuple[int, torch.dtype]] = {}
        self.peak = self.kept = self.step_peak = 0

    def step(self, row: Row, dead: Iterable[Name], change: Change | None = None) -> None:
        """Go on by an instruction, after which some names hold nothing any more."""
        if row.unit is not None:
            own = row.unit.code.peak if change is None else change.peak
            self.peak = max(self.peak, self.values.now + own)
            self._all(own)
        for n in row.writes if change is None or row.unit is None else change.writes:
            self._write(row, n, change)
        self._all()
        if row.op == RECV:  # what arrives lies beside what has left until it is here
            self._between()
        for n in dead if change is None or row.unit is None else change.dead:
            for live in (self.values, self.gathered, self.sums):
                live.drop(n)
        self._between()

    def _between(self) -> None:
        """What is held between two units."""
        self.kept = max(self.kept, self.values.now)
        self.peak = max(self.peak, self.values.now)

    def _all(self, own: int = 0) -> None:
        """The peak of all at once, while a unit takes so much for itself."""
        self.step_peak = max(
            self.step_peak, self.values.now + own + self.gathered.now + self.sums.now
        )

    def _write(self, row: Row, n: Name, change: Change | None) -> None:
        if n[0] == "value":
            self.values.hold(n, (n[1].storage, n[2]), 0 if n in self.products else n[1].nbytes)
        elif n[0] == "sent":
            self.values.hold(n, (n[1].storage, n[2]), n[1].nbytes)
        elif row.op == ADD:
            self._add(row, n, change)
        elif row.bucket is not None:
            self._travel(row, n, row.bucket)
        else:  # a sum that another place made
            self.sums.hold(n, n, row.values[row.writes.index(n)].nbytes)

    def _add(self, row: Row, n: Name, change: Change | None) -> None:
        """The first summand is the sum; the second makes a new one, to which the others are added.
        A product is added to a sum that is there; and the last sum may be cast."""
        source = row.reads[0]
        product = source in self.products
        if change is not None and change.last is not None:
            self.sums.hold(n, (n, "last"), self.elements[n][0] * change.last.itemsize)
            return
        if row.turn > (0 if product else 1):
            return
        memory: Hashable
        if source[0] == "value":
            value = source[1]
            held, dtype = value.nbytes, value.dtype
            memory = (value.storage, source[2])
            elements = torch.Size(value.shape).numel()
        else:
            memory, held = self.sums.held[source]
            elements, dtype = self.elements[source]
        wanted = (change and change.dtype) or row.dtype or dtype
        self.elements[n] = elements, wanted
        if row.turn == 0 and wanted == dtype and not product:
            self.sums.hold(n, memory, held)
        else:
            self.sums.hold(n, (n, row.turn), elements * wanted.itemsize)

    def _travel(self, row: Row, n: Name, bucket: Bucket) -> None:
        """What is under way takes a bucket on all ranks, and in a reduction the shards that arrive;
        a whole leaf is a part of its bucket, or a copy."""
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
