"""Joined units: the code of two units that run back to back, as one.

What only the second reads of the first is then no value that has to be kept, as the
log-probabilities of a cross entropy.

In: the code of two units, and how the second's inputs are wired. Out: one `Code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from torch import fx

from funcpipe._src.backends.grad_accumulation import outputs_of
from funcpipe._src.graph.unit_code import Code, compile_unit


class Wire(NamedTuple):
    """Where an input of the second unit comes from.

    Args:
        from_first: whether the first unit makes it.
        number: among the outputs of the first unit, or among the inputs of both.
    """

    from_first: bool
    number: int


def join_units(
    first: Code,
    second: Code,
    wires: Sequence[Wire],
    kept: Sequence[int],
    codes: dict[str, Code],
) -> Code:
    """Two units as one.

    Args:
        first, second: in the order in which they run.
        wires: for every input of the second.
        kept: the numbers of the outputs of the first that others read; they come before those of
            the second.
        codes: by hash, those that are there already.
    """
    join = _Join()
    for node in _placeholders(first):
        join.enter(node)
    placeholders = _placeholders(second)
    for node, wire in zip(placeholders, wires, strict=True):
        if not wire.from_first:
            join.enter(node, wire.number)
    outputs = join.copy(first)
    for node, wire in zip(placeholders, wires, strict=True):
        if wire.from_first:
            made = outputs[wire.number]
            join.copies[node] = made
    kept_outputs = [outputs[number] for number in kept]
    own_outputs = join.copy(second)
    return compile_unit(
        module=fx.GraphModule(join.attributes, fx.Graph()),
        body=_computing(join.graph),
        inputs=join.inputs,
        outputs=kept_outputs + own_outputs,
        compiled=codes,
    )


def _placeholders(code: Code) -> list[fx.Node]:
    nodes = code.module.graph.nodes
    return [node for node in nodes if node.op == "placeholder"]


def _computing(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op != "placeholder"]


class _Join:
    """A graph into which units are copied."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        self.attributes: dict[str, object] = {}

    def enter(self, node: fx.Node, number: int | None = None) -> None:
        """Make a placeholder an input: one that is there, by its number, or a new one."""
        if number is None or number >= len(self.inputs):
            placeholder = self.graph.placeholder(f"in{len(self.inputs)}")
            placeholder.meta["val"] = node.meta["val"]
            self.inputs.append(placeholder)
            number = -1
        self.copies[node] = self.inputs[number]

    def copy(self, code: Code) -> list[fx.Node]:
        """Copy what a unit computes; its outputs."""
        graph = code.module.graph
        copy_of = self.copies.__getitem__
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.copies[node] = self.graph.node_copy(node, copy_of)
            if node.op == "get_attr":
                attribute = attrgetter(node.target)
                self.attributes[node.target] = attribute(code.module)
        return list(map(copy_of, outputs_of(graph)))
