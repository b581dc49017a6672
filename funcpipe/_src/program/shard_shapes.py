"""Shapes of shards: which elements of a leaf a rank holds, and in which shape.

In: the shape of a leaf, a number of ranks. Out: a range of elements, or a shape.
"""

from __future__ import annotations

Shape = tuple[int, ...]


def extent(
    numel: int,
    parts: int,
    index: int,
) -> tuple[int, int]:
    """Where a shard begins and ends among the elements of its leaf: flat, the last ones may be
    smaller or empty.

    >>> [extent(5, 3, i) for i in range(3)], extent(1, 3, 2)
    ([(0, 2), (2, 4), (4, 5)], (1, 1))
    """
    elements = shard_elements(numel, parts)
    start = min(index * elements, numel)
    end = min(start + elements, numel)
    return start, end


def shard_elements(numel: int, parts: int) -> int:
    """Elements of the first shard, which no other has more of."""
    return -(-numel // parts)


def shard_shape(shape: Shape, elements: int) -> Shape:
    """The shape of a shard: as many dims as its leaf has."""
    ones = [1] * (len(shape) - 1)
    return (elements, *ones)
