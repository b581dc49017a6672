"""Trace errors: what a trace refuses, in the words of the user's own code.

In: the error that a loss function raised while it was traced, or the graph that came out. Out: an
error of ``funcpipe.errors`` that says which line, which input and what to write instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.source_lines import line_of
from funcpipe._src.graph.functionalize import mutates
from funcpipe._src.graph.grouped_mm import explain_grouped
from funcpipe._src.graph.ops import MARK, is_seeded
from funcpipe.errors import TraceError

BY_VALUE = (DataDependentOutputException, GuardOnDataDependentSymNode)
_FOREIGN = ("Please convert all Tensors to FakeTensors first", "Mixing fake modes")


def refuse_impure(graph: Graph, boundaries: int, names: Sequence[str]) -> None:
    """Refuse what no two ranks or microbatches could repeat.

    Args:
        graph: as traced, with its markers.
        boundaries: how many.
        names: of its inputs.

    Raises:
        TraceError: randomness, or an input that is changed in place.
    """
    nodes = list(graph.nodes)
    _refuse_random(nodes, boundaries)
    name_of = dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))
    for node in filter(mutates, nodes):
        written = node.args[0] if node.args else None
        if written in name_of:
            raise TraceError(
                f"the loss function changes {name_of[written]} in place: it has to be pure, since "
                "a microbatch is a view of the caller's batch and params are used again. Write to "
                "a clone instead"
            )


def _refuse_random(nodes: list[Node], boundaries: int) -> None:
    for node in filter(is_seeded, nodes[_start_of_backward(nodes, boundaries) :]):
        raise TraceError(
            f"{node.target} draws a new random mask while torch.utils.checkpoint recomputes: the "
            "gradient would belong to another mask than the loss. Draw the mask outside the loss "
            "and pass it through batch"
        )
    for node in filter(is_seeded, nodes):
        raise TraceError(
            f"{node.target} draws random values, which no two ranks or microbatches could repeat "
            "as one device does. Draw them outside the loss and pass them through batch; for "
            "dropout write fp.random.dropout(x, rate, key)"
        )


def _start_of_backward(nodes: list[Any], boundaries: int) -> int:
    """Where the backward half begins: at the first marker beyond those of boundaries."""
    for position, node in enumerate(nodes):
        if node.target is MARK and node.args[0] > boundaries:
            return position
    return len(nodes)


def explain(error: Exception, loss_fn: Callable) -> Exception:
    """The error of a trace in the words of the user's own code; an unknown kind as it is."""
    where = line_of(error) or ""
    text = str(error)
    grouped = explain_grouped(error)
    if grouped is not None:
        return grouped
    if isinstance(error, BY_VALUE) or ".numpy() is not supported" in text:
        return TraceError(
            f"the loss function decides by the value of a tensor{where} (an if, .item(), int() or "
            "a tensor as index): a traced step is the same for every batch. Use torch.where or "
            "index_select, or a plain Python value that the closure or batch brings"
        )
    if isinstance(error, DynamicOutputShapeException):
        return TraceError(
            f"the loss function makes a tensor whose shape depends on data{where} (a mask as "
            "index, nonzero, unique or the like): a traced step has the same shapes for every "
            "batch. Use torch.where, or multiply by the mask"
        )
    if any(sign in text for sign in _FOREIGN):
        return TraceError(
            "the loss function uses a tensor that did not come in through its "
            f"arguments{where}{_closed_over(loss_fn)}: pass it through params or batch"
        )
    if "use_reentrant=True" in text:
        return TraceError(
            "torch.utils.checkpoint with use_reentrant=True does not work with gradients of chosen "
            "tensors, which value_and_grad takes: write use_reentrant=False"
        )
    if "in-place operation" in text or "inplace operation" in text:
        return TraceError(
            f"the loss function changes a tensor in place{where} whose gradient needs its old "
            f"value, which plain PyTorch refuses too: {text.split('. Hint')[0].rstrip('.')}. Write "
            "to a clone instead"
        )
    return error


def _closed_over(loss_fn: Callable) -> str:
    held = [name for name, value in _surroundings(loss_fn) if _has_tensor(value)]
    return f" (it closes over {', '.join(map(repr, held))})" if held else ""


def _surroundings(fn: Any) -> Iterator[tuple[str, Any]]:
    """What a function can see beside its arguments, by name."""
    while isinstance(fn, functools.partial):
        yield from fn.keywords.items()
        fn = fn.func
    owner = getattr(fn, "__self__", None)
    if owner is not None:
        for name, value in getattr(owner, "__dict__", {}).items():
            yield f"self.{name}", value
        fn = getattr(fn, "__func__", fn)
    code = getattr(fn, "__code__", None)
    variables = getattr(code, "co_freevars", ())
    cells = getattr(fn, "__closure__", None) or ()
    for name, cell in zip(variables, cells, strict=False):
        with contextlib.suppress(ValueError):  # a cell can be empty
            yield name, cell.cell_contents
    for name in getattr(code, "co_names", ()):
        if name in fn.__globals__:
            yield name, fn.__globals__[name]


def _has_tensor(value: Any) -> bool:
    if isinstance(value, torch.nn.Module):
        return True
    return any(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(value))
