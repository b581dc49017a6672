"""Results: what a ``value_and_grad`` gives, as fakes, and what of it may go into the batch of a
later one.

In: a loss function, params as fakes, a batch. Out: fakes of loss and aux. Each has an `Origin`,
which ops hand on, so that the planner knows how a leaf of a later batch is split.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from funcpipe._src.collectives import one_rank
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.core.loss_result import read_loss
from funcpipe._src.core.loss_types import (
    Microbatches,
    Rows,
    differentiable,
    is_summary,
    join_aux,
    mean,
)
from funcpipe._src.graph.fake_tensors import fake, looking
from funcpipe._src.graph.restore import restored

_ORIGIN = "_funcpipe_origin"  # an attribute of fakes
_SEED = 0


class Origin(enum.Flag):
    """What a tensor was computed from.

    ``RESULT``: losses, means and norms, which have no rows. ``ROWS``: `Rows` of an earlier call,
    which have the rows of all ranks. ``BATCH``: the step's batch, or a tensor that the step makes.
    """

    RESULT = 0
    ROWS = enum.auto()
    BATCH = enum.auto()


def origin(leaf: Any) -> Origin:
    """What a tensor, or another leaf of a batch, was computed from.

    >>> origin(torch.ones(2)), origin(3)
    (<Origin.BATCH: 2>, <Origin.BATCH: 2>)
    """
    if not isinstance(leaf, FakeTensor):
        return Origin.BATCH
    return getattr(leaf, _ORIGIN, Origin.RESULT)


def hand_on(inputs: Iterable[Any], outputs: Any) -> None:
    """Give the outputs of an op the origins of its inputs. A 0-d input brings no rows."""
    found = Origin.RESULT
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.dim():
            found |= origin(value)
    if found:
        for out in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(out, FakeTensor):
                setattr(out, _ORIGIN, origin(out) | found)


def loss_and_aux(
    loss_fn: Callable, has_aux: bool, params: Any, batch: Any, mode: FakeTensorMode, row_ranks: int
) -> tuple[torch.Tensor, Any]:
    """What a loss function gives on the whole batch: loss and aux, as fakes that a step may compute
    with.

    Args:
        params: fakes of ``mode``, in the dtypes in which the loss function sees them.
        row_ranks: how many ranks have rows of their own that are not in this batch.
    """
    parts = batch.parts if isinstance(batch, Microbatches) else [batch]
    # Without the modes of the step, since a loss function need not be elementwise.
    with (
        restored(loss_fn),
        _disable_current_modes(),
        bind_context(PlainContext()),
        looking(params, mode) as seen,
        one_rank(),
    ):
        read = [read_loss(loss_fn(seen, part), has_aux) for part in parts]
        total, weight, first = read[0]
        loss = total if weight is None else mean(total, weight)
        joined = join_aux([aux for _, _, aux in read])

    def result(made: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not isinstance(made, Rows):
            return fake(value.shape, value, mode)
        shape = list(value.shape)
        shape[made.dim] *= row_ranks
        out = fake(shape, value, mode)
        setattr(out, _ORIGIN, Origin.ROWS)
        return out

    return fake((), loss, mode), tree.map(result, first, joined, is_leaf=is_summary)


MADE_UP = (
    "({paths} comes from an earlier value_and_grad: this was tried with made-up values from 0.5 to "
    "1.5, or 0 and 1.)"
)


def with_values(batch: Any, read: Iterable[int]) -> tuple[Any, str]:
    """A batch with made-up values in place of the fakes among some of its leaves, and the paths of
    those.

    Args:
        read: the numbers of the leaves.
    """
    leaves, spec = tree.flatten(batch)
    paths = tree.paths(batch)
    made_up = []
    for number in sorted(read):
        if isinstance(leaves[number], FakeTensor):
            leaves[number] = _made_up(leaves[number])
            made_up.append(f"batch{paths[number]}")
    return tree.unflatten(spec, leaves), " and ".join(made_up)


def _made_up(leaf: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    with _disable_current_modes():
        if differentiable(leaf):
            values = torch.rand(leaf.shape, generator=generator) + 0.5
        else:
            values = torch.randint(2, leaf.shape, generator=generator)
        return values.to(device=leaf.device, dtype=leaf.dtype)
