"""Weight layout: how a rank holds the params of one call, and in which dtype the loss sees them.

In: a resolved step, its analysis, a call. Out: `WeightLayout`, or the fakes that a loss is traced
with. A *param arg* is the number of a leaf of what the call gets as params.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis
from funcpipe._src.core import pytree
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.planning.compile_inputs import CompileInputs
from funcpipe._src.program import Piece, Sharded
from funcpipe._src.spec.resolve import ResolvedStep


class _Params(Protocol):
    """What names all params: a `StepAnalysis`, or its tags while it is made."""

    @property
    def paths(self) -> tuple[str, ...]: ...

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]: ...


@dataclass(frozen=True)
class WeightLayout:
    """How a rank holds the params of a call.

    Args:
        sharded: by param arg, the leaves that are gathered before units read them.
        casts: by param arg, the unsharded leaves that are cast before units read them, and to what.
        grad_dtypes: of the leaves that are cast: their gradients are added up in the dtype that
            the state holds.
    """

    sharded: Mapping[int, Sharded]
    casts: Mapping[int, torch.dtype]
    grad_dtypes: Mapping[int, torch.dtype]

    def __str__(self) -> str:
        return f"{len(self.sharded)} leaves sharded, {len(self.casts)} leaves cast"


def lay_out_weights(
    resolved: ResolvedStep, analysis: StepAnalysis, call: PrimitiveCall
) -> WeightLayout:
    """How a rank holds the params of a call, by what the transforms say of each."""
    sharded, casts = {}, {}
    for arg, param in enumerate(call.params):
        if resolved.sharded_over(analysis.paths[param], analysis.shapes[param]):
            sharded[arg] = _sharded(resolved, analysis, call, arg)
            continue
        dtype = loss_dtype(resolved, analysis, call, arg)
        if dtype != call.dtypes[arg]:
            casts[arg] = dtype
    return WeightLayout(sharded, casts, {arg: call.dtypes[arg] for arg in casts})


def _sharded(
    resolved: ResolvedStep, analysis: StepAnalysis, call: PrimitiveCall, arg: int
) -> Sharded:
    path, shape = analysis.paths[call.params[arg]], analysis.shapes[call.params[arg]]
    axes = resolved.sharded_over(path, shape)
    shards = resolved.mesh.axis_size(axes)
    options = resolved.shard_options(path, shape)
    if resolved.precision and options.reduce_dtype is None:
        options = replace(options, reduce_dtype=call.dtypes[arg])
    return Sharded(
        piece=Piece(arg, shape, -(-math.prod(shape) // shards)),
        axes=axes,
        parts=shards,
        summed=tuple(axis for axis in axes if axis in resolved.split_axes),
        grad=call.dtypes[arg],
        whole=loss_dtype(resolved, analysis, call, arg),
        options=options,
    )


def loss_dtype(
    resolved: ResolvedStep, params: _Params, call: PrimitiveCall, arg: int
) -> torch.dtype:
    """The dtype in which a loss function sees a leaf: the dtype in which a sharded
    leaf is gathered, else what transforms ask for."""
    param, dtype = call.params[arg], call.dtypes[arg]
    path, shape = params.paths[param], params.shapes[param]
    if dtype.is_floating_point and resolved.sharded_over(path, shape):
        gathered = resolved.shard_options(path, shape).param_dtype
        if gathered is not None:
            return gathered
    return resolved.dtype_of(path, dtype)


def loss_dtypes(
    resolved: ResolvedStep, params: _Params, call: PrimitiveCall
) -> tuple[torch.dtype, ...]:
    """The dtypes in which a loss function sees its params."""
    return tuple(loss_dtype(resolved, params, call, arg) for arg in range(len(call.params)))


def loss_params(
    inputs: CompileInputs,
    analysis: StepAnalysis,
    call: PrimitiveCall,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[torch.Tensor]:
    """Fakes of a call's params, by default in the dtypes in which the loss function sees them."""
    full = pytree.leaves(inputs.params)
    if dtypes is None:
        dtypes = loss_dtypes(inputs.resolved, analysis, call)
    return [
        fake(analysis.shapes[param], full[param], inputs.mode, dtype)
        for param, dtype in zip(call.params, dtypes, strict=True)
    ]
