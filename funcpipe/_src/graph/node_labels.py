"""Node labels: sorts the nodes of a joint graph into units and kinds, before partitioning.

Every node gets a *label*: F of segment ``s`` is ``s``; B of segment ``s`` is ``2 * segments - 1 -
s``. Labels follow the order in which units run, and so do the edges of the graph. Two rules move
nodes to an earlier or another unit:

- A cast (or the like) of a param at the top of a loss leaves its transpose at the very end of the
  backward pass. Such a node, which nothing but a gradient output reads, moves to the unit that
  makes what it reads.
- The gradient of a tied parameter is a sum over segments. It is taken apart into partial gradients.

In: `Traced`, whose graph is used up. Out: `Nodes`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from funcpipe._src.functional.checkpoint_name import NAMED
from funcpipe._src.graph.ops import (
    MARK,
    is_carried,
    is_cheap,
    is_communication,
    is_heavy,
    is_op,
    is_seeded,
    is_view,
    name_of,
)
from funcpipe._src.graph.trace import Traced

aten = torch.ops.aten
Grads = list[Node | None]  # per tensor of params


@dataclass
class Nodes:
    """What each node of a joint graph is.

    Args:
        params, batch: placeholders and their numbers.
        label: of every other node.
        names: what the loss function calls values of the forward half.
        outputs: the nodes of total, weight and aux tensors.
        grads: per tensor of params its partial gradients, in autograd's order.
        position: every node's position in the graph.
        constant: what follows from neither params nor batch.
        rebuilt: what is computed again in each unit that reads it.
    """

    graph: Graph
    segments: int
    params: dict[Node, int]
    batch: dict[Node, int]
    label: dict[Node, int]
    names: dict[str, list[Node]]
    outputs: list[Node] = field(default_factory=list)
    grads: list[list[Node]] = field(default_factory=list)
    position: dict[Node, int] = field(default_factory=dict)
    constant: set[Node] = field(default_factory=set)
    rebuilt: set[Node] = field(default_factory=set)

    def backward(self, segment: int) -> int:
        """The label of the backward half of a segment."""
        return 2 * self.segments - 1 - segment

    def is_backward(self, node: Node) -> bool:
        """Whether a node belongs to the backward half of a segment."""
        return self.label.get(node, -1) >= self.segments

    def update_order(self) -> None:
        """Number the nodes, and order the labels, as the graph is now."""
        self.position = numbered(self.graph.nodes)
        before = self.label
        labelled = filter(before.__contains__, self.position)
        self.label = {node: before[node] for node in labelled}


def numbered(nodes: Iterable[Node]) -> dict[Node, int]:
    """Nodes and their numbers, from 0."""
    return {node: number for number, node in enumerate(nodes)}


def read_nodes(traced: Traced) -> Nodes:
    """Sort the nodes of a joint graph."""
    nodes = _labelled(traced)
    _forget_data(nodes)
    _merge_constants(nodes)
    _read_outputs(nodes, 1 + traced.has_weight + traced.aux_count)
    nodes.graph.eliminate_dead_code()
    nodes.update_order()
    _classify(nodes)
    return nodes


def _read_outputs(nodes: Nodes, count: int) -> None:
    """Read the ``count`` outputs of the loss and the gradients, and let the graph return partial
    gradients."""
    output = _output_of(nodes.graph)
    returned = output.args[0]
    nodes.outputs = list(returned[:count])
    grads = [_computed(nodes, grad) for grad in returned[count:]]
    _settle_epilogues(nodes, output, grads)
    nodes.grads = [_partials(nodes, grad) for grad in grads]
    partials = itertools.chain(*nodes.grads)
    output.args = ((*nodes.outputs, *partials),)


def _output_of(graph: Graph) -> Any:
    (output,) = graph.find_nodes(op="output")
    return output


# ---- labels


def _labelled(traced: Traced) -> Nodes:
    """Read the markers of a graph, and remove them."""
    graph = traced.module.graph
    segments = traced.boundaries + 1
    label: dict[Node, int] = {}
    names: dict[str, list[Node]] = defaultdict(list)
    current = 0
    node: Any
    for node in list(graph.nodes):
        if node.target is MARK:
            current = int(node.args[0])
            graph.erase_node(node)
        elif node.target is NAMED:
            if current < segments:
                named, name = node.args
                names[str(name)].append(named)
            graph.erase_node(node)
        elif node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op in ("call_function", "get_attr"):
            label[node] = current
    inputs = list(graph.find_nodes(op="placeholder"))
    params = numbered(inputs[: traced.params])
    batch = numbered(inputs[traced.params :])
    return Nodes(graph, segments, params, batch, label, names)


def _forget_data(nodes: Nodes) -> None:
    """Nodes that read a tensor for its shape alone read nothing instead; ints among nodes become
    constants."""
    for node in list(nodes.label):
        value = node.meta.get("val")
        if isinstance(value, int):
            node.replace_all_uses_with(value)  # type: ignore[arg-type]
        elif value is not None:
            _forget_operand(nodes, node, value)


def _forget_operand(nodes: Nodes, node: Node, value: Any) -> None:
    """Replace a ``zeros_like``, ``new_full``, … by a ``full`` of the same result."""
    fill = _fill_of(node)
    if fill is None or not value.is_contiguous():
        return
    args = list(value.shape), fill
    options = {"dtype": value.dtype, "device": value.device}
    graph = nodes.graph
    with graph.inserting_before(node):
        full = graph.call_function(aten.full.default, args, options)
    full.meta = dict(node.meta)
    nodes.label[full] = nodes.label.pop(node)
    node.replace_all_uses_with(full)
    graph.erase_node(node)


def _fill_of(node: Node) -> Any:
    """What a ``zeros_like``, ``new_full``, … fills its result with; None for every other op."""
    name = name_of(node)
    if name in ("zeros_like", "new_zeros"):
        return 0
    if name in ("ones_like", "new_ones"):
        return 1
    if name not in ("full_like", "new_full"):
        return None
    value = node.args[-1]
    return None if isinstance(value, Node) else value


def _merge_constants(nodes: Nodes) -> None:
    """Constants that are made alike, such as a mask that every block makes for itself, become
    one."""
    first_of: dict[tuple, Node] = {}
    alike: dict[Node, int] = {}  # constant -> a number that constants made alike share
    for node in list(nodes.label):
        if not is_op(node) or not _repeatable(node):
            continue
        if not alike.keys() >= set(node.all_input_nodes):
            continue
        args = map_arg((node.args, node.kwargs), lambda source: f"%{alike[source]}")
        made_alike = node.target, repr(args)
        first = first_of.setdefault(made_alike, node)
        alike[node] = alike.setdefault(first, len(alike))
        is_returned = any(user.op == "output" for user in node.users)
        if first is not node and is_carried(node) and not is_returned:
            node.replace_all_uses_with(first)
            nodes.graph.erase_node(node)
            del nodes.label[node]


def _repeatable(node: Node) -> bool:
    """Whether a node gives the same wherever and how often it runs."""
    return not is_seeded(node) and not is_communication(node)


# ---- gradients


def _computed(nodes: Nodes, grad: Node | None) -> Node | None:
    """A gradient that is an input or a constant as it stands becomes a node of the last unit."""
    if grad is None or grad in nodes.label:
        return grad
    output = _output_of(nodes.graph)
    graph = nodes.graph
    with graph.inserting_before(output):
        clone = graph.call_function(aten.clone.default, (grad,))
    clone.meta = dict(grad.meta)
    nodes.label[clone] = nodes.backward(0)
    output.replace_input_with(grad, clone)
    return clone


def _settle_epilogues(nodes: Nodes, output: Node, grads: Grads) -> None:
    """Move what nothing but a gradient output reads up to the backward half of the segment that
    uses the param."""
    backward = list(filter(nodes.is_backward, nodes.graph.nodes))
    earliest = _earliest_of_grads(nodes, grads)
    for node in reversed(backward):
        if node in nodes.outputs or not node.users:
            continue
        readers = [user for user in node.users if user is not output]
        if all(reader in earliest for reader in readers):
            own = earliest.get(node, 0)
            labels = [earliest.get(user, own) for user in node.users]
            earliest[node] = max(labels)
    for node in backward:
        if node not in earliest or node in nodes.outputs:
            continue
        label = earliest[node]
        for source in filter(nodes.is_backward, node.all_input_nodes):
            label = max(label, nodes.label[source])
        nodes.label[node] = min(label, nodes.label[node])


def _earliest_of_grads(nodes: Nodes, grads: Grads) -> dict[Node, int]:
    """For every gradient the earliest label that it may move to."""
    earliest: dict[Node, int] = {}
    for grad, uses in zip(grads, _uses(nodes), strict=True):
        if grad is None:
            continue
        label = nodes.backward(min(uses, default=0))
        other = earliest.get(grad, label)  # where one node is the gradient of two params
        earliest[grad] = max(label, other)
    return earliest


def _uses(nodes: Nodes) -> list[set[int]]:
    """For every param the segments that use it, other than to cast it."""
    uses: dict[int, set[int]] = {}
    casts: dict[Node, set[int]] = {}
    for node, param in nodes.params.items():
        uses[param] = set()
        casts[node] = {param}
    for node, label in nodes.label.items():
        params: set[int] = set()
        sources = node.all_input_nodes
        for source in sources:
            params |= casts.get(source, set())
        only_casts = casts.keys() >= set(sources)
        if params and only_casts and is_cheap(node):
            casts[node] = params
        elif label < nodes.segments:
            for param in params:
                uses[param].add(label)
    return list(uses.values())


def _partials(nodes: Nodes, grad: Any) -> list[Node]:
    """The partial gradients: a gradient is taken apart at its sums over segments.

    Autograd adds to a running sum, the first operand. A second operand that is a sum itself came
    through an alias of the param. It is not taken apart: adding its terms one by one would give
    other bits.
    """
    if grad is None:
        return []
    if not _is_sum_over_segments(nodes, grad):
        return [grad]
    running, last = grad.args
    return [*_partials(nodes, running), last]


def _is_sum_over_segments(nodes: Nodes, node: Any) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    if len(node.args) != 2 or len(node.users) > 1:
        return False
    first, second = node.args
    for term in node.args:
        if not isinstance(term, Node) or not nodes.is_backward(term):
            return False
    if nodes.label[first] != nodes.label[second]:
        return True
    return any(_is_sum_over_segments(nodes, term) for term in node.args)


# ---- kinds


def _classify(nodes: Nodes) -> None:
    """Find the constants, and what is cheaper to compute again than to carry between units."""
    from_batch = set(nodes.batch)  # and from constants
    from_params = set(nodes.params)  # and from constants, by cheap ops
    for node in nodes.label:
        if not _repeatable(node):
            continue
        sources = set(node.all_input_nodes) - nodes.constant
        if not sources:
            nodes.constant.add(node)
        elif is_heavy(node):
            continue
        elif sources <= from_batch:
            from_batch.add(node)
            nodes.rebuilt.add(node)
        elif is_cheap(node) and sources <= from_params:
            from_params.add(node)
            nodes.rebuilt.add(node)
        elif is_view(node) and not _is_smaller(node, node.args[0]):
            nodes.rebuilt.add(node)


def _is_smaller(view: Node, source: Any) -> bool:
    return _size(view) < _size(source)


def _size(node: Any) -> int:
    """How many elements a node makes; 0 unless that is one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return value.numel()
