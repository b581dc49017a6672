"""Bags: `torch.nn.functional.embedding_bag`, which looks up the entries of every row and reduces
them to one.

It is given one flat list of entries, and where in it every bag begins; of indices with two dims
torch counts that itself.

In: a site. Out: states.
"""

from __future__ import annotations

from funcpipe._src.proof.op_context import OpContext, Operand, all_plain
from funcpipe._src.proof.placements import Refusal, Refused, Shard
from funcpipe._src.proof.row_numbers import Places, place_rule
from funcpipe._src.proof.rules_pointwise import States, rule, same_everywhere


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _bags(s: OpContext) -> States:
    indices, offsets, weights = s.x("indices"), s.x("offsets"), s.args.get("per_sample_weights")
    if all_plain(s.operands):
        return same_everywhere(s)
    s.all_values()
    if s.args.get("scale_grad_by_freq"):
        raise Refusal(
            "scale_grad_by_freq=True counts how often the rows of a part name an entry. Leave it "
            "out"
        )
    begin, entries = offsets.state, indices.state
    if (
        not all_plain([s.x("weight")])
        or type(entries) is not Shard
        or not isinstance(begin, Places)
        or not (begin.first_of or begin.own)
        or begin.of != entries
        or s.args.get("include_last_offset")
        or (isinstance(weights, Operand) and weights.state != entries)
    ):
        raise Refusal(
            f"it looks up {indices}, in bags that begin at {offsets}: pass indices with two dims, "
            "(rows, entries), and weights of the same shape, without offsets; fill short bags up "
            "with an index that padding_idx names"
        )
    return [begin.at, *[Refused("it is made for the gradient alone") for _ in s.outs[1:]]]


place_rule("_embedding_bag", "_embedding_bag_forward_only")(_bags)
