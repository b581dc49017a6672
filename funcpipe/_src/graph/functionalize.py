"""In-place ops on a graph's own intermediates become ordinary ones, without tracing again.

Where nothing else can see the memory that an op writes to, the op and its functional twin compute
the same. (PyTorch
itself writes in place: ``rms_norm`` on CPUs does.) Whatever is not that simple is left to
    ``torch.func.functionalize``.
"""

from __future__ import annotations

import torch
from torch import fx


def mutates(node: fx.Node) -> bool:
    """Whether a node writes to one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def make_functional(module: fx.GraphModule) -> bool:
    """Replace in-place ops by their functional twins where that is plainly the same; whether none
    is left."""
    for node in module.graph.nodes:
        twin = _twin(node) if mutates(node) else None
        if twin is not None and _alone(node) and _same_dtypes(node):
            node.target = twin
    module.recompile()
    return not any(map(mutates, module.graph.nodes))


def _twin(node: fx.Node) -> torch._ops.OpOverload | None:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]


def _alone(node: fx.Node) -> bool:
    """Whether the written operand is an intermediate that no view and no later node sees."""
    x = node.args[0]
    if (
        not isinstance(x, fx.Node)
        or x.op != "call_function"
        or not isinstance(x.target, torch._ops.OpOverload)
    ):
        return False
    earlier = {u for u in x.users if u < node}
    aliased = x.target.is_view or any(getattr(u.target, "is_view", False) for u in earlier)
    return not aliased and len(earlier) + 1 == len(x.users) and len(x.target._schema.returns) == 1


def _same_dtypes(node: fx.Node) -> bool:
    """An in-place op keeps its operand's dtype; the twin would promote."""
    vals = [a.meta["val"] for a in node.all_input_nodes]
    return (
        all(v.dtype == node.meta["val"].dtype for v in vals)
        and vals[0].shape == node.meta["val"].shape
    )
