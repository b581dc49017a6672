"""Positions: where in the whole sequence a rank's slice lies.

In: a tensor and the dim of its positions. Out: their numbers, from ops that name axes, so that one
graph serves all ranks.
"""

from __future__ import annotations

import torch

from funcpipe._src.collectives import axis_index
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe.errors import TraceError


def positions(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
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
    return plain(x, dim) if asked is None else asked.positions(x, dim % x.dim())


def plain(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Positions of a tensor that is whole."""
    return torch.arange(x.shape[dim], device=x.device)


def member_positions(part: SequenceLayout, member: int, device: torch.device) -> torch.Tensor:
    """The positions of the member that runs this, int64 ``(part.length(member),)``; ``member``
    gives lengths only."""
    ring = member // part.heads
    first, *_ = (
        b - a for a, b in part.ring_ranges(ring)
    )  # how many positions the first piece of the ring rank has
    place = torch.arange(part.length(member), device=device)
    if part.heads > 1:
        place = place + _start(
            part.ring_length(ring), part.heads, axis_index(part.head_axes, device)
        )
    if part.ring == 1 and not part.zigzag:
        return place
    index = axis_index(part.ring_axes, device)
    if not part.zigzag:
        return place + _start(part.size, part.ring, index)
    front = place + _start(part.size, 2 * part.ring, index)
    back = place - first + _start(part.size, 2 * part.ring, 2 * part.ring - 1 - index)
    return torch.where(place < first, front, back)


def _start(size: int, pieces: int, index: torch.Tensor) -> torch.Tensor:
    """Where a piece begins; see `sequence_layout.py`."""
    short, longer = divmod(size, pieces)
    return index * short + (index.clamp(max=longer) if longer else 0)
