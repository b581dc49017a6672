"""Ring attention: a rank keeps its queries, while keys and values travel around the ring.

A ring of R ranks takes R steps. At each step a rank computes the tiles of its queries against the
keys and values at hand (`ring_tiles.py` says which, `blockwise.py` computes them), and sends those
keys and values on. A message is padded to the longest local sequence.

Backward is a second pass (Liu et al. 2023, "Ring Attention with Blockwise Transformers", appendix
B). The gradients of keys and values travel with them, and one place further, back to their rank.
Sums are in float32 (or float64), so that errors do not grow with the ring.

In: queries, keys and values of one ring rank.
Out: its queries' attention over the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.functional.dispatch import Spec
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence.blockwise import Attended, Choice, kernel, pick, shares
from funcpipe._src.sequence.ring_tiles import RingCall, follows_rank_order, tiles_of_steps
from funcpipe.errors import AxisError, TraceError

SumsByShard = dict[int, Tensor]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    q_layout: SequenceLayout,
    k_layout: SequenceLayout,
    ring_rank: int,
) -> Tensor:
    """Attention over a sequence that is split over a ring, as one rank of the ring computes it.

    Ring attention (Liu et al. 2023), balanced under a causal mask if the layouts are a zigzag (Zhu
    2024, ring-flash-attention). Forward it sends R - 1 messages, each with keys and values of a
    rank; backward R - 1 such messages, and R with gradients.

    Args:
        q: ``(batch, heads, positions, head dim)``: the queries of this ring rank, in the order of
            its layout.
        k, v: its keys and values, of the dtype of ``q``; their number of heads divides that of
            ``q``; ``v`` may have another head dim.
        spec: the attention. ``bias`` has 1 or all local heads, 1 or all local queries, and 1 or all
            keys, in the order of the whole sequence. ``cu_seqlens`` counts positions of the whole
            sequence.
        q_layout, k_layout: how queries, and keys and values, are split; over the same ring.
        ring_rank: a ring rank with the lengths of this one; nothing else of it is used.

    Returns:
        ``(batch, heads, positions, head dim of v)``, of the dtype of ``q``. Zeros for a query that
        sees no key.

    Raises:
        AxisError: the layouts are of different rings, or an operand has other lengths than they
            say.
        TraceError: at the gradient, if it is to be differentiated again.

    >>> from funcpipe._src.collectives import bind_mesh, bind_rank
    >>> from funcpipe._src.comm.simulated import run_ranks
    >>> from funcpipe._src.core.mesh import Mesh
    >>> layout, values = SequenceLayout(4, ("seq",), (), 4, 1), torch.tensor([2.0, 4.0, 6.0, 8.0])
    >>> def body(comm):
    ...     own = values[comm.rank].view(1, 1, 1, 1)
    ...     spec = Spec(causal=True)
    ...     with bind_rank(comm), bind_mesh(comm.mesh, ("seq",)):
    ...         return ring_attention(0 * own, own, own, spec, layout, layout, comm.rank).view(1)
    >>> out = torch.cat(run_ranks(Mesh(seq=4), body))
    >>> out.round(decimals=4)  # equal scores: the mean of the values so far
    tensor([2., 3., 4., 5.])
    """
    _check_layouts(q_layout, k_layout)
    _check_lengths(q, k, spec, q_layout, k_layout, ring_rank)
    scale = 1 / math.sqrt(q.shape[-1]) if spec.scale is None else spec.scale
    has_mask = spec.bias is not None or spec.cu_seqlens is not None
    masked = has_mask or not follows_rank_order(spec.causal, q_layout, k_layout)
    call = RingCall(q_layout, k_layout, scale, spec.causal, masked, kernel(q, v, not masked))
    # Autocast would narrow products of float32 sums.
    with torch.autocast(q.device.type, enabled=False):
        out, _ = _Ring.apply(q, k, v, spec.bias, spec.cu_seqlens, call)
    return out


def _check_layouts(q_layout: SequenceLayout, k_layout: SequenceLayout) -> None:
    q_ring = (q_layout.ring_axes, q_layout.ring)
    k_ring = (k_layout.ring_axes, k_layout.ring)
    if q_ring != k_ring:
        raise AxisError(
            f"ring_attention: queries are split over a ring of {q_layout.ring} on "
            f"{q_layout.ring_axes}, keys over one of {k_layout.ring} on {k_layout.ring_axes}: keys "
            "meet all queries on one ring only. Split both over the same axes"
        )


class _Length(NamedTuple):
    """How many positions a dim has, and how many its layout says."""

    name: str
    dim: int
    found: int
    wanted: int
    may_be_one: bool = False


def _check_lengths(
    q: Tensor,
    k: Tensor,
    spec: Spec,
    q_layout: SequenceLayout,
    k_layout: SequenceLayout,
    ring_rank: int,
) -> None:
    queries = q_layout.ring_length(ring_rank)
    lengths = [
        _Length("q", 2, q.shape[2], queries),
        _Length("k", 2, k.shape[2], k_layout.ring_length(ring_rank)),
    ]
    if spec.bias is not None:
        shape = spec.bias.shape
        lengths.append(_Length("the bias", 2, shape[2], queries, may_be_one=True))
        lengths.append(_Length("the bias", 3, shape[3], k_layout.size, may_be_one=True))
    for name, dim, found, wanted, may_be_one in lengths:
        if found == wanted or (may_be_one and found == 1):
            continue
        raise AxisError(
            f"ring_attention: dim {dim} of {name} has {found} positions, not {wanted}, on ring "
            f"rank {ring_rank} of {q_layout.ring} on {q_layout.ring_axes}: give it the queries and "
            "keys of the ring rank (heads are exchanged before), and a bias with 1 or these "
            "queries and 1 or all keys"
        )


# ---- the two passes


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        call: RingCall,
    ) -> tuple[Tensor, Tensor]:
        tiles = tiles_of_steps(q, bias, cu_seqlens, call)
        queries = call.shards(q)
        attended: dict[int, Attended] = {}
        for step, (keys, values) in _keys_and_values(k, v, call):
            for tile in tiles(step):
                tile_keys = pick(keys, tile.cols)
                tile_values = pick(values, tile.cols)
                tile_queries = pick(queries, tile.rows)
                out, lse = call.kernel.forward(
                    tile_queries, tile_keys, tile_values, tile, call.scale
                )
                for index, share in shares(lse, tile.rows, -math.inf):
                    attended[index] = Attended(out, share).merged(attended.get(index))
        out = _join({index: shard.out for index, shard in attended.items()})
        lse = _join({index: shard.lse for index, shard in attended.items()})
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
    call: RingCall,
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
    tiles = tiles_of_steps(q, bias, cu_seqlens, call)
    own = [call.shards(tensor) for tensor in (q, dout, out, lse)]
    dq: SumsByShard = {}
    dbias: list[_BiasGradient] = []
    travelling: Tensor | None = None  # the gradients of the keys and values at hand
    for step, keys_values in _keys_and_values(k, v, call):
        arriving = None if travelling is None else call.send_on(travelling)
        dk: SumsByShard = {}
        dv: SumsByShard = {}
        for tile in tiles(step):
            rows = [pick(shards, tile.rows) for shards in own]
            cols = [pick(shards, tile.cols) for shards in keys_values]
            grads = call.kernel.backward(*rows, *cols, tile, call.scale)
            _add(dq, grads.q, tile.rows)
            _add(dk, grads.k, tile.cols)
            _add(dv, grads.v, tile.cols)
            if bias is not None and grads.scores is not None and tile.positions is not None:
                gradient = _summed_like(grads.scores, bias.shape)
                dbias.append(_BiasGradient(gradient, tile.positions))
        here = _message([_join(dk), _join(dv)])
        travelling = here if arriving is None else arriving + here
    assert travelling is not None
    if call.ring > 1:
        travelling = call.send_on(travelling)  # to the rank of these keys and values
    own_dk, own_dv = _from_message(travelling, k, v, call)
    return (
        _join(dq).to(q.dtype),
        own_dk[:, :, : k.shape[2]].to(k.dtype),
        own_dv[:, :, : v.shape[2]].to(v.dtype),
        _bias_gradient(bias, dbias) if dbias else None,
        None,  # cu_seqlens
        None,  # call
    )


def _keys_and_values(
    k: Tensor,
    v: Tensor,
    call: RingCall,
) -> Iterator[tuple[int, list[Sequence[Tensor]]]]:
    """Every step, with the shards of the keys, and of the values, that are at hand."""
    missing = call.longest - k.shape[2]
    if missing:
        message = _message([F.pad(x, (0, 0, 0, missing)) for x in (k, v)])
    else:
        message = _message([k, v])
    for step in range(call.ring):
        # It is sent before it is used here, so that it travels while this step computes.
        is_last = step + 1 == call.ring
        coming = message if is_last else call.send_on(message)
        keys_values = _from_message(message, k, v, call)
        yield step, [call.shards(x) for x in keys_values]
        message = coming


def _message(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _from_message(
    message: Tensor,
    k: Tensor,
    v: Tensor,
    call: RingCall,
) -> list[Tensor]:
    """Padded keys and values, or their gradients; ``k`` and ``v`` are this rank's, for shapes."""
    shapes = [(*x.shape[:2], call.longest, x.shape[3]) for x in (k, v)]
    sizes = [math.prod(shape) for shape in shapes]
    flat = message.split(sizes)
    return [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]


