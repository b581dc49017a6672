"""The two all-to-all exchanges around an attention: positions for heads, and back.

`HeadAssignment` says which heads go to which rank.

A *message* is what a rank sends to all others: ``(ranks, batch, positions, columns)``, where the
columns of a position are its elements in some heads. All ranks send equally many positions, those
of the longest local sequence; the surplus is cut off on arrival.

In: a rank's positions of all heads.
Out: all positions of the rank's heads; and the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.collectives import all_to_all, axis_index
from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional.sequence_layout import SequenceLayout


@dataclass(frozen=True)
class HeadAssignment:
    """How many query heads, and heads of keys and values, are split over how many ranks.

    All ranks get equally many query heads, and the key heads that those use. Where there are fewer
    key heads than ranks, several ranks get the same one. Where heads run out, the last one is
    repeated, and what comes of the repeats is dropped.

    >>> heads = HeadAssignment(query_heads=6, key_heads=2, ranks=4)
    >>> heads.queries_per_rank, heads.query_starts
    (2, [0, 2, 4, 6])
    >>> heads.keys_per_rank, heads.key_starts
    (2, [0, 0, 1, 2])
    """

    query_heads: int
    key_heads: int
    ranks: int

    @property
    def queries_per_rank(self) -> int:
        return -(-self.query_heads // self.ranks)

    @property
    def query_starts(self) -> list[int]:
        """The first query head of every rank."""
        return [rank * self.queries_per_rank for rank in range(self.ranks)]

    @property
    def queries_per_key(self) -> int:
        """How many query heads share a key head."""
        return self.query_heads // self.key_heads

    @property
    def key_starts(self) -> list[int]:
        """The first key head of every rank."""
        return [start // self.queries_per_key for start in self.query_starts]

    @property
    def keys_per_rank(self) -> int:
        """How many key heads a rank gets: as many as the rank that needs most."""
        needed = []
        for first_query in self.query_starts:
            last_query = first_query + self.queries_per_rank - 1
            first_key = first_query // self.queries_per_key
            last_key = last_query // self.queries_per_key
            needed.append(last_key - first_key + 1)
        return max(needed)

    @property
    def evenly_grouped(self) -> bool:
        """Whether on every rank equally many neighbouring query heads share a key head.

        An attention with fewer key heads than query heads takes this for granted.
        """
        expected_group = self.queries_per_rank // self.keys_per_rank
        for first_query in self.query_starts:
            first_key = first_query // self.queries_per_key
            for number in range(self.queries_per_rank):
                key = (first_query + number) // self.queries_per_key
                if key - first_key != number // expected_group:
                    return False
        return True

    def own_query_heads(self, layout: SequenceLayout, device: torch.device) -> Tensor:
        """The query heads of the rank that runs this: int64, ``(queries_per_rank,)``."""
        rank = axis_index(layout.head_axes, device)
        number = torch.arange(self.queries_per_rank, device=device)
        return rank * self.queries_per_rank + number


# ---- the two exchanges


def to_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_layout: SequenceLayout,
    key_layout: SequenceLayout,
    heads: HeadAssignment,
    ring_rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """From a rank's positions of all heads to all positions of its heads."""
    queries = message_of_heads(query, heads.query_starts, heads.queries_per_rank)
    keys = message_of_heads(key, heads.key_starts, heads.keys_per_rank)
    values = message_of_heads(value, heads.key_starts, heads.keys_per_rank)
    query_positions = query_layout.ring_length(ring_rank)
    key_positions = key_layout.ring_length(ring_rank)
    axes = query_layout.head_axes
    key_widths = [keys.shape[3], values.shape[3]]
    if query_layout == key_layout:
        # Side by side they travel once, and arrive in the strides that kernels take.
        together = torch.cat([queries, keys, values], 3)
        (arrived,) = exchange([together], [query_positions], axes)
        widths = [queries.shape[3], *key_widths]
        query, key, value = arrived.split(widths, 2)
    else:
        keys_values = torch.cat([keys, values], 3)
        messages = [queries, keys_values]
        positions = [query_positions, key_positions]
        query, key_value = exchange(messages, positions, axes)
        key, value = key_value.split(key_widths, 2)
    query = heads_apart(query, heads.queries_per_rank)
    key = heads_apart(key, heads.keys_per_rank)
    value = heads_apart(value, heads.keys_per_rank)
    if heads.evenly_grouped:
        return query, key, value
    # Otherwise every query head gets a key head of its own.
    query_heads = heads.own_query_heads(query_layout, query.device)
    key_heads = query_heads // heads.queries_per_key
    local = key_heads - key_heads[:1]
    key = key.index_select(1, local)
    value = value.index_select(1, local)
    return query, key, value


