"""Cut: a joint graph becomes units, and every value that goes between two units becomes explicit.

Terms. Boundary ``k`` begins *segment* ``k``; a loss with ``n`` boundaries has segments ``0..n``. A
segment has the *units* F (forward) and B (backward), or F, I (gradient with respect to what came
in) and W (gradient with respect to the params). A *value* is what a unit reads or writes: a leaf of
params or batch, a folded constant, or an activation, residual or gradient that one unit makes and
another reads.

One liveness rule: a node used in another unit is an output of its own and an input there.
Exceptions are *rebuilt*
where they are used instead of being carried: views, and what follows from the batch or the params
    alone by cheap ops.
What follows from neither is *folded*: computed once per rank, then an input.

A tied parameter gets one partial gradient per segment that uses it, kept apart here and summed once
per step.

In: `Traced`. Out: `Units`: units in the order of one microbatch, with shared code where two segments
are alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
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

Key = tuple[str, int]  # kind and segment of a unit


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
            inputs, outputs = (", ".join(map(str, v)) for v in (unit.inputs, unit.outputs))
            lines.append(f"{unit}: ({inputs}) -> ({outputs}), {unit.code.flops} FLOP")
        return "\n".join(lines)


def partition_graph(
    joint: Traced, labels: Nodes, remats: Sequence[Remat] = (), separate_w: bool = True
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
    return replace(cut(joint, labels, separate_w), saved=saved)


def cut(traced: Traced, nodes: Nodes | None = None, split: bool = True) -> Units:
    """Cut a joint graph as it is."""
    return _Cutter(traced, nodes or read_nodes(traced), split).cut()


class _Cutter:
    def __init__(self, traced: Traced, n: Nodes, split: bool) -> None:
        self.traced, self.n, self.split = traced, n, split
        self.final = set(n.heads) | {x for partials in n.grads for x in partials}
        self.deferred = deferred(n) if split else set()
        self.values: dict[fx.Node, Value] = {}
        self.readers: dict[fx.Node, set[Key]] = {}
        self.codes: dict[str, Code] = {}
        self.own: dict[int, list[fx.Node]] = {}
        for x, label in n.label.items():
            self.own.setdefault(label, []).append(x)

    def cut(self) -> Units:
        # Last unit first, so that all readers of a value are known before its own unit is built.
        units = {key: self._unit(key) for key in self._keys()}
        grads = tuple(tuple(map(self._value, partials)) for partials in self.n.grads)
        heads = tuple(map(self._value, self.n.heads))
        folded = {
            v: code_.folded(self.traced.module, x)
            for x, v in self.values.items()
            if v.kind == "const"
        }
        in_order = dict(reversed(units.items()))
        return Units(in_order, self.n.segments, heads, grads, folded, self.traced)

    def _keys(self) -> Iterator[Key]:
        for s in range(self.n.segments):
            yield from (("W", s), ("I", s)) if self.split else ()
            yield "B", s
        yield from (("F", s) for s in reversed(range(self.n.segments)))

    def _nodes(self, kind: str, segment: int) -> list[fx.Node]:
        nodes = self.own.get(segment if kind == "F" else self.n.backward(segment), [])
        return (
            nodes if kind in "FB" else [x for x in nodes if (x in self.deferred) == (kind == "W")]
        )

    def _unit(self, key: Key) -> Unit:
        own = dict.fromkeys(self._nodes(*key))
        # B computes what I and W do: neither reads from the other.
        others = {(k, key[1]) for k in {"B": "IW", "I": "B", "W": "B"}.get(key[0], "")}
        read = {x for x in own if self.readers.get(x, set()) - others and x not in self.n.constant}
        roots = [x for x in own if x in self.final or x in read]
        body, inputs = self._body(key, own, roots)
        order = list(dict.fromkeys(a for x in body for a in x.all_input_nodes if a in inputs))
        code = code_.compile_unit(self.traced.module, body, order, roots, self.codes)
        return Unit(*key, code, tuple(map(self._value, order)), tuple(map(self._value, roots)))

    def _body(
        self, key: Key, own: dict[fx.Node, None], roots: list[fx.Node]
    ) -> tuple[list[fx.Node], set[fx.Node]]:
        """What a unit has to compute for its outputs, in order, and what it reads for that."""
        place, body, inputs = self.n.place, [], set()
        seen = set(roots)
        heap = [(-place[x], x) for x in roots]
        heapq.heapify(heap)
        while heap:  # the latest node first, so that each is met once, after all its users
            _, x = heapq.heappop(heap)
            if not self._computes(x, own):
                inputs.add(x)
                self.readers.setdefault(x, set()).add(key)
                continue
            body.append(x)
            for a in x.all_input_nodes:
                if a not in seen:
                    seen.add(a)
                    heapq.heappush(heap, (-place[a], a))
        return body[::-1], inputs

    def _computes(self, x: fx.Node, own: dict[fx.Node, None]) -> bool:
        if x in self.final:
            return x in own
        if x in self.n.constant:
            return not is_carried(x)
        return x in own or x in self.n.rebuilt

    def _value(self, x: fx.Node) -> Value:
        if x not in self.values:
            kind, index = "value", -1
            if x.op == "placeholder":
                kind, index = (
                    ("param", self.n.params[x])
                    if x in self.n.params
                    else ("batch", self.n.batch[x])
                )
            elif x in self.n.constant and x not in self.final:
                kind = "const"
            self.values[x] = code_.value_of(x, kind, index)
        return self.values[x]


def deferred(n: Nodes) -> set[fx.Node]:
    """The nodes of W: heavy ops off the path to an earlier segment, and what hangs off them.

    In segment 0 nothing is on such a path; there, what feeds another heavy op is on it. Qi et al.
    2023, "Zero Bubble Pipeline Parallelism", section 2.
    """
    backward = [x for x, label in n.label.items() if label >= n.segments]
    needed: set[fx.Node] = set()
    feeds: set[fx.Node] = set()
    for x in reversed(backward):
        same = [u for u in x.users if n.label.get(u) == n.label[x]]
        elsewhere = any(u in n.label and n.label[u] != n.label[x] for u in x.users)
        if any(u in feeds or is_heavy(u) for u in same):
            feeds.add(x)
        first = n.label[x] == n.backward(0) and x in feeds
        if elsewhere or first or any(u in needed for u in same):
            needed.add(x)
    out: set[fx.Node] = set()
    for x in backward:
        hangs = any(a in out and n.label[a] == n.label[x] for a in x.all_input_nodes)
        if x not in needed and (is_heavy(x) or hangs):
            out.add(x)
    return out
