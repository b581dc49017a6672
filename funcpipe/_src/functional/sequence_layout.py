"""How one sequence is split over ranks.

Ring axes are major: every ring rank gets one piece of the sequence, or with *zigzag* two, the
``r``-th from the front and the ``r``-th from the back, so that under a causal mask all have equal
work (Brandon et al. 2023, "Striped Attention"; Zhu 2024, ring-flash-attention's zigzag). Its
positions, one piece after another, are cut once more over the axes of head exchanges. Pieces differ
by at most one position; some may be empty.

In: a length, axes and their sizes. Out: the positions of every member.
"""

from __future__ import annotations

from dataclasses import dataclass

from funcpipe._src.core.mesh import Axes

Ranges = tuple[
    tuple[int, int], ...
]  # [start, stop) pairs of positions, in the order in which they are held


@dataclass(frozen=True)
class SequenceLayout:
    """One sequence over the members of ring and head axes; member ``m`` has ring rank ``m //
    heads``.

    Args:
        size: the number of positions of the whole sequence.
        ring_axes, head_axes: the axes, major first; a member's number is its place on all of them,
            ring axes first.
        ring, heads: how many ranks those have.
        zigzag: whether a ring rank holds two pieces.

    >>> SequenceLayout(10, (), ("seq",), 1, 4).ranges(1)
    ((3, 6),)
    >>> SequenceLayout(8, ("ring",), (), 2, 1, zigzag=True).ranges(0)
    ((0, 2), (6, 8))
    """

    size: int
    ring_axes: Axes
    head_axes: Axes
    ring: int
    heads: int
    zigzag: bool = False

    @property
    def axes(self) -> Axes:
        """All axes, major first."""
        return (*self.ring_axes, *self.head_axes)

    @property
    def members(self) -> int:
        """How many ranks the sequence is split over."""
        return self.ring * self.heads

    @property
    def even(self) -> bool:
        """Whether all members (and both pieces of a zigzag) have equally many positions."""
        return (
            self.size % (self.ring * (2 if self.zigzag else 1)) == 0
            and self.ring_length(0) % self.heads == 0
        )

    def ring_ranges(self, r: int) -> Ranges:
        """The positions of a ring rank: of all its members together."""
        if not self.zigzag:
            return (_piece(self.size, self.ring, r),)
        return (
            _piece(self.size, 2 * self.ring, r),
            _piece(self.size, 2 * self.ring, 2 * self.ring - 1 - r),
        )

    def ring_length(self, r: int) -> int:
        """How many positions a ring rank has."""
        return sum(b - a for a, b in self.ring_ranges(r))

    def ranges(self, member: int) -> Ranges:
        """The positions of a member, in the order in which it holds them; empty pieces are left
        out."""
        r, h = divmod(member, self.heads)
        start, stop = _piece(self.ring_length(r), self.heads, h)
        out, before = [], 0
        for a, b in self.ring_ranges(r):  # cut [start, stop) out of the pieces laid end to end
            first, last = max(start - before, 0), min(stop - before, b - a)
            if first < last:
                out.append((a + first, a + last))
            before += b - a
        return tuple(out)

    def length(self, member: int) -> int:
        """How many positions a member has."""
        return sum(b - a for a, b in self.ranges(member))

    def variant(self, member: int) -> tuple[int, ...]:
        """What a member's graph depends on: members with equal variants run the same graph."""
        r, _ = divmod(member, self.heads)
        return (self.length(member), *(b - a for a, b in self.ring_ranges(r)))


def _piece(size: int, pieces: int, index: int) -> tuple[int, int]:
    """The ``index``-th of ``pieces``: the first ``size % pieces`` are one longer."""
    short, longer = divmod(size, pieces)
    start = index * short + min(index, longer)
    return start, start + short + (index < longer)
