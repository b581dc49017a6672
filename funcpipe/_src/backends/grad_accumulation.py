"""Products: gradients that are added up without being made first.

Terms. A *product* stands for the gradient of a leaf: two factors whose matrix product it is, or the
rows of an embedding's gradient and where they belong. A unit hands it out in place of the gradient;
an accumulator takes it in one pass (``addmm`` with ``out=``), in a precision that may be higher
than that of the factors.

In: the graph of a unit, and which of its outputs are to be handed out so. Out: a graph whose
outputs are the operands, and a function that packs them; `Factors` and `Lookup`, which start an
accumulator or are added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from funcpipe._src.graph.ops import is_op, viewed

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


class Factors(NamedTuple):
    """The matrix product of ``a`` [m, k] and ``b`` [k, n]."""

    a: torch.Tensor
    b: torch.Tensor

    def first(self, dtype: torch.dtype) -> torch.Tensor:
        """The product, in memory of its own: [m, n], row by row."""
        if dtype == self.a.dtype:
            return torch.mm(self.a, self.b)
        if self.a.is_cuda:
            return torch.mm(self.a, self.b, dtype)
        return torch.mm(self.a, self.b).to(dtype)

    def onto(self, sums: torch.Tensor) -> torch.Tensor:
        """``sums``, with the product added to it in place."""
        if sums.dtype == self.a.dtype:
            return torch.addmm(sums, self.a, self.b, out=sums)
        if self.a.is_cuda:
            return torch.addmm(sums, self.a, self.b, sums.dtype, out=sums)
        return sums.add_(torch.mm(self.a, self.b))


class Lookup(NamedTuple):
    """The gradient of a table of ``height`` rows from those that were looked up: ``rows`` [..., n]
    belong to ``places``."""

    rows: torch.Tensor
    places: torch.Tensor
    height: int

    def first(self, dtype: torch.dtype) -> torch.Tensor:
        """The table's gradient, in memory of its own: [height, n]."""
        return self.onto(self.rows.new_zeros((self.height, self.rows.shape[-1]), dtype=dtype))

    def onto(self, sums: torch.Tensor) -> torch.Tensor:
        """``sums``, with the rows added to it in place."""
        return sums.index_put_((self.places,), self.rows.to(sums.dtype), accumulate=True)


Product = Factors | Lookup


def made(x: Any, dtype: torch.dtype) -> torch.Tensor:
    """A gradient as a tensor, in a dtype if it is a product."""
    return x.first(dtype) if isinstance(x, Product) else x


@dataclass(frozen=True)
class Form:
    """How an output of a graph is a product.

    Args:
        operands: the two nodes that it is made of.
        flipped: whether it is the transpose of their matrix product.
        height: for a `Lookup`, the number of rows of the table; 0 for `Factors`.
        dtype: of the output.
    """

    operands: tuple[fx.Node, fx.Node]
    flipped: bool
    height: int
    dtype: torch.dtype

    def sums(self, dtype: torch.dtype) -> bool:
        """Whether accumulators of a dtype take it in without loss: of its factors' own, or float32
        for half the bits."""
        made = self.operands[0].meta["val"].dtype
        return dtype == made or (dtype == torch.float32 and made in _HALF)

    def pack(self, x: torch.Tensor, y: torch.Tensor) -> Product:
        """The product of two operands."""
        if self.height:
            return Lookup(x, y, self.height)
        return Factors(y.t(), x.t()) if self.flipped else Factors(x, y)


def form_of(x: fx.Node) -> Form | None:
    """How a node is a product, transposed or cast perhaps; None where it is none, or others read
    what is in between."""
    val, flipped = x.meta["val"], False
    while (
        len(x.users) == 1
        and is_op(x)
        and x.target not in (aten.mm.default, aten.embedding_dense_backward.default)
    ):
        source = viewed(x) if x.target is not aten._to_copy.default else x.args[0]
        if not isinstance(source, fx.Node) or not (_turns(x) or _stays(x, source)):
            return None
        flipped ^= _turns(x)
        x = source
    if len(x.users) != 1 or not is_op(x):
        return None
    if x.target is aten.mm.default:
        return Form((x.args[0], x.args[1]), flipped, 0, val.dtype)  # type: ignore[arg-type]
    if x.target is aten.embedding_dense_backward.default:
        rows, places, height, padding, scaled = x.args
        if padding == -1 and not scaled and not flipped:
            return Form((rows, places), False, height, val.dtype)  # type: ignore[arg-type]
    return None


def _turns(x: fx.Node) -> bool:
    """Whether a node transposes a matrix."""
    if x.target is aten.t.default:
        return True
    dims = (
        [d % 2 for d in x.args[1:] if isinstance(d, int)] if len(x.meta["val"].shape) == 2 else []
    )
    return x.target is aten.transpose.int and sorted(dims) == [0, 1]


def _stays(x: fx.Node, source: fx.Node) -> bool:
    """Whether a node has the elements of its source in their places: a view of the same shape, or a
    cast."""
    new, old = x.meta["val"], source.meta["val"]
    if x.target is aten._to_copy.default:
        return new.device == old.device
    return x.target in (aten.view.default, aten._unsafe_view.default) and new.shape == old.shape


def outputs_of(graph: fx.Graph) -> Sequence[fx.Node]:
    """The outputs of a unit's graph."""
    return next(x for x in reversed(graph.nodes) if x.op == "output").args[0]  # type: ignore[return-value]


def handing_out(
    module: fx.GraphModule, at: tuple[int, ...]
) -> tuple[fx.GraphModule, Callable[[Sequence[Any]], list]]:
    """A unit that hands out products.

    Args:
        module: its graph, boxed.
        at: the places of its outputs that are to be products.

    Returns:
        the graph in which the operands of each stand in its place; and the function from that
        graph's outputs to the unit's.
    """
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.graph_copy(module.graph, new)
    results: list[fx.Node] = []
    forms: list[Form | None] = []
    for k, x in enumerate(outputs_of(module.graph)):
        form = form_of(x) if k in at else None
        results += [new[x]] if form is None else [new[a] for a in form.operands]
        forms.append(form)
    graph.output(tuple(results))
    graph.set_codegen(fx.graph._BoxedCodeGen())
    graph.eliminate_dead_code()

    def pack(outputs: Sequence[Any]) -> list:
        it = iter(outputs)
        return [next(it) if form is None else form.pack(next(it), next(it)) for form in forms]

    return fx.GraphModule(module, graph), pack
