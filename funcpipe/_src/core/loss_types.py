"""The types that a loss function returns or takes: a mean, rows, ready microbatches; and how they
are put together.

In: totals, weights, rows of every part of a batch. Out: what one device gives for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core import pytree as tree
from funcpipe.errors import BatchError


class Mean(NamedTuple):
    """A loss (or aux value) that is ``total / weight``, both additive over any split of the batch.

    Args:
        total: 0-d tensor, the sum of what is averaged; every summand depends on the batch.
        weight: 0-d tensor, how much there was to average (tokens, rows); does not depend on params.

    The loss of a step is the sum of totals over the sum of weights, over every microbatch and every
    shard, so that gradients do not depend on how the batch was split.

    A mean of nothing is 0, and so is its gradient: where the whole weight is 0, as in a batch whose
    labels are all ignored, an optimizer gets zeros. It still lets its momentum run out and decays
    weights, as with any gradient of zeros.
    """

    total: Tensor
    weight: Tensor


class Rows(NamedTuple):
    """An aux value with one entry per row of the batch: concatenated along ``dim`` in global row
    order."""

    x: Tensor
    dim: int = 0


class Microbatches(NamedTuple):
    """A batch that is a sequence of ready microbatches, which may differ in shape."""

    parts: Sequence[Any]


SCALAR_LOSS = (
    "{why}, but the loss function returns a plain scalar: whether to add or to average the scalars "
    "of the parts cannot be known. Return fp.Mean(total, weight), for instance the summed loss and "
    "the number of tokens."
)
AUX_LEAF = (
    "aux{path} is a plain value, but the batch is split and there is no rule to join the parts: "
    "return fp.Mean(total, weight) for an average or fp.Rows(x, dim) for one entry per row"
)


def is_summary(node: Any) -> bool:
    """Whether a node of an aux tree is a `Mean` or `Rows`."""
    return isinstance(node, Mean | Rows)


def differentiable(leaf: Tensor) -> bool:
    """Whether a leaf can have a gradient; the others are frozen."""
    return leaf.is_floating_point() or leaf.is_complex()


def divisor_of(weight: Tensor) -> Tensor:
    """What totals are divided by: the weight, and infinity where that is 0. It is floating.

    >>> divisor_of(torch.tensor([2, 0]))
    tensor([2., inf], dtype=torch.float64)
    """
    weight = weight if differentiable(weight) else weight.double()
    return weight.masked_fill(weight == 0, math.inf)


def mean(total: Tensor, weight: Tensor) -> Tensor:
    """``total / weight``, in its dtype; 0 where the weight is 0.

    >>> mean(torch.tensor([3, 0]), torch.tensor([2, 0]))
    tensor([1.5000, 0.0000])
    """
    dtype = torch.result_type(total, weight)
    if not (dtype.is_floating_point or dtype.is_complex):
        dtype = torch.get_default_dtype()
    return (total / divisor_of(weight)).to(dtype)


def averaged(grad: Tensor, divisor: Tensor) -> Tensor:
    """A gradient of a total over a divisor, in the dtype of the leaf: a quotient of two 0-d tensors
    may have another."""
    return (grad / divisor).to(grad.dtype) if differentiable(grad) else grad


def aux_nodes(aux: Any) -> list[tuple[str, Any]]:
    """Every node of an aux tree with its path; a `Mean` or `Rows` is one node.

    >>> aux_nodes({"loss": Mean(torch.tensor(1), torch.tensor(2)), "count": 3})
    [("['count']", 3), ("['loss']", Mean(total=tensor(1), weight=tensor(2)))]
    """
    nodes: list[Any] = []

    def note(node: Any) -> int:
        nodes.append(node)
        return 0

    paths = tree.paths(tree.map(note, aux, is_leaf=is_summary))
    return list(zip(paths, nodes, strict=True))


def aux_value(node: Any) -> Any:
    """An aux leaf as one device gives it, attached to its graph."""
    if isinstance(node, Mean):
        return mean(node.total, node.weight)
    return node.x if isinstance(node, Rows) else node


def plain_aux(node: Any) -> Any:
    """An aux leaf as one device gives it."""
    value = aux_value(node)
    return value.detach() if isinstance(value, Tensor) else value


def check_microbatches(batch: Microbatches) -> Sequence[Any]:
    """The ready microbatches; BatchError when there are none."""
    if not isinstance(batch.parts, Sequence) or not batch.parts:
        raise BatchError(
            f"the batch is fp.Microbatches({batch.parts!r}): it takes a list of microbatches, and "
            "a step needs at least one"
        )
    return batch.parts


def join_aux(parts: list[Any]) -> Any:
    """One aux tree from those of all microbatches.

    Raises:
        BatchError: there are several, and a leaf is neither a `Mean` nor `Rows`.
    """
    paths = iter([path for path, _ in aux_nodes(parts[0])])

    def join(*values: Any) -> Any:
        return _join_leaf(next(paths), values)

    return tree.map(join, *parts, is_leaf=is_summary)


def _join_leaf(path: str, values: Sequence[Any]) -> Any:
    if len(values) == 1:
        return plain_aux(values[0])
    if all(isinstance(value, Mean) for value in values):
        total = sum(value.total for value in values)
        weight = sum(value.weight for value in values)
        return plain_aux(Mean(total, weight))
    if all(isinstance(value, Rows) for value in values):
        rows = [value.x.detach() for value in values]
        return torch.cat(rows, values[0].dim)
    raise BatchError(AUX_LEAF.format(path=path))
