"""The bias of an attention that is split over ranks.

In: a rank's bias, as the loss function made it; 4-d, where a dim of size 1 stands for all.
Out: the bias of the rank's heads, of the queries of its ring rank, and of all keys.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.collectives import all_gather
from funcpipe._src.functional.positions import member_positions
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence.head_exchange import (
    HeadAssignment,
    exchange,
    heads_apart,
    join_ranks,
    message_of_heads,
    pad_positions,
)


def bias_of_own_heads(
    bias: Tensor,
    split: bool,
    layout: SequenceLayout,
    heads: HeadAssignment,
    ring_rank: int,
) -> Tensor:
    """The bias of a rank's heads and of the queries of its ring rank; dims of size 1 stay so.

    Args:
        split: whether a rank has the bias of its own queries only.
        layout: how queries are split.
    """
    if split and heads.ranks > 1:
        return _queries_for_heads(bias, layout, heads, ring_rank)
    if not split and layout.ring > 1 and bias.shape[2] > 1:
        ring_only = replace(layout, head_axes=(), heads=1)
        queries = member_positions(ring_only, ring_rank, bias.device)
        bias = bias.index_select(2, queries)
    if heads.ranks > 1 and bias.shape[1] > 1:
        own = heads.own_query_heads(layout, bias.device)
        bias = bias.index_select(1, own.clamp(max=heads.query_heads - 1))
    return bias


def _queries_for_heads(
    bias: Tensor,
    layout: SequenceLayout,
    heads: HeadAssignment,
    ring_rank: int,
) -> Tensor:
    """From a rank's queries of a bias to all queries of its heads.

    A bias that is the same for all heads goes to all ranks as it is.
    """
    queries = layout.ring_length(ring_rank)
    if bias.shape[1] > 1:
        message = message_of_heads(bias, heads.query_starts, heads.queries_per_rank)
        (arrived,) = exchange([message], [queries], layout.head_axes)
        return heads_apart(arrived, heads.queries_per_rank)
    longest = -(-queries // heads.ranks)
    padded = pad_positions(bias, longest)[:, 0]
    gathered = all_gather(padded, layout.head_axes, tiled=False)
    return join_ranks(gathered, queries).unsqueeze(1)


def bias_of_all_keys(bias: Tensor, layout: SequenceLayout) -> Tensor:
    """A bias that is split along keys, gathered over all keys, in the order of the sequence."""
    sequence_ranks = range(layout.members)
    longest = max(layout.length(sequence_rank) for sequence_rank in sequence_ranks)
    missing = longest - bias.shape[3]
    padded = F.pad(bias, (0, missing)) if missing else bias
    gathered = all_gather(padded, layout.axes, tiled=False)
    by_start: dict[int, Tensor] = {}
    for sequence_rank, own in enumerate(gathered.unbind(0)):
        ranges = layout.ranges(sequence_rank)
        lengths = [stop - start for start, stop in ranges]
        surplus = own.shape[3] - sum(lengths)
        *spans, _ = own.split([*lengths, surplus], 3)
        for (start, _), span in zip(ranges, spans, strict=True):
            by_start[start] = span
    if not by_start:
        return bias
    return torch.cat([by_start[start] for start in sorted(by_start)], 3)
