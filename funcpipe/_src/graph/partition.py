"""Partition: a joint graph becomes units, and every value between two units becomes explicit.

Boundary ``k`` begins *segment* ``k``; a loss with ``n`` boundaries has segments ``0..n``. A segment
has the *units* F (forward) and B (backward), or F, I (gradient with respect to what came in) and W
(gradient with respect to the params). A *value* is what a unit reads or writes: a leaf of params or
batch, a folded constant, or an activation, residual or gradient that one unit makes and another
reads.

There is one rule of liveness: a node used in another unit is an output of its own unit and an input
there. Two kinds of nodes are not carried. Views, and what follows from the batch or the params
alone by cheap ops, are *rebuilt* where they are used. What follows from neither is *folded*:
computed once per rank, then an input. A tied param gets one partial gradient per segment that uses
it; they are kept apart here and summed once per step.

In: `Traced`. Out: `Units`, in the order of one microbatch, with shared code where two segments are
alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from funcpipe._src.graph import unit_code as code_
from funcpipe._src.graph.node_labels import Nodes, read_nodes
from funcpipe._src.graph.ops import is_carried, is_heavy
from funcpipe._src.graph.remat import Saved, rematerialise
from funcpipe._src.graph.trace import Traced
from funcpipe._src.graph.unit_code import Code, Value

if TYPE_CHECKING:
    from funcpipe._src.spec.requests import Remat

_SAME_HALF = {"B": "IW", "I": "B", "W": "B"}  # units that do the same, or a part of it

Key = tuple[str, int]  # kind and segment of a unit
NodeSet = set[fx.Node]
NodeList = list[fx.Node]
Own = Collection[fx.Node]  # the nodes of a unit


@dataclass(frozen=True, eq=False)
class Unit:
    """A compiled piece of one segment.

    Args:
        kind: ``"F"``, ``"B"``, ``"I"`` or ``"W"``.
        segment: which segment.
        code: what runs, shared between units that do the same.
        inputs, outputs: the values it reads and writes, in the order of the code's arguments and
            results.
    """

    kind: str
    segment: int
    code: Code
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def __str__(self) -> str:
        return f"{self.kind}{self.segment}"


@dataclass(frozen=True, eq=False)
class Units:
    """A loss cut at its boundaries.

    Args:
        units: by kind and segment, in the order of one microbatch.
        segments: how many segments.
        heads: total, weight (if the loss has one) and aux tensors: values of F units.
        grads: for every tensor of params its partial gradients, in the order in which autograd
            would sum them (none at all: zeros).
        constants: what was folded: a function without arguments computes it on this rank.
        traced: where it all came from; its graph is used up.
        saved: what every segment saves for its backward half, where that is known.
    """

    units: dict[Key, Unit]
    segments: int
    heads: tuple[Value, ...]
    grads: tuple[tuple[Value, ...], ...]
    constants: dict[Value, code_.Folded]
    traced: Traced
    saved: tuple[Saved, ...] = ()

    def __str__(self) -> str:
        lines = []
        for unit in self.units.values():
            inputs = ", ".join(map(str, unit.inputs))
            outputs = ", ".join(map(str, unit.outputs))
            lines.append(f"{unit}: ({inputs}) -> ({outputs}), {unit.code.flops} FLOP")
        return "\n".join(lines)


def partition_graph(
    joint: Traced,
    labels: Nodes,
    remats: Sequence[Remat] = (),
    separate_w: bool = True,
) -> Units:
    """Cut a joint graph at its boundaries into units.

    Args:
        joint: its graph is used up.
        labels: what ``read_nodes`` made of it.
        remats: what transforms ask to be computed again.
        separate_w: whether to make I and W units beside B.

    Raises:
        StackError: two of ``remats`` choose for one segment.
    """
    saved = rematerialise(labels, remats)
    units = cut(joint, labels, separate_w)
    return replace(units, saved=saved)


def cut(traced: Traced, nodes: Nodes | None = None, split: bool = True) -> Units:
    """Cut a joint graph as it is."""
    labels = nodes or read_nodes(traced)
    return _Cutter(traced, labels, split).cut()


class _Cutter:
    """Builds the units of a graph, last unit first, so that all readers of a value are known before
    its own unit is built.

    Attributes:
        final: the outputs of the graph, which are made once, in their own unit.
        readers: for every node the units that read it.
        own: the nodes by label.
    """

    def __init__(self, joint: Traced, labels: Nodes, separate_w: bool) -> None:
        self.joint = joint
        self.labels = labels
        self.separate_w = separate_w
        self.deferred = deferred(labels) if separate_w else set()
        self.final = set(labels.outputs)
        self.final.update(*labels.grads)
        self.values: dict[fx.Node, Value] = {}
        self.readers: dict[fx.Node, set[Key]] = {}
        self.codes: dict[str, Code] = {}
        self.own: dict[int, NodeList] = {}
        for node, label in labels.label.items():
            alike = self.own.setdefault(label, [])
            alike.append(node)

    def cut(self) -> Units:
        units = {key: self._unit(key) for key in self._keys()}
        in_order = reversed(units.items())
        labels = self.labels
        grads = [self._values(partials) for partials in labels.grads]
        return Units(
            units=dict(in_order),
            segments=labels.segments,
            heads=self._values(labels.outputs),
            grads=tuple(grads),
            constants=self._constants(),
            traced=self.joint,
        )

    def _keys(self) -> Iterator[Key]:
        for segment in range(self.labels.segments):
            if self.separate_w:
                yield "W", segment
                yield "I", segment
            yield "B", segment
        for segment in reversed(range(self.labels.segments)):
            yield "F", segment

    def _constants(self) -> dict[Value, code_.Folded]:
        found = {}
        for node, value in self.values.items():
            if value.kind == "const":
                module = self.joint.module
                found[value] = code_.folded(module, node)
        return found

    # ---- one unit

    def _unit(self, key: Key) -> Unit:
        kind, segment = key
        own = dict.fromkeys(self._nodes(kind, segment))
        roots = [node for node in own if self._is_output(node, key)]
        body, read = self._body(key, own, roots)
        inputs = _in_order_of_use(body, read)
        module = self.joint.module
        code = code_.compile_unit(module, body, inputs, roots, self.codes)
        return Unit(
            kind=kind,
            segment=segment,
            code=code,
            inputs=self._values(inputs),
            outputs=self._values(roots),
        )

    def _nodes(self, kind: str, segment: int) -> NodeList:
        """What a unit computes, if somebody reads it."""
        if kind == "F":
            return self.own.get(segment, [])
        label = self.labels.backward(segment)
        nodes = self.own.get(label, [])
        if kind == "W":
            return [node for node in nodes if node in self.deferred]
        if kind == "I":
            return [node for node in nodes if node not in self.deferred]
        return nodes

    def _is_output(self, node: fx.Node, key: Key) -> bool:
        """Whether another unit reads a node. B computes what I and W do: neither reads the
        other."""
        if node in self.final:
            return True
        if node in self.labels.constant:
            return False
        kind, segment = key
        kinds = _SAME_HALF.get(kind, "")
        same = {(other, segment) for other in kinds}
        readers = self.readers.get(node, set())
        return not readers <= same

    def _body(self, key: Key, own: Own, roots: NodeList) -> tuple[NodeList, NodeSet]:
        """What a unit has to compute for its outputs, in order, and what it reads for that."""
        position = self.labels.position
        body: NodeList = []
        inputs: NodeSet = set()
        seen = set(roots)
        heap = [(-position[node], node) for node in roots]
        heapq.heapify(heap)
        while heap:  # the latest node first, so that each is met once, after all its users
            _, node = heapq.heappop(heap)
            if not self._computes(node, own):
                inputs.add(node)
                readers = self.readers.setdefault(node, set())
                readers.add(key)
                continue
            body.append(node)
            for read in node.all_input_nodes:
                if read not in seen:
                    seen.add(read)
                    entry = -position[read], read
                    heapq.heappush(heap, entry)
        body.reverse()
        return body, inputs

    def _computes(self, node: fx.Node, own: Own) -> bool:
        """Whether a unit computes a node that it needs; else it reads it."""
        if node in self.final:
            return node in own
        if node in self.labels.constant:
            return not is_carried(node)
        return node in own or node in self.labels.rebuilt

    def _values(self, nodes: Iterable[fx.Node]) -> tuple[Value, ...]:
        return tuple(map(self._value, nodes))

    def _value(self, node: fx.Node) -> Value:
        if node not in self.values:
            kind, index = self._kind(node)
            self.values[node] = code_.value_of(node, kind, index)
        return self.values[node]

    def _kind(self, node: fx.Node) -> tuple[str, int]:
        """The kind of a node's value, and its number among params or batch leaves."""
        if node in self.labels.params:
            return "param", self.labels.params[node]
        if node.op == "placeholder":
            return "batch", self.labels.batch[node]
        if node in self.labels.constant and node not in self.final:
            return "const", -1
        return "value", -1


