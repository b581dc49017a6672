"""Which tiles a rank computes at each step of a ring attention, and what of them is seen.

At step ``s`` a rank has the keys and values of its *source*, the rank ``s`` before it on the ring.

========================  =========================================================================
attention                 tiles of a step
========================  =========================================================================
to all keys, even         all queries against all keys
causal, even, zigzag      step 0: each half against itself, causally, and the second half of the
                          queries against the first half of the keys; later: the second against the
                          first, and either first against first (the source is earlier) or second
                          against second
causal, even              step 0: all, causally; later: all, which counts if the source is earlier
any other                 all against all, masked by positions in the whole sequence
========================  =========================================================================

Ranks with equal lengths share one graph. What depends on the rank follows from its place on the
ring, which is an op of the graph.

In: a ring attention.
Out: a function from a step to its tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.collectives import axis_index, ppermute
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence.blockwise import Choice, Kernel, Tile

TilesOfStep = Callable[[int], Sequence[Tile]]

FIRST: Choice = ((0, None),)
SECOND: Choice = ((1, None),)


@dataclass(frozen=True)
class RingCall:
    """A ring attention without its tensors.

    Args:
        q_layout, k_layout: how queries, and keys and values, are split.
        scale: of the scores.
        causal: whether a query sees no key behind its own place.
        masked: whether what is seen follows from positions, not from the order of ranks alone.
        kernel: what computes the tiles.
    """

    q_layout: SequenceLayout
    k_layout: SequenceLayout
    scale: float
    causal: bool
    masked: bool
    kernel: Kernel

    @property
    def ring(self) -> int:
        """How many ranks the ring has."""
        return self.k_layout.ring

    @property
    def longest(self) -> int:
        """The most keys of a rank."""
        return max(map(self.k_layout.ring_length, range(self.ring)))

    @property
    def halves(self) -> bool:
        """Whether queries, keys and values are taken by halves."""
        return self.causal and self.k_layout.zigzag and not self.masked

    def shards(self, tensor: Tensor) -> Sequence[Tensor]:
        """A tensor by halves, or all of it, along its positions."""
        if not self.halves:
            return [tensor]
        return tensor.chunk(2, 2)

    def send_on(self, message: Tensor) -> Tensor:
        """Send a message to the next rank; returns the message of the rank before."""
        pairs = [(rank, (rank + 1) % self.ring) for rank in range(self.ring)]
        return ppermute(message, self.k_layout.ring_axes, pairs)


def follows_rank_order(
    causal: bool,
    q_layout: SequenceLayout,
    k_layout: SequenceLayout,
) -> bool:
    """Whether the order of ranks alone tells which keys of another rank a query sees."""
    if causal:
        per_rank = 2 if k_layout.zigzag else 1
        even = k_layout.size % (k_layout.ring * per_rank) == 0
        return even and q_layout == k_layout
    lengths = set(map(k_layout.ring_length, range(k_layout.ring)))
    return len(lengths) == 1


def tiles_of_steps(
    q: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    call: RingCall,
) -> TilesOfStep:
    """The tiles of every step, as the table of this module has them."""
    ring_rank = axis_index(call.k_layout.ring_axes, q.device)
    if call.masked:
        return _masked_tiles(q, bias, cu_seqlens, call, ring_rank)

    def tiles(step: int) -> Sequence[Tile]:
        if not call.causal:
            return [Tile()]
        if step == 0:
            return _own_causal_tiles(call)
        source_is_earlier = (ring_rank - step) % call.ring < ring_rank
        if not call.halves:
            counts: Choice = ((0, source_is_earlier),)
            return [Tile(counts, counts)]
        either: Choice = ((0, source_is_earlier), (1, ~source_is_earlier))
        return [Tile(SECOND, FIRST), Tile(either, either)]

    return tiles


def _own_causal_tiles(call: RingCall) -> Sequence[Tile]:
    if not call.halves:
        return [Tile(causal=True)]
    return [
        Tile(FIRST, FIRST, causal=True),
        Tile(SECOND, FIRST),
        Tile(SECOND, SECOND, causal=True),
    ]


def _masked_tiles(
    q: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    call: RingCall,
    ring_rank: Tensor,
) -> TilesOfStep:
    queries_of_ranks = _positions_of_ranks(call.q_layout, q.device)
    queries = _of_rank(queries_of_ranks, ring_rank)[: q.shape[2]]
    keys_of_ranks = _positions_of_ranks(call.k_layout, q.device)

    def tiles(step: int) -> Sequence[Tile]:
        source = (ring_rank - step) % call.ring
        keys = _of_rank(keys_of_ranks, source)
        seen = (keys >= 0).view(1, 1, 1, -1)
        if call.causal:
            not_later = keys <= queries.unsqueeze(1)
            seen = seen & not_later
        if cu_seqlens is not None:
            seen = seen & _same_document(cu_seqlens, queries, keys)
        if bias is None:
            return [Tile(seen=seen)]
        bias_here = bias
        if bias.shape[3] > 1:
            indices = keys.clamp(min=0)
            bias_here = bias.index_select(3, indices)
        if bias.dtype == torch.bool:
            return [Tile(seen=seen & bias_here)]
        return [Tile(seen=seen, bias=bias_here, positions=keys)]

    return tiles


def _positions_of_ranks(layout: SequenceLayout, device: torch.device) -> Tensor:
    """The positions of all ring ranks: int64 ``(ring, longest)``, with -1 as padding."""
    lengths = list(map(layout.ring_length, range(layout.ring)))
    padded = []
    for ring_rank, length in enumerate(lengths):
        ranges = layout.ring_ranges(ring_rank)
        spans = [torch.arange(start, stop, device=device) for start, stop in ranges]
        missing = max(lengths) - length
        padded.append(F.pad(torch.cat(spans), (0, missing), value=-1))
    return torch.stack(padded)


def _of_rank(table: Tensor, rank: Tensor) -> Tensor:
    """``table[rank]``, which would copy the rank to the host."""
    row = table.index_select(0, rank.view(1))
    return row.squeeze(0)


def _same_document(cu_seqlens: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Whether two positions are of one document: bool, ``(1 or batch, 1, rows, columns)``.

    Positions outside of all documents are not.
    """
    starts = cu_seqlens.long().reshape(-1, cu_seqlens.shape[-1]).contiguous()
    row = _document_of(rows, starts)
    col = _document_of(cols, starts)
    behind_all = row == starts.shape[1]
    row = row.masked_fill(behind_all, 0).unsqueeze(-1)
    same = (row == col.unsqueeze(1)) & (row > 0)
    return same.unsqueeze(1)


def _document_of(positions: Tensor, starts: Tensor) -> Tensor:
    """The number of every position's document, from 1; 0 in front of all."""
    every_row = positions.expand(len(starts), -1)
    return torch.searchsorted(starts, every_row.contiguous(), right=True)
