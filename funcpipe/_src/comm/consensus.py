"""A number that every rank tells all others, before every step.

Terms. In *round* ``k`` a rank tells the rank ``2**k`` before it all numbers that it knows: its own
and the next ranks'. It hears as many from the rank ``2**k`` after it (Bruck et al. 1997, "Efficient
Algorithms for All-to-All Communications in Multiport Message-Passing Systems", concatenation).

In: a gloo group of all ranks, a number. Out: all numbers. Errors are those of torch.distributed.

Why not a collective: the host of a captured step does little else, and each time that a thread of
gloo is woken counts. A message whose receive has begun is sent at once, where gloo else asks the
receiver first (gloo/transport/tcp/pair.cc), and a collective takes a thread of its own too. So what
the next call hears is received from the end of this one on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

_TAG = 0


class Digests:
    """The numbers of all ranks, again and again. All ranks make it, and call it, alike."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._expected: list[
            tuple[int, torch.Tensor, dist.Work]
        ] = []  # how far the teller is, what it tells
        self._expect()

    def _expect(self) -> None:
        for far, count in _rounds(self._size):
            told = torch.empty(count, dtype=torch.int64)
            work = self._group.recv([told], (self._rank + far) % self._size, _TAG)
            self._expected.append((far, told, work))

    def exchange(self, n: int, meanwhile: Callable[[], object]) -> list[int]:
        """Every rank's 64-bit number, in rank order; ``meanwhile`` runs when the own one is on its
        way."""
        known, sent = [n], []
        for far, told, work in self._expected:
            mine = torch.tensor(known[: len(told)])
            sent.append((mine, self._group.send([mine], (self._rank - far) % self._size, _TAG)))
            if far == 1:
                meanwhile()
            work.wait()
            known += told.tolist()
        if self._size == 1:
            meanwhile()
        for _, work in sent:  # they have left, unless this rank is ahead of who hears it
            work.wait()
        self._expected = []
        self._expect()
        return known[self._size - self._rank :] + known[: self._size - self._rank]


def _rounds(size: int) -> list[tuple[int, int]]:
    """How far the teller of each round is, and how many numbers it tells.

    >>> _rounds(5)
    [(1, 1), (2, 2), (4, 1)]
    """
    return [(far, min(far, size - far)) for far in (2**k for k in range((size - 1).bit_length()))]
