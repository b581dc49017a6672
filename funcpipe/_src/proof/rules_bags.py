"""Rules of bags: `torch.nn.functional.embedding_bag`, which looks up the entries of every row and
reduces them to one.

The op is given one flat list of entries, and where in it every bag begins. Of indices with two dims
torch counts that itself.

In: op contexts. Out: placements.
"""

from __future__ import annotations

from funcpipe._src.proof.op_context import OpContext, all_replicated
from funcpipe._src.proof.placements import Refusal, Refused, Shard
from funcpipe._src.proof.rules import Placements, rule, same_everywhere
from funcpipe._src.proof.rules_row_numbers import RowNumbers

_BAGS = ("_embedding_bag", "_embedding_bag_forward_only")


@rule(*_BAGS)
@rule(*_BAGS, rows=True)
def _bags(op: OpContext) -> Placements:
    if all_replicated(op.operands):
        return same_everywhere(op)
    op.check_values()
    if op.args.get("scale_grad_by_freq"):
        raise Refusal(
            "scale_grad_by_freq=True counts how often the rows of a part name an entry. Leave it "
            "out"
        )
    begin = op.operand("offsets").placement
    if not isinstance(begin, RowNumbers) or not _whole_bags(op, begin):
        raise Refusal(
            f"it looks up {op.operand('indices')}, in bags that begin at {op.operand('offsets')}: "
            "pass indices with two dims, (rows, entries), and weights of the same shape, without "
            "offsets; fill short bags up with an index that padding_idx names"
        )
    return [begin.at, *[Refused("it is made for the gradient alone") for _ in op.outs[1:]]]


def _whole_bags(op: OpContext, begin: RowNumbers) -> bool:
    """Whether every bag has the entries of one row."""
    entries, weights = op.operand("indices").placement, op.args.get("per_sample_weights")
    if type(entries) is not Shard or begin.of != entries or op.args.get("include_last_offset"):
        return False
    if weights is not None and weights.placement != entries:
        return False
    in_order = bool(begin.first_of) or begin.own
    return in_order and all_replicated([op.operand("weight")])
