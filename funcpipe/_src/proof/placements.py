"""States: how a tensor of one rank stands to the same tensor on one device, and what sums and
products make of them.

Terms. A dim *moves* if its size on a rank differs from its size on one device. A *number* is what
Python or a fill makes of lengths; it is a *count* if it grows like the positions of a part. Every
state but `Refused` is a claim that is proven, for every rank ``m`` of a data shard, of its tensor
``x[m]`` and the tensor ``X`` of one device:

========== ========================================================= ==================================
state      claim                                                      along other dims that move
========== ========================================================= ==================================
`Replicate`    ``x[m] == X``                                              constant, as in ``expand``
`Shard`    ``x[m]`` is ``X`` at the positions of ``m``                constant
`Partial`  ``sum of x[m] over ranks == X``                            none
`Average`  ``sum of x[m] * (positions of m) == X * (all positions)``  none
`Number`   all of ``x[m]`` is ``a``, all of ``X`` is ``b``            constant
========== ========================================================= ==================================

In: states of operands. Out: the state of a result, or a `Refusal` that says why there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional.sequence_layout import SequenceLayout

_ROUNDING = 1e-9  # relative: numbers are computed in float64
PSUM = "fp.psum(x, axis) makes it the sum over all ranks"
COUNTS = "return sums as Mean.total and Mean.weight, which are divided once, after all sums"


class Refusal(Exception):
    """Why a result has no state; no error, for what is refused may matter to nothing."""


class NoSum(Refusal):
    """Summands do not add up over ranks alike."""


@dataclass(frozen=True)
class Replicate:
    """The same on every rank as on one device."""

    def __str__(self) -> str:
        return "the same on every rank"


@dataclass(frozen=True)
class Shard:
    """The positions of a rank lie along ``dim``, whose size is ``outer * positions * inner``."""

    dim: int
    part: Any  # a `SequenceLayout` of a sequence; of rows, a `rows.Share` or a `places.Order`
    outer: int = 1
    inner: int = 1

    def __str__(self) -> str:
        return f"a rank's slice of {self.part.size} positions along dim {self.dim}"

    def at(self, dim: int) -> Shard:
        """The same, along another dim."""
        return Shard(dim, self.part, self.outer, self.inner)


@dataclass(frozen=True)
class Partial:
    """The sum over the ranks of ``axes`` is meant."""

    axes: Axes

    def __str__(self) -> str:
        return "a sum over one rank's positions"


@dataclass(frozen=True)
class Average:
    """A mean over the positions of a rank."""

    part: Any

    def __str__(self) -> str:
        return "a mean over one rank's positions"


@dataclass(frozen=True)
class Number:
    """One number everywhere: ``a`` on a rank, ``b`` on one device. NaN: memory that was not written
    to."""

    a: float
    b: float

    def __str__(self) -> str:
        return (
            f"the number {self.a:g}"
            if self.constant
            else f"the number {self.a:g} ({self.b:g} on one device)"
        )

    @property
    def constant(self) -> bool:
        """Whether it does not depend on lengths."""
        return self.a == self.b or (math.isnan(self.a) and math.isnan(self.b))


@dataclass(frozen=True)
class Refused:
    """Nothing is known of it.

    Args:
        text: why.
        summands: whether summands of it do not add up alike.
    """

    text: str
    summands: bool = False


class Local:
    """The base of what is right on a part of the batch alone, in one way or another
    (`row_numbers.py`)."""


State = Replicate | Shard | Partial | Average | Number | Refused | Local
ZERO = Number(0, 0)


@dataclass(frozen=True)
class World:
    """What is known beforehand.

    Args:
        lengths: of every part: how many positions the rank has, and how many there are where the
            loss function is run as on one device.
        live: the axes of parts that have more than one rank.
        rows: whether the rows of the batch are split, not a sequence: they meet in no known call
            (`rows.py`).
        by_hand: how many entries of rows all ranks have, where the loss function names the axes
            that split rows: it may have written the number of ranks by hand.
    """

    lengths: dict[Any, tuple[int, int]]
    live: Axes
    rows: bool = False
    by_hand: frozenset[float] = frozenset()

    def axes(self, part: SequenceLayout) -> Axes:
        """The axes over which a sum over positions is partial."""
        return tuple(a for a in self.live if a in part.axes)

    def factor(self, size: tuple[int, int]) -> tuple[SequenceLayout, int] | None:
        """The part of which both sizes of a dim are a multiple, the same one."""
        for part, (a, b) in self.lengths.items():
            if size[1] % b == 0 and size[0] == a * (size[1] // b):
                return part, size[1] // b
        return None

    def along(self, dim: int, size: tuple[int, int]) -> Shard | None:
        """How units lie along a dim of such sizes along which a tensor is constant: in any way, so
        in the usual one."""
        found = self.factor(size)
        return (
            None
            if found is None
            else Shard(dim, found[0], *((1, found[1]) if self.rows else (found[1], 1)))
        )

    def is_count(self, n: Number, part: SequenceLayout) -> bool:
        """Whether a number grows like the positions of a part."""
        a, b = self.lengths[part]
        return not n.constant and math.isclose(n.a * b, n.b * a, rel_tol=_ROUNDING)

    def counted(self, n: Number) -> SequenceLayout | None:
        """The part that a number counts."""
        return next((p for p in self.lengths if self.is_count(n, p)), None)


def plain(s: State) -> bool:
    """Whether a state says that every rank has what one device has."""
    return isinstance(s, Replicate) or (isinstance(s, Number) and s.constant)


def as_partial(w: World, s: State) -> State:
    """A count, or zero, as the sum over ranks that it is; any other state as it is."""
    if not isinstance(s, Number):
        return s
    part = w.counted(s)
    return Partial(w.live) if s == ZERO else s if part is None else Partial(w.axes(part))


def dual(w: World, s: State) -> State | None:
    """The state of the gradient of the loss with respect to a tensor, every rank's total counting
    once."""
    if isinstance(s, Shard):
        return s
    if isinstance(s, Partial) and s.axes == w.live:
        return Replicate()
    return Partial(w.live) if plain(s) else None


def agrees(new: State, old: State) -> bool:
    """Whether what has a state may stand where another is wanted."""
    if isinstance(new, Refused) or new == old:
        return not isinstance(new, Refused)
    if isinstance(new, Number) and new.constant:
        return isinstance(old, Shard | Replicate) or (new == ZERO and isinstance(old, Partial))
    return isinstance(new, Replicate) and isinstance(old, Shard)


def add(w: World, s: State, t: State) -> State:
    """The state of a sum.

    >>> part = SequenceLayout(8, (), ("seq",), 1, 2)
    >>> w = World({part: (4, 8)}, ("seq",))
    >>> add(w, Partial(("seq",)), Number(4, 8))  # a sum over positions, and their number
    Partial(axes=('seq',))
    """
    if isinstance(t, Number) and not isinstance(s, Number):
        s, t = t, s
    if isinstance(s, Number) and s == ZERO:
        return t
    if plain(s) and plain(t):
        return Replicate()
    if isinstance(s, Average) or isinstance(t, Average):
        average = s if isinstance(s, Average) else t
        if all(plain(x) or x == average for x in (s, t)):
            return average
        raise NoSum(
            f"it adds {s} and {t}: no sum over ranks makes that what one device has. Write sums, "
            f"and {COUNTS}"
        )
    if isinstance(t, Partial) and as_partial(w, s) == t:
        return t
    if isinstance(s, Partial) or isinstance(t, Partial):
        raise NoSum(
            f"it adds {s} and {t}: the sum over ranks would hold what is the same on every rank "
            "once for each of them. Multiply that by the number of this rank's tokens, or add it "
            "to the gradients"
        )
    raise Refusal(_depends(s, t))


def mul(w: World, s: State, t: State) -> State:
    """The state of a product.

    >>> part = SequenceLayout(8, (), ("seq",), 1, 2)
    >>> w = World({part: (4, 8)}, ("seq",))
    >>> mul(w, Average(part), Number(4, 8))  # a mean over positions, times their number
    Partial(axes=('seq',))
    """
    if isinstance(s, Number) and not plain(s):
        s, t = t, s
    if plain(s) and plain(t):
        return Replicate()
    if plain(t):
        s, t = t, s
    if plain(s) and isinstance(t, Partial | Average):
        return t
    if isinstance(t, Number):
        part = w.counted(t)
        if part is not None and (plain(s) or s == Average(part)):
            return Partial(w.axes(part))
        inverse = w.counted(Number(t.b, t.a))
        if inverse is not None and isinstance(s, Partial) and s.axes == w.axes(inverse):
            return Average(inverse)
        if plain(s) and inverse is not None and round(1 / t.a) in w.by_hand:
            return Replicate()
        if isinstance(s, Partial | Average):
            raise Refusal(
                f"it scales {s} by {t}: no sum over ranks makes that what one device has; {COUNTS}"
            )
        raise Refusal(_depends(s, t))
    raise Refusal(
        f"it multiplies {s} by {t}, and a product of sums is not the sum of products: {PSUM}"
    )


def div(w: World, s: State, t: State) -> State:
    """The state of a quotient."""
    if plain(t):
        return mul(w, s, t)
    if isinstance(t, Number):
        if not t.a:
            raise Refusal("it divides by the number of positions, of which a rank has none")
        return mul(w, s, Number(1 / t.a, 1 / t.b))
    raise Refusal(f"it divides by {t}: {PSUM}; or {COUNTS}")


def _depends(*states: State) -> str:
    number = next((s for s in states if isinstance(s, Number) and not s.constant), None)
    return (
        f"it computes with {number}, which is made from the length of a rank's slice: take the "
        "whole length from a Python value that the closure brings, or positions from "
        "fp.positions(x, dim)"
    )
