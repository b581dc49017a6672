"""The rule of attention, the one known call that may mix positions.

In: op contexts. Out: how the operands of an attention are split, and the placement of its result.
"""

from __future__ import annotations

from funcpipe._src.functional.dispatch import Held
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.op_context import (
    OpContext,
    Operand,
    all_replicated,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import Placement, Refusal, Replicate, Shard, replicated
from funcpipe._src.proof.rules import known_call, same_everywhere

_SHAPE = "attention takes (batch, heads, positions, head dim)"
_LOCAL_MASK = (
    "it is built from the length of a rank's slice: use causal=True, or a mask of the whole "
    "sequence (every rank takes its rows), or one with size 1 along queries or keys"
)


@known_call("attention")
def _attention(op: OpContext) -> tuple[Held, Placement]:
    query, key, value = op.operand("q"), op.operand("k"), op.operand("v")
    operands, bias, packed = [query, key, value], op.args["bias"], op.args["cu_seqlens"]
    op.value("scale")
    if op.split.rows:
        return Held(), _of_rows(op, operands)
    if packed is not None and not all_replicated([packed]):
        raise Refusal(
            f"cu_seqlens are {packed}: hand them to every rank whole (dims=None for that leaf)"
        )
    if any(operand.split_at(2) for operand in operands):
        return _over_positions(op, query, key, value)
    if all_replicated(operands if bias is None else [*operands, bias]):
        return Held(), Replicate()
    return Held(), _along_another_dim(op, operands)


def _over_positions(
    op: OpContext,
    query: Operand,
    key: Operand,
    value: Operand,
) -> tuple[Held, Placement]:
    of_queries, of_keys = _layout(query, "queries"), _layout(key, "keys")
    if of_keys != _layout(value, "values"):
        raise Refusal(f"keys are {key}, but values are {value}: both have the same positions")
    if of_queries is None:
        raise Refusal(
            f"queries are {query}, but keys are {key}: split the queries too, or gather keys and "
            "values"
        )
    if of_keys is None and (op.args["causal"] or op.args["cu_seqlens"] is not None):
        raise Refusal(
            f"queries are {query}, but every rank has all keys ({key}): causal and cu_seqlens "
            "would count a rank's queries from its first. Split keys and values too, or pass a "
            "bias that has rows for queries"
        )
    bias: Operand | None = op.args["bias"]
    by_query, by_key = False, False
    if bias is not None:
        by_query, by_key = _check_bias(bias, of_queries, of_keys)
    return Held(of_queries, of_keys, by_query, by_key), Shard(2, of_queries)


def _layout(operand: Operand, what: str) -> SequenceLayout | None:
    """How an operand is split along its positions; None if every rank has all of them."""
    split = operand.split_at(2)
    if split is not None and operand.varying == [2] and (split.outer, split.inner) == (1, 1):
        return split.layout
    if all_replicated([operand]):
        return None
    raise Refusal(
        f"{what} are {operand}; {_SHAPE}, with positions unmixed in the third dim, or the same on "
        "every rank"
    )


def _check_bias(
    bias: Operand, of_queries: SequenceLayout, of_keys: SequenceLayout | None
) -> tuple[bool, bool]:
    """Whether a bias is split along queries, and along keys."""
    is_it = f"the bias, or mask, is {bias}"
    for dim in bias.varying:
        if not bias.split_at(dim):
            raise Refusal(f"{is_it}, and dim {dim} is as long as a rank's slice: {_LOCAL_MASK}")
    rows, columns = bias.split_at(2), bias.split_at(3)
    rows_lie = rows is None or rows == Shard(2, of_queries)
    columns_lie = columns is None or (of_keys is not None and columns == Shard(3, of_keys))
    if not rows_lie or not columns_lie:
        raise Refusal(f"{is_it}, which is not split as queries and keys are: {_LOCAL_MASK}")
    if rows is columns is None and not replicated(bias.placement):
        raise Refusal(f"{is_it}; {_LOCAL_MASK}")
    keys = None if of_keys is None else of_keys.size
    has_all_rows = keys is not None and bias.local[2] == of_queries.size
    if rows is None and bias.local[2] != 1 and not has_all_rows:
        raise Refusal(
            f"{is_it}, with {bias.local[2]} rows for {of_queries.size} queries: {_LOCAL_MASK}"
        )
    if columns is None and keys is not None and bias.local[3] not in (1, keys):
        raise Refusal(f"{is_it}, with {bias.local[3]} columns for {keys} keys: {_LOCAL_MASK}")
    return rows is not None, columns is not None


def _along_another_dim(op: OpContext, operands: list[Operand]) -> Placement:
    """Attention in which every rank has whole sequences, but not all of them: positions lie along
    batch or heads."""
    query, key, value = operands
    if op.args["cu_seqlens"] is not None:
        raise Refusal(
            f"queries are {query}: cu_seqlens go with sequences that are split along positions"
        )
    placement, bias = query.placement, op.args["bias"]
    if not isinstance(placement, Shard) or placement.dim > 1 or not _all_lie(operands, placement):
        raise Refusal(
            f"queries are {query}, keys {key}, values {value}; {_SHAPE}, and all of them are split "
            "alike"
        )
    elementwise(op, [query] if bias is None else [query, bias], 4)
    if bias is not None and any(dim != placement.dim for dim in bias.varying):
        raise Refusal(f"the bias, or mask, is {bias}: {_LOCAL_MASK}")
    return placement


def _all_lie(operands: list[Operand], placement: Shard) -> bool:
    alike = all(operand.placement == placement for operand in operands)
    return alike and all(operand.varying == [placement.dim] for operand in operands)


def _of_rows(op: OpContext, operands: list[Operand]) -> Placement:
    """Attention within every row of the batch."""
    bias, packed = op.args["bias"], op.args["cu_seqlens"]
    tensors = operands if bias is None else [*operands, bias]
    if all_replicated(tensors if packed is None else [*tensors, packed]):
        return Replicate()
    for tensor in tensors:
        refuse_mixing(tensor, [2, 3], "attends")
    if not any(tensor.shard for tensor in tensors):
        return same_everywhere(op)
    placement = elementwise(op, tensors, 4)
    alike = placement.dim == 0 or all(x.placement == placement for x in operands)
    if not alike or not _fits_rows(packed, placement):
        query, key, value = operands
        raise Refusal(
            f"queries are {query}, keys {key}, values {value}, cu_seqlens {packed}; they have rows "
            "along their first dim"
        )
    return placement


def _fits_rows(packed: Operand | None, placement: Shard) -> bool:
    """Whether cu_seqlens are the same for all rows, or split as they are."""
    if packed is None or all_replicated([packed]):
        return True
    return packed.ndim == 2 and packed.placement == placement
