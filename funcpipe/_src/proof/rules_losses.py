"""Rules of losses, which reduce what they compute of every entry.

In: op contexts. Out: placements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from funcpipe._src.proof.op_context import (
    OpContext,
    Operand,
    all_replicated,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import Partial, Placement, Refusal, Replicate, Shard
from funcpipe._src.proof.rules import Placements, rule, same_everywhere
from funcpipe._src.proof.rules_reduction import mean_over

_NONE, _MEAN, _SUM = 0, 1, 2  # torch's numbers of reductions


@rule(
    "mse_loss",
    "huber_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
)
def _loss(op: OpContext) -> Placement:
    op.check_values()
    if not any(operand.shard for operand in op.operands):
        return same_everywhere(op)
    ndim = max(operand.ndim for operand in op.operands)
    placement = elementwise(op, op.operands, ndim)
    _check_sizes(op, op.operands)
    how = op.value("reduction")
    if how == _NONE:
        return placement
    if how == _SUM:
        return Partial(op.split.axes(placement.layout))
    first = op.operands[0]
    return mean_over(op, placement, first.local[placement.dim - ndim + first.ndim])


@rule("nll_loss_forward", "nll_loss2d_forward", "nll_loss_nd")
def _nll_loss(op: OpContext) -> Placements:
    op.check_values()
    scores, target = op.operand(), op.operand("target")
    if not scores.shard and not target.shard:
        return same_everywhere(op)
    classes = 1 if scores.ndim > 1 else 0
    refuse_mixing(scores, [classes], "looks up classes")
    weight = op.args.get("weight")
    if weight is not None and not all_replicated([weight]):
        raise Refusal(f"its weight differs between {op.words.owner}s")
    entries = _without_dim(scores, classes)
    placement = elementwise(op, [entries, target], target.ndim)
    _check_sizes(op, [entries, target])
    how = op.value("reduction")
    if how == _MEAN:
        raise Refusal(
            f"it divides the sum over {op.words.own_items} by the number of labels among them: "
            "write reduction='sum', and the number of labels as Mean.weight"
        )
    if how == _NONE:
        return [placement, Replicate()]
    return [Partial(op.split.axes(placement.layout))] * 2


def _check_sizes(op: OpContext, operands: Iterable[Operand]) -> None:
    for operand in operands:
        if any(operand.constant_along(dim) for dim in operand.varying):
            raise Refusal(f"the size of a dim is made from {op.words.length}")


def _without_dim(operand: Operand, gone: int) -> Operand:
    """An operand without one of its dims."""
    placement = operand.placement
    if isinstance(placement, Shard):
        placement = placement.at(placement.dim - (placement.dim > gone))
    return replace(
        operand,
        local=operand.local[:gone] + operand.local[gone + 1 :],
        full=operand.full[:gone] + operand.full[gone + 1 :],
        placement=placement,
    )
