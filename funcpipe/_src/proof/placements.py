"""Placements: how a tensor of one rank stands to the same tensor on one device, and what sums and
products make of them.

A dim *varies* if its size on a rank differs from its size on one device. A *number* is what Python
or a fill makes of lengths; it is a *count* if it grows like the positions of a layout. Every
placement but `Refused` is a proven claim. It holds for every rank ``m`` of a data shard, of its
tensor ``x[m]`` and of the tensor ``X`` of one device:

============= ========================================================= ========================
placement     claim                                                     along other varying dims
============= ========================================================= ========================
`Replicate`   ``x[m] == X``                                             constant, as in ``expand``
`Shard`       ``x[m]`` is ``X`` at the positions of ``m``               constant
`Partial`     ``sum of x[m] over ranks == X``                           none
`Average`     ``sum of x[m] * (positions of m) == X * (all positions)`` none
`Number`      all of ``x[m]`` is ``local``, all of ``X`` is ``full``    constant
============= ========================================================= ========================

Where the rows of a batch are split, read *part* for rank and *rows* for positions. `Local` has more
placements for that case.

In: placements of operands. Out: the placement of a result, or a `Refusal` that says why there is
none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from funcpipe._src.core.mesh import Axes
from funcpipe._src.proof.words import COUNTS, POSITIONS, Words

_ROUNDING = 1e-9  # relative: numbers are computed in float64
Sizes = tuple[int, int]  # of a dim, on a rank and on one device


class Refusal(Exception):
    """Why a result has no placement. It is no error yet: the loss may not depend on that result."""


class NoSum(Refusal):
    """The summands do not add up over ranks alike."""


@dataclass(frozen=True)
class Replicate:
    """The same on every rank as on one device."""


@dataclass(frozen=True)
class Shard:
    """The positions of a rank lie along ``dim``, whose size is ``outer * positions * inner``.

    Args:
        layout: a `SequenceLayout`; where rows are split, a `rows.RowLayout` or a
            `rules_row_numbers.Order`.
    """

    dim: int
    layout: Any
    outer: int = 1
    inner: int = 1

    def at(self, dim: int) -> Shard:
        """The same, along another dim."""
        return Shard(dim, self.layout, self.outer, self.inner)


@dataclass(frozen=True)
class Partial:
    """The sum over the ranks of ``axes`` is what one device has."""

    axes: Axes


@dataclass(frozen=True)
class Average:
    """A mean over the positions of a rank."""

    layout: Any


@dataclass(frozen=True)
class Number:
    """One number in all entries: ``local`` on a rank, ``full`` on one device. NaN: memory that no
    op has written to."""

    local: float
    full: float

    def __str__(self) -> str:
        if self.constant:
            return f"the number {self.local:g}"
        return f"the number {self.local:g} ({self.full:g} on one device)"

    @property
    def constant(self) -> bool:
        """Whether it does not depend on lengths."""
        unwritten = math.isnan(self.local) and math.isnan(self.full)
        return self.local == self.full or unwritten


@dataclass(frozen=True)
class Refused:
    """Nothing is known of it.

    Args:
        text: why.
        summands: whether the reason is that summands do not add up alike.
    """

    text: str
    summands: bool = False


class Local:
    """The base of placements that are right on a part of the batch without being what one device
    has. Each is defined in the file whose rules make it:

    ============ ================================================== =========================
    `RowNumbers` the numbers of a part's own rows                   `rules_row_numbers.py`
    `Largest`    a maximum over the rows of a part                  `rules_row_reductions.py`
    `Norm`       a norm over the rows of a part                     `rules_row_reductions.py`
    `OneRow`     one row of a loop over rows                        `rules_row_loops.py`
    `RankIndex`  a function of the index of a rank alone            `rules_edges.py`
    `Last`       the last rows of a part                            `rules_edges.py`
    `Rest`       the rows of a part without the last ones           `rules_edges.py`
    `Before`     the last rows of the part before                   `rules_edges.py`
    `LastFlag`   one number on the last rank, another on all others `rules_edges.py`
    `Shuffled`   all rows, in another order than on one device      `rules_edges.py`
    ============ ================================================== =========================
    """

    fault = ", which one device does not have"  # follows its name where an op cannot use it


Placement = Replicate | Shard | Partial | Average | Number | Refused | Local
ZERO = Number(0, 0)


@dataclass(frozen=True)
class SplitContext:
    """What is split, and how; known before a proof begins.

    Args:
        lengths: of every layout: how many positions the rank has, and how many there are where the
            loss function runs as on one device. Rules add orders of rows.
        live: the axes of layouts that have more than one rank.
        rows: whether the rows of the batch are split, not a sequence: attention does not mix them
            (`rows.py`).
        by_hand: how many entries of rows all ranks have, where the loss function names the axes
            that split rows. It may contain the number of ranks as a Python number.
        words: how errors name what is split.
    """

    lengths: dict[Any, Sizes]
    live: Axes
    rows: bool = False
    by_hand: frozenset[float] = frozenset()
    words: Words = POSITIONS

    def axes(self, layout: Any) -> Axes:
        """The axes over which a sum over positions is partial."""
        return tuple(axis for axis in self.live if axis in layout.axes)

    def factor(self, sizes: Sizes) -> tuple[Any, int] | None:
        """The layout of whose lengths both sizes are the same multiple, and that multiple."""
        for layout, (local, full) in self.lengths.items():
            multiple, rest = divmod(sizes[1], full)
            if not rest and sizes[0] == local * multiple:
                return layout, multiple
        return None

    def along(self, dim: int, sizes: Sizes) -> Shard | None:
        """How positions lie along a dim of such sizes. The tensor is constant along it, so any
        order is right, and the usual one is taken."""
        found = self.factor(sizes)
        if found is None:
            return None
        layout, multiple = found
        return Shard(dim, layout, 1, multiple) if self.rows else Shard(dim, layout, multiple, 1)

    def is_count(self, number: Number, layout: Any) -> bool:
        """Whether a number grows like the positions of a layout."""
        local, full = self.lengths[layout]
        grown = math.isclose(number.local * full, number.full * local, rel_tol=_ROUNDING)
        return grown and not number.constant

    def counted(self, number: Number) -> Any | None:
        """The layout whose positions a number counts."""
        return next((layout for layout in self.lengths if self.is_count(number, layout)), None)

    def text(self, placement: Placement) -> str:
        """A placement in words."""
        return describe(placement, self.words)


def describe(placement: Placement, words: Words) -> str:
    """A placement in the words for what is split."""
    if isinstance(placement, Replicate):
        return f"the same {words.at_every}"
    if isinstance(placement, Shard):
        share = words.share_of.format(size=placement.layout.size)
        return f"{share} along dim {placement.dim}"
    if isinstance(placement, Partial):
        return f"a sum over {words.own_items}"
    if isinstance(placement, Average):
        return f"a mean over {words.own_items}"
    return str(placement)


def replicated(placement: Placement) -> bool:
    """Whether every rank has what one device has."""
    if isinstance(placement, Number):
        return placement.constant
    return isinstance(placement, Replicate)


def as_partial(split: SplitContext, placement: Placement) -> Placement:
    """A count, or zero, as the sum over ranks that it is; any other placement as it is."""
    if not isinstance(placement, Number):
        return placement
    if placement == ZERO:
        return Partial(split.live)
    layout = split.counted(placement)
    return placement if layout is None else Partial(split.axes(layout))


def dual(split: SplitContext, placement: Placement) -> Placement | None:
    """The placement of the gradient of the loss with respect to a tensor, where the loss is the sum
    of all ranks' totals."""
    if isinstance(placement, Shard):
        return placement
    if isinstance(placement, Partial) and placement.axes == split.live:
        return Replicate()
    return Partial(split.live) if replicated(placement) else None