def _in_order_of_use(body: NodeList, read: NodeSet) -> NodeList:
    """The nodes that a body reads, in the order in which its arguments first name them.

    ``all_input_nodes`` has another order in torch 2.14.
    """
    found: dict[fx.Node, None] = {}

    def note(used: fx.Node) -> fx.Node:
        if used in read:
            found[used] = None
        return used

    for node in body:
        fx.map_arg((node.args, node.kwargs), note)
    return list(found)


def deferred(labels: Nodes) -> NodeSet:
    """The nodes of W: heavy ops off the path to an earlier segment, and what hangs off them.

    In segment 0 nothing is on such a path; there, what feeds another heavy op is on it. Qi et al.
    2023, "Zero Bubble Pipeline Parallelism", section 2.
    """
    label = labels.label
    backward = [node for node in label if label[node] >= labels.segments]
    needed = _needed_earlier(labels, backward)
    found: NodeSet = set()
    for node in backward:
        if node in needed:
            continue
        own = label[node]
        reads = node.all_input_nodes
        inside = [read for read in reads if label.get(read) == own]
        if is_heavy(node) or not found.isdisjoint(inside):
            found.add(node)
    return found


def _needed_earlier(labels: Nodes, backward: NodeList) -> NodeSet:
    """The nodes on the path to an earlier segment."""
    label = labels.label
    first = labels.backward(0)
    needed: NodeSet = set()
    feeds: NodeSet = set()  # what feeds a heavy op of the same segment
    for node in reversed(backward):
        own = label[node]
        users = [user for user in node.users if user in label]
        inside = [user for user in users if label[user] == own]
        if any(map(is_heavy, inside)) or not feeds.isdisjoint(inside):
            feeds.add(node)
        leaves = len(inside) < len(users)
        stays = own == first and node in feeds
        if leaves or stays or not needed.isdisjoint(inside):
            needed.add(node)
    return needed
