"""Rules of gradients: of ops, which a loss function takes itself, and those that the user wrote
(`custom_backward.py`).

In: op contexts. Out: placements.
"""

from __future__ import annotations

from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.custom_backward import COTANGENT
from funcpipe._src.proof.op_context import OpContext, Operand, all_replicated, refuse_mixing
from funcpipe._src.proof.placements import (
    Partial,
    Placement,
    Refusal,
    Shard,
    agrees,
    as_partial,
    dual,
)
from funcpipe._src.proof.rules import Placements, rule, same_everywhere
from funcpipe._src.proof.rules_reduction import normalized_dims


@rule("slice_backward", "select_backward")
def _put_back(op: OpContext) -> Placement:
    """A part of a tensor, in zeros of all of it."""
    grad, dim = op.operand("grad_output"), op.value("dim")
    for name in ("start", "end", "step", "index"):
        if name in op.args:
            op.value(name)
    placement = grad.placement
    if not isinstance(placement, Shard):
        return same_everywhere(op)
    dim %= len(op.out.local)
    new_dim = op.call.name == "select_backward" and placement.dim >= dim
    split = placement.dim + new_dim
    if split == dim:
        refuse_mixing(grad, [placement.dim], "puts back entries")
    return placement.at(split)


@rule("embedding_dense_backward")
def _of_table(op: OpContext) -> Placement:
    placement = op.operand("grad_output").placement
    if not isinstance(placement, Shard) or placement != op.operand("indices").placement:
        return same_everywhere(op)
    op.check_values()
    return Partial(op.split.axes(placement.layout))


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def _of_layer_norm(op: OpContext) -> Placements:
    grad, operand = op.operand("grad_out"), op.operand("input")
    placement = operand.placement
    if not isinstance(placement, Shard):
        return same_everywhere(op)
    refuse_mixing(operand, normalized_dims(op, operand), "normalises")
    others = [other for other in op.operands if other.ndim == operand.ndim]
    if any(other.placement != placement for other in (grad, *others)):
        raise Refusal("its operands are not split alike")
    of_params = Partial(op.split.axes(placement.layout))
    return [placement, *[of_params] * (len(op.outs) - 1)]


@rule("nll_loss_backward", "mse_loss_backward", "binary_cross_entropy_with_logits_backward")
def _of_loss(op: OpContext) -> Placement:
    """The gradient of a loss that sums its entries, or keeps each."""
    reduction = op.args["reduction"]
    if isinstance(reduction, Differs) or reduction == 1:
        raise Refusal(f"it is the gradient of a mean over {op.words.own_items}")
    placement = op.operand().placement
    others = []
    for name in ("grad_output", "self", "target"):
        operand = op.args.get(name)
        if isinstance(operand, Operand) and not operand.shard:
            others.append(operand)
    if isinstance(placement, Shard) and all_replicated(others):
        return placement
    return same_everywhere(op)


# ---- gradients that the user wrote


@rule(COTANGENT)
def _cotangent(op: OpContext) -> Placement:
    """The gradient that comes to the backward of an autograd.Function."""
    placement = None
    if "of" in op.args and not _has_constant_dims(op.operand("of")):
        placement = dual(op.split, op.operand("of").placement)
    if placement is None:
        raise Refusal("what gradient comes to an autograd.Function is not known")
    return placement


def check_gradient(op: OpContext) -> None:
    """Refuse a gradient, made by the backward of an autograd.Function, that is not split as the
    gradient of its tensor is."""
    name, grad = op.args["function"], op.operand("grad")
    if "of" not in op.args:
        raise Refusal(
            f"{name} makes a gradient of a tensor that was changed in place, or that no op has seen"
        )
    operand = op.operand("of")
    wanted = dual(op.split, operand.placement)
    found = as_partial(op.split, grad.placement)
    if wanted is not None and not _has_constant_dims(operand) and agrees(found, wanted):
        return
    text = "none" if wanted is None else op.split.text(wanted)
    raise Refusal(
        f"{name} makes {grad} of {operand}: {op.words.at_owners} that is not the gradient that "
        f"one device makes. It wants {text}"
    )


def _has_constant_dims(operand: Operand) -> bool:
    return any(operand.constant_along(dim) for dim in operand.varying)
