"""Ops: the marker that divides a graph into segments, and what can be asked about a node by its op
alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
HEAVY = frozenset(
    [
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "convolution",
        "convolution_backward",
        "embedding_dense_backward",
        "_grouped_mm",
    ]
)
FACTORIES = frozenset(["zeros", "ones", "full", "empty", "arange", "scalar_tensor"])
_CHEAP = frozenset(["_to_copy", "clone"])

_LIB = torch.library.Library("funcpipe", "FRAGMENT")
_LIB.define("mark(int label) -> ()")
_LIB.impl("mark", lambda label: None, "CompositeExplicitAutograd")
torch.library.register_fake("funcpipe::mark", lambda label: None, lib=_LIB)
MARK = torch.ops.funcpipe.mark.default
fx.has_side_effect(MARK)  # else it is removed as dead code


def is_op(node: fx.Node) -> bool:
    """Whether a node calls an ATen (or custom) op."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def is_seeded(node: fx.Node) -> bool:
    """Whether a node draws from the global generator. Backward ops are exempt: cuDNN's attention
    backward is tagged so."""
    op: Any = node.target
    if not is_op(node) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    return (
        not op.overloadpacket.__name__.endswith("_backward")
        and _argument(node, op, "dropout_p") != 0.0
    )


def _argument(node: fx.Node, op: Any, name: str) -> Any:
    """An argument of an op by name, its default included; None where the op has none of that
    name."""
    for i, a in enumerate(op._schema.arguments):
        if a.name == name:
            return node.kwargs.get(name, node.args[i] if i < len(node.args) else a.default_value)
    return None


def is_heavy(x: fx.Node) -> bool:
    """Whether a node is a matrix product or the like."""
    return is_op(x) and x.target.overloadpacket.__name__ in HEAVY  # type: ignore[union-attr]


def is_view(x: fx.Node) -> bool:
    """Whether a node's result, or each of its results, shares its operand's memory."""
    return is_op(x) and (x.target.is_view or x.target is aten._unsafe_view.default)  # type: ignore[union-attr]


def viewed(x: fx.Node) -> fx.Node | None:
    """The node whose memory a node's result shares, if there is one."""
    source = x.args[0] if x.args else None
    if not isinstance(source, fx.Node):
        return None
    if x.target is operator.getitem:  # of split, unbind: one of several views
        return viewed(source)
    return source if is_view(x) else None


def base_of(x: fx.Node) -> fx.Node:
    """The node that owns the memory in which a node's result lies."""
    while (source := viewed(x)) is not None:
        x = source
    return x


def is_cheap(x: fx.Node) -> bool:
    """Whether computing a node again costs no more than reading it."""
    if x.target is operator.getitem:
        return True
    if not is_op(x):
        return False
    op: Any = x.target
    return torch.Tag.pointwise in op.tags or is_view(x) or op.overloadpacket.__name__ in _CHEAP


def is_factory(x: fx.Node) -> bool:
    """Whether a node makes a constant from nothing, so that folding it would only cost memory."""
    return is_op(x) and not x.all_input_nodes and x.target.overloadpacket.__name__ in FACTORIES  # type: ignore[union-attr]


def is_communication(x: fx.Node) -> bool:
    """Whether a node talks to other ranks: such a node runs exactly where the loss put it.

    The place of a rank on an axis is no talk: it is a constant of the rank.
    """
    if not is_op(x) or x.target.namespace != "funcpipe":  # type: ignore[union-attr]
        return False
    return x.target.overloadpacket.__name__ != "axis_index"  # type: ignore[union-attr]


def is_carried(x: fx.Node) -> bool:
    """Whether a constant is computed once, and not in every unit that reads it."""
    return not is_factory(x) and viewed(x) is None and isinstance(x.meta.get("val"), torch.Tensor)


def extract(module: fx.GraphModule, x: fx.Node, inputs: Iterable[fx.Node] = ()) -> fx.GraphModule:
    """The part of a graph that computes one node, as a function of ``inputs``."""
    need, stack = {x}, [x]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in need:
                need.add(a)
                stack.append(a)
    graph = fx.Graph()
    new = {a: graph.placeholder(a.name) for a in inputs}
    for node in x.graph.nodes:  # in order
        if node in need and node not in new:
            new[node] = graph.node_copy(node, lambda a: new[a])
    graph.output(new[x])
    return fx.GraphModule(module, graph)