def to_positions(
    out: Tensor,
    layout: SequenceLayout,
    heads: HeadAssignment,
    sequence_rank: int,
) -> Tensor:
    """From all positions of a rank's heads to its positions of all heads."""
    columns = out.transpose(1, 2).flatten(2)
    message = _cut_for_ranks(columns, heads.ranks)
    arrived = _swap(message, layout.head_axes)
    own = arrived[:, :, : layout.length(sequence_rank)]
    by_position = own.permute(1, 2, 0, 3)
    columns = by_position.flatten(2)
    all_heads = heads_apart(columns, heads.ranks * heads.queries_per_rank)
    return all_heads[:, : heads.query_heads]


# ---- messages


def message_of_heads(
    tensor: Tensor,
    starts: Sequence[int],
    heads_each: int,
) -> Tensor:
    """A message from ``(batch, heads, positions, dim)``, with equally many heads for each rank.

    Those of rank ``r`` begin with head ``starts[r]``. Beyond the last head, that head is repeated.
    """
    ranks = len(starts)
    missing = starts[-1] + heads_each - tensor.shape[1]
    if missing > 0:
        last = tensor[:, -1:]
        repeated = last.expand(-1, missing, -1, -1)
        tensor = torch.cat([tensor, repeated], 1)
    if tensor.shape[1] != ranks * heads_each:  # ranks share heads
        of_ranks = [tensor[:, start : start + heads_each] for start in starts]
        tensor = torch.cat(of_ranks, 1)
    by_position = tensor.transpose(1, 2)
    by_rank = by_position.unflatten(2, (ranks, heads_each))
    return by_rank.movedim(2, 0).flatten(3)


def heads_apart(columns: Tensor, heads: int) -> Tensor:
    """From ``(batch, positions, columns)`` to ``(batch, heads, positions, head dim)``."""
    head_dim = columns.shape[2] // heads
    apart = columns.unflatten(2, (heads, head_dim))
    return apart.transpose(1, 2)


def exchange(
    messages: Sequence[Tensor],
    positions: Sequence[int],
    axes: Axes,
) -> list[Tensor]:
    """Send messages to all ranks, and join what arrives.

    Args:
        messages: of one or several tensors.
        positions: for each of them, how many positions all ranks have together.
        axes: those of the ranks.

    Returns:
        for each message ``(batch, positions, columns)``.
    """
    padded = []
    for message, count in zip(messages, positions, strict=True):
        ranks = message.shape[0]
        longest = -(-count // ranks)
        padded.append(pad_positions(message, longest))
    arrived = _all_to_all(padded, axes)
    return list(map(join_ranks, arrived, positions))


def _all_to_all(messages: Sequence[Tensor], axes: Axes) -> list[Tensor]:
    """One all-to-all of several messages."""
    if len(messages) == 1:
        return [_swap(messages[0], axes)]
    flat = [message.flatten(1) for message in messages]
    widths = [part.shape[1] for part in flat]
    arrived = _swap(torch.cat(flat, 1), axes)
    parts = arrived.split(widths, 1)
    shapes = [message.shape[1:] for message in messages]
    shaped = []
    for part, shape in zip(parts, shapes, strict=True):
        shaped.append(part.unflatten(1, shape))
    return shaped


def _swap(message: Tensor, axes: Axes) -> Tensor:
    """Entry ``r`` of dim 0 goes to rank ``r``; the result has the entries from all ranks."""
    return all_to_all(message, axes, 0, 0, tiled=False)


def pad_positions(message: Tensor, positions: int) -> Tensor:
    """A message with zeros up to so many positions."""
    missing = positions - message.shape[2]
    if not missing:
        return message
    return F.pad(message, (0, 0, 0, missing))


def join_ranks(message: Tensor, positions: int) -> Tensor:
    """``(batch, positions, columns)`` from the local sequences of all ranks, without their padding.

    The first ``positions % ranks`` ranks have one position more than the others.
    """
    ranks = message.shape[0]
    longer = positions % ranks
    if longer == 0:
        return _end_to_end(message)
    first, rest = message.split([longer, ranks - longer])
    without_padding = rest[:, :, :-1]
    spans = [_end_to_end(first), _end_to_end(without_padding)]
    return torch.cat(spans, 1)


def _end_to_end(message: Tensor) -> Tensor:
    return message.movedim(0, 1).flatten(1, 2)


def _cut_for_ranks(columns: Tensor, ranks: int) -> Tensor:
    """A message with the local sequence of every rank; the inverse of `join_ranks`."""
    short, longer = divmod(columns.shape[1], ranks)
    if longer == 0:
        even = columns.unflatten(1, (ranks, short))
        return even.movedim(1, 0)
    long = short + 1
    shorter = ranks - longer
    lengths = [longer * long, shorter * short]
    first, rest = columns.split(lengths, 1)
    first = first.unflatten(1, (longer, long))
    rest = rest.unflatten(1, (shorter, short))
    padded = pad_positions(rest, long)
    uneven = torch.cat([first, padded], 1)
    return uneven.movedim(1, 0)
