"""Buckets: the lengths to which rows are padded, and how often each shape has come.

In: how many tokens and documents the rows of microbatches hold.
Out: the shape of every microbatch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from funcpipe.errors import BatchError


class MicrobatchShape(NamedTuple):
    """How many rows a microbatch has, and to how many tokens and documents each is padded."""

    rows: int
    tokens: int
    documents: int


Shape = tuple[MicrobatchShape, ...]  # of a batch: one entry for every microbatch


@dataclass
class Buckets:
    """To which shapes microbatches are padded, and how often each has come.

    Args:
        lengths: the lengths that a row may have, or
        multiple_of: a number of which all lengths are multiples.
        documents: the most documents in a row; rows of ``cu_seqlens`` then have the same length
            always. By default any number, padded (with documents of length zero) to the next power
            of two.
        ragged: whether microbatches of one batch may differ. A plan is for one sequence of shapes,
            so that few lengths can make many plans; by default all microbatches get the length of
            the longest.

    ``shapes`` counts the batches of every shape. A *miss* was the first of its shape, for which a
    plan was made; a *hit* is any other.

    >>> buckets = Buckets([256, 1024])
    >>> buckets.fit(100), buckets.fit(257), Buckets(multiple_of=128).fit(257)
    (256, 1024, 384)
    """

    lengths: Sequence[int] = ()
    multiple_of: int = 0
    documents: int | None = None
    ragged: bool = False
    shapes: Counter[Shape] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if bool(self.lengths) == bool(self.multiple_of):
            raise BatchError("Buckets takes one of lengths=[...] and multiple_of=...")
        for length in self.lengths:
            check_count("Buckets", "lengths", length)
        if self.multiple_of:
            check_count("Buckets", "multiple_of", self.multiple_of)
        if self.documents is not None:
            check_count("Buckets", "documents", self.documents)

    @property
    def misses(self) -> int:
        """How many shapes there were."""
        return len(self.shapes)

    @property
    def hits(self) -> int:
        """How many batches had a shape that had come before."""
        return sum(self.shapes.values()) - self.misses

    def fit(self, tokens: int) -> int:
        """The length of a row that holds so many tokens.

        Raises:
            BatchError: no bucket is that long.
        """
        if self.multiple_of:
            multiples = -(-tokens // self.multiple_of)
            return max(multiples, 1) * self.multiple_of
        long_enough = [length for length in self.lengths if length >= tokens]
        if not long_enough:
            raise BatchError(
                f"Buckets: {tokens} tokens are more than the longest of {sorted(self.lengths)}; "
                "add a longer one"
            )
        return min(long_enough)

    def fit_documents(self, count: int) -> int:
        """How many documents ``cu_seqlens`` of a row has room for, the padding counted as one."""
        return 1 << count.bit_length() if self.documents is None else self.documents + 1


def check_count(
    function: str,
    name: str,
    value: int,
) -> None:
    """BatchError unless a setting is a whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BatchError(f"{function}: {name} is {value!r}; it has to be a whole number, 1 or more")
