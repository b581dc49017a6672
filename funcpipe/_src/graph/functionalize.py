"""Functionalize: in-place ops on a graph's own intermediates become ordinary ones.

Where nothing else can see the memory that an op writes to, the op and its functional twin compute
the same, so that the graph need not be traced again. (PyTorch itself writes in place: ``rms_norm``
on CPUs does.) Whatever is not that simple is left to ``torch.func.functionalize``.

In: a traced graph. Out: the same graph, changed, and whether an in-place op is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from funcpipe._src.graph.ops import is_op, name_of


def mutates(node: fx.Node) -> bool:
    """Whether a node writes to one of its operands."""
    op: Any = node.target
    return is_op(node) and op._schema.is_mutable


def make_functional(module: fx.GraphModule) -> bool:
    """Replace in-place ops by their functional twins where that is plainly the same.

    Returns:
        whether no in-place op is left.
    """
    for node in filter(mutates, module.graph.nodes):
        twin = _twin(node)
        if twin is not None and _writes_unseen(node) and _keeps_dtype(node):
            node.target = twin
    module.recompile()
    return not any(map(mutates, module.graph.nodes))


def _twin(node: fx.Node) -> Any:
    """The functional op of the same name and overload, if there is one."""
    op: Any = node.target
    name = name_of(node)
    if not name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, op._overloadname, None)


def _writes_unseen(node: fx.Node) -> bool:
    """Whether the written operand is an intermediate that no view and no later node sees."""
    written: Any = node.args[0]
    if not isinstance(written, fx.Node) or not is_op(written):
        return False
    op: Any = written.target
    if op.is_view or len(op._schema.returns) != 1:
        return False
    for user in written.users:
        is_alias = getattr(user.target, "is_view", False)
        if is_alias or user > node:
            return False
    return True


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the twin promotes to no other dtype or shape: an in-place op keeps its operand's."""
    result = node.meta["val"]
    operands = [source.meta["val"] for source in node.all_input_nodes]
    if operands[0].shape != result.shape:
        return False
    return all(operand.dtype == result.dtype for operand in operands)
