"""Attention over a split sequence: an exchange, attention over all positions, an exchange.

Jacobs et al. 2023, "DeepSpeed-Ulysses". A rank holds all heads of its positions. The first exchange
gives it all positions of its heads, or those of its ring rank; the second one goes back.

One graph serves all ranks. Which heads go to which rank is the same for every sender; where a rank
has to find its own place, the graph asks `axis_index`.

In: queries, keys and values of one rank in the layout of `functional/dispatch.py`, and how they are
split over ranks.
Out: what that rank's queries attend to.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from funcpipe._src.functional.attention import narrowed, whole
from funcpipe._src.functional.dispatch import Held, Spec
from funcpipe._src.functional.positions import member_positions
from funcpipe._src.sequence.head_exchange import HeadAssignment, to_heads, to_positions
from funcpipe._src.sequence.ring import ring_attention
from funcpipe._src.sequence.split_bias import bias_of_all_keys, bias_of_own_heads
from funcpipe.errors import TraceError


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Spec,
    layouts: Held,
    sequence_rank: int,
) -> Tensor:
    """What a rank does for an attention over a split sequence.

    Each exchange is one all-to-all, and one more in the backward pass. With N positions, P ranks
    and heads that P divides, a rank holds and sends ``N / P`` positions of all query heads twice
    (queries, results), and of ``max(P, key heads)`` heads twice (keys, values).

    Args:
        query, key, value: of one rank, with the positions that ``layouts`` gives it.
        layouts: how they and the bias are split over ranks.
        sequence_rank: any one of the ranks that run the same graph; only its lengths are used.

    Returns:
        ``(batch, query heads, positions of the query, head dim of the value)``.

    Raises:
        TraceError: the bias is split along keys, but the keys are not.

    >>> import torch
    >>> from funcpipe._src.collectives import bind_mesh, bind_rank
    >>> from funcpipe._src.comm.simulated import run_ranks
    >>> from funcpipe._src.core.mesh import Mesh
    >>> from funcpipe._src.functional.sequence_layout import SequenceLayout
    >>> layout = SequenceLayout(4, (), ("seq",), 1, 2)
    >>> values = torch.tensor([2.0, 4.0, 6.0, 8.0]).view(1, 1, 4, 1).expand(-1, 2, -1, -1)
    >>> def body(comm):
    ...     own = values.narrow(2, 2 * comm.rank, 2)
    ...     with bind_rank(comm), bind_mesh(comm.mesh, ("seq",)):
    ...         spec, layouts = Spec(causal=True), Held(layout, layout)
    ...         return split_attention(0 * own, own, own, spec, layouts, comm.rank)[0, 0, :, 0]
    >>> torch.cat(run_ranks(Mesh(seq=2), body))  # equal scores: the mean of the values so far
    tensor([2., 3., 4., 5.])
    """
    layout = layouts.queries
    if layout is None:
        return whole(query, key, value, spec)
    if layouts.keys is None:
        return _attend_to_all_keys(query, key, value, spec, layouts, sequence_rank)
    query, key, value = map(narrowed, (query, key, value))  # before they travel
    heads = HeadAssignment(query.shape[1], key.shape[1], layout.heads)
    ring_rank = sequence_rank // layout.heads
    if spec.bias is not None:
        bias = bias_of_all_keys(spec.bias, layouts.keys) if layouts.bias_key else spec.bias
        bias = bias_of_own_heads(bias, layouts.bias_query, layout, heads, ring_rank)
        spec = replace(spec, bias=bias)
    if heads.ranks > 1:
        query, key, value = to_heads(query, key, value, layout, layouts.keys, heads, ring_rank)
    if layout.ring > 1:
        out = ring_attention(query, key, value, spec, layout, layouts.keys, ring_rank)
    else:
        out = whole(query, key, value, spec)
    return to_positions(out, layout, heads, sequence_rank) if heads.ranks > 1 else out


def _attend_to_all_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: Spec,
    layouts: Held,
    sequence_rank: int,
) -> Tensor:
    """An attention for which every rank holds all keys and values: nothing is exchanged."""
    assert layouts.queries is not None
    if layouts.bias_key:
        raise TraceError(
            "attention: the bias is split along its keys, but every rank holds all keys and "
            "values; let every rank have the whole bias, too (dims=None for its leaf of the batch)"
        )
    queries = member_positions(layouts.queries, sequence_rank, query.device)
    bias = spec.bias
    if bias is not None and bias.shape[2] > 1 and not layouts.bias_query:
        bias = bias.index_select(2, queries)
    return whole(query, key, value, replace(spec, bias=bias), queries)
