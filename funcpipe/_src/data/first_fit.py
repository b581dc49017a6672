"""Which document goes into which row: MULTIFIT, which is first-fit under the smallest capacity.

In: the sizes of documents, how many rows, the most tokens and documents of a row.
Out: the documents of every row, by index, and those that fit nowhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Filling(NamedTuple):
    """Indices of documents: those of every row, and those that fit nowhere."""

    rows: list[list[int]]
    leftover: list[int]


def fill_rows(
    sizes: list[int],
    rows: int,
    max_tokens: int,
    max_documents: int,
) -> Filling:
    """Fill rows first-fit, longest documents first, up to the smallest capacity that suffices.

    Coffman, Garey & Johnson, 1978, https://doi.org/10.1137/0207001. Where not all documents fit,
    the capacity is ``max_tokens``. Indices are in order within a row, and among the leftover.

    >>> fill_rows([3, 1, 2], rows=2, max_tokens=4, max_documents=9)
    Filling(rows=[[0], [1, 2]], leftover=[])
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    best = _first_fit(sizes, order, rows, max_tokens, max_documents)
    longest = sizes[order[0]]
    mean = -(-sum(sizes) // rows)
    low, high = max(longest, mean), max_tokens
    while not best.leftover and low < high:
        capacity = (low + high) // 2
        tried = _first_fit(sizes, order, rows, capacity, max_documents)
        if tried.leftover:
            low = capacity + 1
        else:
            best, high = tried, capacity
    return Filling([sorted(row) for row in best.rows], sorted(best.leftover))


def _first_fit(
    sizes: list[int],
    order: list[int],
    rows: int,
    capacity: int,
    max_documents: int,
) -> Filling:
    free = np.full(rows, capacity)  # tokens; -1 where a row has all documents that it may have
    filled: list[list[int]] = [[] for _ in range(rows)]
    leftover = []
    for index in order:
        fits = free >= sizes[index]
        row = int(fits.argmax())
        if not fits[row]:
            leftover.append(index)
            continue
        filled[row].append(index)
        free[row] -= sizes[index]
        if len(filled[row]) == max_documents:
            free[row] = -1
    return Filling(filled, leftover)
