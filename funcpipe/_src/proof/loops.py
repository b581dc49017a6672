"""Loops over rows: in two recordings of different lengths, ``sum(f(row) for row in x)`` becomes one
op for any row, and a sum over rows.

A loop is rolled up if every turn does the same with its row, and a sum, a stack or a cat of all
rows is all that joins them. The length of a turn is that of the last turn in the longer recording.

In: the entries of two recordings, from where rows are taken apart. Out: the same entries with one
turn of the loop each; or None if it is no such loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from funcpipe._src.proof.recording import RecordedOp, TensorRef, refs, writes

ONE = "one_row"
SUM = "sum_of_rows"
STACK = "stack_of_rows"
CAT = "cat_of_rows"
_JOINS = {"stack": STACK, "cat": CAT}
Entries = list[RecordedOp]


def rolled(
    local: Sequence[RecordedOp], full: Sequence[RecordedOp]
) -> tuple[Entries, Entries] | None:
    """The entries of both recordings from a loop on, rolled up; both begin with an ``unbind``."""
    of_rank = _Loop(local)
    of_one = _Loop(full)
    own, other = [], []
    pairs = zip(_unbinds(local), _unbinds(full), strict=False)
    for unbind, partner in pairs:
        if of_rank.takes_apart(unbind) and of_one.takes_apart(partner):
            own.append(unbind)
            other.append(partner)
    of_rank.follow(own)
    of_one.follow(other)
    longest = of_rank if of_rank.turns >= of_one.turns else of_one
    if longest.turns < 2:
        return None
    last = longest.turns - 1
    length = len(longest.entries_of[last])
    rolled_local = of_rank.roll(length)
    rolled_full = of_one.roll(length)
    if rolled_local is None or rolled_full is None:
        return None
    return rolled_local, rolled_full


def _operands(entry: RecordedOp) -> set[int]:
    """The numbers of the tensors that an op takes."""
    operands = refs(entry.args.values())
    return {operand.number for operand in operands}


def _unbinds(entries: Sequence[RecordedOp]) -> Entries:
    return [entry for entry in entries if entry.name == "unbind"]


class _Made(NamedTuple):
    """What a turn made: of which row, and the same of the first row."""

    row: int
    first: TensorRef


@dataclass(frozen=True)
class _Sum:
    """A sum of some rows.

    Args:
        item: what it adds up, of the first row.
        rows: which rows are in it.
        start: what it began with.
    """

    item: TensorRef | None
    rows: frozenset[int]
    start: Any


class _Loop:
    """The entries of one recording from a loop on; the first takes rows apart."""

    def __init__(self, entries: Sequence[RecordedOp]) -> None:
        self.entries = entries
        self.turns = len(entries[0].outs)
        self.unbinds: Entries = []
        self.entries_of: dict[int, Entries] = {row: [] for row in range(self.turns)}
        self.made: dict[int, _Made] = {}
        self.sums: dict[int, _Sum] = {}

    def takes_apart(self, unbind: RecordedOp) -> bool:
        """Whether an ``unbind`` gives one tensor for each turn."""
        return len(unbind.outs) == self.turns

    def follow(self, unbinds: Entries) -> None:
        """See which entries come from which rows."""
        self.unbinds = unbinds
        row_of: dict[int, int] = {}
        of_several: set[int] = set()
        for entry in self.entries:
            if self._is_unbind(entry):
                for row, out in enumerate(entry.outs):
                    row_of[out.number] = row
                continue
            numbers = _operands(entry)
            rows = {row_of[number] for number in numbers if number in row_of}
            outs = [out.number for out in entry.outs]
            if len(rows) > 1 or not of_several.isdisjoint(numbers):
                of_several.update(outs)
            elif rows:
                row = rows.pop()
                self.entries_of[row].append(entry)
                row_of.update(dict.fromkeys(outs, row))

    def _is_unbind(self, entry: RecordedOp) -> bool:
        return any(entry is unbind for unbind in self.unbinds)

    def roll(self, length: int) -> Entries | None:
        """The entries with one turn, which has so many entries."""
        for unbind in self.unbinds:
            first_row = unbind.outs[0]
            for row, out in enumerate(unbind.outs):
                self.made[out.number] = _Made(row, first_row)
        first_turn = self.entries_of[0][:length]
        turn_of: dict[int, int] = {}
        for row, entries in self.entries_of.items():
            turn = entries[:length]
            if len(turn) != length:
                return None
            for entry, first in zip(turn, first_turn, strict=True):
                if not self._alike(entry, first, row):
                    return None
                turn_of[id(entry)] = row
        return self._with_joins(turn_of)

    def _alike(self, entry: RecordedOp, first: RecordedOp, row: int) -> bool:
        """Whether an entry does to its row what one of the first row does."""
        if entry.name != first.name:
            return False
        if entry.grad != first.grad:
            return False
        if _changes_numbers(entry):
            return False
        if entry.args.keys() != first.args.keys():
            return False
        if len(entry.outs) != len(first.outs):
            return False
        for name, value in entry.args.items():
            if not self._same(value, first.args[name], row):
                return False
        for out, of_first in zip(entry.outs, first.outs, strict=True):
            self.made[out.number] = _Made(row, of_first)
            if out.shape != of_first.shape:
                return False
        return True

    def _same(self, value: Any, first: Any, row: int) -> bool:
        if isinstance(value, TensorRef) and isinstance(first, TensorRef):
            made = self.made.get(value.number, _Made(row, value))
            return made == (row, first)
        if _is_list(value) and _is_list(first):
            if len(value) != len(first):
                return False
            rows = itertools.repeat(row)
            return all(map(self._same, value, first, rows))
        if type(value) is not type(first):
            return False
        return bool(value == first)

    # ---- what joins rows

    def _with_joins(self, turn_of: dict[int, int]) -> Entries | None:
        """All entries, one turn of the loop among them, and the joins of rows as single ones."""
        found: Entries = []
        for entry in self.entries:
            if self._is_unbind(entry):
                operand = entry.args["self"]
                first = entry.outs[:1]
                found.append(_row_op(entry, ONE, operand, first))
            elif id(entry) in turn_of:
                if turn_of[id(entry)] == 0:
                    found.append(entry)
            else:
                joined = self._join(entry)
                if joined is None:
                    return None
                found += joined
        return found

    def _join(self, entry: RecordedOp) -> Entries | None:
        """What an entry outside of the turns becomes; None if it joins rows in another way."""
        operands = _operands(entry)
        if operands.isdisjoint(self.made) and operands.isdisjoint(self.sums):
            return [entry]
        if entry.name in _JOINS:
            return self._join_all(entry)
        adds = entry.name in ("add", "add_") and not writes(entry)
        if not adds or entry.args["alpha"] != 1:
            return None
        left = entry.args["self"]
        right = entry.args["other"]
        total = self._sum(left, right)
        if total is None:
            return None
        if len(total.rows) == self.turns:
            return _whole_sum(entry, total)
        self.sums[entry.outs[0].number] = total
        return []

    def _join_all(self, entry: RecordedOp) -> Entries | None:
        """A stack or cat of all rows, in their order."""
        tensors = entry.args["tensors"]
        rows = []
        firsts = set()
        for tensor in tensors:
            made = self.made.get(tensor.number)
            if made is None:
                return None
            rows.append(made.row)
            firsts.add(made.first.number)
        if rows != list(range(self.turns)):
            return None
        if len(firsts) > 1:
            return None
        name = _JOINS[entry.name]
        return [_row_op(entry, name, tensors[0], entry.outs)]

    def _sum(self, left: Any, right: Any) -> _Sum | None:
        """What two terms, some of them rows or sums of rows, add up to."""
        first = self._term(left)
        second = self._term(right)
        if not first.rows.isdisjoint(second.rows):
            return None
        if _is_zero(second.start):
            start = first.start
        elif _is_zero(first.start):
            start = second.start
        else:
            return None
        item = first.item or second.item
        if item is None:
            return None
        other = second.item or item
        if other.number != item.number:
            return None
        rows = first.rows | second.rows
        return _Sum(item, rows, start)

    def _term(self, term: Any) -> _Sum:
        if isinstance(term, TensorRef):
            if term.number in self.sums:
                return self.sums[term.number]
            if term.number in self.made:
                made = self.made[term.number]
                rows = frozenset([made.row])
                return _Sum(made.first, rows, start=0)
        return _Sum(None, frozenset(), term)


def _row_op(
    entry: RecordedOp,
    name: str,
    operand: TensorRef,
    outs: tuple[TensorRef, ...],
) -> RecordedOp:
    """An op of one row, or of all, in the place of an entry."""
    args = {"self": operand, "dim": entry.args["dim"]}
    return replace(entry, name=name, func=None, args=args, outs=outs)


def _whole_sum(entry: RecordedOp, total: _Sum) -> Entries:
    """The sum over all rows, and what it began with added to it."""
    item = total.item
    assert item is not None
    of_rows = replace(entry, name=SUM, func=None, args={"self": item})
    if _is_zero(total.start):
        return [of_rows]
    out = entry.outs[0]
    between = replace(item, number=-1 - out.number)
    args = {"self": between, "other": total.start, "alpha": 1}
    with_start = replace(entry, name="add", args=args)
    return [replace(of_rows, outs=(between,)), with_start]


def _is_zero(start: Any) -> bool:
    return isinstance(start, int | float) and start == 0


def _changes_numbers(entry: RecordedOp) -> bool:
    """Whether an op changes numbers of an operand; not only its shape."""
    if not writes(entry):
        return False
    return torch.Tag.inplace_view not in entry.func.tags


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
