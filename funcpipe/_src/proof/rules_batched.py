"""Rules of ops that do the same for every entry of some dims: linear algebra, transforms, pooling,
norms of batches.

An op has *core* dims, along which it mixes; along all others what is split stays so. Results have
the same dims, counted from the front.

In: op contexts. Out: placements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from funcpipe._src.proof.op_context import OpContext, Operand, elementwise, refuse_mixing
from funcpipe._src.proof.placements import Refusal, Replicate, Shard
from funcpipe._src.proof.rules import Placements, rule, same_everywhere
from funcpipe._src.proof.rules_reduction import check_params

# ---- one kind of core dims for all operands

_LAST_TWO = (
    "inverse", "linalg_inv_ex", "cholesky", "linalg_cholesky_ex", "linalg_qr", "_linalg_svd",
    "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "_linalg_det", "_linalg_slogdet",
    "linalg_lu_factor_ex", "linalg_lu", "linalg_matrix_exp", "linalg_solve_triangular",
    "triangular_solve", "_linalg_solve_ex", "cholesky_solve", "cholesky_inverse", "_cdist_forward",
    "_euclidean_dist", "linalg_pinv",
)  # fmt: skip
_ALL_BUT_FIRST = ("grid_sampler_2d", "grid_sampler_3d", "im2col", "col2im")
_LAST_THREE = ("pixel_shuffle", "pixel_unshuffle")
_WINDOWS = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
_NAME_THEIR_DIMS = (
    "_fft_r2c", "_fft_c2c", "_fft_c2r", "linalg_cross", "_softmax_backward_data",
    "_log_softmax_backward_data", "logit_backward",
)  # fmt: skip
CoreDims = Callable[[Operand], Iterable[int]]


def _last(count: int) -> CoreDims:
    def core_dims(operand: Operand) -> range:
        return range(operand.ndim - count, operand.ndim)

    return core_dims


@rule(*_LAST_TWO)
def _matrices(op: OpContext) -> Placements:
    return _apart(op, _last(2), "works on matrices")


@rule(*_WINDOWS)
def _windows(op: OpContext) -> Placements:
    digits = re.findall(r"(\d)d", op.call.name)
    return _apart(op, _last(int(digits[0])), "moves a window")


@rule(*_ALL_BUT_FIRST)
def _images(op: OpContext) -> Placements:
    def core_dims(operand: Operand) -> range:
        return range(1, operand.ndim)

    return _apart(op, core_dims, "works on images")


@rule(*_LAST_THREE)
def _around(op: OpContext) -> Placements:
    return _apart(op, _last(3), "rearranges an image")


@rule(*_NAME_THEIR_DIMS)
def _along_dims(op: OpContext) -> Placements:
    if not any(operand.shard for operand in op.operands):
        return same_everywhere(op)
    given = op.value("dim")
    dims = [given] if isinstance(given, int) else list(given)

    def core_dims(operand: Operand) -> list[int]:
        return [dim % operand.ndim for dim in dims]

    return _apart(op, core_dims, "mixes")


def _apart(op: OpContext, core_dims: CoreDims, what: str) -> Placements:
    """The placements of the results of an op that mixes along core dims alone."""
    operands = [operand for operand in op.operands if operand.ndim]
    if not any(operand.shard for operand in operands):
        return same_everywhere(op)
    op.check_values()
    for operand in operands:
        refuse_mixing(operand, core_dims(operand), what)
    placement = elementwise(op, operands, max(operand.ndim for operand in operands))
    return [placement if len(out.local) > placement.dim else Replicate() for out in op.outs]


# ---- norms


@rule("native_group_norm")
def _group_norm(op: OpContext) -> Placements:
    operand = op.operand("input")
    refuse_mixing(operand, range(1, operand.ndim), "normalises")
    if not operand.shard:
        return same_everywhere(op)
    check_params(op, operand)
    return operand.placement


_NO_TRAINING = "_native_batch_norm_legit_no_training"


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    _NO_TRAINING,
)
def _batch_norm(op: OpContext) -> Placements:
    operand = op.operand("input")
    others = [dim for dim in range(operand.ndim) if dim != 1]
    placement = operand.placement
    if not isinstance(placement, Shard):
        refuse_mixing(operand, others, "takes the mean and variance")
        return same_everywhere(op)
    op.check_values()
    if not op.args.get("training", op.call.name != _NO_TRAINING):
        refuse_mixing(operand, [1], "looks up channels")
        check_params(op, operand)
        return [placement, *[Replicate()] * (len(op.outs) - 1)]
    refuse_mixing(operand, others, "takes the mean and variance")
    # The split dim is that of channels: instance norm gives every row channels of its own.
    of_channels = placement.at(0)
    if any(x.placement != of_channels for x in op.operands if x is not operand):
        raise Refusal("its weight or bias differs from what it normalises")
    return [placement, *[of_channels] * (len(op.outs) - 1)]
