"""How one sequence is split over ranks.

Ring axes are major: every ring rank gets one piece of the sequence, or with *zigzag* two, the
``r``-th from the front and the ``r``-th from the back, so that under a causal mask all have equal
work (Brandon et al. 2023, "Striped Attention"; Zhu 2024, ring-flash-attention's zigzag). Its
positions, one piece after another, are cut once more over the axes of head exchanges. Pieces differ
by at most one position; some may be empty.

The *sequence rank* of a rank is its place on all of these axes, ring axes first.

In: a length, axes and their sizes. Out: the positions of every sequence rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from funcpipe._src.core.mesh import Axes

# [start, stop) pairs of positions, in the order in which a rank holds them
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SequenceLayout:
    """One sequence over the ranks of ring and head axes. Sequence rank ``r`` has ring rank ``r //
    heads``.

    Args:
        size: the number of positions of the whole sequence.
        ring_axes, head_axes: the axes, major first.
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
        """Whether all ranks (and both pieces of a zigzag) have equally many positions."""
        pieces = 2 * self.ring if self.zigzag else self.ring
        pieces_even = self.size % pieces == 0
        return pieces_even and self.ring_length(0) % self.heads == 0

    def ring_ranges(self, ring_rank: int) -> Ranges:
        """The positions of a ring rank: of all its sequence ranks together."""
        if not self.zigzag:
            return (_piece(self.size, self.ring, ring_rank),)
        pieces = 2 * self.ring
        front = _piece(self.size, pieces, ring_rank)
        from_end = pieces - 1 - ring_rank
        back = _piece(self.size, pieces, from_end)
        return front, back

    def ring_length(self, ring_rank: int) -> int:
        """How many positions a ring rank has."""
        return sum(_lengths(self.ring_ranges(ring_rank)))

    def ranges(self, sequence_rank: int) -> Ranges:
        """The positions of a sequence rank, in the order in which it holds them; empty pieces are
        left out."""
        ring_rank, head_rank = divmod(sequence_rank, self.heads)
        of_ring = self.ring_length(ring_rank)
        start, stop = _piece(of_ring, self.heads, head_rank)
        found = []
        before = 0  # the lengths of the pieces so far, laid end to end
        for piece_start, piece_stop in self.ring_ranges(ring_rank):
            length = piece_stop - piece_start
            first = max(start - before, 0)
            last = min(stop - before, length)
            if first < last:
                found.append((piece_start + first, piece_start + last))
            before += length
        return tuple(found)

    def length(self, sequence_rank: int) -> int:
        """How many positions a sequence rank has."""
        return sum(_lengths(self.ranges(sequence_rank)))

    def variant(self, sequence_rank: int) -> tuple[int, ...]:
        """What a rank's graph depends on: ranks with equal variants run the same graph."""
        pieces = self.ring_ranges(sequence_rank // self.heads)
        return (self.length(sequence_rank), *_lengths(pieces))


def _lengths(ranges: Ranges) -> list[int]:
    return [stop - start for start, stop in ranges]


def _piece(size: int, pieces: int, index: int) -> tuple[int, int]:
    """The ``index``-th of ``pieces``: the first ``size % pieces`` are one longer."""
    short, longer = divmod(size, pieces)
    start = index * short + min(index, longer)
    return start, start + short + (index < longer)
