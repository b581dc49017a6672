"""Transformers for tests of sequence parallelism: small, float64, written as people write them,
with every kind of attention.

In: a `Transformer`, drawn by `transformers` or written by hand. Out: ``init``, ``loss_fn``,
``batch``, ``dims``, and a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import funcpipe as fp

VOCAB = 11


@dataclass(frozen=True)
class Transformer:
    """A language model.

    Args:
        length, rows: of the batch.
        heads, kv_heads, d, dv: numbers of heads of queries, and of keys and values; sizes of a
            head.
        layers: blocks, with a boundary after each.
        call: how attention is written: torch's own ("sdpa"), or `fp.attention` of q, k and v
            ("three"), of q and packed keys and values ("kv"), or of all packed ("qkv").
        causal: whether a token sees no later ones.
        packed: whether every row holds several documents.
        mask: "" or what the scores are masked with or biased by: "padding" (bool, by key, split
            with the batch), "rows" (bool, split along queries, all keys), "whole" (bool, for all),
            "bias" (a parameter for every head).
        places: how tokens know their positions: "learned" or "rotary".
        remat: whether blocks run under torch.utils.checkpoint.
        aux: whether the loss of every token is returned as `Rows`.
    """

    length: int = 8
    rows: int = 2
    heads: int = 2
    kv_heads: int = 2
    d: int = 4
    dv: int = 4
    layers: int = 2
    call: str = "sdpa"
    causal: bool = True
    packed: bool = False
    mask: str = ""
    places: str = "rotary"
    remat: bool = False
    aux: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.d

    def init(self, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(shape, generator=g, dtype=torch.float64) * shape[-1] ** -0.5

        h, k, d, dv, w = self.heads, self.kv_heads, self.d, self.dv, self.width
        block = lambda: {  # noqa: E731
            "q": rand(h * d, w), "k": rand(k * d, w), "v": rand(k * dv, w), "o": rand(w, h * dv),
            "up": rand(2 * w, w), "down": rand(w, 2 * w), "norm": 1 + 0.1 * rand(w),
            **({"bias": rand(h, self.length, self.length)} if self.mask == "bias" else {}),
        }  # fmt: skip
        out = {
            "embed": rand(VOCAB, w),
            "blocks": [block() for _ in range(self.layers)],
            "head": rand(VOCAB, w),
        }
        return out | ({"places": rand(self.length, w)} if self.places == "learned" else {})

    def batch(self, seed: int = 0, rows: int | None = None) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        b, n = self.rows if rows is None else rows, self.length
        tokens = torch.randint(VOCAB, (b, n), generator=g)
        labels = torch.where(
            torch.rand(b, n, generator=g) < 0.2, -100, torch.randint(VOCAB, (b, n), generator=g)
        )
        if bool((labels == -100).all()):  # a mean of nothing is NaN, and so is all that follows it
            labels[:, -1] = tokens[:, -1]
        out: dict[str, Any] = {"tokens": tokens, "labels": labels}
        if self.packed:
            cuts = torch.randint(0, n + 1, (b, 2), generator=g).sort(1).values
            out["cu_seqlens"] = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=n).to(torch.int32)
        if self.mask == "padding":
            out["mask"] = torch.rand(b, n, generator=g) < 0.8
            out["mask"][:, :1] = True
        if self.mask in ("rows", "whole"):
            out["mask"] = (torch.rand(b, n, n, generator=g) < 0.7) | torch.eye(n, dtype=torch.bool)
        return out

    @property
    def dims(self) -> dict[str, Any]:
        """Along which dims the sequence of the batch is split."""
        out: dict[str, Any] = {"tokens": 1, "labels": 1}
        if self.packed:
            out["cu_seqlens"] = None
        if self.mask:
            out |= {"padding": {"mask": 1}, "rows": {"mask": 1}, "whole": {"mask": None}}.get(
                self.mask, {}
            )
        return out

    def loss_fn(self, params: Any, batch: Any) -> Any:
        x = F.embedding(batch["tokens"], params["embed"])
        at = fp.positions(batch["tokens"])
        if self.places == "learned":
            x = x + F.embedding(at, params["places"])
        for p in params["blocks"]:
            x = (
                checkpoint(self._block, p, x, at, batch, use_reentrant=False)
                if self.remat
                else self._block(p, x, at, batch)
            )
            x = fp.stage_boundary(x)
        logits = F.linear(x, params["head"])
        losses = F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        ).view_as(batch["labels"])
        loss = fp.Mean(losses.sum(), (batch["labels"] != -100).sum().double())
        return (loss, {"losses": fp.Rows(losses)}) if self.aux else loss

    def _block(self, p: Any, x: torch.Tensor, at: torch.Tensor, batch: Any) -> torch.Tensor:
        y = F.rms_norm(x, (self.width,), p["norm"])
        heads = lambda w, d: F.linear(y, w).unflatten(-1, (-1, d))  # noqa: E731
        q, k, v = heads(p["q"], self.d), heads(p["k"], self.d), heads(p["v"], self.dv)
        if self.places == "rotary":
            q, k = _rotate(q, at), _rotate(k, at)
        x = x + F.linear(self._attention(q, k, v, p, batch).flatten(2), p["o"])
        # Of two numbers a layer norm leaves the sign, and gradients that are rounding errors: a
        # larger eps keeps more.
        y = F.layer_norm(x, (self.width,), eps=0.1)
        return x + F.linear(F.gelu(F.linear(y, p["up"])), p["down"])

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: Any, batch: Any
    ) -> torch.Tensor:
        bias = p.get("bias")
        if self.mask:
            mask = batch.get("mask")
            bias = {"padding": lambda: mask[:, None, None, :], "bias": lambda: bias[None]}.get(
                self.mask, lambda: mask[:, None]
            )()
        if self.call == "sdpa":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias,
                is_causal=self.causal,
                enable_gqa=self.heads != self.kv_heads,
            )
            return out.transpose(1, 2)
        options = {"causal": self.causal, "bias": bias, "cu_seqlens": batch.get("cu_seqlens")}
        if self.call == "qkv":
            return fp.attention(torch.stack([q, k, v], 2), **options)
        if self.call == "kv":
            return fp.attention(q, torch.stack([k, v], 2), **options)
        return fp.attention(q, k, v, **options)

    def step(self, state: Any, batch: Any) -> Any:
        """Plain descent; its state is the params and the last gradients."""
        out, grads = fp.value_and_grad(self.loss_fn, has_aux=self.aux)(state[0], batch)
        loss, aux = out if self.aux else (out, None)
        params = optree.tree_map(lambda p, g: p - 0.1 * g, state[0], grads)
        return (params, grads), {"loss": loss, "aux": aux}

    def init_state(self, params: Any) -> Any:
        return params, optree.tree_map(torch.zeros_like, params)

    def but(self, **changes: Any) -> Transformer:
        return dataclasses.replace(self, **changes)


def _rotate(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = at[:, None, None].double() * 0.5 ** torch.arange(half, dtype=torch.float64)
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


@st.composite
def transformers(draw: st.DrawFn, max_length: int = 12, max_heads: int = 6) -> Transformer:
    """Random transformers, of which none is refused on one device."""
    call = draw(st.sampled_from(["sdpa", "three", "kv", "qkv"]))
    kv_heads = draw(st.integers(1, max_heads))
    group = 1 if call == "qkv" else draw(st.integers(1, max(1, max_heads // kv_heads)))
    packed = call != "sdpa" and draw(st.booleans())
    mask = draw(st.sampled_from(["", "", "padding", "rows", "whole", "bias"]))
    return Transformer(
        length=draw(st.integers(1, max_length)),
        rows=1,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        d=2,
        dv=2 if call in ("kv", "qkv") else draw(st.sampled_from([2, 3])),
        layers=draw(st.integers(1, 2)),
        call=call,
        causal=draw(st.booleans())
        and not (call == "sdpa" and mask),  # torch takes one or the other
        packed=packed,
        mask=mask,
        places=draw(st.sampled_from(["learned", "rotary"])),
        remat=draw(st.booleans()),
        aux=draw(st.booleans()),
    )


def transformed(
    model: Transformer,
    seq: Callable[[Callable], Callable],
    microbatches: int = 1,
    sharded: tuple[str, ...] = (),
    data: bool = False,
) -> Callable:
    """The step of a model with a sequence transform, and others."""
    step = seq(model.step)
    if data:
        step = fp.data_parallel(step, axis="data")
    if sharded:
        step = fp.sharded_weights(step, axis=sharded)
    return fp.pipelined(step, axis="pipe", microbatches=microbatches)
