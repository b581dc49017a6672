"""Positions: where in the whole sequence a rank's slice lies.

In: a tensor and the dim of its positions. Out: their numbers, from ops that name axes, so that one
graph serves all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcpipe._src.collectives import axis_index
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe.errors import TraceError


def positions(x: Tensor, dim: int = 1) -> Tensor:
    """The global positions of a tensor along a dim: what ``torch.arange(x.shape[dim])`` is on one
    device.

    Args:
        x: a tensor with positions along ``dim``, such as the token ids ``(batch, positions)``.
        dim: which dim.

    Returns:
        int64 of shape ``(x.shape[dim],)``, on the device of ``x``. Where the sequence is split
        (`seq_all_to_all`, `seq_ring`), the numbers of this rank's positions; else ``0, 1, …``.

    Raises:
        TraceError: ``x`` has no such dim.

    >>> positions(torch.zeros(2, 3, dtype=torch.int64))
    tensor([0, 1, 2])
    """
    if not -x.dim() <= dim < x.dim():
        raise TraceError(f"positions: a tensor of shape {tuple(x.shape)} has no dim {dim}")
    asked = hook.current()
    if asked is None:
        return plain(x, dim)
    return asked.positions(x, dim % x.dim())


def plain(tensor: Tensor, dim: int) -> Tensor:
    """Positions of a tensor that is whole."""
    size = tensor.shape[dim]
    return torch.arange(size, device=tensor.device)


def member_positions(
    layout: SequenceLayout,
    sequence_rank: int,
    device: torch.device,
) -> Tensor:
    """The positions of the rank that runs this, int64 ``(layout.length(sequence_rank),)``.

    The axes give the rank its positions; ``sequence_rank`` gives lengths alone, so that one graph
    serves all ranks of equal lengths.
    """
    ring = sequence_rank // layout.heads
    count = layout.length(sequence_rank)
    place = torch.arange(count, device=device)
    if layout.heads > 1:
        head = axis_index(layout.head_axes, device)
        of_ring = layout.ring_length(ring)
        place = place + _start(of_ring, layout.heads, head)
    if layout.ring == 1 and not layout.zigzag:
        return place
    index = axis_index(layout.ring_axes, device)
    if not layout.zigzag:
        return place + _start(layout.size, layout.ring, index)
    pieces = 2 * layout.ring
    start, stop = layout.ring_ranges(ring)[0]
    in_front = stop - start
    front = place + _start(layout.size, pieces, index)
    back = place - in_front
    index_from_end = pieces - 1 - index
    back = back + _start(layout.size, pieces, index_from_end)
    return torch.where(place < in_front, front, back)


def _start(size: int, pieces: int, index: Tensor) -> Tensor:
    """Where a piece begins; see `sequence_layout.py`."""
    short, longer = divmod(size, pieces)
    start = index * short
    if not longer:
        return start
    return start + index.clamp(max=longer)
