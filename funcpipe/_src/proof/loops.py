"""Loops over rows: ``sum(f(row) for row in x)`` on two tapes of other lengths becomes one op for
any row, and a sum over rows.

A loop is rolled up if every turn does the same with its row, and nothing else joins the rows than a
sum, a stack or a cat of all of them. What a turn does is read off the last turn of the longer tape.

In: two tapes, and where on each rows are taken apart. Out: their entries from there on, with one
turn of the loop each; or
None: it is no such loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from funcpipe._src.proof.op_recorder import Entry, Ref, refs, writes

ONE, SUM, STACK, CAT = "one_row", "sum_of_rows", "stack_of_rows", "cat_of_rows"
_JOINS = {"stack": STACK, "cat": CAT}


def rolled(a: Sequence[Entry], b: Sequence[Entry]) -> tuple[list[Entry], list[Entry]] | None:
    """The entries of both tapes from a loop on, rolled up; both begin with an ``unbind``."""
    loops = [_Loop(x, len(x[0].outs)) for x in (a, b)]
    pairs = list(zip(*(x.unbinds for x in loops), strict=False))
    both = [
        k
        for k, (x, y) in enumerate(pairs)
        if (len(x.outs), len(y.outs)) == (len(a[0].outs), len(b[0].outs))
    ]
    for x in loops:
        x.follow([x.unbinds[k] for k in both])
    longest = max(loops, key=lambda x: x.turns)
    if longest.turns < 2:
        return None
    length = len(longest.of_row[longest.turns - 1])
    out = [x.roll(length) for x in loops]
    return None if out[0] is None or out[1] is None else (out[0], out[1])


class _Loop:
    """The entries of one tape from a loop on.

    Args:
        turns: how many rows it takes.
    """

    def __init__(self, entries: Sequence[Entry], turns: int) -> None:
        self.entries, self.turns = entries, turns
        self.unbinds = [e for e in entries if e.name == "unbind"]
        self.row: dict[int, int] = {}  # of a tensor that comes from one row: which
        self.joined: set[int] = set()  # tensors that come from several
        self.of_row: list[list[Entry]] = [[] for _ in range(turns)]

    def follow(self, unbinds: Sequence[Entry]) -> None:
        """See which entries come from which rows."""
        self.unbinds = list(unbinds)
        for e in self.entries:
            if any(e is u for u in self.unbinds):
                self.row |= {r.number: k for k, r in enumerate(e.outs)}
                continue
            numbers = [r.number for r in refs(e.args.values())]
            rows = {self.row[n] for n in numbers if n in self.row}
            if len(rows) > 1 or any(n in self.joined for n in numbers):
                self.joined |= {r.number for r in e.outs}
            elif rows:
                k = rows.pop()
                self.of_row[k].append(e)
                self.row |= {r.number: k for r in e.outs}

    def roll(self, length: int) -> list[Entry] | None:
        """The entries with one turn, which has so many entries."""
        turns = [entries[:length] for entries in self.of_row]
        made: dict[
            int, tuple[int, Ref]
        ] = {}  # what a turn made: of which row, and the same of the first row
        for u in self.unbinds:
            made |= {r.number: (k, u.outs[0]) for k, r in enumerate(u.outs)}
        for k, turn in enumerate(turns):
            if len(turn) != length or not all(
                self._alike(e, first, made, k) for e, first in zip(turn, turns[0], strict=True)
            ):
                return None
        return self._joins({id(e): k for k, turn in enumerate(turns) for e in turn}, made)

    def _alike(self, e: Entry, first: Entry, made: dict[int, tuple[int, Ref]], k: int) -> bool:
        """Whether an entry does to its row what one of the first row does."""
        if (
            e.name != first.name
            or e.args.keys() != first.args.keys()
            or len(e.outs) != len(first.outs)
            or _changes(e)
        ):
            return False
        if e.grad != first.grad or not all(
            self._same(v, first.args[n], made, k) for n, v in e.args.items()
        ):
            return False
        made |= {r.number: (k, f) for r, f in zip(e.outs, first.outs, strict=True)}
        return all(r.shape == f.shape for r, f in zip(e.outs, first.outs, strict=True))

    def _same(self, x: Any, first: Any, made: dict[int, tuple[int, Ref]], k: int) -> bool:
        if isinstance(x, Ref) and isinstance(first, Ref):
            return made.get(x.number, (k, x)) == (k, first)
        if isinstance(x, list | tuple) and isinstance(first, list | tuple):
            return len(x) == len(first) and all(
                self._same(p, q, made, k) for p, q in zip(x, first, strict=True)
            )
        return type(x) is type(first) and bool(x == first)

    def _joins(
        self, turn_of: dict[int, int], made: dict[int, tuple[int, Ref]]
    ) -> list[Entry] | None:
        """All entries, the joins of rows as single ones."""
        out: list[Entry] = []
        sums: dict[
            int, tuple[Ref, frozenset[int], Any]
        ] = {}  # a sum: of what, of which rows, and what it began with
        for e in self.entries:
            if any(e is u for u in self.unbinds):
                args = {"self": e.args["self"], "dim": e.args["dim"]}
                out.append(Entry(ONE, None, args, e.outs[:1], e.line, e.grad))
            elif id(e) in turn_of:
                out += [e] if turn_of[id(e)] == 0 else []
            elif not any(r.number in made or r.number in sums for r in refs(e.args.values())):
                out.append(e)
            elif e.name in _JOINS:
                entry = self._all_of(e, made)
                if entry is None:
                    return None
                out.append(entry)
            elif e.name in ("add", "add_") and not writes(e) and e.args["alpha"] == 1:
                found = _sum(e.args["self"], e.args["other"], made, sums)
                if found is None:
                    return None
                if len(found[1]) == self.turns:
                    out += self._whole_sum(e, *found)
                else:
                    sums[e.outs[0].number] = found
            else:
                return None
        return out

    def _all_of(self, e: Entry, made: dict[int, tuple[int, Ref]]) -> Entry | None:
        """A stack or cat of all rows, in their order."""
        found = [made.get(r.number) for r in e.args["tensors"]]
        if [f and f[0] for f in found] != list(range(self.turns)) or len(
            {f and f[1].number for f in found}
        ) > 1:
            return None
        first = e.args["tensors"][0]
        return Entry(
            _JOINS[e.name], None, {"self": first, "dim": e.args["dim"]}, e.outs, e.line, e.grad
        )

    def _whole_sum(self, e: Entry, item: Ref, rows: frozenset[int], start: Any) -> Iterator[Entry]:
        """The sum over all rows, and what it began with added to it."""
        if isinstance(start, int | float) and start == 0:
            yield Entry(SUM, None, {"self": item}, e.outs, e.line, e.grad)
            return
        between = replace(item, number=-1 - e.outs[0].number)
        yield Entry(SUM, None, {"self": item}, (between,), e.line, e.grad)
        yield replace(e, name="add", args={"self": between, "other": start, "alpha": 1})


def _sum(
    x: Any, y: Any, made: dict[int, Any], sums: dict[int, Any]
) -> tuple[Ref, frozenset[int], Any] | None:
    """What two terms, some of them rows or sums of rows, add up to."""
    item, rows, start = None, frozenset[int](), 0
    for term in (x, y):
        if isinstance(term, Ref) and term.number in sums:
            of, some, begun = sums[term.number]
        elif isinstance(term, Ref) and term.number in made:
            (k, of), begun = made[term.number], 0
            some = frozenset([k])
        else:
            of, some, begun = None, frozenset(), term
        twice = not (isinstance(begun, int | float) and begun == 0) and not (
            isinstance(start, int | float) and start == 0
        )
        if (
            twice
            or (rows & some)
            or (item is not None and of is not None and item.number != of.number)
        ):
            return None
        item, rows = item or of, rows | some
        start = start if isinstance(begun, int | float) and begun == 0 else begun
    return None if item is None else (item, rows, start)


def _changes(e: Entry) -> bool:
    """Whether an op changes numbers of an operand; not only its shape."""
    return writes(e) and torch.Tag.inplace_view not in e.func.tags
