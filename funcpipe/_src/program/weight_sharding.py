"""Shards: the gathers and reductions of sharded leaves, put between the rows of a program.

Terms. A leaf that is sharded over axes S is held in flat *shards* of ``ceil(numel / n)`` elements
(the last ones may be smaller, or empty). A unit reads whole leaves: a GATHER starts as many units
before it as *prefetch* says, a WAIT stands right before it, and the whole leaf is dropped after it
unless *regather* says to hold it. What a unit makes of a leaf's
gradient is whole too: a REDUCE starts as soon as it is final, and turns it into this rank's shard
of the sum. All leaves that a unit needs travel in one *bucket*, at most ``bucket_bytes`` each.

In: rows in which units read ("param", leaf) and add to ("grad", leaf, partial). Out: rows with
GATHER, REDUCE and WAIT, in which ("param", leaf) of a sharded leaf is the shard and ("grad", leaf,
partial) a sum of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby, pairwise

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    REDUCE,
    RUN,
    WAIT,
    Bucket,
    Name,
    Piece,
    Row,
)
from funcpipe._src.spec.requests import WeightSharding


@dataclass(frozen=True)
class Sharded:
    """A sharded leaf.

    Args:
        piece: its place in buckets.
        axes: what it is sharded over, in mesh order.
        parts: the number of ranks on them.
        summed: those of its axes that split the batch.
        grad: the dtype of its gradient shards (the parameter's own).
        whole: the dtype in which it is gathered.
        options: when it is whole, and how it travels: those of `sharded_weights`.
    """

    piece: Piece
    axes: Axes
    parts: int
    summed: Axes
    grad: torch.dtype
    whole: torch.dtype
    options: WeightSharding


Sharding = Mapping[int, Sharded]  # by the leaf's number; the others are held whole


def shard(rows: Sequence[Row], s: Sharding) -> list[Row]:
    """The rows with their gathers and reductions."""
    return _reduced(_gathered(rows, s), s)


# ---- gathers


def _gathered(rows: Sequence[Row], s: Sharding) -> list[Row]:
    runs = [i for i, row in enumerate(rows) if row.op == RUN]
    needs = {
        i: [n[1] for n in dict.fromkeys(rows[i].reads) if n[0] == "param" and n[1] in s]
        for i in runs
    }
    held = _held(rows, runs, needs, s)
    fresh = count()
    live: dict[int, Name] = {}  # leaf -> the name under which it is whole
    starts: dict[int, list[Row]] = {}
    waits: dict[int, list[Row]] = {}
    names: dict[int, dict[Name, Name]] = {}
    for k, i in enumerate(runs):
        new = {leaf: s[leaf].whole for leaf in needs[i] if leaf not in live}
        for bucket in _buckets(new, s):
            token = ("pending", next(fresh))
            leaves = [p.leaf for p in bucket.pieces]
            live.update((leaf, ("full", leaf, token[1])) for leaf in leaves)
            at = runs[max(k - s[leaves[0]].options.prefetch, 0)]
            shards = tuple(("param", leaf) for leaf in leaves)
            starts.setdefault(at, []).append(
                Row(GATHER, rows[i].action, shards, (token,), bucket=bucket)
            )
            whole = tuple(live[leaf] for leaf in leaves)
            waits.setdefault(i, []).append(
                Row(WAIT, rows[i].action, (token,), whole, bucket=bucket)
            )
        names[i] = {("param", leaf): live[leaf] for leaf in needs[i]}
        for leaf in [x for x in live if not held(x, k)]:
            del live[leaf]
    out: list[Row] = []
    for i, row in enumerate(rows):
        out += [*starts.get(i, ()), *waits.get(i, ())]
        swap = names.get(i, {})
        out.append(replace(row, reads=tuple(swap.get(n, n) for n in row.reads)) if swap else row)
    return out


def _held(
    rows: Sequence[Row], runs: list[int], needs: dict[int, list[int]], s: Sharding
) -> Callable[[int, int], bool]:
    """Whether a whole leaf is held after the ``k``-th unit: is its next use near enough?"""
    uses: dict[int, list[int]] = {}
    for k, i in enumerate(runs):
        for leaf in needs[i]:
            uses.setdefault(leaf, []).append(k)
    after = {(leaf, a): b for leaf, ks in uses.items() for a, b in pairwise(ks)}
    last: dict[int, int] = {}

    def held(leaf: int, k: int) -> bool:
        if k in uses[leaf]:
            last[leaf] = k
        following = after.get((leaf, last[leaf]))
        if following is None:
            return False
        options = s[leaf].options
        if (
            options.regather == "step" or following - k <= 1 + options.prefetch
        ):  # gathered again, it would be under way
            return True
        if options.regather == "microbatch":
            return False
        a, b = (
            rows[runs[x]].action.microbatch // int(options.regather)
            for x in (last[leaf], following)
        )
        return a == b

    return held


def _buckets(
    dtypes: Mapping[int, torch.dtype], s: Sharding, sums: bool = False
) -> Iterator[Bucket]:
    """Leaves with their dtype on the wire, in the collectives in which they travel; ``sums``: as
    gradients."""

    def key(leaf: int) -> tuple:
        options = s[leaf].options
        summed = s[leaf].summed if sums else ()
        return (
            s[leaf].axes,
            s[leaf].parts,
            summed,
            str(dtypes[leaf]),
            options.bucket_bytes or 0,
            options.prefetch,
        )

    for (axes, parts, summed, _, most, _), alike in groupby(sorted(dtypes, key=key), key):
        some: list[int] = []
        for leaf in alike:
            size = sum(s[i].piece.numel for i in (*some, leaf)) * dtypes[leaf].itemsize
            if some and most and size > most:
                yield Bucket(axes, parts, tuple(s[i].piece for i in some), dtypes[leaf], summed)
                some = []
            some.append(leaf)
        yield Bucket(axes, parts, tuple(s[i].piece for i in some), dtypes[some[0]], summed)


# ---- reductions


def _reduced(rows: Sequence[Row], s: Sharding) -> list[Row]:
    """Reductions start right after the unit that made a gradient final; they are waited for before
    the next unit but one reduces, and at the end."""
    out: list[Row] = []
    waiting: list[list[Row]] = []
    fresh = count()
    final = _last_turns(rows)
    i = 0
    while i < len(rows):
        if not _is_grad(rows[i], s):
            out.append(rows[i])
            i += 1
            continue
        j = i
        while j < len(rows) and rows[j].op == ADD:
            j += 1
        grads = [row for row in rows[i:j] if _is_grad(row, s)]
        out += [row for row in rows[i:j] if not _is_grad(row, s)]
        starts, ends = _reduce(grads, s, final, fresh, out)
        if starts and len(waiting) > 1:
            out += waiting.pop(0)
        out += starts
        waiting += [ends] if ends else []
        i = j
    return out + [row for ends in waiting for row in ends]


def _reduce(
    grads: list[Row], s: Sharding, final: dict[Name, int], fresh: Iterator[int], out: list[Row]
) -> tuple[list[Row], list[Row]]:
    """The reductions that a unit's gradients start, and what ends them; whole sums are put out at
    once."""
    ready: dict[int, list[tuple[Row, Name]]] = {}
    for row in grads:
        name, source = row.writes[0], row.reads[0]
        if _late(row, s):
            whole = ("whole", *name[1:])
            out.append(replace(row, writes=(whole,), dtype=_wire_dtype(row, s)))
            if row.turn < final[name]:
                continue
            source = whole
        ready.setdefault(name[1], []).append((row, source))
    starts, ends = [], []
    while ready:  # a leaf may have several partial gradients in one unit: one bucket each
        some = {leaf: rows.pop(0) for leaf, rows in ready.items()}
        ready = {leaf: rows for leaf, rows in ready.items() if rows}
        for bucket in _buckets(
            {leaf: _wire_dtype(row, s) for leaf, (row, _) in some.items()}, s, sums=True
        ):
            token = ("pending", f"grad {next(fresh)}")
            chosen = [some[p.leaf] for p in bucket.pieces]
            starts.append(
                Row(
                    REDUCE,
                    chosen[0][0].action,
                    tuple(x for _, x in chosen),
                    (token,),
                    bucket=bucket,
                )
            )
            ends += _finish(chosen, token, bucket, s)
    return starts, ends


def _finish(chosen: list[tuple[Row, Name]], token: Name, bucket: Bucket, s: Sharding) -> list[Row]:
    action = chosen[0][0].action
    shards = tuple(("shard", *row.writes[0][1:], row.action.microbatch) for row, _ in chosen)
    out = [Row(WAIT, action, (token,), shards, bucket=bucket)]
    for (row, _), name in zip(chosen, shards, strict=True):
        turn = 0 if _late(row, s) else row.turn
        out.append(
            Row(ADD, row.action, (name,), row.writes, turn=turn, dtype=s[row.writes[0][1]].grad)
        )
    return out


def _is_grad(row: Row, s: Sharding) -> bool:
    return row.op == ADD and row.writes[0][0] == "grad" and row.writes[0][1] in s


def _late(row: Row, s: Sharding) -> bool:
    """Whether a leaf's gradients are added up whole."""
    return s[row.writes[0][1]].options.reduce == "last"


def _last_turns(rows: Sequence[Row]) -> dict[Name, int]:
    return {row.writes[0]: row.turn for row in rows if row.op == ADD}


def _wire_dtype(row: Row, s: Sharding) -> torch.dtype:
    """In which dtype a gradient travels: as its unit makes it, or as it was added up. Whole
    gradients add up in the parameter's own precision, or the unit's where that is higher."""
    leaf, made = s[row.writes[0][1]], row.reads[0][1].dtype
    if leaf.options.reduce_dtype is not None:
        return leaf.options.reduce_dtype
    return torch.promote_types(made, leaf.grad) if _late(row, s) else made
