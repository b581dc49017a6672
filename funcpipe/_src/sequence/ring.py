"""Ring attention: a rank keeps its queries, while keys and values travel around the ring.

Terms. A ring of R ranks takes R *steps*. At step ``s`` a rank has the *block* of its *source*, the
rank ``s`` places before
it: that rank's keys and values, padded to the longest block. What of it is attended to are *tiles*
(`blockwise.py`), one by one; a *piece* is a half where a zigzag balances a causal mask, else all.
Ranks with equal lengths share one graph: what depends on the rank follows from its place on the
ring, an op of the graph.

=====================  =====================================================================================
attention              tiles of a step
=====================  =====================================================================================
to all, even           all against all
causal, even, zigzag   own block: each half against itself, causally, and the second against the first half;
                       other blocks: the second against the first half, and either first against
                       first (the source is earlier) or second against second
causal, even           own block: all, causally; other blocks: all, which counts if the source is earlier
any other              all against all, masked by positions in the whole sequence
=====================  =====================================================================================

Backward is a second trip (Liu et al. 2023, "Ring Attention with Blockwise Transformers", appendix
B). The gradients of a
block travel with it, and one place further: home. Sums are wide, so that errors do not grow with
    the ring.

In: what one ring rank has of queries, keys and values. Out: its queries' attention over the whole
sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcpipe._src.collectives import axis_index, ppermute
from funcpipe._src.functional.dispatch import Spec
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence.blockwise import Attended, Choice, Kernel, Tile, kernel, pick, shares
from funcpipe.errors import AxisError, TraceError

Tensor = torch.Tensor
Tiles = Callable[[int], Sequence[Tile]]  # of a step
Sums = dict[int, Tensor]  # of every piece


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    part_q: SequenceLayout,
    part_k: SequenceLayout,
    r: int,
) -> Tensor:
    """Attention over a sequence that is split over a ring, as one rank of the ring computes it.

    Ring attention (Liu et al. 2023), balanced under a causal mask if the parts are a zigzag (Zhu
    2024, ring-flash-attention). R - 1 messages forward, each keys and values of a rank; backward R
    - 1, and R of gradients.

    Args:
        q: ``(batch, heads, positions, head dim)``: the queries of this ring rank, one piece after
            another.
        k, v: its keys and values, of the dtype of ``q``; their number of heads divides that of
            ``q``; ``v`` may have another head dim.
        spec: the attention. ``bias`` has 1 or all local heads, 1 or all local queries, and 1 or all
            keys, in the order of the whole sequence. ``cu_seqlens`` counts positions of the whole
            sequence.
        part_q, part_k: how the positions of queries, and of keys and values, are split; over the
            same ring.
        r: a ring rank with the lengths of this one; it is asked for nothing else.

    Returns:
        ``(batch, heads, positions, head dim of v)``, of the dtype of ``q``. Zeros for a query that
        sees no key.

    Raises:
        AxisError: the parts are of different rings, or an operand has not the lengths that they
        say.
        TraceError: at the gradient, if it is to be differentiated again.

    >>> from funcpipe._src.collectives import bind_mesh, bind_rank
    >>> from funcpipe._src.comm.simulated import run_ranks
    >>> from funcpipe._src.core.mesh import Mesh
    >>> part, v = SequenceLayout(4, ("seq",), (), 4, 1), torch.tensor([2.0, 4.0, 6.0, 8.0])
    >>> def body(comm):
    ...     own = v[comm.rank].view(1, 1, 1, 1)
    ...     with bind_rank(comm), bind_mesh(comm.mesh, ("seq",)):
    ...         return ring_attention(0 * own, own, own, Spec(causal=True), part, part, comm.rank).view(1)
    >>> torch.cat(run_ranks(Mesh(seq=4), body)).round(decimals=4)  # equal scores: the mean of the values so far
    tensor([2., 3., 4., 5.])
    """
    _check(q, k, spec, part_q, part_k, r)
    scale = 1 / math.sqrt(q.shape[-1]) if spec.scale is None else spec.scale
    masked = (
        spec.bias is not None
        or spec.cu_seqlens is not None
        or not _even(spec.causal, part_q, part_k)
    )
    call = _Call(part_q, part_k, scale, spec.causal, masked, kernel(q, v, not masked))
    with torch.autocast(
        q.device.type, enabled=False
    ):  # it would narrow the products of wide operands
        out, _ = _Ring.apply(q, k, v, spec.bias, spec.cu_seqlens, call)
    return out


def _even(causal: bool, part_q: SequenceLayout, part_k: SequenceLayout) -> bool:
    """Whether what is seen of a block does not depend on positions, but on the order of ranks at
    most."""
    if causal:
        return part_q == part_k and part_k.size % (part_k.ring * (2 if part_k.zigzag else 1)) == 0
    return len({part_k.ring_length(s) for s in range(part_k.ring)}) == 1


def _check(
    q: Tensor, k: Tensor, spec: Spec, part_q: SequenceLayout, part_k: SequenceLayout, r: int
) -> None:
    if (part_q.ring_axes, part_q.ring) != (part_k.ring_axes, part_k.ring):
        raise AxisError(
            f"ring_attention: queries are split over a ring of {part_q.ring} on "
            f"{part_q.ring_axes}, keys over one of {part_k.ring} on {part_k.ring_axes}: keys meet "
            "all queries on one ring only. Split both over the same axes"
        )
    lengths = [
        ("q", 2, q.shape[2], part_q.ring_length(r)),
        ("k", 2, k.shape[2], part_k.ring_length(r)),
    ]
    if spec.bias is not None:
        lengths += [
            ("the bias", 2, spec.bias.shape[2], part_q.ring_length(r)),
            ("the bias", 3, spec.bias.shape[3], part_k.size),
        ]
    for name, dim, found, wanted in lengths:
        if found != wanted and not (name == "the bias" and found == 1):
            raise AxisError(
                f"ring_attention: dim {dim} of {name} has {found} positions, not {wanted}, on ring "
                f"rank {r} of {part_q.ring} on {part_q.ring_axes}: give it the queries and keys of "
                "the ring rank (heads are exchanged before), and a bias with 1 or these queries "
                "and 1 or all keys"
            )


@dataclass(frozen=True)
class _Call:
    """What stays the same on a trip; ``masked``: what is seen follows from positions."""

    part_q: SequenceLayout
    part_k: SequenceLayout
    scale: float
    causal: bool
    masked: bool
    kernel: Kernel

    @property
    def ring(self) -> int:
        return self.part_k.ring

    @property
    def halves(self) -> bool:
        return self.causal and self.part_k.zigzag and not self.masked

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The pieces of a tensor along its positions."""
        return x.chunk(2, 2) if self.halves else [x]

    def passed_on(self, x: Tensor) -> Tensor:
        """Send a message to the next rank; what comes from the one before."""
        return ppermute(
            x, self.part_k.ring_axes, [(s, (s + 1) % self.ring) for s in range(self.ring)]
        )


