"""Tiles: attention of some queries to some keys, whose results can be merged.

Terms. A *tile* is a *piece* of a rank's queries against a piece of the keys and values that are
there. Its scores are those of its queries and keys, its *lse* the log-sum-exp of every row of them.
Where pieces depend on the rank, a *choice* lists them with conditions, so that all ranks run the
same ops. *Wide* is float32, or float64 for float64.

With the out and lse of whole rows, a tile's probabilities, and so its gradients, stand for
themselves (Dao 2023, FlashAttention-2, section 3.1): ``P = exp(S - lse)``, ``dS = P * (dP -
rowsum(dout * out))``.

In: pieces in the layout of `functional/dispatch.py`, a tile. Out: what its rows attend to, or
gradients; wide, or to be made so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Tensor = torch.Tensor
Choice = tuple[
    tuple[int, Tensor | None], ...
]  # pieces, each with when it is meant (None: always); at most one is

ALL: Choice = ((0, None),)
_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Tile:
    """What is computed, and what of it is seen.

    Args:
        rows, cols: which pieces of the queries, and of the keys and values.
        causal: whether row ``i`` sees columns up to ``i`` only; rows and columns are equally many.
        seen: bool, broadcastable to the scores ``(batch, heads, rows, columns)``; None: all.
        bias: added to the scores; broadcastable to them.
        positions: of the columns in the whole sequence, -1 for padding; where there is a bias.
    """

    rows: Choice = ALL
    cols: Choice = ALL
    causal: bool = False
    seen: Tensor | None = None
    bias: Tensor | None = None
    positions: Tensor | None = None


class Attended(NamedTuple):
    """What rows attend to, ``(batch, heads, rows, head dim)``, and its lse, ``(batch, heads,
    rows)``: -inf for nothing."""

    out: Tensor
    lse: Tensor

    def merged(self, other: Attended | None) -> Attended:
        """Attention to the keys of both."""
        if other is None:
            return self
        lse = torch.logaddexp(self.lse, other.lse)
        finite = _finite(lse)
        own, others = ((x.lse - finite).exp().unsqueeze(-1) for x in (self, other))
        return Attended(self.out * own + other.out * others, lse)


class Gradients(NamedTuple):
    """Of queries, keys and values; of the scores, where they are at hand."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor | None = None


class Kernel(NamedTuple):
    """``forward(q, k, v, tile, scale)`` and ``backward(q, dout, out, lse, k, v, tile, scale)``,
    where dout, out and lse are those of whole rows."""

    forward: Callable[..., Attended]
    backward: Callable[..., Gradients]


def kernel(q: Tensor, v: Tensor, plain: bool) -> Kernel:
    """What computes the tiles of an attention: flash attention where it can; ``plain``: no tile has
    a mask or bias."""
    fits = (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] == v.shape[3] <= 256
        and q.shape[3] % 8 == 0
    )
    flash = (
        plain
        and fits
        and q.numel() > 0
        and q.device.type == "cuda"
        and torch.backends.cuda.flash_sdp_enabled()
    )
    return FLASH if flash else MATMUL


def pick(pieces: Sequence[Tensor], choice: Choice) -> Tensor:
    """The piece that is meant; any where none is."""
    x = pieces[choice[0][0]]
    for i, when in choice[1:]:
        x = pieces[i] if when is None else torch.where(when, pieces[i], x)
    return x


def shares(x: Tensor, choice: Choice, nothing: float) -> list[tuple[int, Tensor]]:
    """What every piece gets of a tile's result: the result, or nothing, even where it is infinite
    or NaN."""
    return [(i, x if when is None else x.masked_fill(~when, nothing)) for i, when in choice]


# ---- products of matrices: any tile, on any device


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _finite(lse: Tensor) -> Tensor:
    """An lse to subtract: 0 where nothing is seen, so that -inf stays -inf."""
    return lse.masked_fill(lse == -math.inf, 0)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``(batch, heads, rows, d)`` as ``(batch, heads of k, group * rows, d)``, wide: query heads
    that share a key head lie one after another, so that one product serves them all."""
    heads = k.shape[1]
    return _wide(x.reshape(x.shape[0], heads, x.shape[1] // heads * x.shape[2], x.shape[3]))


def _scores(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    shape = (*q.shape[:3], k.shape[2])
    scores = (_grouped(q, k) @ _wide(k).mT * scale).reshape(shape)
    if tile.bias is not None:
        scores = scores + tile.bias.to(scores.dtype)
    if tile.causal:
        later = torch.ones(shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if tile.seen is None else scores.masked_fill(~tile.seen, -math.inf)


def _matmul_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> Attended:
    scores = _scores(q, k, tile, scale)
    lse = scores.logsumexp(-1)
    p = (scores - _finite(lse).unsqueeze(-1)).exp()
    return Attended((_grouped(p, k) @ _wide(v)).reshape(*q.shape[:3], v.shape[3]), lse)


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
    p = (_scores(q, k, tile, scale) - _finite(lse).unsqueeze(-1)).exp()
    dp = (_grouped(dout, k) @ _wide(v).mT).reshape(p.shape)
    dscores = p * (dp - (_wide(dout) * _wide(out)).sum(-1, keepdim=True))
    dq = (_grouped(dscores, k) @ _wide(k)).reshape(q.shape) * scale
    dk = _grouped(dscores, k).mT @ _grouped(q, k) * scale
    return Gradients(dq, dk, _grouped(p, k).mT @ _grouped(dout, k), dscores)


# ---- flash attention: tiles without mask or bias, in half precision on CUDA


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float) -> Attended:
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
    # The kernel takes lse to be contiguous, and does not read the state of the generator without
    # dropout.
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    grads = _aten._scaled_dot_product_flash_attention_backward(
        dout.contiguous(),
        q,
        k,
        v,
        out,
        lse.contiguous(),
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
    return Gradients(*(x.float() for x in grads))


MATMUL = Kernel(_matmul_forward, _matmul_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
