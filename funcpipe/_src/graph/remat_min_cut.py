"""Remat by minimum cuts: which forward values of a segment to save, and which to compute again.

An *item* is a forward value. Saving it costs bytes; computing it again costs *work* and needs other
items. The backward half reads some items: each is saved, or computed again from what is saved. The
*base* of an item owns its memory: saving the base saves its views.

Under a budget of bytes the least work is wanted. For a price per byte and a price per unit of work
the cheapest choice is a minimum cut. Every item has two nodes, "there" and "again":

- the edge from "there" to "again" costs what saving the item costs;
- the edge from "again" to the sink costs its work;
- edges that cannot be cut lead from "again" to all that the item needs.

A search over prices gives the choices on the lower convex hull of bytes and work. What the last of
them leaves of the budget is filled up.

functorch's partitioner does the like under an ``activation_memory_budget``. It is private, differs
between releases of torch, and takes joint graphs of its own making.

In: `Choice`. Out: the set of items to save, and its `Outcome`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

SOURCE, SINK = "source", "sink"
Numbers = frozenset[int]  # of items
_UNCUTTABLE: dict[str, int] = {}  # an edge without a capacity cannot be cut


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
    def bases(self) -> Numbers:
        """All that can be saved."""
        return frozenset(index for index, item in enumerate(self.items) if item.saveable)

    def named(self, names: tuple[str, ...]) -> Numbers:
        """The bases of the items with one of these names."""
        bases: set[int] = set()
        for name, indices in self.names:
            if name in names:
                bases.update(self.items[index].base for index in indices)
        return frozenset(bases)

    def kept(self, index: int, saved: Numbers) -> bool:
        """Whether an item is read as the forward half left it, if these are saved."""
        item = self.items[index]
        return not item.again or item.base in saved


class Outcome(NamedTuple):
    """What saving some items leads to.

    Args:
        saved: those of them that are read.
        nbytes: of these.
        flops, work: of what is computed again.
    """

    saved: Numbers
    nbytes: int
    flops: int
    work: int


def outcome(choice: Choice, saved: Numbers) -> Outcome:
    """What saving these items leads to. What cannot be computed again is saved as well."""
    kept: set[int] = set()
    again: set[int] = set()
    stack = list(choice.read)
    while stack:
        index = stack.pop()
        if choice.kept(index, saved):
            kept.add(choice.items[index].base)
        elif index not in again:
            again.add(index)
            stack += choice.items[index].needs
    recomputed = [choice.items[index] for index in again]
    return Outcome(
        saved=frozenset(kept),
        nbytes=sum(choice.items[index].nbytes for index in kept),
        flops=sum(item.flops for item in recomputed),
        work=sum(item.work for item in recomputed),
    )


@functools.lru_cache(maxsize=1024)
def within(choice: Choice, budget: float) -> Numbers:
    """What to save for the least work within a budget; the fewest bytes if that cannot be.

    Args:
        budget: the part of the bytes that are read without remat, from 0 to 1.

    >>> x = Item(nbytes=8, flops=0, work=0, base=0, needs=(), saveable=True, again=False,
    ...          product=False)
    >>> wide = Item(nbytes=32, flops=0, work=4, base=1, needs=(0,), saveable=True, again=True,
    ...             product=False)
    >>> dear = Item(nbytes=32, flops=64, work=68, base=2, needs=(1,), saveable=True, again=True,
    ...             product=True)
    >>> choice = Choice((x, wide, dear), read=(0, 1, 2), names=())
    >>> [sorted(within(choice, budget)) for budget in (1, 0.6, 0)]
    [[0, 1, 2], [0, 2], [0]]
    """
    everything = outcome(choice, choice.bases)
    limit = budget * everything.nbytes
    if everything.nbytes <= limit:
        return everything.saved
    all_bytes = 1 + sum(item.nbytes for item in choice.items)
    all_work = 1 + sum(item.work for item in choice.items)
    least_work = _cheapest(choice, 1, all_bytes)
    fewest_bytes = _cheapest(choice, all_work, 1)
    if least_work.nbytes <= limit:
        return _filled(choice, least_work, limit).saved
    best = _on_hull(choice, limit, over=least_work, under=fewest_bytes)
    return _filled(choice, best, limit).saved


def _on_hull(choice: Choice, limit: float, over: Outcome, under: Outcome) -> Outcome:
    """The choice of the least work on the convex hull that keeps to a limit of bytes.

    Args:
        over: a choice of more bytes than the limit.
        under: the choice of the fewest bytes; returned if it is over the limit, too.
    """
    while under.nbytes <= limit:
        per_byte = under.work - over.work
        per_work = over.nbytes - under.nbytes
        found = _cheapest(choice, per_byte, per_work)
        price = per_byte * found.nbytes + per_work * found.work
        if price == per_byte * over.nbytes + per_work * over.work:
            break
        if found.nbytes <= limit:
            under = found
        else:
            over = found
    return under


def _cheapest(choice: Choice, per_byte: int, per_work: int) -> Outcome:
    """The choice whose bytes and work cost the least at these prices."""
    import networkx  # of torch's own requirements; slow to import

    graph = networkx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    for index, item in enumerate(choice.items):
        again = _again(index) if item.again else SINK
        saving = {"capacity": per_byte * item.nbytes} if item.saveable else _UNCUTTABLE
        graph.add_edge(_there(index), again, **saving)
        if item.again:
            graph.add_edge(again, SINK, capacity=per_work * item.work)
            for needed in item.needs:
                graph.add_edge(again, _there(needed))
    for index in choice.read:
        graph.add_edge(SOURCE, _there(index))
    _, (wanted, _) = networkx.minimum_cut(graph, SOURCE, SINK)
    saved = set()
    for index in choice.bases:
        if _there(index) in wanted and _again(index) not in wanted:
            saved.add(index)
    return outcome(choice, frozenset(saved))


def _there(index: int) -> tuple[int, str]:
    return index, "there"


def _again(index: int) -> tuple[int, str]:
    return index, "again"


def _filled(choice: Choice, best: Outcome, limit: float) -> Outcome:
    """Save more while the limit allows it and it spares work, first what spares most per byte."""

    def rank(index: int) -> tuple[float, int]:
        item = choice.items[index]
        needed = [choice.items[other] for other in item.needs]
        spared = item.work or sum(other.work for other in needed)
        return -spared / max(item.nbytes, 1), index

    before = None
    while best != before:  # what spared nothing may do so beside another
        before = best
        left = choice.bases - best.saved
        for index in sorted(left, key=rank):
            other = outcome(choice, best.saved | {index})
            if other.nbytes <= limit and other.work < best.work:
                best = other
    return best
