"""Slices of the sequence for heads, and back: two exchanges around an attention (Jacobs et al.
2023, "DeepSpeed-Ulysses").

Terms. A rank holds all heads of its positions. *Dealing* gives every rank of the head axes its
heads of all their positions: ``ceil(heads / ranks)`` query heads each, and the heads of keys and
values that those use; where there are fewer of these than ranks, several ranks get the same one.
Where heads run out, the last is repeated, and what comes of it is dropped. *Rows* are how tensors
travel: ``(ranks, batch, positions, columns)``, a row being what one position has in some heads. All
ranks send rows for equally many positions, those of the longest slice.

One graph serves all ranks. Which heads go to whom is the same for every sender; where a rank has to
know its own place, it asks `axis_index`.

In: queries, keys and values of one rank, in hook layout, and how they lie. Out: what that rank's
queries attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from funcpipe._src.collectives import all_gather, all_to_all, axis_index
from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional.attention import narrowed, whole
from funcpipe._src.functional.dispatch import Held, Spec
from funcpipe._src.functional.positions import member_positions
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence.ring import ring_attention
from funcpipe.errors import TraceError


def split_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, held: Held, member: int
) -> torch.Tensor:
    """What a rank does for an attention: an exchange, attention over all positions (or around a
    ring), an exchange.

    Each exchange is one all-to-all, and one more backward. With N positions, P ranks and heads that
    P divides, a rank holds and sends 1/P of N rows of all query heads twice (queries, results), and
    of max(P, heads of keys) heads twice.

    Args:
        q, k, v: of one rank, in hook layout, with the positions that ``held`` says.
        held: how they and the bias lie on ranks.
        member: any one of the ranks that run the same graph; it is asked for lengths only.

    Returns:
        ``(batch, query heads, positions of q, head dim of v)``, of the rank's queries.

    Raises:
        TraceError: a bias that is split along keys, where keys are not.

    >>> from funcpipe._src.collectives import bind_mesh, bind_rank
    >>> from funcpipe._src.comm.simulated import run_ranks
    >>> from funcpipe._src.core.mesh import Mesh
    >>> part, v = SequenceLayout(4, (), ("seq",), 1, 2), torch.tensor([2.0, 4.0, 6.0, 8.0]).view(1, 1, 4, 1).expand(-1, 2, -1, -1)
    >>> def body(comm):
    ...     own = v.narrow(2, 2 * comm.rank, 2)
    ...     with bind_rank(comm), bind_mesh(comm.mesh, ("seq",)):
    ...         return split_attention(0 * own, own, own, Spec(causal=True), Held(part, part), comm.rank)[0, 0, :, 0]
    >>> torch.cat(run_ranks(Mesh(seq=2), body))  # equal scores: the mean of the values so far
    tensor([2., 3., 4., 5.])
    """
    if held.q is None:
        return whole(q, k, v, spec)
    if held.k is None:
        return _against_all_keys(q, k, v, spec, held.bias_query, held.bias_key, held.q, member)
    q, k, v = narrowed(q), narrowed(k), narrowed(v)  # before they travel
    deal, ring = _Deal(q.shape[1], k.shape[1], held.q.heads), member // held.q.heads
    if spec.bias is not None:
        bias = _all_keys(spec.bias, held.k) if held.bias_key else spec.bias
        spec = replace(spec, bias=_own_bias(bias, held.bias_query, held.q, deal, ring))
    if deal.ranks > 1:
        q, k, v = _to_heads(q, k, v, held.q, held.k, deal, ring)
    out = (
        whole(q, k, v, spec)
        if held.q.ring == 1
        else ring_attention(q, k, v, spec, held.q, held.k, ring)
    )
    return out if deal.ranks == 1 else _to_positions(out, held.q, deal, member)


def _against_all_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: Spec,
    bias_query: bool,
    bias_key: bool,
    part: SequenceLayout,
    member: int,
) -> torch.Tensor:
    """Every rank holds all keys and values: nothing to exchange."""
    if bias_key:
        raise TraceError(
            "attention: the bias is split along its keys, but every rank holds all keys and "
            "values; let every rank have the whole bias, too (dims=None for its leaf of the batch)"
        )
    rows, bias = member_positions(part, member, q.device), spec.bias
    if bias is not None and bias.shape[2] > 1 and not bias_query:
        bias = bias.index_select(2, rows)
    return whole(q, k, v, replace(spec, bias=bias), rows)


# ---- which heads a rank gets


@dataclass(frozen=True)
class _Deal:
    """How heads are dealt: how many query heads, and heads of keys and values, there are, to how
    many ranks.

    Heads are counted on beyond the last, up to a multiple of the ranks.
    """

    queries: int
    keys: int
    ranks: int

    @property
    def each(self) -> int:
        """How many query heads a rank gets."""
        return -(-self.queries // self.ranks)

    @property
    def starts(self) -> list[int]:
        """The first query head of every rank."""
        return [p * self.each for p in range(self.ranks)]

    @property
    def group(self) -> int:
        """How many query heads share a head of keys and values."""
        return self.queries // self.keys

    @property
    def key_starts(self) -> list[int]:
        """The first head of keys and values of every rank."""
        return [s // self.group for s in self.starts]

    @property
    def keys_each(self) -> int:
        """How many heads of keys and values a rank gets: as many as the rank that needs most."""
        return max((s + self.each - 1) // self.group - s // self.group + 1 for s in self.starts)

    @property
    def even(self) -> bool:
        """Whether on every rank equally many neighbouring query heads share a head, so that
        attention knows which."""
        n = self.each // self.keys_each
        return all(
            (s + j) // self.group - s // self.group == j // n
            for s in self.starts
            for j in range(self.each)
        )

    def own(self, part: SequenceLayout, device: torch.device) -> torch.Tensor:
        """The numbers of the query heads of the rank that runs this: int64, ``(each,)``."""
        return axis_index(part.head_axes, device) * self.each + torch.arange(
            self.each, device=device
        )


def _dealt(x: torch.Tensor, starts: Sequence[int], each: int) -> torch.Tensor:
    """Rows for every rank: of ``(batch, heads, positions, dim)`` so many heads from its start
    on."""
    missing = starts[-1] + each - x.shape[1]
    if missing > 0:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1)], 1)
    if x.shape[1] != len(starts) * each:  # ranks share heads
        x = torch.cat([x[:, s : s + each] for s in starts], 1)
    return x.transpose(1, 2).unflatten(2, (len(starts), each)).movedim(2, 0).flatten(3)


def _heads(x: torch.Tensor, each: int) -> torch.Tensor:
    """From ``(batch, positions, columns)`` to hook layout."""
    return x.unflatten(2, (each, x.shape[2] // each)).transpose(1, 2)


# ---- the two exchanges


def _to_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_part: SequenceLayout,
    k_part: SequenceLayout,
    deal: _Deal,
    ring: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From a rank's positions of all heads to all positions of its heads."""
    rows = [
        _dealt(q, deal.starts, deal.each),
        *(_dealt(x, deal.key_starts, deal.keys_each) for x in (k, v)),
    ]
    widths = [x.shape[3] for x in rows]
    n, m = q_part.ring_length(ring), k_part.ring_length(ring)
    if (
        q_part == k_part
    ):  # queries, keys and values of a position side by side: they come out as kernels take them
        (own,) = _exchange([torch.cat(rows, 3)], [n], q_part.head_axes)
        columns = own.split(widths, 2)
    else:
        own, other = _exchange([rows[0], torch.cat(rows[1:], 3)], [n, m], q_part.head_axes)
        columns = (own, *other.split(widths[1:], 2))
    q, k, v = (
        _heads(x, each)
        for x, each in zip(columns, (deal.each, deal.keys_each, deal.keys_each), strict=True)
    )
    if not deal.even:  # a head of keys and values for every query head
        heads = deal.own(q_part, q.device)
        heads = heads // deal.group - heads[:1] // deal.group
        k, v = k.index_select(1, heads), v.index_select(1, heads)
    return q, k, v


