"""Non-finite values in words, and the op of a unit that they come from.

In: a tensor; the graph of a unit and its inputs. Out: `Fault` or None; the `Origin` of each output
that is not finite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Interpreter, Node

from funcpipe._src.backends.grad_accumulation import outputs_of
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import differentiable

aten = torch.ops.aten
_MASKS = (
    aten.masked_fill,
    aten.where,
    aten.full,
    aten.full_like,
    aten.scalar_tensor,
)


class Fault(NamedTuple):
    """What of a tensor is not finite.

    Args:
        text: in words.
        is_low: whether it is all negative infinity.
    """

    text: str
    is_low: bool


def fault_of(value: Any) -> Fault | None:
    """What of a value is not finite; None if all is finite."""
    if not isinstance(value, torch.Tensor) or not differentiable(value):
        return None
    total = _count(value.isfinite().logical_not())
    if not total:
        return None
    nan = _count(value.isnan())
    low = 0
    if value.is_floating_point():
        low = _count(value.isneginf())
    counts = _counts_text(nan, total - nan, value.numel())
    return Fault(f"{describe(value)} of which {counts}", low == total)


def _count(mask: torch.Tensor) -> int:
    return int(mask.sum())


def _counts_text(nan: int, infinite: int, elements: int) -> str:
    if nan and infinite:
        return f"{nan} NaN and {infinite} infinite of {elements}"
    kind = "NaN" if nan else "infinite"
    count = nan or infinite
    verb = "is" if count == 1 else "are"
    return f"{count} of {elements} {verb} {kind}"


class Origin(NamedTuple):
    """Where in a unit a value that is not finite comes from.

    Args:
        op: None: from outside.
        meant: whether it may be meant.
    """

    op: str | None
    meant: bool


Origins = list[Origin | None]  # of the outputs of a unit


def run_with_origins(
    module: GraphModule,
    origins: Origins,
    args: list[Any],
) -> Any:
    """Run a unit op by op, boxed as the unit itself.

    Args:
        module: its graph.
        origins: gets one for each of its outputs.
        args: its inputs; emptied.
    """
    interpreter = _Interpreter(module)
    inputs = list(args)
    args.clear()
    results = interpreter.run(*inputs, enable_io_processing=False)
    origins += map(interpreter.origins.get, outputs_of(module.graph))
    return results


class _Interpreter(Interpreter):
    """Runs the graph of a unit, and notes the origin of what is not finite."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.origins: dict[Node, Origin] = {}

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        values = out if isinstance(out, tuple | list) else [out]
        faults = list(filter(None, map(fault_of, values)))
        if faults:
            is_low = all(fault.is_low for fault in faults)
            self.origins[n] = self._origin(n, is_low)
        return out

    def _origin(self, node: Node, is_low: bool) -> Origin:
        """Where a value comes from that is not finite; ``is_low``: all of it negative infinity."""
        if node.op == "placeholder":
            return Origin(None, is_low)  # if it is not meant, the unit that made it has an event
        op = str(node.target)
        sources = filter(self.origins.__contains__, node.all_input_nodes)
        before = list(map(self.origins.__getitem__, sources))
        if not before:
            packet = getattr(node.target, "overloadpacket", None)
            return Origin(op, is_low and packet in _MASKS)
        worst = min(before, key=lambda origin: origin.meant)
        if worst.meant and not is_low:
            return Origin(op, False)
        return worst
