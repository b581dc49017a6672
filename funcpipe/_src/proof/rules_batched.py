"""Rules of ops that do the same for every entry of some dims: linear algebra, transforms, pooling,
and the gradients of ops.

An op has *core* dims, along which it mixes; along all others what is split stays so. Results have
the same dims, counted from the front.

In: a site. Out: states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import OpContext, Operand, all_plain, elementwise, refuse_mixing
from funcpipe._src.proof.placements import Partial, Refusal, Replicate, Shard, State
from funcpipe._src.proof.rules_pointwise import States, rule, same_everywhere

# ---- one kind of core dims for all operands

_LAST_TWO = (
    "inverse", "linalg_inv_ex", "cholesky", "linalg_cholesky_ex", "linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_eig",
    "_linalg_eigvals", "_linalg_det", "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_lu", "linalg_matrix_exp",
    "linalg_solve_triangular", "triangular_solve", "_linalg_solve_ex", "cholesky_solve", "cholesky_inverse", "_cdist_forward",
    "_euclidean_dist", "linalg_pinv",
)  # fmt: skip
_ALL_BUT_FIRST = ("grid_sampler_2d", "grid_sampler_3d", "im2col", "col2im")
_AROUND = {"pixel_shuffle": 3, "pixel_unshuffle": 3}
_POOLS = (
    *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("avg_pool", "max_pool", "reflection_pad", "replication_pad", "upsample_nearest")),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)), "max_pool2d_with_indices", "max_pool3d_with_indices",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool1d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)  # fmt: skip


@rule(*_LAST_TWO)
def _matrices(s: OpContext) -> States:
    return _apart(s, lambda x: range(x.ndim - 2, x.ndim), "works on matrices")


@rule(*_POOLS)
def _windows(s: OpContext) -> States:
    n = int(re.findall(r"(\d)d", s.call.name)[0])
    return _apart(s, lambda x: range(x.ndim - n, x.ndim), "moves a window")


@rule(*_ALL_BUT_FIRST)
def _images(s: OpContext) -> States:
    return _apart(s, lambda x: range(1, x.ndim), "works on images")


@rule(*_AROUND)
def _around(s: OpContext) -> States:
    return _apart(s, lambda x: range(x.ndim - _AROUND[s.call.name], x.ndim), "rearranges an image")


@rule(
    "_fft_r2c",
    "_fft_c2c",
    "_fft_c2r",
    "linalg_cross",
    "_softmax_backward_data",
    "_log_softmax_backward_data",
    "logit_backward",
)
def _along_dims(s: OpContext) -> States:
    """Ops that name their core dims."""
    if not s.operands or not any(isinstance(x.state, Shard) for x in s.operands):
        return same_everywhere(s)
    given = s.value("dim")
    dims = [given] if isinstance(given, int) else list(given)
    return _apart(s, lambda x: [d % x.ndim for d in dims], "mixes")


def _apart(s: OpContext, core: Any, what: str) -> States:
    """The states of the results of an op that mixes along core dims alone."""
    operands = [x for x in s.operands if x.ndim]
    if not any(isinstance(x.state, Shard) for x in operands):
        return same_everywhere(s)
    s.all_values()
    for x in operands:
        refuse_mixing(x, core(x), what)
    state = elementwise(s, operands, max(x.ndim for x in operands))
    assert isinstance(state, Shard)
    return [state if len(o.a) > state.dim else Replicate() for o in s.outs]


# ---- norms


@rule("native_group_norm")
def _group_norm(s: OpContext) -> States:
    x = s.x("input")
    refuse_mixing(x, range(1, x.ndim), "normalises")
    if not isinstance(x.state, Shard):
        return same_everywhere(s)
    _plain_besides(s, [x])
    return x.state


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_native_batch_norm_legit_no_training",
)
def _batch_norm(s: OpContext) -> States:
    x = s.x("input")
    if not isinstance(x.state, Shard):
        refuse_mixing(x, [d for d in range(x.ndim) if d != 1], "takes the mean and variance")
        return same_everywhere(s)
    s.all_values()
    if not s.args.get("training", s.call.name != "_native_batch_norm_legit_no_training"):
        refuse_mixing(x, [1], "looks up channels")
        _plain_besides(s, [x])
        return [x.state, *[Replicate()] * (len(s.outs) - 1)]
    refuse_mixing(x, [d for d in range(x.ndim) if d != 1], "takes the mean and variance")
    if any(
        p.state != x.state.at(0) for p in s.operands if p is not x
    ):  # as in instance norm: every row has its channels
        raise Refusal("its weight or bias differs from what it normalises")
    return [x.state, *[x.state.at(0)] * (len(s.outs) - 1)]


def _plain_besides(s: OpContext, operands: Sequence[Operand]) -> None:
    if not all_plain(p for p in s.operands if not any(p is x for x in operands)):
        raise Refusal("its weight or bias differs between ranks")


# ---- gradients of ops, which a loss function takes itself


@rule("slice_backward", "select_backward")
def _put_back(s: OpContext) -> State:
    """A part of a tensor, in zeros of all of it."""
    g, d = s.x("grad_output"), s.value("dim")
    for name in {"start", "end", "step", "index"} & s.args.keys():
        s.value(name)
    if not isinstance(g.state, Shard):
        return same_everywhere(s)
    d %= len(s.out.a)
    at = g.state.dim + (s.call.name == "select_backward" and g.state.dim >= d)
    if at == d:
        refuse_mixing(g, [g.state.dim], "puts back entries")
    return g.state.at(at)


@rule("embedding_dense_backward")
def _table(s: OpContext) -> State:
    g, indices = s.x("grad_output"), s.x("indices")
    if not isinstance(g.state, Shard) or g.state != indices.state:
        return same_everywhere(s)
    s.all_values()
    return Partial(s.world.axes(g.state.part))


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def _layer_norm(s: OpContext) -> States:
    g, x = s.x("grad_out"), s.x("input")
    if not isinstance(x.state, Shard):
        return same_everywhere(s)
    shape = s.args["normalized_shape"]
    n = x.ndim - len(getattr(shape, "a", shape))
    refuse_mixing(x, range(n, x.ndim), "normalises")
    if any(t.state != x.state for t in s.operands if t.ndim == x.ndim) or g.state != x.state:
        raise Refusal("its operands lie otherwise")
    return [x.state, *[Partial(s.world.axes(x.state.part))] * (len(s.outs) - 1)]


@rule("nll_loss_backward", "mse_loss_backward", "binary_cross_entropy_with_logits_backward")
def _of_loss(s: OpContext) -> State:
    """The gradient of a loss of which all rows were summed, or each kept."""
    operands = _tensors(s, ("grad_output", "self", "target"))
    if isinstance(s.args["reduction"], Differs) or s.args["reduction"] == 1:
        raise Refusal("it is the gradient of a mean over the positions of a rank")
    x = s.x("self")
    if not isinstance(x.state, Shard) or not all_plain(
        t for t in operands if not isinstance(t.state, Shard)
    ):
        return same_everywhere(s)
    return x.state


def _tensors(s: OpContext, names: Iterable[str]) -> list[Operand]:
    return [s.args[n] for n in names if isinstance(s.args.get(n), Operand)]
