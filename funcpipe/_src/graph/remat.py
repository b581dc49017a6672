"""Remat: backward halves compute forward values again instead of reading what was saved.

A pass between `read_nodes` and `cut`. For every segment a policy says which forward values are
saved. Every other forward value that the backward half reads is computed again there: its nodes are
*cloned*, with the label of the backward half, just before what reads them first. The liveness rule
of `partition.py` does the rest: a value that no other unit reads is no residual, and where I and W
are units of their own, W reads from I what I computes again.

Never cloned: communication, ops that draw from the global generator, nodes that are no plain calls,
and what enters the segment (values of other segments, params and the batch). A clone is the same op
on the same operands, so gradients have the same bits.

In: `Nodes`, which are changed, and what `remat` transforms ask for. Out: for every segment a
`Saved`.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from funcpipe._src.graph.node_labels import Nodes
from funcpipe._src.graph.ops import (
    base_of,
    is_communication,
    is_op,
    is_seeded,
    name_of,
    viewed,
)
from funcpipe._src.graph.remat_min_cut import Choice, Item, Numbers, Outcome, outcome, within
from funcpipe._src.graph.unit_code import flops, nbytes_of
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
    items: Numbers

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
        """Whether a budget was asked for that no choice can keep."""
        budget = None if self.remat is None else self.remat.budget
        return budget is not None and self.outcome.nbytes > budget * self.whole.nbytes


def rematerialise(nodes: Nodes, remats: Sequence[Remat]) -> tuple[Saved, ...]:
    """Let backward halves compute forward values again, as transforms ask.

    Args:
        nodes: is changed.
        remats: each for its own segments.

    Raises:
        StackError: two of them choose for one segment.
    """
    own: dict[int, list[Node]] = defaultdict(list)
    for node, label in nodes.label.items():
        own[label].append(node)
    all_saved = []
    for segment in range(nodes.segments):
        backward = own[nodes.backward(segment)]
        items = _Items(nodes, own[segment])
        choice = items.choice(backward)
        remat = _remat_of(remats, segment)
        if remat is None:
            all_saved.append(Saved(choice, None, choice.bases))
            continue
        saved = Saved(choice, remat, _chosen(remat, choice))
        _Cloning(nodes, items.number, saved).run(backward)
        all_saved.append(saved)
    nodes.update_order()
    return tuple(all_saved)


def check_used(remats: Iterable[Remat], losses: Sequence[Sequence[Saved]]) -> None:
    """Check that loss functions have the names and segments that transforms ask for.

    Args:
        losses: for every loss function of the step, what its segments save.

    Raises:
        StackError: no loss function has that name, or that segment.
    """
    if not losses:
        return
    names = sorted(set(_names_of(losses)))
    segments = max(map(len, losses))
    for remat in remats:
        if isinstance(remat.segments, tuple):
            _check_segments(remat, remat.segments, segments)
        for name in (*remat.save, *remat.recompute):
            if name not in names:
                raise StackError(_unknown_name(remat, name, names))


def _names_of(losses: Iterable[Sequence[Saved]]) -> Iterator[str]:
    for segments in losses:
        for saved in segments:
            yield from dict(saved.choice.names)


def _check_segments(remat: Remat, wanted: tuple[int, ...], segments: int) -> None:
    for segment in wanted:
        if segment >= segments:
            raise StackError(
                f"{remat}: there is no segment {segment}: the loss function has {segments}, "
                "counted from 0, one more than stage boundaries"
            )


def _unknown_name(remat: Remat, name: str, names: list[str]) -> str:
    has = f"it names {', '.join(map(repr, names))}" if names else "it names none"
    return (
        f"{remat}: no value of the loss function has the name {name!r}; {has}. Write "
        f"x = fp.checkpoint_name(x, {name!r}) where the value is made"
    )


def _remat_of(remats: Sequence[Remat], segment: int) -> Remat | None:
    """The transform that chooses for a segment, if there is one."""
    found = [remat for remat in remats if remat.covers(segment)]
    if len(found) > 1:
        raise StackError(
            f"{found[0]} and {found[1]} both choose what segment {segment} saves; give each its "
            "own segments (segments=...)"
        )
    return found[0] if found else None


def _chosen(remat: Remat, choice: Choice) -> Numbers:
    """What a transform wants to be saved."""
    if remat.budget is not None:
        return within(choice, remat.budget)
    if remat.save:
        return choice.named(remat.save)
    if remat.recompute:
        return choice.bases - choice.named(remat.recompute)
    if remat.policy == "products":
        items = choice.items
        return frozenset(index for index in choice.bases if items[index].product)
    return frozenset()


# ---- what there is to choose from


class _Items:
    """The forward values of a segment as items, and what enters it as soon as something reads
    it."""

    def __init__(self, nodes: Nodes, forward: Sequence[Node]) -> None:
        self.nodes = nodes
        self.number: dict[Node, int] = {}
        self.entering: dict[Node, int] = {}
        self.items: list[Item] = []
        for node in forward:
            if self._is_own(node):
                self._add(node)

    def choice(self, backward: Sequence[Node]) -> Choice:
        """What the segment may choose from, given the nodes of its backward half."""
        read: dict[int, None] = {}
        for node in backward:
            read |= dict.fromkeys(self._operands(node))
        names = []
        for name, named in self.nodes.names.items():
            own = filter(self.number.__contains__, named)
            names.append((name, tuple(map(self.number.__getitem__, own))))
        return Choice(tuple(self.items), tuple(read), tuple(names))

    def _is_own(self, node: Node) -> bool:
        """Whether the segment makes a node.

        Every unit makes for itself what follows from params, the batch or what enters the segment.
        """
        if node in self.nodes.constant:
            return False
        if node not in self.nodes.rebuilt:
            return True
        return any(source in self.number for source in node.all_input_nodes)

    def _operands(self, node: Node) -> list[int]:
        """The items that a node reads, each once."""
        numbers = map(self._item_of, node.all_input_nodes)
        return list(dict.fromkeys(number for number in numbers if number is not None))

    def _item_of(self, node: Node) -> int | None:
        """The item of what a node reads; None where that costs nothing to keep, or is a
        gradient."""
        if node in self.number:
            return self.number[node]
        base = base_of(node)
        if base in self.number:
            return self.number[base]
        if base in self.nodes.constant or base in self.nodes.rebuilt:
            return None
        if base not in self.nodes.label or self.nodes.is_backward(base):
            return None
        if base not in self.entering:
            self.entering[base] = len(self.items)
            self.items.append(_entering(base, len(self.items)))
        return self.entering[base]

    def _add(self, node: Node) -> None:
        needs = tuple(self._operands(node))
        number = self.number[node] = len(self.items)
        base = self._item_of(base_of(node))
        makes_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        saveable = base == number and makes_tensor
        views = [self.items[needed] for needed in needs if not self.items[needed].saveable]
        is_part = node.target is operator.getitem  # of what a product returns, perhaps
        of_product = is_part and any(view.product for view in views)
        self.items.append(
            Item(
                nbytes=nbytes_of(node) if saveable else 0,
                flops=flops(node),
                work=flops(node) + _work(node),
                base=number if base is None else base,
                needs=needs,
                saveable=saveable,
                again=_is_repeatable(node) and all(view.again for view in views),
                product=flops(node) > 0 or _is_unknown(node) or of_product,
            )
        )


def _entering(base: Node, number: int) -> Item:
    """The item of a value that enters a segment: it cannot be computed again there."""
    return Item(
        nbytes=nbytes_of(base),
        flops=0,
        work=0,
        base=number,
        needs=(),
        saveable=True,
        again=False,
        product=False,
    )


def _is_repeatable(node: Node) -> bool:
    if is_communication(node) or is_seeded(node):
        return False
    return is_op(node) or node.target is operator.getitem


def _is_unknown(node: Node) -> bool:
    """Whether an op may take any number of FLOPs."""
    if not is_op(node) or flops(node):
        return False
    op: Any = node.target
    return op.namespace != "aten" or "attention" in name_of(node)


def _work(node: Node) -> int:
    """How many elements a node makes, weighed."""
    if node.target is operator.getitem or viewed(node) is not None:
        return 0
    made = node.meta.get("val")
    if not isinstance(made, tuple | list):
        made = [made]
    elements = sum(value.numel() for value in made if isinstance(value, torch.Tensor))
    return elements * _UNKNOWN if _is_unknown(node) else elements


# ---- cloning


class _Cloning:
    """Clones what a segment does not save to where its backward half reads it first.

    Args:
        nodes: are changed.
        number: of the items that are nodes of the forward half.
        saved: what the segment saves.
    """

    def __init__(self, nodes: Nodes, number: dict[Node, int], saved: Saved) -> None:
        self.nodes, self.number, self.saved = nodes, number, saved
        self.clones: dict[Node, Node] = {}

    def run(self, backward: Sequence[Node]) -> None:
        """Clone for the nodes of the backward half, in order."""
        for user in backward:
            dropped = list(filter(self._is_dropped, user.all_input_nodes))
            for node in self._missing(dropped):
                self._clone(node, user)
            for node in dropped:
                user.replace_input_with(node, self.clones[node])

    def _is_dropped(self, node: Node) -> bool:
        """Whether a node of the forward half is computed again."""
        if node not in self.number:
            return False
        return not self.saved.choice.kept(self.number[node], self.saved.items)

    def _missing(self, wanted: Iterable[Node]) -> list[Node]:
        """The nodes to clone, in order, before some can be read."""
        missing: set[Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in self.clones and node not in missing:
                missing.add(node)
                stack += filter(self._is_dropped, node.all_input_nodes)
        return sorted(missing, key=self.nodes.position.__getitem__)

    def _clone(self, node: Node, user: Node) -> None:
        """Clone a node right before one that reads it."""
        graph = self.nodes.graph
        with graph.inserting_before(user):
            clone = graph.node_copy(node, lambda source: self.clones.get(source, source))
        self.clones[node] = clone
        self.nodes.label[clone] = self.nodes.label[user]
        if node in self.nodes.rebuilt:
            self.nodes.rebuilt.add(clone)