def agrees(new: Placement, wanted: Placement) -> bool:
    """Whether a tensor of one placement may stand where another placement is wanted."""
    if isinstance(new, Refused):
        return False
    if new == wanted:
        return True
    if isinstance(new, Number) and new.constant:
        is_sum = new == ZERO and isinstance(wanted, Partial)
        return is_sum or isinstance(wanted, Shard | Replicate)
    return isinstance(new, Replicate) and isinstance(wanted, Shard)


# ---- arithmetic


def add(split: SplitContext, left: Placement, right: Placement) -> Placement:
    """The placement of a sum.

    >>> from funcpipe._src.functional.sequence_layout import SequenceLayout
    >>> layout = SequenceLayout(8, (), ("seq",), 1, 2)
    >>> split = SplitContext({layout: (4, 8)}, ("seq",))
    >>> add(split, Partial(("seq",)), Number(4, 8))  # a sum over positions, and their number
    Partial(axes=('seq',))
    """
    if isinstance(right, Number) and not isinstance(left, Number):
        left, right = right, left
    if isinstance(left, Number) and left == ZERO:
        return right
    if replicated(left) and replicated(right):
        return Replicate()
    for average in (left, right):
        if isinstance(average, Average):
            if all(replicated(term) or term == average for term in (left, right)):
                return average
            raise NoSum(f"{_sum_of(split, left, right)}: {split.words.no_mean}")
    if isinstance(right, Partial) and as_partial(split, left) == right:
        return right
    if isinstance(left, Partial) or isinstance(right, Partial):
        raise NoSum(f"{_sum_of(split, left, right)}: {split.words.no_constant}")
    raise Refusal(_from_length(split, left, right))


