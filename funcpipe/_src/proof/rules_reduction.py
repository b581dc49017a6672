"""Rules of ops that run along dims: sums and other reductions, softmax and sorts, norms,
convolutions.

Along positions only a sum is allowed: the sum over ranks is then the sum over all positions.

In: op contexts. Out: placements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import OpContext, Operand, all_replicated, refuse_mixing
from funcpipe._src.proof.placements import (
    Average,
    Number,
    Partial,
    Placement,
    Refusal,
    Shard,
    mul,
)
from funcpipe._src.proof.rules import kept, rule, same_everywhere
from funcpipe._src.proof.rules_pointwise import pointwise

# ---- along dims that the result keeps

_ALONG = {
    "_softmax": "takes a softmax",
    "_log_softmax": "takes a log-softmax",
    "_safe_softmax": "takes a softmax",
    "cumsum": "takes a running sum",
    "cumprod": "takes a running product",
    "cummax": "takes a running maximum",
    "cummin": "takes a running minimum",
    "logcumsumexp": "takes a running log-sum-exp",
    "sort": "sorts",
    "argsort": "sorts",
    "topk": "takes the largest",
    "flip": "turns around",
    "roll": "rolls",
    "glu": "takes halves",
}


_LINEAR = ("cumsum", "flip", "roll")


@rule(*_ALONG)
def _along(op: OpContext) -> Placement:
    operand = op.operand()
    if op.call.name in _LINEAR and isinstance(operand.placement, Partial | Average):
        op.check_values()
        return operand.placement
    dims = op.dims("dims" if "dims" in op.args else "dim")
    refuse_mixing(operand, dims, _ALONG[op.call.name])
    op.check_values()
    return kept(operand)


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(op: OpContext) -> Placement:
    operand = op.operand("input")
    refuse_mixing(operand, normalized_dims(op, operand), "normalises")
    op.check_values()
    check_params(op, operand)
    return kept(operand)


def normalized_dims(op: OpContext, operand: Operand) -> range:
    """The last dims, over which a layer norm normalises."""
    shape = op.args["normalized_shape"]
    count = len(shape.local if isinstance(shape, Differs) else shape)
    return range(operand.ndim - count, operand.ndim)


def check_params(op: OpContext, operand: Operand) -> None:
    """Refuse a weight or bias that is not the same everywhere; all tensors but one are such."""
    if not all_replicated(param for param in op.operands if param is not operand):
        raise Refusal(f"its weight or bias differs between {op.words.owner}s")


@rule("convolution")
def _convolution(op: OpContext) -> Placement:
    operand, weight = op.operand("input"), op.operand("weight")
    if not operand.shard:
        return same_everywhere(op)
    refuse_mixing(operand, [1], "adds up channels")
    check_params(op, operand)
    op.check_values()
    for dim in range(2, operand.ndim):
        stride, padding = op.value("stride")[dim - 2], op.value("padding")[dim - 2]
        entrywise = weight.local[dim] == stride == 1 and padding == 0
        if op.value("transposed") or not entrywise:
            refuse_mixing(operand, [dim], f"moves a window of {weight.local[dim]}")
    return operand.placement


# ---- reductions

_SUMS = ("sum", "nansum", "count_nonzero")
_REDUCTIONS = {
    "sum": "takes the sum",
    "mean": "takes the mean",
    "nansum": "takes the sum",
    "count_nonzero": "counts",
    "prod": "takes the product",
    "logsumexp": "takes the log-sum-exp",
    "var": "takes the variance",
    "std": "takes the standard deviation",
    "var_mean": "takes the variance",
    "std_mean": "takes the standard deviation",
    "linalg_vector_norm": "takes the norm",
    "norm": "takes the norm",
    "any": "asks for any",
    "all": "asks for all",
    "argmax": "looks for the largest",
    "argmin": "looks for the smallest",
    "median": "takes the median",
    "nanmedian": "takes the median",
    "mode": "takes the most frequent",
    "kthvalue": "takes the k-th",
    "aminmax": "takes the extremes",
    "amax": "takes the maximum",
    "amin": "takes the minimum",
    "max": "takes the maximum",
    "min": "takes the minimum",
}


@rule(*_REDUCTIONS)
def _reduce(op: OpContext) -> Placement:
    if "other" in op.args:  # the larger of two tensors
        return pointwise(op)
    op.check_values()
    operand, dims = op.operand(), op.dims()
    placement = operand.placement
    if isinstance(placement, Shard) and placement.dim in dims:
        return _over_positions(op, operand, placement)
    varying = [dim for dim in dims if operand.varies(dim)]
    how = _REDUCTIONS[op.call.name]
    if not (_adds(op) or op.call.name == "mean"):
        refuse_mixing(operand, varying, how)
    if op.call.name in ("sum", "mean"):
        return _sum_or_mean(op, operand, dims)
    if isinstance(placement, Partial | Average):
        return kept(operand)
    refuse_mixing(operand, varying, how)
    return _without_dims(op, kept(operand), dims)


def _adds(op: OpContext) -> bool:
    """Whether a reduction is a sum."""
    if op.call.name == "linalg_vector_norm":
        return op.value("ord") == 1
    return op.call.name in _SUMS


def _over_positions(op: OpContext, operand: Operand, placement: Shard) -> Placement:
    others = [dim for dim in op.dims() if dim != placement.dim and operand.varies(dim)]
    how, adds = _REDUCTIONS[op.call.name], _adds(op)
    if not (adds or op.call.name == "mean"):
        refuse_mixing(operand, [dim for dim in op.dims() if operand.varies(dim)], how)
    refuse_mixing(operand, others, how)
    if adds:
        return Partial(op.split.axes(placement.layout))
    return mean_over(op, placement, operand.local[placement.dim])


def mean_over(op: OpContext, placement: Shard, count: int) -> Average:
    """The placement of a mean over so many positions."""
    if not count:
        raise Refusal(_no_mean(op))
    layout = placement.layout  # sorted rows have the mean of the rows
    return Average(getattr(layout, "base", layout))


def _no_mean(op: OpContext) -> str:
    return (
        f"it takes the mean over {op.words.items}, of which a {op.words.owner} has none: write the "
        "sum (reduction='sum')"
    )


def _sum_or_mean(op: OpContext, operand: Operand, dims: Sequence[int]) -> Placement:
    """Of a tensor without positions along the dims."""
    placement, is_mean = operand.placement, op.call.name == "mean"
    if isinstance(placement, Partial | Average):
        return placement
    if is_mean and not _count(operand.local, dims):
        raise Refusal(_no_mean(op))
    if isinstance(placement, Number):
        if is_mean:
            return placement
        counts = _count(operand.local, dims), _count(operand.full, dims)
        return Number(placement.local * counts[0], placement.full * counts[1])
    varying = [dim for dim in dims if operand.varies(dim)]
    if varying and not is_mean:
        counts = _count(operand.local, varying), _count(operand.full, varying)
        return mul(op.split, kept(operand), Number(*counts))
    return _without_dims(op, kept(operand), dims)


def _count(shape: Sequence[int], dims: Iterable[int]) -> int:
    return math.prod(shape[dim] for dim in dims)


def _without_dims(op: OpContext, placement: Placement, dims: Sequence[int]) -> Placement:
    """The placement of a result that lacks some dims, unless it keeps them with size 1."""
    if not isinstance(placement, Shard) or op.args.get("keepdim"):
        return placement
    return placement.at(placement.dim - sum(dim < placement.dim for dim in dims))
