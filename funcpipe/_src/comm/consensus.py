"""Consensus: before every step all ranks exchange one number.

In: a gloo group of all ranks, a number of this rank.
Out: the numbers of all ranks. Errors are those of torch.distributed.

In round ``k`` a rank sends the rank ``2**k`` before it all numbers that have arrived: its own and
those of the ranks after it. It receives as many from the rank ``2**k`` after it (Bruck et al. 1997,
"Efficient Algorithms for All-to-All Communications in Multiport Message-Passing Systems",
concatenation).

Why not a collective: the host of a captured step does little else, and each time that a thread of
gloo is woken counts. A message whose receive has begun is sent at once, where gloo else asks the
receiver first (gloo/transport/tcp/pair.cc), and a collective takes a thread of its own too. So the
receives of the next exchange begin at the end of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

_TAG = 0


class _Receive(NamedTuple):
    """A receive that has begun: from how many ranks after this one, into which numbers."""

    distance: int
    numbers: torch.Tensor
    work: dist.Work


class DigestExchange:
    """The numbers of all ranks, again and again. All ranks make it, and call it, alike."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = group.rank()
        self._size = group.size()
        self._receives = self._begin_receives()

    def _begin_receives(self) -> list[_Receive]:
        receives = []
        for distance, count in _rounds(self._size):
            numbers = torch.empty(count, dtype=torch.int64)
            source = (self._rank + distance) % self._size
            work = self._group.recv([numbers], source, _TAG)
            receives.append(_Receive(distance, numbers, work))
        return receives

    def exchange(self, number: int, meanwhile: Callable[[], object]) -> list[int]:
        """Every rank's 64-bit number, in rank order.

        ``meanwhile`` runs when this rank's own number is on its way.
        """
        arrived = [number]  # from this rank on, round the ranks
        sent = []
        for distance, numbers, receive in self._receives:
            mine = torch.tensor(arrived[: len(numbers)])
            destination = (self._rank - distance) % self._size
            send = self._group.send([mine], destination, _TAG)
            sent.append((send, mine))  # the tensor lives until it has left
            if distance == 1:
                meanwhile()
            receive.wait()
            arrived += numbers.tolist()
        if self._size == 1:
            meanwhile()
        for send, _ in sent:  # it has left, unless this rank is ahead of the receiver
            send.wait()
        self._receives = self._begin_receives()
        first = self._size - self._rank
        return arrived[first:] + arrived[:first]


def _rounds(size: int) -> Iterator[tuple[int, int]]:
    """For each round, how far the sender is and how many numbers it sends.

    >>> list(_rounds(5))
    [(1, 1), (2, 2), (4, 1)]
    """
    distance = 1
    while distance < size:
        yield distance, min(distance, size - distance)
        distance *= 2
