"""Rules of the other known calls: positions, cross-entropy and dropout of funcpipe.

In: op contexts. Out: how their operands are split, and the placement of their results.
"""

from __future__ import annotations

from dataclasses import replace

from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.op_context import OpContext, all_replicated, elementwise
from funcpipe._src.proof.placements import Partial, Placement, Refusal, Replicate, Shard
from funcpipe._src.proof.rules import Sliced, known_call
from funcpipe._src.proof.rules_row_numbers import own_numbers


@known_call("positions")
def _positions(op: OpContext) -> tuple[SequenceLayout | None, Placement]:
    operand, dim = op.operand("x"), op.value("dim")
    split = operand.split_at(dim)
    if split is None:
        if operand.varies(dim):
            raise Refusal(
                f"dim {dim} of {operand} is as long as {op.words.share}, but which "
                f"{op.words.items} those are is not known: name a tensor of the batch"
            )
        return None, Replicate()
    if op.split.rows and split.outer == 1:
        return None, own_numbers(split.at(0))
    if (split.outer, split.inner) != (1, 1):
        raise Refusal(
            f"dim {dim} of {operand} holds {op.words.items} together with another dim: take "
            "positions before they are merged"
        )
    return split.layout, Shard(0, split.layout)


@known_call("cross_entropy")
def _cross_entropy(op: OpContext) -> tuple[SequenceLayout | None, Placement]:
    tokens, head, labels = op.operand("x"), op.args["head"], op.operand("labels")
    op.value("options")
    if head is not None and not all_replicated([head]):
        raise Refusal(f"the head is {head}: every {op.words.owner} has to have all of it")
    if all_replicated([tokens, labels]):
        return None, Replicate()
    for operand in (tokens, labels):
        if not operand.shard or operand.varying != [operand.shard.dim]:
            raise Refusal(f"tokens are {tokens}, labels {labels}: split both, along the same dim")
    if tokens.split_at(tokens.ndim - 1):
        raise Refusal(f"tokens are {tokens}: their last dim holds features")
    without_features = replace(tokens, local=tokens.local[:-1], full=tokens.full[:-1])
    placement = elementwise(op, [without_features, labels], labels.ndim)
    return placement.layout, Partial(op.split.axes(placement.layout))


@known_call("dropout")
def _dropout(op: OpContext) -> tuple[Sliced, Placement]:
    """Finds the dim of positions, if it is not among the dims of the key."""
    operand, key, rows = op.operand("x"), op.operand("key"), op.split.rows
    op.value("rate")
    if all_replicated([operand, key]):
        return None, Replicate()
    split = operand.placement
    if rows and (not isinstance(split, Shard) or key.ndim <= split.dim):
        raise Refusal(
            f"x is {operand}, but its key {key}: give every row a key, a leaf "
            "fp.random.keys(key, rows) of the batch"
        )
    merged = f"x is {operand}: drop places before {op.words.items} are merged with another dim"
    if not isinstance(split, Shard) or operand.varying != [split.dim]:
        raise Refusal(merged)
    if split.outer != 1 or (split.inner != 1 and not rows):
        raise Refusal(merged)
    if split.dim < key.ndim:  # every position has a key of its own
        if key.placement != split or key.varying != [split.dim]:
            raise Refusal(f"x is {operand}, but its key {key}: both are split alike")
        return None, split
    if not all_replicated([key]):
        raise Refusal(
            f"x is {operand}, but its key {key}: a row has one key on all ranks (dims=None for "
            "that leaf)"
        )
    return (split.dim, split.layout), split
