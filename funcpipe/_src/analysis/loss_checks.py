"""What must hold of a loss whose batch is split, checked when it is traced.

The loss is ``sum of totals / sum of weights`` over the parts of a batch. That is the loss of the
whole batch only if ``weight`` does not depend on params and adds up over the parts, as ``total``
does: that is proven (`proof/rows.py`).
Weights are also compared as numbers, where they may not be exact, or where the proof fails: it is
the clearer error.

In: the nodes of a joint graph, the loss function, the batch and its parts. Out: nothing, or an
error that says which rule is broken and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from funcpipe._src.collectives import one_rank
from funcpipe._src.collectives.ops import STARTS, WAIT
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.core.loss_result import read_loss
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.intercept import Intercept
from funcpipe._src.graph.fake_tensors import looking
from funcpipe._src.graph.node_labels import Nodes
from funcpipe._src.graph.ops import extract
from funcpipe._src.graph.restore import restored
from funcpipe._src.sequence.rewrite import Unsplit
from funcpipe.errors import BatchError

_WEIGHT_TOLERANCE = 1e-5  # relative: weights are float32 sums of the same numbers in another order

_ATEN = torch.ops.aten
_COPIES = (_ATEN.clone.default, _ATEN.detach.default)


def check_weight(nodes: Nodes) -> None:
    """The weight does not depend on params.

    Raises:
        BatchError: it does.
    """
    if nodes.outputs[1] in reached(nodes, nodes.params):
        raise BatchError(
            "Mean.weight depends on params: it has to be computed from the batch alone (a count of "
            "tokens or rows), since gradients are divided by it once, after all sums"
        )


def check_additive(
    loss_fn: Callable,
    has_aux: bool,
    params: Any,
    batch: Any,
    parts: Iterable[Tensor],
    mode: FakeTensorMode,
    also: str = "",
    times: int = 1,
) -> None:
    """The weights of the parts add up to the weight of the whole batch.

    Args:
        params: the full tree, of fakes of ``mode``; what depends on it is computed as shapes only.
        batch: the whole batch, with its data.
        parts: the weight of every part.
        also: what else the error says.
        times: what the weight of one device is multiplied by: see `written_for`.

    Raises:
        BatchError: they do not.
    """
    with (
        bind_context(PlainContext()),
        restored(loss_fn),
        looking(params, mode) as seen,
        one_rank(),
        hook.bound(_Glancing()),
        Intercept(),
    ):
        weight = read_loss(loss_fn(seen, batch), has_aux)[1]
    if isinstance(weight, FakeTensor):
        return  # depends on params in the whole batch only; the traced part said it does not
    weights = [part.double() for part in parts]
    whole = times * float(weight)
    total = float(sum(weights[1:], weights[0]))
    largest = max(abs(whole), abs(total))
    if abs(whole - total) > _WEIGHT_TOLERANCE * largest:
        raise BatchError(
            f"Mean.weight of the whole batch is {whole:g}, but those of its {len(weights)} parts "
            f"add up to {total:g}: the loss would change with the split. Return a weight that adds "
            f"up, such as the number of tokens or rows in what the loss function sees.{also}"
        )


class _Glancing(Unsplit):
    """The hook of a loss that is looked at on a whole batch: an attention of fakes is a shape.

    Its masks, which may come from the batch alone, are not made: of a long sequence they would not
    fit.
    """

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: hook.Spec,
    ) -> Tensor:
        if isinstance(query, FakeTensor):
            shape = *query.shape[:3], value.shape[3]
            return query.new_empty(shape)
        with hook.bound(None):
            return super().attention(query, key, value, spec)


def written_for(weight: fx.GraphModule, mesh: Mesh) -> int:
    """By how many ranks a weight divides its sum over ranks, written as a number; 1 where it does
    not.

    Such a sum is a mean, as in ``psum(rows, "data") / 2``. One device, where the axis has one rank,
    divides by 1.
    """
    (output,) = weight.graph.find_nodes(op="output")
    divided: Any = output.args[0]
    while _calls(divided, *_COPIES):
        divided = divided.args[0]
    if not _calls(divided, _ATEN.div.Tensor):
        return 1
    summed, divisor = divided.args[:2]
    if not _calls(summed, WAIT):
        return 1
    start = summed.args[0]
    if not _calls(start, STARTS["psum"]):
        return 1
    axes = str(start.args[1]).split(",")
    ranks = mesh.axis_size(axes)
    return ranks if divisor == ranks else 1


def _calls(node: Any, *ops: Any) -> bool:
    """Whether a node calls one of some ops."""
    return isinstance(node, fx.Node) and node.target in ops


def reached(nodes: Nodes, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """What the forward half computes from some nodes."""
    found = set(sources)
    for node, label in nodes.label.items():
        forward = label < nodes.segments
        if forward and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def weight_of(nodes: Nodes, module: fx.GraphModule) -> fx.GraphModule | None:
    """A function from the tensors of a part of the batch to its weight; if it names axes, it runs
    as a rank. None where the weight depends on params."""
    weight = nodes.outputs[1]
    if weight in reached(nodes, nodes.params):
        return None
    return extract(module, weight, nodes.batch)


def batch_read(weight: fx.GraphModule | None, batch: int) -> list[int]:
    """Which tensors of the batch, of so many, a function of `weight_of` reads."""
    if weight is None:
        return []
    inputs = weight.graph.find_nodes(op="placeholder")
    return [number for number, node in enumerate(inputs[:batch]) if node.users]
