"""Weight layout: how a rank holds the params of one call, and in which dtype the loss sees them.

In: a call. Out: `WeightLayout`, or the fakes that its loss is traced with. A *param arg* is the
number of a leaf of what the call gets as params.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from funcpipe._src.analysis.state import PrimitiveCall
from funcpipe._src.core.mesh import Axes
from funcpipe._src.planning.compile_inputs import CallInputs
from funcpipe._src.program import BucketEntry, ShardedArg
from funcpipe._src.spec.resolve import ResolvedStep


class _Params(Protocol):
    """What names all params: a `StepAnalysis`, or its tags while it is made."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of every param."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of every param."""


@dataclass(frozen=True)
class WeightLayout:
    """How a rank holds the params of a call.

    Args:
        sharded: by param arg, the leaves that are gathered before units read them.
        casts: by param arg, the unsharded leaves that are cast before units read them, and to what.
        grad_dtypes: of the leaves that are cast: their gradients are added up in the dtype that
            the state holds.
    """

    sharded: Mapping[int, ShardedArg]
    casts: Mapping[int, torch.dtype]
    grad_dtypes: Mapping[int, torch.dtype]

    def __str__(self) -> str:
        return f"{len(self.sharded)} leaves sharded, {len(self.casts)} leaves cast"


def lay_out_weights(inputs: CallInputs) -> WeightLayout:
    """How a rank holds the params of a call, by what the transforms say of each."""
    sharded, casts, grad_dtypes = {}, {}, {}
    for arg, dtype in enumerate(traced_dtypes(inputs)):
        own = inputs.call.dtypes[arg]
        axes = inputs.resolved.sharded_over(*inputs.param(arg))
        if axes:
            sharded[arg] = _sharded(inputs, arg, axes, dtype)
        elif dtype != own:
            casts[arg], grad_dtypes[arg] = dtype, own
    return WeightLayout(sharded, casts, grad_dtypes)


def _sharded(inputs: CallInputs, arg: int, axes: Axes, traced: torch.dtype) -> ShardedArg:
    resolved = inputs.resolved
    own = inputs.call.dtypes[arg]
    path, shape = inputs.param(arg)
    options = resolved.shard_options(path, shape)
    if resolved.precision and options.reduce_dtype is None:
        options = replace(options, reduce_dtype=own)
    shards = resolved.mesh.axis_size(axes)
    summed = [axis for axis in axes if axis in resolved.split_axes]
    return ShardedArg(
        entry=BucketEntry.of(arg, shape, shards),
        axes=axes,
        parts=shards,
        summed=tuple(summed),
        grad_dtype=own,
        gathered_dtype=traced,
        options=options,
    )


def loss_dtypes(
    resolved: ResolvedStep, params: _Params, call: PrimitiveCall
) -> tuple[torch.dtype, ...]:
    """The dtypes in which a loss function sees its params.

    That of a sharded leaf is the one in which it is gathered, if that is said; the others are what
    transforms ask for.
    """
    found = []
    for param, dtype in zip(call.params, call.dtypes, strict=True):
        path, shape = params.paths[param], params.shapes[param]
        wanted = None
        if dtype.is_floating_point and resolved.sharded_over(path, shape):
            options = resolved.shard_options(path, shape)
            wanted = options.param_dtype
        if wanted is None:
            wanted = resolved.dtype_of(path, dtype)
        found.append(wanted)
    return tuple(found)


def traced_dtypes(inputs: CallInputs) -> tuple[torch.dtype, ...]:
    """The dtypes in which a call's loss function sees its params."""
    return loss_dtypes(inputs.resolved, inputs.analysis, inputs.call)


def traced_params(inputs: CallInputs) -> list[torch.Tensor]:
    """Fakes of a call's params as its loss function sees them."""
    return inputs.params(traced_dtypes(inputs))
