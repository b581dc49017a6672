"""Attention of some queries to some keys, with results that can be merged.

A *tile* is a shard of a rank's queries against a shard of the keys and values at hand. Its scores
are those of its queries and keys; *lse* is the log-sum-exp of the scores of every query.

Given the results and lse of complete rows, a tile's probabilities, and so its gradients, need no
other tile (Dao 2023, FlashAttention-2, section 3.1): ``P = exp(S - lse)``,
``dS = P * (dP - rowsum(dout * out))``.

In: shards in the layout of `functional/dispatch.py`, a tile.
Out: what its queries attend to, or gradients; float32, or float64 for float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Which shard is meant, as (index, condition) pairs: at most one condition is true on a rank, and
# None is true always. So all ranks run the same ops, though the shard depends on the rank.
Choice = tuple[tuple[int, Tensor | None], ...]

ALL: Choice = ((0, None),)
_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Tile:
    """What is computed, and which of its scores count.

    Args:
        rows, cols: which shards of the queries, and of the keys and values.
        causal: whether row ``i`` sees columns up to ``i`` only; rows and columns are equally many.
        seen: bool, broadcastable to the scores ``(batch, heads, rows, columns)``; None: all.
        bias: added to the scores; broadcastable to them.
        positions: of the columns in the whole sequence, -1 for padding; given where a bias is.
    """

    rows: Choice = ALL
    cols: Choice = ALL
    causal: bool = False
    seen: Tensor | None = None
    bias: Tensor | None = None
    positions: Tensor | None = None


class Attended(NamedTuple):
    """What queries attend to.

    Args:
        out: ``(batch, heads, rows, head dim)``.
        lse: ``(batch, heads, rows)``, -inf for a row that sees nothing.
    """

    out: Tensor
    lse: Tensor

    def merged(self, other: Attended | None) -> Attended:
        """Attention to the keys of both."""
        if other is None:
            return self
        lse = torch.logaddexp(self.lse, other.lse)
        finite = _finite(lse)
        own_share = (self.lse - finite).exp().unsqueeze(-1)
        other_share = (other.lse - finite).exp().unsqueeze(-1)
        out = self.out * own_share + other.out * other_share
        return Attended(out, lse)


class Gradients(NamedTuple):
    """Of queries, keys and values; of the scores, if the kernel makes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor | None = None


class Kernel(NamedTuple):
    """What computes a tile.

    Args:
        forward: ``(q, k, v, tile, scale) -> Attended``.
        backward: ``(q, dout, out, lse, k, v, tile, scale) -> Gradients``, where ``dout, out, lse``
            are those of complete rows.
    """

    forward: Callable[..., Attended]
    backward: Callable[..., Gradients]


def kernel(q: Tensor, v: Tensor, plain: bool) -> Kernel:
    """Flash attention where it can compute the tiles, else matrix products.

    Args:
        plain: whether no tile has a mask or a bias.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    dims_fit = q.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0
    if not (plain and half and dims_fit and q.numel() > 0):
        return MATMUL
    on_cuda = q.device.type == "cuda"
    return FLASH if on_cuda and torch.backends.cuda.flash_sdp_enabled() else MATMUL


def pick(shards: Sequence[Tensor], choice: Choice) -> Tensor:
    """The shard that is meant; any one if no condition is true."""
    (first, _), *others = choice
    picked = shards[first]
    for index, condition in others:
        if condition is None:
            picked = shards[index]
        else:
            picked = torch.where(condition, shards[index], picked)
    return picked


def shares(result: Tensor, choice: Choice, nothing: float) -> list[tuple[int, Tensor]]:
    """What every shard gets of a tile's result: the result if it is meant, else ``nothing``.

    It gets ``nothing`` even where the result is infinite or NaN.
    """
    found = []
    for index, condition in choice:
        if condition is None:
            found.append((index, result))
        else:
            found.append((index, result.masked_fill(~condition, nothing)))
    return found


# ---- products of matrices: any tile, on any device


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _finite(lse: Tensor) -> Tensor:
    """An lse to subtract: 0 where nothing is seen, so that -inf stays -inf."""
    return lse.masked_fill(lse == -math.inf, 0)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``(batch, heads, rows, d)`` as ``(batch, heads of k, group * rows, d)``, in wide floats.

    Query heads that share a key head lie one after another, so that one product serves them all.
    """
    batch, query_heads, rows, dim = x.shape
    key_heads = k.shape[1]
    group = query_heads // key_heads
    return _wide(x.reshape(batch, key_heads, group * rows, dim))


def _scores(
    q: Tensor,
    k: Tensor,
    tile: Tile,
    scale: float,
) -> Tensor:
    shape = (*q.shape[:3], k.shape[2])
    products = _grouped(q, k) @ _wide(k).mT
    scores = (products * scale).reshape(shape)
    if tile.bias is not None:
        scores = scores + tile.bias.to(scores.dtype)
    if tile.causal:
        later = torch.ones(shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if tile.seen is None:
        return scores
    return scores.masked_fill(~tile.seen, -math.inf)


def _matmul_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    scale: float,
) -> Attended:
    scores = _scores(q, k, tile, scale)
    lse = scores.logsumexp(-1)
    p = (scores - _finite(lse).unsqueeze(-1)).exp()
    out = _grouped(p, k) @ _wide(v)
    return Attended(out.reshape(*q.shape[:3], v.shape[3]), lse)


def _matmul_backward(
    q: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    scale: float,
) -> Gradients:
    scores = _scores(q, k, tile, scale)
    p = (scores - _finite(lse).unsqueeze(-1)).exp()
    dp = (_grouped(dout, k) @ _wide(v).mT).reshape(p.shape)
    row_sums = (_wide(dout) * _wide(out)).sum(-1, keepdim=True)
    dscores = p * (dp - row_sums)
    dq = (_grouped(dscores, k) @ _wide(k)).reshape(q.shape) * scale
    dk = _grouped(dscores, k).mT @ _grouped(q, k) * scale
    dv = _grouped(p, k).mT @ _grouped(dout, k)
    return Gradients(dq, dk, dv, dscores)


# ---- flash attention: tiles without mask or bias, in half precision on CUDA


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    scale: float,
) -> Attended:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, tile.causal, scale=scale)
    return Attended(out.float(), lse)


def _flash_backward(
    q: Tensor,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    scale: float,
) -> Gradients:
    # Without dropout the kernel does not read the state of the random generator.
    seed = torch.empty((2,), dtype=torch.uint64, device=q.device)
    offset = torch.empty((), dtype=torch.uint64, device=q.device)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out,
        lse.contiguous(),  # the kernel takes it to be
        None,  # offsets of packed sequences
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        tile.causal,
        seed,
        offset,
        scale=scale,
    )
    return Gradients(dq.float(), dk.float(), dv.float())


MATMUL = Kernel(_matmul_forward, _matmul_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
