"""Whether a total adds up: the total of a batch has to be the sum of the totals of its parts.

Terms. A total is taken apart into a sum of *terms*, a number times a node. A term that does not come from what is
split of the batch, such as a penalty on params, and a mean over the batch are the same in every part, so they add up only
if their number grows with the batch: ``n_rows * l2``, ``n_rows * mean``. The number of a sum must not: ``sum / n_rows`` is a mean. Which numbers
grow is seen by tracing the loss a second time, on the whole batch. That is done only where it matters.

In: the nodes of a joint graph, and a way to those of the whole batch. Out: nothing, or a BatchError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from funcpipe.errors import BatchError
from funcpipe.graph.code import folded
from funcpipe.graph.nodes import Nodes
from funcpipe.graph.ops import is_op

aten = torch.ops.aten
FREE, MEAN, SUM, NEITHER, OTHER = "free of the batch", "mean", "sum", "neither", "other"
_THROUGH = frozenset(["clone", "_to_copy", "alias", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze"])
_CLAMPS = frozenset(["clamp", "clamp_min", "maximum"])
_REDUCTIONS = {  # the place of the argument that says 1 for mean, 2 for sum
    "nll_loss_forward": 3,
    "nll_loss2d_forward": 3,
    "binary_cross_entropy": 3,
    "mse_loss": 2,
    "huber_loss": 2,
    "smooth_l1_loss": 2,
    "soft_margin_loss": 2,
    "binary_cross_entropy_with_logits": 4,
}
_NEITHER = frozenset(
    ["max", "min", "amax", "amin", "median", "prod", "var", "std", "logsumexp", "norm", "linalg_vector_norm"]
)
_TOLERANCE = 1e-5  # relative: numbers may be float32


@dataclass(frozen=True)
class Term:
    """A summand of a total: ``number * node`` (node None: the number alone)."""

    number: float
    node: fx.Node | None
    kind: str

    def __str__(self) -> str:
        number = f"{self.number:.6g}"
        if self.node is None:
            return number
        node: Any = self.node.args[0] if self.node.target is operator.getitem else self.node
        made = getattr(node.target, "overloadpacket", node.target)
        return f"{'' if number == '1' else number + ' * '}{self.node.name}, made by {made}"


def check_summands(part: list[Term], growth: Sequence[float], whole: Callable[[], list[Term] | None]) -> None:
    """Every summand of the total adds up over the parts of a batch.

    Args:
        part: the terms of one part.
        growth: how many times as much as the part the whole batch holds; several numbers where it has several sequences.
        whole: the terms of the whole batch; None if there is none to look at.

    Raises:
        BatchError: a summand that would be counted once per part, or a mean.
    """
    doubtful = [t for t in part if t.kind in (FREE, MEAN, NEITHER) or (t.kind == SUM and abs(t.number) != 1)]
    if not any(t.number for t in doubtful):
        return
    other = whole()
    if other is None:
        other = [t for t in part if t.kind != MEAN or abs(t.number) == 1]  # another number may be a count
        part = other
    if [t.kind for t in part] == [t.kind for t in other]:
        for t, w in zip(part, other, strict=True):
            _check(t, t.number, w.number, growth)
        return
    for kind in (FREE, MEAN):  # a loop over the rows of the batch: one by one they have no partner
        numbers = [math.fsum(t.number for t in terms if t.kind == kind) for terms in (part, other)]
        if numbers[0]:
            example = max((t for t in part if t.kind == kind), key=lambda t: abs(t.number))
            _check(example, numbers[0], numbers[1], growth)


def _check(t: Term, part: float, whole: float, growth: Sequence[float]) -> None:
    wanted = [part] if t.kind == SUM else [part * n for n in growth]
    if t.kind == OTHER or (t.kind != NEITHER and any(math.isclose(whole, x, rel_tol=_TOLERANCE) for x in wanted)):
        return
    if t.kind == FREE:
        raise BatchError(
            f"a summand of Mean.total does not depend on the batch ({t}), or only on leaves that every part gets "
            "whole: it would be counted once for every microbatch and shard. Multiply it by the weight (total + weight * l2), or add it to the gradients"
        )
    if t.kind == NEITHER:
        raise BatchError(
            f"a summand of Mean.total is no sum over the rows of a part ({t}): those of the parts do not add up to that of "
            "the batch. Compute it for every row and sum over rows"
        )
    raise BatchError(
        f"a summand of Mean.total is a mean over the rows of a part ({t}): means of parts do not add up to the mean of the "
        "batch. Return the sum as total (reduction='sum') and the number of rows or tokens as weight"
    )


def terms(n: Nodes, module: fx.GraphModule, whole: Set[int] = frozenset()) -> list[Term]:
    """The summands of the total.

    Args:
        whole: the numbers of the tensors of the batch that every part gets whole.
    """
    return list(_Terms(n, module, whole).of(n.heads[0], 1.0))


class _Terms:
    def __init__(self, n: Nodes, module: fx.GraphModule, whole: Set[int]) -> None:
        self.n, self.module = n, module
        pieces = [x for x, k in n.batch.items() if k not in whole]
        ranked = [x for x in n.label if is_op(x) and x.target.namespace == "funcpipe"]  # type: ignore[union-attr]
        self.from_batch = reached(n, [*pieces, *ranked])  # what differs between ranks counts as from the batch

    def of(self, x: Any, number: float) -> Iterator[Term]:
        """The terms of ``number * x``."""
        value = self._number(x)
        if value is not None:
            yield Term(number * value, None, FREE)
            return
        name = x.target.overloadpacket.__name__ if is_op(x) else ""
        if name in ("add", "sub", "rsub"):
            yield from self._sum(x, name, number)
        elif name == "neg":
            yield from self.of(x.args[0], -number)
        elif name in _THROUGH:
            yield from self.of(x.args[0], number)
        elif name in ("mul", "div") and "rounding_mode" not in x.kwargs:
            yield from self._product(x, name, number)
        elif name == "sum" and _is_stack(x.args[0]):
            yield from (t for a in x.args[0].args[0] for t in self.of(a, number))
        else:
            yield Term(number, x, self._kind(x, name))

    def _number(self, x: Any) -> float | None:
        """What a constant is; None for everything else."""
        if not isinstance(x, fx.Node):
            return float(x) if isinstance(x, int | float) else None
        if x not in self.n.constant or x in self.from_batch or x.meta["val"].numel() != 1:
            return None
        return float(folded(self.module, x)())

    def _sum(self, x: fx.Node, name: str, number: float) -> Iterator[Term]:
        alpha = x.kwargs.get("alpha", 1)
        assert isinstance(alpha, int | float)
        first, second = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[name]
        yield from self.of(x.args[0], number * first)
        yield from self.of(x.args[1], number * second)

    def _product(self, x: fx.Node, name: str, number: float) -> Iterator[Term]:
        a, b = x.args[:2]
        p, q = self._number(a), self._number(b)
        if q is not None:
            yield from self.of(a, number * q if name == "mul" else number / q)
        elif name == "mul" and p is not None:
            yield from self.of(b, number * p)
        elif b not in self.from_batch:  # a factor from params changes nothing: it is the same in every part
            yield from self.of(a, number)
        elif name == "mul" and a not in self.from_batch and p is None and self._is_sum(b):
            yield from self.of(b, number)
        else:
            yield Term(number, x, MEAN if name == "div" and self._is_sum(b) else OTHER)

    def _is_sum(self, x: Any) -> bool:
        """Whether a node grows with the batch, such as the number of tokens in it, perhaps kept from 0."""
        while is_op(x) and x.target.overloadpacket.__name__ in _THROUGH | _CLAMPS:
            x = x.args[0]
        return is_op(x) and self._kind(x, x.target.overloadpacket.__name__) == SUM

    def _kind(self, x: fx.Node, name: str) -> str:
        if x not in self.from_batch:
            return FREE
        if x.target is operator.getitem:
            source: Any = x.args[0]
            return self._kind(source, source.target.overloadpacket.__name__) if is_op(source) else OTHER
        at = _REDUCTIONS.get(name)
        if at is not None:
            reduction: Any = x.args[at] if len(x.args) > at else 1
            return {1: MEAN, 2: SUM}.get(reduction, OTHER)
        if name == "linalg_vector_norm" and x.args[1:2] == (1,):
            return SUM
        return {"mean": MEAN, "sum": SUM}.get(name, NEITHER if name in _NEITHER else OTHER)


def _is_stack(x: Any) -> bool:
    ops = (aten.stack.default, aten.cat.default)
    return x.target in ops and all(a.meta["val"].numel() == 1 for a in x.args[0])


def reached(n: Nodes, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """What the forward half computes from some nodes."""
    out = set(sources)
    for x, label in n.label.items():
        if label < n.segments and any(a in out for a in x.all_input_nodes):
            out.add(x)
    return out