def _sum_of(split: SplitContext, left: Placement, right: Placement) -> str:
    return f"it adds {split.text(left)} and {split.text(right)}"


def mul(split: SplitContext, left: Placement, right: Placement) -> Placement:
    """The placement of a product.

    >>> from funcpipe._src.functional.sequence_layout import SequenceLayout
    >>> layout = SequenceLayout(8, (), ("seq",), 1, 2)
    >>> split = SplitContext({layout: (4, 8)}, ("seq",))
    >>> mul(split, Average(layout), Number(4, 8))  # a mean over positions, times their number
    Partial(axes=('seq',))
    """
    if isinstance(left, Number) and not replicated(left):
        left, right = right, left
    if replicated(left) and replicated(right):
        return Replicate()
    if replicated(right):
        left, right = right, left
    if replicated(left) and isinstance(right, Partial | Average):
        return right
    if isinstance(right, Number):
        return _scaled(split, left, right)
    raise Refusal(
        f"it multiplies {split.text(left)} by {split.text(right)}, and a product of sums is not "
        f"the sum of products: {split.words.sum_first}"
    )


def _scaled(split: SplitContext, placement: Placement, number: Number) -> Placement:
    """The placement of a product with a number that depends on lengths."""
    layout = split.counted(number)
    if layout is not None and (replicated(placement) or placement == Average(layout)):
        return Partial(split.axes(layout))
    inverse = split.counted(Number(number.full, number.local))
    if inverse is not None:
        if isinstance(placement, Partial) and placement.axes == split.axes(inverse):
            return Average(inverse)
        if replicated(placement) and round(1 / number.local) in split.by_hand:
            return Replicate()
    if isinstance(placement, Partial | Average):
        raise Refusal(f"it scales {split.text(placement)} by {number}: {split.words.no_mean}")
    raise Refusal(_from_length(split, placement, number))


def div(split: SplitContext, left: Placement, right: Placement) -> Placement:
    """The placement of a quotient."""
    if replicated(right):
        return mul(split, left, right)
    words = split.words
    if not isinstance(right, Number):
        raise Refusal(f"it divides by {split.text(right)}: {words.sum_first}; or {COUNTS}")
    if not right.local:
        raise Refusal(
            f"it divides by the number of {words.items}, of which a {words.owner} has none"
        )
    return mul(split, left, Number(1 / right.local, 1 / right.full))


def _from_length(split: SplitContext, *placements: Placement) -> str:
    numbers = [term for term in placements if isinstance(term, Number) and not term.constant]
    return (
        f"it computes with {numbers[0] if numbers else None}, which is made from "
        f"{split.words.length}: {split.words.length_advice}"
    )
