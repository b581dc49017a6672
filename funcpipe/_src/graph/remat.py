"""Remat: the backward half of a segment computes forward values again instead of reading what the
forward half saved.

A pass between `read_nodes` and `cut`. For every segment a policy says which forward values are
saved. Every other forward
value that the backward half reads is computed again there: its nodes are *cloned*, with the label
of the backward half, just before what reads them first. The rule of liveness in `partition.py` does
the rest: what nobody reads any more is no residual, and where I and W are units of their own, what
I computes again W reads from I.

Never cloned: communication, ops that draw from the global generator, ops that are no plain calls,
and what enters the
segment: values of other segments, params and the batch. A clone is the same op on the same
operands, so gradients have the same bits.

In: `Nodes`, which are changed, and what `remat` transforms asked for. Out: for every segment a
`Saved`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from funcpipe._src.graph.node_labels import Nodes
from funcpipe._src.graph.ops import base_of, is_communication, is_op, is_seeded, viewed
from funcpipe._src.graph.remat_min_cut import Choice, Item, Outcome, outcome, within
from funcpipe._src.graph.unit_code import flops, nbytes
from funcpipe.errors import StackError

if TYPE_CHECKING:
    from funcpipe._src.spec.requests import Remat

# Work for every element that an op makes of which it is not known how many FLOPs it takes, such as
# an attention of one's own.
_UNKNOWN = 1000


@dataclass(frozen=True)
class Saved:
    """What a segment saves for its backward half.

    Args:
        choice: what it could save or compute again.
        remat: by what it was chosen; None: all that is read is saved.
        items: the items that are saved if they are needed.
    """

    choice: Choice
    remat: Remat | None
    items: frozenset[int]

    @functools.cached_property
    def outcome(self) -> Outcome:
        """Bytes that are saved, FLOPs that are computed again."""
        return outcome(self.choice, self.items)

    @functools.cached_property
    def whole(self) -> Outcome:
        """The same without remat."""
        return outcome(self.choice, self.choice.bases)

    @property
    def over(self) -> bool:
        """Whether it is less than a budget that was asked for cannot be reached."""
        budget = None if self.remat is None else self.remat.budget
        return budget is not None and self.outcome.nbytes > budget * self.whole.nbytes


def rematerialise(n: Nodes, remats: Sequence[Remat]) -> tuple[Saved, ...]:
    """Let backward halves compute forward values again, as transforms ask.

    Args:
        n: is changed.
        remats: each for its own segments.

    Raises:
        StackError: two of them choose for one segment.
    """
    own: dict[int, list[fx.Node]] = {}
    for x, label in n.label.items():
        own.setdefault(label, []).append(x)
    out = []
    for s in range(n.segments):
        backward = own.get(n.backward(s), [])
        items = _Items(n, s, own.get(s, []))
        choice = items.choice(backward)
        remat = _chosen(remats, s)
        saved = Saved(choice, remat, choice.bases if remat is None else _policy(remat, choice))
        if remat is not None:
            _compute_again(n, items.number, saved, backward)
        out.append(saved)
    n.place = {x: i for i, x in enumerate(n.graph.nodes)}
    n.label = {x: n.label[x] for x in n.place if x in n.label}
    return tuple(out)


def check_used(remats: Iterable[Remat], losses: Sequence[Sequence[Saved]]) -> None:
    """StackError when a transform asks for a name or a segment that no loss function of the step
    has.

    Args:
        losses: of every loss function what its segments save.
    """
    known = sorted({name for saved in losses for s in saved for name, _ in s.choice.names})
    segments = max(map(len, losses), default=0)
    for remat in remats if losses else ():
        for s in remat.segments if isinstance(remat.segments, tuple) else ():
            if s >= segments:
                raise StackError(
                    f"{remat}: there is no segment {s}: the loss function has {segments}, counted "
                    "from 0, one more than stage boundaries"
                )
        for name in (*remat.save, *remat.recompute):
            if name not in known:
                there = f"it names {', '.join(map(repr, known))}" if known else "it names none"
                raise StackError(
                    f"{remat}: no value of the loss function has the name {name!r}; {there}. Write "
                    f"x = fp.checkpoint_name(x, {name!r}) where the value is made"
                )


def _chosen(remats: Sequence[Remat], segment: int) -> Remat | None:
    """The one that chooses for a segment."""
    found = [x for x in remats if x.covers(segment)]
    if len(found) > 1:
        raise StackError(
            f"{found[0]} and {found[1]} both choose what segment {segment} saves; give each its "
            "own segments (segments=...)"
        )
    return found[0] if found else None


def _policy(remat: Remat, c: Choice) -> frozenset[int]:
    """What a transform wants to be saved."""
    if remat.budget is not None:
        return within(c, remat.budget)
    if remat.save:
        return c.named(remat.save)
    if remat.recompute:
        return c.bases - c.named(remat.recompute)
    return (
        frozenset(i for i in c.bases if c.items[i].product)
        if remat.policy == "products"
        else frozenset()
    )


# ---- what there is to choose from


class _Items:
    """The forward values of a segment as items, and what enters it as soon as something reads
    it."""

    def __init__(self, n: Nodes, segment: int, forward: Sequence[fx.Node]) -> None:
        self.n, self.segment = n, segment
        self.number: dict[fx.Node, int] = {}
        self.entering: dict[fx.Node, int] = {}
        self.items: list[Item] = []
        for x in forward:
            if self._is_own(x):
                self._add(x)

    def choice(self, backward: Sequence[fx.Node]) -> Choice:
        """What the segment may choose from, given the nodes of its backward half."""
        read = tuple(dict.fromkeys(i for x in backward for i in self._operands(x)))
        names = (
            (name, tuple(self.number[x] for x in some if x in self.number))
            for name, some in self.n.names.items()
        )
        return Choice(tuple(self.items), read, tuple(names))

    def _is_own(self, x: fx.Node) -> bool:
        """Not so what every unit makes for itself, from params, the batch or what enters the
        segment."""
        rebuilt = x in self.n.rebuilt and not any(a in self.number for a in x.all_input_nodes)
        return x not in self.n.constant and not rebuilt

    def _operands(self, x: fx.Node) -> list[int]:
        return [i for i in map(self._item_of, x.all_input_nodes) if i is not None]

    def _item_of(self, x: fx.Node) -> int | None:
        """The item of what a node reads; None where that costs nothing to keep, or is a
        gradient."""
        if x in self.number:
            return self.number[x]
        base = base_of(x)
        if base in self.number:
            return self.number[base]
        free = base in self.n.constant or base in self.n.rebuilt
        if free or self.n.label.get(base, self.n.segments) >= self.n.segments:
            return None
        if base not in self.entering:
            i = self.entering[base] = len(self.items)
            self.items.append(
                Item(_bytes(base), 0, 0, i, (), saveable=True, again=False, product=False)
            )
        return self.entering[base]

    def _add(self, x: fx.Node) -> None:
        needs = tuple(dict.fromkeys(self._operands(x)))
        i = self.number[x] = len(self.items)
        base = self._item_of(base_of(x))
        saveable = base == i and isinstance(x.meta.get("val"), torch.Tensor)
        parts = [self.items[j] for j in needs if not self.items[j].saveable]
        part_of_product = x.target is operator.getitem and any(part.product for part in parts)
        self.items.append(
            Item(
                nbytes=_bytes(x) if saveable else 0,
                flops=flops(x),
                work=flops(x) + _work(x),
                base=i if base is None else base,
                needs=needs,
                saveable=saveable,
                again=_repeatable(x) and all(part.again for part in parts),
                product=flops(x) > 0 or _unknown(x) or part_of_product,
            )
        )


def _repeatable(x: fx.Node) -> bool:
    return (
        (is_op(x) or x.target is operator.getitem) and not is_communication(x) and not is_seeded(x)
    )


def _unknown(x: fx.Node) -> bool:
    """Whether an op may take any number of FLOPs."""
    if not is_op(x) or flops(x):
        return False
    packet = x.target.overloadpacket  # type: ignore[union-attr]
    return x.target.namespace != "aten" or "attention" in packet.__name__  # type: ignore[union-attr]


def _work(x: fx.Node) -> int:
    """Elements that a node makes, weighed."""
    if x.target is operator.getitem or viewed(x) is not None:
        return 0
    val = x.meta.get("val")
    made = val if isinstance(val, tuple | list) else (val,)
    return sum(y.numel() for y in made if isinstance(y, torch.Tensor)) * (
        _UNKNOWN if _unknown(x) else 1
    )


def _bytes(x: fx.Node) -> int:
    val = x.meta.get("val")
    return nbytes(val) if isinstance(val, torch.Tensor) else 0


# ---- cloning


def _compute_again(
    n: Nodes, number: dict[fx.Node, int], saved: Saved, backward: Sequence[fx.Node]
) -> None:
    """Clone what is not saved to where the backward half of a segment reads it first.

    Args:
        number: of the items that are nodes of the forward half.
        backward: the nodes of the backward half, in order.
    """
    new: dict[fx.Node, fx.Node] = {}

    def gone(x: fx.Node) -> bool:
        return x in number and not saved.choice.kept(number[x], saved.items)

    for user in backward:
        wanted = [x for x in user.all_input_nodes if gone(x)]
        missing, stack = set(), list(wanted)
        while stack:
            x = stack.pop()
            if x not in new and x not in missing:
                missing.add(x)
                stack += filter(gone, x.all_input_nodes)
        for x in sorted(missing, key=n.place.__getitem__):
            with n.graph.inserting_before(user):
                new[x] = n.graph.node_copy(x, lambda a: new.get(a, a))
            n.label[new[x]] = n.label[user]
            if x in n.rebuilt:
                n.rebuilt.add(new[x])
        for x in wanted:
            user.replace_input_with(x, new[x])
