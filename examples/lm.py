"""A small Llama-style language model over bytes, as pure functions: parameters in, numbers out.

Shape suffixes: B rows of the batch, T positions, D model width, V = 256 bytes, H heads of d
numbers. Weights are (out, in), as ``torch.nn.functional.linear`` takes them. Two calls know of
parallelism: ``fp.stage_boundary``, after every block the model may be cut; and ``fp.positions``,
the sequence may be split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import funcpipe as fp

VOCABULARY = 256
IGNORED = -100  # a label that counts neither in the loss nor in its weight

Params = dict[str, Any]


class Sizes(NamedTuple):
    """How large the model is."""

    blocks: int = 8
    width: int = 128
    heads: int = 4
    tied: bool = False  # read the logits off the embedding, instead of a head of its own


def init_params(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters, the same for the same seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden = sizes.width, 8 * sizes.width // 3 // 16 * 16
    std_in = width**-0.5
    std_out = (2 * sizes.blocks * width) ** -0.5  # 2 * blocks branches add up on one stream

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    def block() -> Params:
        return {
            "attention_norm": torch.ones(width, dtype=dtype),
            "qkv": normal(3 * width, width, std=std_in),
            "attention_out": normal(width, width, std=std_out),
            "mlp_norm": torch.ones(width, dtype=dtype),
            "gate_up": normal(2 * hidden, width, std=std_in),
            "down": normal(width, hidden, std=std_out),
        }

    params: Params = {
        "embed": normal(VOCABULARY, width, std=0.02 if sizes.tied else 1.0),
        "blocks": [block() for _ in range(sizes.blocks)],
        "norm": torch.ones(width, dtype=dtype),
    }
    if not sizes.tied:
        params["head"] = normal(VOCABULARY, width, std=0.02)
    return params


def rotary_table(positions_T: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and frequency, each (T, dim / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=positions_T.device, dtype=dtype) / dim)
    angle = torch.outer(positions_T.to(dtype), frequency)
    return angle.cos(), angle.sin()


def rotate(x_BHTd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), as in Llama."""
    cos, sin = table
    first, second = x_BHTd.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1)


def attention(p: Params, x_BTD: Tensor, heads: int, table: tuple[Tensor, Tensor]) -> Tensor:
    """Causal self-attention."""
    qkv = F.linear(x_BTD, p["qkv"]).unflatten(-1, (3, heads, -1))
    q_BHTd, k_BHTd, v_BHTd = (x.transpose(1, 2) for x in qkv.unbind(2))
    q_BHTd = rotate(q_BHTd, table)
    k_BHTd = rotate(k_BHTd, table)
    y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)
    return F.linear(y_BHTd.transpose(1, 2).flatten(-2), p["attention_out"])


def block(p: Params, x_BTD: Tensor, heads: int, table: tuple[Tensor, Tensor]) -> Tensor:
    """One transformer block: attention, then SwiGLU, each on a normalized copy of the stream."""
    x_BTD = x_BTD + attention(p, norm(x_BTD, p["attention_norm"]), heads, table)
    gate, up = F.linear(norm(x_BTD, p["mlp_norm"]), p["gate_up"]).chunk(2, dim=-1)
    return x_BTD + F.linear(F.silu(gate) * up, p["down"])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-5)


def hidden(params: Params, tokens_BT: Tensor, sizes: Sizes) -> Tensor:
    """The normalized stream behind the last block, (B, T, D)."""
    x_BTD = F.embedding(tokens_BT, params["embed"])
    # Not arange(T): a rank may have a slice of the sequence only.
    table = rotary_table(fp.positions(tokens_BT), sizes.width // sizes.heads, x_BTD.dtype)
    for p in params["blocks"]:
        x_BTD = fp.stage_boundary(block(p, x_BTD, sizes.heads, table))
    return norm(x_BTD, params["norm"])


def head(params: Params, sizes: Sizes) -> Tensor:
    """The matrix that makes logits, (V, D)."""
    return params["embed" if sizes.tied else "head"]


def logits(params: Params, tokens_BT: Tensor, sizes: Sizes) -> Tensor:
    """Logits of the byte after every token, (B, T, V)."""
    return F.linear(hidden(params, tokens_BT, sizes), head(params, sizes))


def make_loss(sizes: Sizes) -> Callable[[Params, dict[str, Tensor]], fp.Mean]:
    """Cross entropy in nats: the sum over tokens, and how many tokens there were."""

    def loss_fn(params: Params, batch: dict[str, Tensor]) -> fp.Mean:
        logits_BTV = logits(params, batch["tokens"], sizes)
        labels_BT = batch["labels"]
        total = F.cross_entropy(
            logits_BTV.flatten(0, 1),
            labels_BT.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return fp.Mean(total=total, weight=(labels_BT != IGNORED).sum())

    return loss_fn


@torch.no_grad()
def continue_text(
    params: Params,
    sizes: Sizes,
    prompt: bytes,
    count: int,
    temperature: float = 0.7,
) -> bytes:
    """``count`` more bytes, drawn one by one from the logits; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([list(prompt)])
    for _ in range(count):
        logits_V = logits(params, tokens[:, -128:], sizes)[0, -1].float()
        probabilities_V = (logits_V / temperature).softmax(-1).cpu()
        drawn = torch.multinomial(probabilities_V, 1, generator=generator)
        tokens = torch.cat((tokens, drawn[None]), dim=1)
    return bytes(tokens[0].tolist())