# ---- the two trips


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        tiles, queries = _tiles(q, bias, cu_seqlens, call), call.split(q)
        found: dict[int, Attended] = {}
        for s, block in _blocks(k, v, call):
            for t in tiles(s):
                keys, values = (pick(x, t.cols) for x in block)
                out, lse = call.kernel.forward(pick(queries, t.rows), keys, values, t, call.scale)
                for i, share in shares(lse, t.rows, -math.inf):
                    found[i] = Attended(out, share).merged(found.get(i))
        out, lse = (_joined({i: x[which] for i, x in found.items()}) for which in (0, 1))
        return out.to(q.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> Any:
        if torch.is_grad_enabled():
            raise TraceError(
                "ring_attention: the gradient of an attention around a ring is differentiated once "
                "more (create_graph=True, or torch.func inside the loss), but it has no "
                "derivative; split the sequence by seq_all_to_all instead, whose attention is "
                "torch's own"
            )
        with torch.autocast(dout.device.type, enabled=False):
            return _backward(ctx.call, dout, *ctx.saved_tensors)


def _backward(
    call: _Call,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of the operands, given that of the result."""
    tiles = _tiles(q, bias, cu_seqlens, call)
    own = [call.split(x) for x in (q, dout, out, lse)]
    dq: Sums = {}
    dbias: list[tuple[Tensor, Tensor]] = []
    travelling: list[Tensor] = []  # the gradients of the block, once there are some
    for s, block in _blocks(k, v, call):
        arriving = [call.passed_on(x) for x in travelling]
        dk: Sums = {}
        dv: Sums = {}
        for t in tiles(s):
            rows, cols = (pick(x, t.rows) for x in own), (pick(x, t.cols) for x in block)
            g = call.kernel.backward(*rows, *cols, t, call.scale)
            for sums, x, choice in ((dq, g.q, t.rows), (dk, g.k, t.cols), (dv, g.v, t.cols)):
                _add(sums, x, choice)
            if bias is not None and g.scores is not None and t.positions is not None:
                dbias.append((_over(g.scores, bias.shape), t.positions))
        here = _packed([_joined(dk), _joined(dv)])
        travelling = [x + here for x in arriving] or [here]
    (home,) = (call.passed_on(x) if call.ring > 1 else x for x in travelling)
    dkv = zip(_unpacked(home, k, v, call), (k, v), strict=True)
    return (
        _joined(dq).to(q.dtype),
        *(dx[:, :, : x.shape[2]].to(x.dtype) for dx, x in dkv),
        None if bias is None or not dbias else _bias_gradient(bias, dbias),
        None,
        None,
    )


def _blocks(k: Tensor, v: Tensor, call: _Call) -> Iterator[tuple[int, list[Sequence[Tensor]]]]:
    """Every step, with the pieces of the keys, and of the values, of its source."""
    missing = _longest(call.part_k) - k.shape[2]
    block = _packed(
        [torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (k, v)] if missing else (k, v)
    )
    for s in range(call.ring):
        # It is sent before it is used here, so that it travels while this step computes.
        coming = call.passed_on(block) if s + 1 < call.ring else block
        yield s, [call.split(x) for x in _unpacked(block, k, v, call)]
        block = coming


def _longest(part: SequenceLayout) -> int:
    return max(part.ring_length(s) for s in range(part.ring))


def _packed(xs: Iterable[Tensor]) -> Tensor:
    """One message."""
    return torch.cat([x.flatten() for x in xs])


def _unpacked(block: Tensor, k: Tensor, v: Tensor, call: _Call) -> list[Tensor]:
    """Keys and values, or their gradients, padded; ``k`` and ``v`` are the own."""
    shapes = [(*x.shape[:2], _longest(call.part_k), x.shape[3]) for x in (k, v)]
    flat = block.split([math.prod(shape) for shape in shapes])
    return [x.view(shape) for x, shape in zip(flat, shapes, strict=True)]


def _add(sums: Sums, x: Tensor, choice: Choice) -> None:
    for i, share in shares(x, choice, 0):
        sums[i] = sums[i] + share if i in sums else share


def _joined(pieces: Sums) -> Tensor:
    return torch.cat([pieces[i] for i in sorted(pieces)], 2)


def _over(dscores: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of what a tile sees of a bias: summed over the dims along which the bias is the
    same."""
    return dscores.sum_to_size(*shape[:3], 1 if shape[3] == 1 else dscores.shape[3])


def _bias_gradient(bias: Tensor, tiles: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of a bias from its gradients in all tiles, each with the positions of its
    columns."""
    dscores, positions = zip(*tiles, strict=True)
    if bias.shape[3] == 1:
        return torch.stack(dscores).sum(0).to(bias.dtype)
    zeros = torch.zeros(bias.shape, dtype=dscores[0].dtype, device=bias.device)
    return zeros.index_add(3, torch.cat(positions).clamp(min=0), torch.cat(dscores, 3)).to(
        bias.dtype
    )


# ---- what is seen


def _tiles(q: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, call: _Call) -> Tiles:
    index = axis_index(call.part_k.ring_axes, q.device)
    if call.masked:
        return _masked_tiles(q, bias, cu_seqlens, call, index)
    first, second = ((0, None),), ((1, None),)

    def tiles(s: int) -> Sequence[Tile]:
        if not call.causal:
            return [Tile()]
        if s == 0 and call.halves:
            return [
                Tile(first, first, causal=True),
                Tile(second, first),
                Tile(second, second, causal=True),
            ]
        if s == 0:
            return [Tile(causal=True)]
        earlier = (index - s) % call.ring < index
        if not call.halves:
            return [Tile(((0, earlier),), ((0, earlier),))]
        either = ((0, earlier), (1, ~earlier))
        return [Tile(second, first), Tile(either, either)]

    return tiles


def _masked_tiles(
    q: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, call: _Call, index: Tensor
) -> Tiles:
    own = _row(_positions(call.part_q, q.device), index)[: q.shape[2]]
    positions = _positions(call.part_k, q.device)

    def tiles(s: int) -> Sequence[Tile]:
        keys = _row(positions, (index - s) % call.ring)
        seen = (keys >= 0).view(1, 1, 1, -1)
        if call.causal:
            seen = seen & (keys <= own.unsqueeze(1))
        if cu_seqlens is not None:
            seen = seen & _same_document(cu_seqlens, own, keys)
        if bias is None:
            return [Tile(seen=seen)]
        part = bias if bias.shape[3] == 1 else bias.index_select(3, keys.clamp(min=0))
        if bias.dtype == torch.bool:
            return [Tile(seen=seen & part)]
        return [Tile(seen=seen, bias=part, positions=keys)]

    return tiles


def _positions(part: SequenceLayout, device: torch.device) -> Tensor:
    """The positions of all ring ranks: int64 ``(ring, longest)``, -1 behind those that a rank
    has."""
    rows = []
    for s in range(part.ring):
        row = torch.cat([torch.arange(*piece, device=device) for piece in part.ring_ranges(s)])
        rows.append(
            torch.nn.functional.pad(row, (0, _longest(part) - part.ring_length(s)), value=-1)
        )
    return torch.stack(rows)


def _row(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.view(1)).squeeze(
        0
    )  # table[index] would ask for the value of the index


def _same_document(cu_seqlens: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Whether positions are of one document, ``(1 or batch, 1, rows, columns)``; not if they are of
    none."""
    starts = cu_seqlens.long().reshape(-1, cu_seqlens.shape[-1]).contiguous()
    row, col = (
        torch.searchsorted(starts, x.expand(len(starts), -1).contiguous(), right=True)
        for x in (rows, cols)
    )
    row = row.masked_fill(row == starts.shape[1], 0).unsqueeze(
        -1
    )  # 0: of none, in front of all or behind them
    return ((row == col.unsqueeze(1)) & (row > 0)).unsqueeze(1)
