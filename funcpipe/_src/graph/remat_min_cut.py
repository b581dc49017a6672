"""Choices: which forward values of a segment are saved for its backward half, and which are
computed there again.

Terms. An *item* is a forward value. Saving it costs bytes; computing it again costs *work* and
needs other items. The backward half *reads* some; what it reads is saved, or computed again from
what is saved. The *base* of an item owns the
memory in which it lies: saving the base saves its views.

Under a budget of bytes the least work is wanted. For a price per byte and a price per unit of work
the cheapest choice is a
minimum cut: every item has two places, "is there" and "is computed again"; between them lies what
saving it costs, behind the second what computing it costs, and from the second a road that cannot
be cut leads to all that it needs. A search over prices gives the choices on the lower convex hull
of bytes and work; what the last of them leaves of the budget is filled up. functorch's partitioner
does the like under an ``activation_memory_budget``; it is private, differs between releases of
torch, and takes joint graphs of its own making, so this is our own.

In: `Choice`. Out: the set of items to save, and what comes of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

SOURCE, SINK = "source", "sink"


class Item(NamedTuple):
    """A forward value of a segment, or one that enters it. Other items are given by their numbers.

    Args:
        nbytes: of its memory; 0 for a view.
        flops: to compute it, as ``torch.utils.flop_counter`` counts.
        work: the same and one for every element that it makes, so that an op without FLOPs is not
            free.
        base: the item whose memory it lies in.
        needs: the items that it is computed from.
        saveable: whether it has memory of its own: a view has not, nor have several values in one.
        again: whether it may be computed again.
        product: whether it comes from a matrix product, a convolution, an attention or a custom op.
    """

    nbytes: int
    flops: int
    work: int
    base: int
    needs: tuple[int, ...]
    saveable: bool
    again: bool
    product: bool


@dataclass(frozen=True)
class Choice:
    """What may be saved or computed again in a segment. Equal segments have equal choices.

    Args:
        items: every forward value of the segment, and what enters it.
        read: those that the backward half reads.
        names: every name in the loss function, with the items of this segment that bear it.
    """

    items: tuple[Item, ...]
    read: tuple[int, ...]
    names: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bases(self) -> frozenset[int]:
        """All that can be saved."""
        return frozenset(i for i, x in enumerate(self.items) if x.saveable)

    def named(self, names: tuple[str, ...]) -> frozenset[int]:
        """The bases of the items with one of these names."""
        return frozenset(
            self.items[i].base for name, some in self.names if name in names for i in some
        )

    def kept(self, i: int, saved: frozenset[int]) -> bool:
        """Whether an item is read as the forward half left it, if these are saved."""
        return not self.items[i].again or self.items[i].base in saved


class Outcome(NamedTuple):
    """What comes of saving some items: those of them that are read, their bytes, and what is
    computed again."""

    saved: frozenset[int]
    nbytes: int
    flops: int
    work: int


def outcome(c: Choice, saved: frozenset[int]) -> Outcome:
    """What comes of saving these items, where they are needed, and all that cannot be computed
    again."""
    kept: set[int] = set()
    again: set[int] = set()
    stack = list(c.read)
    while stack:
        i = stack.pop()
        if c.kept(i, saved):
            kept.add(c.items[i].base)
        elif i not in again:
            again.add(i)
            stack += c.items[i].needs
    nbytes = sum(c.items[i].nbytes for i in kept)
    return Outcome(
        frozenset(kept),
        nbytes,
        sum(c.items[i].flops for i in again),
        sum(c.items[i].work for i in again),
    )


@functools.lru_cache(maxsize=1024)
def within(c: Choice, budget: float) -> frozenset[int]:
    """What to save for the least work within a part of the bytes that are read as it is; the fewest
    bytes if that cannot be.

    >>> x = Item(nbytes=8, flops=0, work=0, base=0, needs=(), saveable=True, again=False, product=False)
    >>> wide = Item(nbytes=32, flops=0, work=4, base=1, needs=(0,), saveable=True, again=True, product=False)
    >>> dear = Item(nbytes=32, flops=64, work=68, base=2, needs=(1,), saveable=True, again=True, product=True)
    >>> c = Choice((x, wide, dear), read=(0, 1, 2), names=())
    >>> [sorted(within(c, budget)) for budget in (1, 0.6, 0)]
    [[0, 1, 2], [0, 2], [0]]
    """
    whole = outcome(c, c.bases)
    limit = budget * whole.nbytes
    if whole.nbytes <= limit:
        return whole.saved
    all_bytes = 1 + sum(x.nbytes for x in c.items)
    all_work = 1 + sum(x.work for x in c.items)
    over, under = (
        _cheapest(c, 1, all_bytes),
        _cheapest(c, all_work, 1),
    )  # the least work, the fewest bytes
    if over.nbytes <= limit:
        under = over
    while under.nbytes <= limit < over.nbytes:
        per_byte, per_work = under.work - over.work, over.nbytes - under.nbytes
        found = _cheapest(c, per_byte, per_work)
        if (
            per_byte * found.nbytes + per_work * found.work
            == per_byte * over.nbytes + per_work * over.work
        ):
            break
        over, under = (over, found) if found.nbytes <= limit else (found, under)
    return _filled(c, under, limit).saved


def _cheapest(c: Choice, per_byte: int, per_work: int) -> Outcome:
    """The choice whose bytes and work cost the least at these prices."""
    import networkx  # of torch's own requirements; slow to import

    g = networkx.DiGraph()
    g.add_nodes_from((SOURCE, SINK))
    for i, x in enumerate(c.items):
        there, again = (i, "there"), (i, "again")
        cost = (
            {"capacity": per_byte * x.nbytes} if x.saveable else {}
        )  # an edge without a capacity cannot be cut
        g.add_edge(there, again if x.again else SINK, **cost)
        if x.again:
            g.add_edge(again, SINK, capacity=per_work * x.work)
            g.add_edges_from((again, (j, "there")) for j in x.needs)
    g.add_edges_from((SOURCE, (i, "there")) for i in c.read)
    wanted, _ = networkx.minimum_cut(g, SOURCE, SINK)[1]
    saved = (i for i in c.bases if (i, "there") in wanted and (i, "again") not in wanted)
    return outcome(c, frozenset(saved))


def _filled(c: Choice, best: Outcome, limit: float) -> Outcome:
    """Save more while the limit allows it and it spares work: what spares the most per byte
    first."""

    def spared(i: int) -> float:
        x = c.items[i]
        return -(x.work or sum(c.items[j].work for j in x.needs)) / max(x.nbytes, 1)

    before = None
    while best != before:  # what spared nothing may do so beside another
        before = best
        for i in sorted(c.bases - best.saved, key=lambda i: (spared(i), i)):
            other = outcome(c, best.saved | {i})
            if other.nbytes <= limit and other.work < best.work:
                best = other
    return best
