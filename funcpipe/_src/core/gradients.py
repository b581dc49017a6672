"""The loss and its gradient on one device: by ``torch.autograd.grad``, or by torch.func inside its
transforms.

In: a loss function, params and a batch. Out: what `value_and_grad` returns in plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.containers import check_containers
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.inference_mode import without_inference
from funcpipe._src.core.loss_result import read_loss
from funcpipe._src.core.loss_types import (
    SCALAR_LOSS,
    Microbatches,
    aux_value,
    averaged,
    check_microbatches,
    differentiable,
    divisor_of,
    is_summary,
    join_aux,
    mean,
    plain_aux,
)
from funcpipe.errors import BatchError, TraceError

Leaves = list[Tensor]


class Totals(NamedTuple):
    """What a loss function gives for one microbatch, before the division by the weight.

    Args:
        total, weight: 0-d; ``weight`` is None where the loss is a scalar.
        aux: as the loss function returned it.
        grads: of the total, for every leaf of params.
    """

    total: Tensor
    weight: Tensor | None
    aux: Any
    grads: Leaves


class _Loss(NamedTuple):
    """A loss function of the leaves of params, whose structure is ``spec``."""

    loss_fn: Callable
    has_aux: bool
    spec: Any

    def read(self, leaves: Leaves, batch: Any) -> tuple[Any, Any, Any]:
        """Total, weight or None, and aux."""
        params = tree.unflatten(self.spec, leaves)
        out = self.loss_fn(params, batch)
        return read_loss(out, self.has_aux)


def plain_value_and_grad(
    loss_fn: Callable,
    has_aux: bool,
    params: Any,
    batch: Any,
) -> Any:
    """What `value_and_grad` returns in plain PyTorch."""
    params, batch = without_inference(params), without_inference(batch)
    leaves, spec = check_params(params)
    loss = _Loss(loss_fn, has_aux, spec)
    if isinstance(batch, Microbatches):
        totals = _of_microbatches(loss, leaves, batch)
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        totals = _by_functorch(loss, leaves, batch)
    else:
        totals = _by_autograd(loss, leaves, batch)
        aux = tree.map(plain_aux, totals.aux, is_leaf=is_summary)
        totals = totals._replace(aux=aux)
    mean_loss, leaf_grads = _divided(totals)
    grads = tree.unflatten(spec, leaf_grads)
    if has_aux:
        return (mean_loss, totals.aux), grads
    return mean_loss, grads


def check_params(params: Any) -> tuple[Leaves, Any]:
    """The leaves and structure of params.

    Raises:
        TraceError: a leaf is not a tensor.
        StateError: a leaf is an object that holds tensors.
    """
    leaves, spec = tree.flatten(params)
    if all(map(torch.is_tensor, leaves)):
        return leaves, spec
    check_containers("params", params)
    paths = tree.paths(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TraceError(
                f"params{path} is {describe(leaf)}, not a tensor; pass settings through a closure "
                "instead"
            )
    return leaves, spec


def totals_and_grads(
    loss_fn: Callable,
    has_aux: bool,
    leaves: Leaves,
    spec: Any,
    batch: Any,
) -> Totals:
    """Total, weight, aux and the gradients of the total, by ``torch.autograd.grad``."""
    return _by_autograd(_Loss(loss_fn, has_aux, spec), leaves, batch)


def _by_autograd(loss: _Loss, leaves: Leaves, batch: Any) -> Totals:
    with torch.enable_grad():
        inputs = list(map(_input, leaves))
        total, weight, aux = loss.read(inputs, batch)
    grads = _gradients(total, inputs)
    if weight is not None:
        weight = weight.detach()
    return Totals(total.detach(), weight, aux, grads)


def _input(leaf: Tensor) -> Tensor:
    return leaf.detach().requires_grad_() if differentiable(leaf) else leaf


def _gradients(total: Tensor, inputs: Leaves) -> Leaves:
    """The gradient of every input; zeros for one that has none."""
    wanted = [leaf for leaf in inputs if leaf.requires_grad]
    found: Iterator[Tensor] = iter(())
    if total.requires_grad and wanted:
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    grads = []
    for leaf in inputs:
        grad = next(found, None) if leaf.requires_grad else None
        grads.append(torch.zeros_like(leaf) if grad is None else _dense(grad))
    return grads


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def _by_functorch(loss: _Loss, leaves: Leaves, batch: Any) -> Totals:
    """The same inside a transform of torch.func; aux is as one device gives it."""
    moving = [place for place, leaf in enumerate(leaves) if differentiable(leaf)]
    # torch.func hands back tensors only. The structure of weight and aux stays here, and in it the
    # leaves that are no tensors.
    beside_spec: Any = None
    beside: list[Any] = []

    def total_of(inputs: Leaves) -> Any:
        nonlocal beside_spec, beside
        total, weight, aux = loss.read(_with_entries(leaves, moving, inputs), batch)
        values = tree.map(aux_value, aux, is_leaf=is_summary)
        beside, beside_spec = tree.flatten((weight, values))
        tensors = [leaf for leaf in beside if isinstance(leaf, Tensor)]
        return total, tensors

    differentiate = torch.func.grad_and_value(total_of, has_aux=True)
    grads, (total, tensors) = differentiate([leaves[place] for place in moving])
    returned = iter(tensors)
    for place, leaf in enumerate(beside):
        if isinstance(leaf, Tensor):
            beside[place] = next(returned)
    weight, aux = tree.unflatten(beside_spec, beside)
    zeros = list(map(torch.zeros_like, leaves))
    return Totals(total, weight, aux, _with_entries(zeros, moving, grads))


def _with_entries(values: Leaves, places: Sequence[int], entries: Leaves) -> Leaves:
    """A list with other entries at some places."""
    out = list(values)
    for place, entry in zip(places, entries, strict=True):
        out[place] = entry
    return out


def _of_microbatches(loss: _Loss, leaves: Leaves, batch: Microbatches) -> Totals:
    """The sums over ready microbatches."""
    parts = [_by_autograd(loss, leaves, part) for part in check_microbatches(batch)]
    weights = [part.weight for part in parts]
    if len(parts) > 1 and any(weight is None for weight in weights):
        raise BatchError(SCALAR_LOSS.format(why="the batch comes in several microbatches"))
    total = _sum([part.total for part in parts])
    weight = _sum(weights)
    of_leaves = zip(*(part.grads for part in parts), strict=True)
    grads = list(map(_sum, of_leaves))
    aux = join_aux([part.aux for part in parts])
    return Totals(total, weight, aux, grads)


def _sum(summands: Sequence[Any]) -> Any:
    return functools.reduce(torch.add, summands)


def _divided(found: Totals) -> tuple[Tensor, Leaves]:
    """The loss and its gradients: totals over the weight, if there is one."""
    if found.weight is None:
        return found.total, found.grads
    divisor = divisor_of(found.weight)
    grads = [averaged(grad, divisor) for grad in found.grads]
    return mean(found.total, found.weight), grads
