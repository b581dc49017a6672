"""Ops: the marker that divides a graph into segments, and questions that a node's op answers.

In: a node of an FX graph. Out: whether it is a view, a matrix product, communication and so on;
`extract` gives the part of the graph that computes a node.
"""

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


def name_of(node: fx.Node) -> str:
    """The name of the op that a node calls, without its overload; empty where it calls none."""
    if not is_op(node):
        return ""
    op: Any = node.target
    return op.overloadpacket.__name__


def is_seeded(node: fx.Node) -> bool:
    """Whether a node draws from the global generator.

    Backward ops do not, although cuDNN's attention backward has the tag.
    """
    op: Any = node.target
    if not is_op(node) or torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    if name_of(node).endswith("_backward"):
        return False
    return _argument(node, op, "dropout_p") != 0.0


def _argument(node: fx.Node, op: Any, name: str) -> Any:
    """An argument of an op by name, or its default; None where the op has none of that name."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.name != name:
            continue
        if position < len(node.args):
            return node.args[position]
        return node.kwargs.get(name, argument.default_value)
    return None


def is_heavy(node: fx.Node) -> bool:
    """Whether a node is a matrix product or the like."""
    return name_of(node) in HEAVY


def is_view(node: fx.Node) -> bool:
    """Whether a node's result, or each of its results, shares its operand's memory."""
    op: Any = node.target
    return is_op(node) and (op.is_view or op is aten._unsafe_view.default)


def viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory a node's result shares, if there is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is operator.getitem:  # of split, unbind: one of several views
        return viewed(source)
    return source if is_view(node) else None


def base_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory in which a node's result lies."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def is_cheap(node: fx.Node) -> bool:
    """Whether computing a node again costs no more than reading it."""
    if node.target is operator.getitem:
        return True
    if not is_op(node):
        return False
    op: Any = node.target
    return torch.Tag.pointwise in op.tags or is_view(node) or name_of(node) in _CHEAP


def is_factory(node: fx.Node) -> bool:
    """Whether a node makes a constant from nothing, so that folding it would only cost memory."""
    return not node.all_input_nodes and name_of(node) in FACTORIES


def is_communication(node: fx.Node) -> bool:
    """Whether a node exchanges data with other ranks: it then runs exactly where the loss put it.

    ``axis_index`` does not: the position of a rank on an axis is a constant of the rank.
    """
    op: Any = node.target
    return is_op(node) and op.namespace == "funcpipe" and name_of(node) != "axis_index"


def is_carried(node: fx.Node) -> bool:
    """Whether a constant is computed once, and not in every unit that reads it."""
    if is_factory(node) or viewed(node) is not None:
        return False
    return isinstance(node.meta.get("val"), torch.Tensor)


def extract(
    module: fx.GraphModule, result: fx.Node, inputs: Iterable[fx.Node] = ()
) -> fx.GraphModule:
    """The part of a graph that computes one node, as a function of ``inputs``."""
    needed = {result}
    stack = [result]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                stack.append(source)
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in result.graph.nodes:  # in order
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return fx.GraphModule(module, graph)
