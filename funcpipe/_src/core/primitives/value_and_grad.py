"""The loss and its gradient: the one primitive of a step that transforms rewrite.

In: a loss function, params and a batch. Out: the loss and its gradient, as the current context
makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch, with_tensors
from funcpipe._src.core.context import current
from funcpipe._src.core.inference_mode import refuse_inference_mode
from funcpipe._src.core.loss_scale import non_finite
from funcpipe._src.core.reductions import global_sum


def value_and_grad(
    loss_fn: Callable[[Any, Any], Any], has_aux: bool = False
) -> Callable[[Any, Any], Any]:
    """The loss and its gradient with respect to the params: the one primitive that transforms
    rewrite.

    Args:
        loss_fn: ``(params, batch) -> scalar | Mean``; with ``has_aux``, ``-> (scalar | Mean,
            aux)``. Pure: every tensor comes in through its arguments.
        has_aux: whether the loss function returns further values. Their leaves are `Mean` (averaged
            over the whole batch) or `Rows` (concatenated in row order); any tensor where the batch
            is not split.

    Returns:
        A function ``(params, batch) -> (loss, grads)``, or ``((loss, aux), grads)``. ``loss`` is a
        detached 0-d tensor, ``grads`` a tree like ``params`` of dense tensors; the gradient of an
        unused or integer leaf is zeros.

    Python values that the loss function reads (closed-over numbers, attributes, training flags)
    count as they are at the call, also in a transformed step: another value makes another plan.
    What is followed, and what is not, is said in ``analysis/host_values.py``.

    In plain PyTorch it is ``torch.autograd.grad``; inside a torch.func transform it is
    torch.func's.

    Arrays and numbers of numpy in the batch are tensors for the loss function.

    Raises:
        TraceError: the loss is not a 0-d tensor, or a leaf of params is not a tensor; it runs in
        torch.inference_mode.
        BatchError: a leaf of the batch is neither a tensor nor a constant (a number, a text, ...);
        in a runner.

    >>> w = torch.tensor([1.0, 2.0])
    >>> value_and_grad(lambda p, b: (p * b).sum())(w, torch.tensor([3.0, 4.0]))
    (tensor(11.), tensor([3., 4.]))
    """

    @functools.wraps(loss_fn)
    def run(params: Any, batch: Any) -> Any:
        refuse_inference_mode("value_and_grad")
        context = current()
        batch = with_tensors(batch) if context.is_plain else read_batch(batch)
        out = context.value_and_grad(loss_fn, has_aux, params, batch)
        value, grads = out
        if context.calls_seen is not None:
            loss = value[0] if has_aux else value
            loss, copies = tree.map_tensors(torch.clone, (loss, grads))
            context.calls_seen.append((context, loss, copies))
        if context.loss_scale is not None:
            context.loss_scale.bad = context.loss_scale.bad + global_sum(grads, non_finite)
        return out

    return run
