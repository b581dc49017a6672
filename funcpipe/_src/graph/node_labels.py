"""The nodes of a joint graph, sorted into what each of them is; the first half of cutting.

Every node gets a *label*: F of segment ``s`` is ``s``; B of segment ``s`` is ``2 * segments - 1 -
s``. Labels follow the order in which units run, and so do the edges of the graph, wherever a node
is moved to below:

- a cast (or the like) of a param at the top of a loss leaves its transpose at the very end of the
  backward pass: such a node, which nothing but a gradient output reads, moves to the unit that
  makes what it reads;
- the gradient of a tied parameter is a sum over segments: it is taken apart into the partial
  gradients.

In: `Traced`, whose graph is used up. Out: `Nodes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

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
    viewed,
)
from funcpipe._src.graph.trace import Traced

aten = torch.ops.aten


@dataclass
class Nodes:
    """What is known of the nodes of a joint graph.

    Args:
        params, batch: placeholders and their numbers.
        label: of every other node.
        place: every node's place in the graph.
        heads: the nodes of total, weight and aux tensors.
        grads: per tensor of params its partial gradients, in autograd's order.
        constant: what follows from neither params nor batch.
        rebuilt: what is computed again in each unit that reads it.
        names: what the loss function calls values of the forward half.
    """

    graph: fx.Graph
    segments: int
    params: dict[fx.Node, int]
    batch: dict[fx.Node, int]
    label: dict[fx.Node, int]
    heads: list[fx.Node] = field(default_factory=list)
    grads: list[list[fx.Node]] = field(default_factory=list)
    place: dict[fx.Node, int] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)
    rebuilt: set[fx.Node] = field(default_factory=set)
    names: dict[str, list[fx.Node]] = field(default_factory=dict)

    def backward(self, segment: int) -> int:
        """The label of the backward half of a segment."""
        return 2 * self.segments - 1 - segment


def read_nodes(traced: Traced) -> Nodes:
    """Sort the nodes of a joint graph."""
    n = _labelled(traced)
    _forget_data(n)
    _merge_constants(n)
    out = next(x for x in n.graph.nodes if x.op == "output")
    heads = 1 + traced.has_weight + traced.aux_count
    n.heads = list(out.args[0][:heads])
    grads = [x if x is None else _computed(n, x) for x in out.args[0][heads:]]
    _settle_epilogues(n, out, grads)
    n.grads = [[] if x is None else _partials(n, x) for x in grads]
    out.args = ((*n.heads, *(x for partials in n.grads for x in partials)),)
    n.graph.eliminate_dead_code()
    n.place = {x: i for i, x in enumerate(n.graph.nodes)}
    n.label = {x: n.label[x] for x in n.place if x in n.label}
    _classify(n)
    return n


def _labelled(traced: Traced) -> Nodes:
    graph, segments = traced.module.graph, traced.boundaries + 1
    label: dict[fx.Node, int] = {}
    names: dict[str, list[fx.Node]] = {}
    current = 0
    for node in list(graph.nodes):
        if node.target is MARK:
            current = int(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
        elif node.target is NAMED:
            if current < segments:
                names.setdefault(str(node.args[1]), []).append(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
        elif node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op in ("call_function", "get_attr"):
            label[node] = current
    inputs = [x for x in graph.nodes if x.op == "placeholder"]
    params, batch = inputs[: traced.params], inputs[traced.params :]
    return Nodes(
        graph,
        segments,
        {x: i for i, x in enumerate(params)},
        {x: i for i, x in enumerate(batch)},
        label,
        names=names,
    )


def _forget_data(n: Nodes) -> None:
    """Nodes that read a tensor for its shape alone read nothing instead; ints among nodes become
    constants."""
    for node in list(n.label):
        if isinstance(node.meta.get("val"), int):
            node.replace_all_uses_with(node.meta["val"])
        if not is_op(node):
            continue
        fill = _fill_of(node)
        val = node.meta.get("val")
        if fill is not None and val is not None and val.is_contiguous():
            with n.graph.inserting_before(node):
                args: tuple = (list(val.shape), fill)
                new = n.graph.call_function(
                    aten.full.default, args, {"dtype": val.dtype, "device": val.device}
                )
            new.meta = dict(node.meta)
            n.label[new] = n.label.pop(node)
            node.replace_all_uses_with(new)
            n.graph.erase_node(node)


def _fill_of(node: fx.Node) -> Any:
    """What a ``zeros_like``, ``new_full``, … fills its result with; None for every other op."""
    name: str = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    if name in ("zeros_like", "new_zeros"):
        return 0
    if name in ("ones_like", "new_ones"):
        return 1
    if name in ("full_like", "new_full") and not isinstance(node.args[-1], fx.Node):
        return node.args[-1]
    return None


def _merge_constants(n: Nodes) -> None:
    """Constants that are made alike, such as a mask that every block makes for itself, become
    one."""
    known: dict[tuple, fx.Node] = {}
    alike: dict[fx.Node, int] = {}  # constant -> a number that constants made alike share
    for node in list(n.label):
        if not is_op(node) or is_seeded(node) or is_communication(node):
            continue
        if not all(a in alike for a in node.all_input_nodes):
            continue
        args = fx.node.map_arg((node.args, node.kwargs), lambda a: f"%{alike[a]}")
        first = known.setdefault((node.target, repr(args)), node)
        alike[node] = alike.setdefault(first, len(alike))
        if first is not node and is_carried(node) and not any(u.op == "output" for u in node.users):
            node.replace_all_uses_with(first)
            n.graph.erase_node(node)
            del n.label[node]


def _computed(n: Nodes, x: fx.Node) -> fx.Node:
    """A gradient that is an input or a constant as it stands, made a node of the last unit."""
    if x in n.label:
        return x
    out = next(y for y in n.graph.nodes if y.op == "output")
    with n.graph.inserting_before(out):
        new = n.graph.call_function(aten.clone.default, (x,))
    new.meta = dict(x.meta)
    n.label[new] = n.backward(0)
    out.args = fx.node.map_arg(out.args, lambda y: new if y is x else y)
    return new


def _settle_epilogues(n: Nodes, out: fx.Node, grads: list[fx.Node | None]) -> None:
    """Move what nothing but a gradient output reads up to the backward half of the segment that
    uses the param."""
    until: dict[fx.Node, int] = {}  # tail node -> the earliest label it may move to
    for grad, uses in zip(grads, _uses(n), strict=True):
        if grad is not None:
            until[grad] = max(until.get(grad, 0), n.backward(min(uses, default=0)))
    backward = [x for x in n.graph.nodes if n.label.get(x, -1) >= n.segments and x not in n.heads]
    for x in reversed(backward):
        if x.users and all(u is out or u in until for u in x.users):
            until[x] = max(until.get(u, until.get(x, 0)) for u in x.users)
    for x in backward:
        if x in until:
            sources = [n.label[a] for a in x.all_input_nodes if n.label.get(a, -1) >= n.segments]
            n.label[x] = min(n.label[x], max([until[x], *sources]))


def _uses(n: Nodes) -> list[set[int]]:
    """For every param the segments that use it, other than to cast it."""
    uses: list[set[int]] = [set() for _ in n.params]
    own: dict[fx.Node, set[int]] = {x: {i} for x, i in n.params.items()}
    for x, label in n.label.items():
        found: set[int] = set().union(*(own[a] for a in x.all_input_nodes if a in own))
        if found and is_cheap(x) and all(a in own for a in x.all_input_nodes):
            own[x] = found
        elif label < n.segments:
            for i in found:
                uses[i].add(label)
    return uses


def _partials(n: Nodes, x: fx.Node) -> list[fx.Node]:
    """A gradient taken apart at its sums over segments.

    Autograd adds to a running sum, the first operand. A second one that is a sum itself came
    through an alias of the
    param, and is not taken apart: adding its terms one by one would give other bits.
    """
    return [*_partials(n, x.args[0]), x.args[1]] if _spans(n, x) else [x]  # type: ignore[arg-type, list-item]


def _spans(n: Nodes, x: fx.Node) -> bool:
    if x.target is not aten.add.Tensor or len(x.users) > 1 or x.kwargs or len(x.args) > 2:
        return False
    terms = [a for a in x.args if isinstance(a, fx.Node) and n.label.get(a, -1) >= n.segments]
    return len(terms) == 2 and (
        n.label[terms[0]] != n.label[terms[1]] or any(_spans(n, a) for a in terms)
    )


def _classify(n: Nodes) -> None:
    free: set[fx.Node] = set(n.batch)  # from batch and constants
    own: set[fx.Node] = set(n.params)  # from params and constants, by cheap ops
    for x in n.label:
        inputs = x.all_input_nodes
        if is_seeded(x) or is_communication(x):
            continue
        if all(a in n.constant for a in inputs):
            n.constant.add(x)
        elif is_heavy(x):
            continue
        elif all(a in free or a in n.constant for a in inputs):
            free.add(x)
            n.rebuilt.add(x)
        elif is_cheap(x) and all(a in own or a in n.constant for a in inputs):
            own.add(x)
            n.rebuilt.add(x)
        elif is_view(x) and _size(x) >= _size(viewed(x)):
            n.rebuilt.add(x)


def _size(x: fx.Node | None) -> int:
    val = None if x is None else x.meta.get("val")
    return val.numel() if isinstance(val, torch.Tensor) else 0
