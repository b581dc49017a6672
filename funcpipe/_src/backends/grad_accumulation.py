"""Gradient GEMMs: gradients that are added up without being made first.

A gradient GEMM stands for the gradient of a leaf: two factors whose matrix product it is, or the
rows of an embedding's gradient and where they belong. A unit hands it out in place of the gradient;
a sum takes it in in one pass (``addmm`` with ``out=``), in a precision that may be higher than that
of the factors.

In: the graph of a unit, and which of its outputs are to be handed out so. Out: a graph whose
outputs are the operands, and a function that packs them into `Factors` and `Lookup`, which start a
sum or are added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from funcpipe._src.graph.ops import is_op, viewed

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_MATMUL = aten.mm.default
_LOOKUP = aten.embedding_dense_backward.default
_VIEWS = (aten.view.default, aten._unsafe_view.default)


class Factors(NamedTuple):
    """The matrix product of ``left`` [m, k] and ``right`` [k, n]."""

    left: Tensor
    right: Tensor

    def materialize(self, dtype: torch.dtype) -> Tensor:
        """The product, in memory of its own: [m, n], row by row."""
        left, right = self
        if dtype == left.dtype:
            return torch.mm(left, right)
        if left.is_cuda:
            return torch.mm(left, right, dtype)
        return torch.mm(left, right).to(dtype)

    def accumulate_into(self, total: Tensor) -> Tensor:
        """``total``, with the product added to it in place."""
        left, right = self
        if total.dtype == left.dtype:
            return torch.addmm(total, left, right, out=total)
        if left.is_cuda:
            return torch.addmm(total, left, right, total.dtype, out=total)
        return total.add_(torch.mm(left, right))


class Lookup(NamedTuple):
    """The gradient of a table of ``height`` rows from those that were looked up: ``rows`` [..., n]
    belong to ``places``."""

    rows: Tensor
    places: Tensor
    height: int

    def materialize(self, dtype: torch.dtype) -> Tensor:
        """The table's gradient, in memory of its own: [height, n]."""
        width = self.rows.shape[-1]
        zeros = self.rows.new_zeros((self.height, width), dtype=dtype)
        return self.accumulate_into(zeros)

    def accumulate_into(self, total: Tensor) -> Tensor:
        """``total``, with the rows added to it in place."""
        rows = self.rows.to(total.dtype)
        return total.index_put_((self.places,), rows, accumulate=True)


GradientGemm = Factors | Lookup


def materialized(grad: GradientGemm | Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient as a tensor, in a dtype if it is a gradient GEMM."""
    if isinstance(grad, GradientGemm):
        return grad.materialize(dtype)
    return grad


@dataclass(frozen=True)
class Form:
    """How an output of a graph is a gradient GEMM.

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

    def adds_to(self, dtype: torch.dtype) -> bool:
        """Whether sums of a dtype take it in without loss: of its factors' own, or float32 for half
        the bits."""
        own = self.operands[0].meta["val"].dtype
        widens = dtype == torch.float32 and own in _HALF
        return dtype == own or widens

    def pack(self, first: Tensor, second: Tensor) -> GradientGemm:
        """The gradient GEMM of two operands."""
        if self.height:
            return Lookup(first, second, self.height)
        if self.flipped:
            return Factors(second.t(), first.t())
        return Factors(first, second)


def form_of(node: fx.Node) -> Form | None:
    """How a node is a gradient GEMM, transposed or cast perhaps; None where it is none, or others
    read what is in between."""
    dtype = node.meta["val"].dtype
    flipped = False
    while _is_read_once(node) and node.target not in (_MATMUL, _LOOKUP):
        source = _source_of(node)
        if source is None:
            return None
        flipped ^= _transposes(node)
        node = source
    if not _is_read_once(node):
        return None
    args: Any = node.args
    if node.target is _MATMUL:
        left, right = args
        return Form((left, right), flipped, 0, dtype)
    if node.target is _LOOKUP:
        rows, places, height, padding, scaled = args
        if padding == -1 and not scaled and not flipped:
            return Form((rows, places), False, height, dtype)
    return None


def _source_of(node: fx.Node) -> fx.Node | None:
    """What a node transposes, casts or views with its elements in their places; else None."""
    source = node.args[0] if _casts(node) else viewed(node)
    if not isinstance(source, fx.Node):
        return None
    if _transposes(node) or _keeps_places(node, source):
        return source
    return None


def _is_read_once(node: fx.Node) -> bool:
    return is_op(node) and len(node.users) == 1


def _casts(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default


def _transposes(node: fx.Node) -> bool:
    """Whether a node transposes a matrix."""
    if node.target is aten.t.default:
        return True
    if node.target is not aten.transpose.int:
        return False
    if node.meta["val"].dim() != 2:
        return False
    _, *dims = node.args
    return {dim % 2 for dim in dims if isinstance(dim, int)} == {0, 1}


def _keeps_places(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node has the elements of its source in their places: a view of the same shape, or a
    cast."""
    new = node.meta["val"]
    old = source.meta["val"]
    if _casts(node):
        return new.device == old.device
    return node.target in _VIEWS and new.shape == old.shape


def outputs_of(graph: fx.Graph) -> Sequence[fx.Node]:
    """The outputs of a unit's graph."""
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    return results


Pack = Callable[[Sequence[Any]], list]


def handing_out(
    module: fx.GraphModule,
    numbers: tuple[int, ...],
) -> tuple[fx.GraphModule, Pack]:
    """A unit that hands out gradient GEMMs.

    Args:
        module: its graph, boxed.
        numbers: of its outputs that are to be gradient GEMMs.

    Returns:
        the graph in which the operands of each stand in its place; and the function from that
        graph's outputs to the unit's.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    results: list[fx.Node] = []
    forms: list[Form | None] = []
    for number, node in enumerate(outputs_of(module.graph)):
        form = form_of(node) if number in numbers else None
        operands = (node,) if form is None else form.operands
        results.extend(copies[operand] for operand in operands)
        forms.append(form)
    graph.output(tuple(results))
    graph.set_codegen(fx.graph._BoxedCodeGen())
    graph.eliminate_dead_code()

    def pack(outputs: Sequence[Any]) -> list:
        left = iter(outputs)
        packed = []
        for form in forms:
            output = next(left)
            if form is not None:
                output = form.pack(output, next(left))
            packed.append(output)
        return packed

    return fx.GraphModule(module, graph), pack