def _to_positions(
    out: torch.Tensor, part: SequenceLayout, deal: _Deal, member: int
) -> torch.Tensor:
    """From all positions of a rank's heads to its positions of all heads."""
    rows = _all_to_all([_cut(out.transpose(1, 2).flatten(2), deal.ranks)], part.head_axes)[0]
    rows = rows[:, :, : part.length(member)].permute(1, 2, 0, 3).flatten(2)
    return _heads(rows, deal.ranks * deal.each)[:, : deal.queries]


def _exchange(
    rows: Sequence[torch.Tensor], lengths: Sequence[int], axes: Axes
) -> list[torch.Tensor]:
    """Rows to all ranks; of what comes, so many positions as there are, ``(batch, positions,
    columns)``."""
    padded = [_padded(x, -(-n // x.shape[0])) for x, n in zip(rows, lengths, strict=True)]
    return [_joined(x, n) for x, n in zip(_all_to_all(padded, axes), lengths, strict=True)]


def _all_to_all(rows: Sequence[torch.Tensor], axes: Axes) -> list[torch.Tensor]:
    """One all-to-all of several rows."""
    if len(rows) == 1:
        return [all_to_all(rows[0], axes, 0, 0, tiled=False)]
    flat = [x.flatten(1) for x in rows]
    got = all_to_all(torch.cat(flat, 1), axes, 0, 0, tiled=False).split(
        [x.shape[1] for x in flat], 1
    )
    return [x.unflatten(1, y.shape[1:]) for x, y in zip(got, rows, strict=True)]


def _padded(rows: torch.Tensor, n: int) -> torch.Tensor:
    """Rows for ``n`` positions."""
    missing = n - rows.shape[2]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _joined(rows: torch.Tensor, n: int) -> torch.Tensor:
    """``(batch, n, columns)`` from the slices of all ranks: the first ``n % ranks`` are full, the
    others one short."""
    ranks, full = rows.shape[0], n % rows.shape[0]
    if full == 0:
        return rows.movedim(0, 1).flatten(1, 2)
    first, rest = rows.split([full, ranks - full])
    return torch.cat([x.movedim(0, 1).flatten(1, 2) for x in (first, rest[:, :, :-1])], 1)


def _cut(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The slices of all ranks; the inverse of `_joined`."""
    short, full = divmod(x.shape[1], ranks)
    if full == 0:
        return x.unflatten(1, (ranks, short)).movedim(1, 0)
    first, rest = x.split([full * (short + 1), (ranks - full) * short], 1)
    first, rest = first.unflatten(1, (full, short + 1)), rest.unflatten(1, (ranks - full, short))
    return torch.cat([first, _padded(rest, short + 1)], 1).movedim(1, 0)


# ---- the bias


def _own_bias(
    bias: torch.Tensor, split: bool, part: SequenceLayout, deal: _Deal, ring: int
) -> torch.Tensor:
    """The bias of a rank's heads and of the queries of its ring rank; dims of size 1 stay so.

    Args:
        split: whether its queries are.
    """
    if split and deal.ranks > 1:
        return _exchanged(bias, part, deal, ring)
    if not split and part.ring > 1 and bias.shape[2] > 1:
        bias = bias.index_select(
            2, member_positions(replace(part, head_axes=(), heads=1), ring, bias.device)
        )
    if deal.ranks > 1 and bias.shape[1] > 1:
        bias = bias.index_select(1, deal.own(part, bias.device).clamp(max=deal.queries - 1))
    return bias


def _exchanged(bias: torch.Tensor, part: SequenceLayout, deal: _Deal, ring: int) -> torch.Tensor:
    """A bias that is split along queries, along heads instead; all ranks get all of one that has no
    heads."""
    n = part.ring_length(ring)
    if bias.shape[1] > 1:
        (rows,) = _exchange([_dealt(bias, deal.starts, deal.each)], [n], part.head_axes)
        return _heads(rows, deal.each)
    rows = all_gather(_padded(bias, -(-n // deal.ranks))[:, 0], part.head_axes, tiled=False)
    return _joined(rows, n).unsqueeze(1)


def _all_keys(bias: torch.Tensor, part: SequenceLayout) -> torch.Tensor:
    """A bias that is split along keys, over all keys, in the order of the whole sequence."""
    missing = max(part.length(m) for m in range(part.members)) - bias.shape[3]
    got = all_gather(F.pad(bias, (0, missing)) if missing else bias, part.axes, tiled=False)
    pieces: list[tuple[int, torch.Tensor]] = []
    for m, x in enumerate(got.unbind(0)):
        lengths = [stop - start for start, stop in part.ranges(m)]
        held = x.split([*lengths, x.shape[3] - sum(lengths)], 3)
        pieces += zip((start for start, _ in part.ranges(m)), held, strict=False)
    return (
        torch.cat([x for _, x in sorted(pieces, key=lambda piece: piece[0])], 3) if pieces else bias
    )
