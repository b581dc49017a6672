"""Rules of ops that read or write entries by their numbers, or by a mask.

In: op contexts. Out: placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from funcpipe._src.proof.op_context import (
    OpContext,
    Operand,
    all_replicated,
    elementwise,
    refuse_mixing,
)
from funcpipe._src.proof.placements import (
    Number,
    Placement,
    Refusal,
    Replicate,
    Shard,
    replicated,
)
from funcpipe._src.proof.rules import Placements, kept, rule, same_everywhere
from funcpipe._src.proof.rules_view import choosing

_TAKES = "takes entries by number"


@rule("embedding")
def _embedding(op: OpContext) -> Placement:
    table = op.operand("weight")
    indices = op.operand("indices")
    refuse_mixing(table, table.varying, "looks up rows")
    usual = isinstance(indices.placement, Replicate | Number | Shard)
    if usual and all_replicated([table]):
        return kept(indices)
    return same_everywhere(op)


@rule("index_select")
def _index_select(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    index = op.operand("index")
    refuse_mixing(operand, [dim], _TAKES)
    if operand.shard and all_replicated([index]):
        return operand.shard
    if index.shard and index.ndim == 1 and all_replicated([operand]):
        return index.shard.at(dim)
    return same_everywhere(op)


@rule("gather")
def _gather(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    index = op.operand("index")
    refuse_mixing(operand, [dim], _TAKES)
    if operand.shard and replicated(index.placement):
        if index.varying != [operand.shard.dim]:
            raise Refusal(f"it takes entries of {operand} at {index}")
        return elementwise(op, [operand, index], operand.ndim)
    if index.shard and index.shard.dim != dim:
        return elementwise(op, [operand, index], operand.ndim)
    if index.shard and all_replicated([operand]):
        return index.shard  # every entry picks from a table that is the same everywhere
    return same_everywhere(op)


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    index = op.operand("index")
    tensors = [operand]
    for other in op.operands:
        if other is not operand and other.ndim:
            tensors.append(other)
    if not any(tensor.shard for tensor in tensors):
        return same_everywhere(op)
    op.check_values()
    for tensor in tensors:
        refuse_mixing(tensor, [dim], "writes entries by number")
    for other_dim in range(operand.ndim):
        if other_dim != dim and not _same_sizes([index, *tensors], other_dim):
            raise Refusal(f"it writes to some entries of {operand} along dim {other_dim}")
    return elementwise(op, op.operands, operand.ndim)


def _same_sizes(tensors: Sequence[Operand], dim: int) -> bool:
    """Whether a dim has the same sizes in all tensors."""
    local = {tensor.local[dim] for tensor in tensors}
    full = {tensor.full[dim] for tensor in tensors}
    return len(local) == len(full) == 1


@rule("index")
def _index(op: OpContext) -> Placement:
    operand = op.operand()
    indices = op.args["indices"]
    given = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in given:
        if operand.split_at(dim):
            raise Refusal(choosing(op, operand, dim, "by number"))
        refuse_mixing(operand, [dim], _TAKES)
    where = [indices[dim] for dim in given]
    ndim = max(index.ndim for index in where)
    first = given[0]
    last = given[-1]
    together = last - first + 1 == len(given)
    front = first if together else 0  # the first dim of the result that comes of indices
    if any(index.shard for index in where):
        if not all_replicated([operand]):
            raise Refusal(f"it takes entries of {operand} at {where[0]}")
        placement = elementwise(op, where, ndim)
        return placement.at(placement.dim + front)
    split = operand.shard
    if split is None or not all_replicated(where):
        return same_everywhere(op)
    before = sum(dim not in given for dim in range(split.dim))
    behind_indices = split.dim > front or not together
    return split.at(before + ndim if behind_indices else before)


@rule("index_put")
def _index_put(op: OpContext) -> Placements:
    """Entries beside positions; one number where a mask says so; or anything where nothing depends
    on positions."""
    operand = op.operand()
    indices = op.args["indices"]
    given = [index for index in indices if index is not None]
    masks = [index for index in given if index.dtype == torch.bool]
    split = operand.shard
    if split and not masks and not _has_index(indices, split.dim):
        return _put_beside(op, operand, split)
    if len(indices) != 1 or not masks:
        return same_everywhere(op)
    if not split and not masks[0].shard:
        return same_everywhere(op)
    return _put_number(op, operand, masks[0])


def _has_index(indices: Sequence[Operand | None], dim: int) -> bool:
    return dim < len(indices) and indices[dim] is not None


def _put_number(op: OpContext, operand: Operand, mask: Operand) -> Placement:
    values = op.operand("values")
    ndim = mask.ndim
    covered = (operand.local[:ndim], operand.full[:ndim])
    one_number = not values.ndim and all_replicated([values])
    covers = (mask.local, mask.full) == covered
    if op.value("accumulate") or not one_number or not covers:
        raise Refusal(f"it writes {values} where a mask says so; that is known of a single number")
    ones = (1,) * (operand.ndim - ndim)
    local = mask.local + ones
    mask = replace(mask, local=local, full=mask.full + ones)
    return elementwise(op, [operand, mask], operand.ndim)


def _put_beside(op: OpContext, operand: Operand, split: Shard) -> Placement:
    """Entries written along other dims than the split one."""
    values = op.operand("values")
    indices: Sequence[Operand | None] = op.args["indices"]
    where = [index for index in indices if index is not None]
    if not all_replicated(where):
        raise Refusal(f"it writes to entries of {operand} at {where[0]}")
    op.value("accumulate")
    taken = _index(op)
    assert isinstance(taken, Shard)
    of_indices = max(index.ndim for index in where)
    ndim = operand.ndim - len(where) + of_indices
    dim = taken.dim - (ndim - values.ndim)  # the last dims of values are aligned
    alike = values.varying == [dim] and values.placement == split.at(dim)
    lies_alike = alike and dim >= 0
    if not lies_alike and not all_replicated([values]):
        raise Refusal(f"it writes {values} to entries of {operand}")
    return split
