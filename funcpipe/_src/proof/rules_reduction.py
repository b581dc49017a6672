"""Rules of what runs along dims: sums and other reductions, softmax and sorts, products of
matrices, norms, losses.

Along positions only a sum is allowed: the sum over ranks is then the sum over all positions.

In: a site. Out: states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from funcpipe._src.proof import row_numbers as places
from funcpipe._src.proof.op_context import (
    MIXES,
    OpContext,
    Operand,
    all_plain,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import (
    Average,
    Number,
    Partial,
    Refusal,
    Replicate,
    Shard,
    State,
    add,
    mul,
    plain,
)
from funcpipe._src.proof.rules_pointwise import (
    RULES,
    States,
    kept,
    pointwise,
    rule,
    same_everywhere,
)

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
def _along(s: OpContext) -> States:
    x = s.x()
    if s.call.name == "sort" and s.world.rows and x.ndim == 1 and x.split_at(0):
        return places.ordered(s, x)
    if s.call.name in _LINEAR and isinstance(x.state, Partial | Average):
        s.all_values()
        ends = isinstance(x.state, places.Counts) and s.call.name == "cumsum"
        return places.Ends(x.state.axes, x.state.keys) if ends else x.state  # type: ignore[union-attr]
    refuse_mixing(x, s.dims("dims" if "dims" in s.args else "dim"), _ALONG[s.call.name])
    s.all_values()
    return kept(x)


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(s: OpContext) -> State:
    x = s.x("input")
    shape = s.args["normalized_shape"]
    refuse_mixing(x, range(x.ndim - len(getattr(shape, "a", shape)), x.ndim), "normalises")
    s.all_values()
    if not all_plain(p for p in s.operands if p is not x):
        raise Refusal("its weight or bias differs between ranks")
    return kept(x)


@rule("convolution")
def _convolution(s: OpContext) -> State:
    x = s.x("input")
    if not isinstance(x.state, Shard):
        return same_everywhere(s)
    refuse_mixing(x, [1], "adds up channels")
    if not all_plain(p for p in s.operands if p is not x):
        raise Refusal("its weight or bias differs between ranks")
    s.all_values()
    for d in range(2, x.ndim):
        alone = (
            s.x("weight").a[d] == s.value("stride")[d - 2] == 1 and s.value("padding")[d - 2] == 0
        )
        if not alone or s.value("transposed"):
            refuse_mixing(x, [d], f"moves a window of {s.x('weight').a[d]}")
    return x.state


# ---- reductions

_NO_MEAN = (
    "it takes the mean over positions, of which a rank has none: write the sum (reduction='sum')"
)
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
def _reduce(s: OpContext) -> State:
    if "other" in s.args:  # the larger of two tensors
        return pointwise(s)
    s.all_values()
    name, x, dims = s.call.name, s.x(), s.dims()
    how = _REDUCTIONS[name]
    adds = name in ("sum", "nansum", "count_nonzero") or (
        name == "linalg_vector_norm" and s.value("ord") == 1
    )
    split = x.state.dim if isinstance(x.state, Shard) and x.state.dim in dims else None
    free = [d for d in dims if x.moves(d) and d != split]
    linear = adds or name == "mean"
    if (
        split is not None
        and not (free or adds)
        and s.world.rows
        and (found := places.largest(s, x) or places.norm(s, x))
    ):
        return found
    refuse_mixing(
        x,
        free if split is not None and linear else [d for d in dims if x.moves(d) and not linear],
        how,
    )
    if split is not None:
        return _over_positions(s, x, adds, dims)
    if isinstance(x.state, Partial | Average):
        return x.state if name in ("sum", "mean") else kept(x)
    if name == "mean" and not all(x.a[d] for d in dims):
        raise Refusal(_NO_MEAN)
    if isinstance(x.state, Number) and name in ("sum", "mean"):
        a, b = (math.prod(shape[d] for d in dims) if name == "sum" else 1 for shape in (x.a, x.b))
        return Number(x.state.a * a, x.state.b * b)
    if free and name not in ("sum", "mean"):
        refuse_mixing(x, free, how)
    if free and name == "sum":
        return mul(
            s.world, kept(x), Number(*(math.prod(shape[d] for d in free) for shape in (x.a, x.b)))
        )
    return _without(s, kept(x), dims)


def _over_positions(s: OpContext, x: Operand, adds: bool, dims: Sequence[int]) -> State:
    assert isinstance(x.state, Shard)
    if adds:
        return places.counts(s, x, dims)
    if not x.a[x.state.dim]:
        raise Refusal(_NO_MEAN)
    return Average(getattr(x.state.part, "base", x.state.part))


def _without(s: OpContext, state: State, dims: Sequence[int]) -> State:
    """The state of a result without some dims, unless it keeps them with size 1."""
    if not isinstance(state, Shard) or s.args.get("keepdim"):
        return state
    return state.at(state.dim - sum(d < state.dim for d in dims))


# ---- products of matrices: letters as in einsum

_LETTERS = {
    "mm": ("ik", "kj", "ij"),
    "bmm": ("bik", "bkj", "bij"),
    "mv": ("ik", "k", "i"),
    "dot": ("k", "k", ""),
    "vdot": ("k", "k", ""),
    "addmm": ("ik", "kj", "ij"),
    "baddbmm": ("bik", "bkj", "bij"),
    "addmv": ("ik", "k", "i"),
    "addbmm": ("bik", "bkj", "ij"),
}
_NAMES = {
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
}
_NAMES |= {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "addmv": ("mat", "vec"),
}
_NAMES |= {"dot": ("self", "tensor"), "vdot": ("self", "other")}


@rule(*_LETTERS)
def _product(s: OpContext) -> State:
    x, y = (s.x(n) for n in _NAMES[s.call.name])
    state = _contracted(s, x, y, *_LETTERS[s.call.name])
    if not s.call.name.startswith("add") and s.call.name != "baddbmm":
        return state
    for k in ("alpha", "beta"):
        s.value(k)
    bias = s.x()
    if isinstance(state, Shard):
        like = replace(x, a=s.out.a, b=s.out.b, state=state)
        return elementwise(s, [like, bias], len(s.out.a))
    if isinstance(bias.state, Shard):
        raise Refusal(f"it adds {bias} to {state}")
    return add(s.world, state, bias.state)


def _contracted(s: OpContext, x: Operand, y: Operand, of_x: str, of_y: str, of_out: str) -> State:
    splits = [
        (of[t.state.dim], t.state) for t, of in ((x, of_x), (y, of_y)) if isinstance(t.state, Shard)
    ]
    moving = {of[d] for t, of in ((x, of_x), (y, of_y)) for d in t.moving}
    if not splits:
        gone = moving - set(of_out)
        if gone:
            raise Refusal(
                f"it adds up products of {x} and {y} along a dim whose size is made from a slice's "
                "length"
            )
        return mul(s.world, kept_number(x), kept_number(y))
    letter, state = splits[0]
    for t in (x, y):
        if not isinstance(t.state, Shard) and not plain(t.state):
            raise Refusal(f"it multiplies {state} by {t}")
    if any(other != letter for other, _ in splits):
        raise Refusal(
            "it multiplies every position of a rank's slice with every other one of the slice "
            f"({x} with {y}), but none with another rank's. {MIXES}: "
            "F.scaled_dot_product_attention, or fp.attention"
        )
    if any(other.at(0) != state.at(0) for _, other in splits):
        raise Refusal("its operands have positions in different order, or of different sequences")
    if (moving - {letter}) - set(of_out):
        raise Refusal(
            f"it adds up products of {x} and {y} along a dim whose size is made from a slice's "
            "length"
        )
    return state.at(of_out.index(letter)) if letter in of_out else Partial(s.world.axes(state.part))


@rule("einsum")
def _einsum(s: OpContext) -> State:
    terms, _, out = s.value("equation").partition("->")
    of_x, of_y = terms.split(",")
    x, y = s.x(), s.x("other")
    return _contracted(s, x, y, of_x, of_y, out)


def kept_number(x: Operand) -> State:
    """A tensor's state where a sum along it follows: of a number, that it is the same
    everywhere."""
    if isinstance(x.state, Number):
        return kept(x)
    return x.state


# ---- losses

_LOSSES = ["mse_loss", "huber_loss", "smooth_l1_loss", "soft_margin_loss"]
_LOSSES += ["binary_cross_entropy", "binary_cross_entropy_with_logits"]


@rule(*_LOSSES)
def _loss(s: OpContext) -> State:
    s.all_values()
    shape = max((len(x.a) for x in s.operands), default=0)
    if not any(isinstance(x.state, Shard) for x in s.operands):
        return same_everywhere(s)
    state, how = elementwise(s, s.operands, shape), s.value("reduction")
    assert isinstance(state, Shard)
    if any(x.free_at(d) for x in s.operands for d in range(x.ndim)):
        raise Refusal("the size of a dim is made from a slice's length")
    if how == 0:
        return state
    if how == 2:
        return Partial(s.world.axes(state.part))
    if not s.operands[0].a[state.dim - shape + s.operands[0].ndim]:
        raise Refusal(_NO_MEAN)
    return Average(state.part)


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(s: OpContext) -> States:
    s.all_values()
    x, target = s.x(), s.x("target")
    if not isinstance(x.state, Shard) and not isinstance(target.state, Shard):
        return same_everywhere(s)
    refuse_mixing(x, [x.ndim - 1 if x.ndim < 2 else 1], "looks up classes")
    if "weight" in s.args and s.args["weight"] is not None and not all_plain([s.x("weight")]):
        raise Refusal("its weight differs between ranks")
    rows = _class_rows(x)
    state = elementwise(s, [rows, target], target.ndim)
    assert isinstance(state, Shard)
    if any(t.free_at(d) for t in (rows, target) for d in range(t.ndim)):
        raise Refusal("the size of a dim is made from a slice's length")
    total = Partial(s.world.axes(state.part))
    how = s.value("reduction")
    if how == 1:
        raise Refusal(
            "it divides the sum over a rank's positions by the number of labels among them: write "
            "reduction='sum', and the number of labels as Mean.weight"
        )
    return [state, Replicate()] if how == 0 else [total, total]


def _class_rows(x: Operand) -> Operand:
    """An operand without its dim of classes."""
    d = 1 if x.ndim > 1 else 0
    state = x.state
    if isinstance(state, Shard):
        state = state.at(state.dim - (state.dim > d))
    return replace(x, a=x.a[:d] + x.a[d + 1 :], b=x.b[:d] + x.b[d + 1 :], state=state)


RULES["nll_loss_nd"] = _nll_loss