def _add(
    sums: SumsByShard,
    result: Tensor,
    choice: Choice,
) -> None:
    for index, share in shares(result, choice, 0):
        sums[index] = sums[index] + share if index in sums else share


def _join(shards: SumsByShard) -> Tensor:
    in_order = [shards[index] for index in sorted(shards)]
    return torch.cat(in_order, 2)


# ---- the gradient of a bias


class _BiasGradient(NamedTuple):
    """The gradient of a bias in one tile, and the positions of the tile's columns."""

    scores: Tensor
    positions: Tensor


def _summed_like(dscores: Tensor, shape: Sequence[int]) -> Tensor:
    """Summed over the dims along which a bias of this shape is the same."""
    columns = 1 if shape[3] == 1 else dscores.shape[3]
    return dscores.sum_to_size(*shape[:3], columns)


def _bias_gradient(bias: Tensor | None, tiles: list[_BiasGradient]) -> Tensor:
    assert bias is not None
    dscores = [tile.scores for tile in tiles]
    if bias.shape[3] == 1:
        return torch.stack(dscores).sum(0).to(bias.dtype)
    zeros = torch.zeros(bias.shape, dtype=dscores[0].dtype, device=bias.device)
    positions = torch.cat([tile.positions for tile in tiles])
    gradient = zeros.index_add(3, positions.clamp(min=0), torch.cat(dscores, 3))
    return gradient.to(bias.dtype)
