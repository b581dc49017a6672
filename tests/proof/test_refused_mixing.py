"""Loss functions that mix positions elsewhere than in attention, or in an attention of their own:
each is refused, by op, line and reason.

On one device every one of them is a fine program. Run on slices as it is, each would give other
numbers without a word.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import grid
from support.refused_losses import (
    ALONG,
    MIXES,
    UNEVEN,
    Misuses,
    attend,
    check_refused,
    check_refused_on,
    heads,
)

SHIFT = "labels come shifted in the batch"


def by_hand(x: torch.Tensor) -> torch.Tensor:
    return ((x @ x.transpose(1, 2)).softmax(-1) @ x).sum()


def written(x: torch.Tensor, at: Any, value: Any) -> torch.Tensor:
    out = x.clone()
    out[at] = value
    return out.sum()


def scaled_part(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[:, 0].mul_(3.0)
    return out.sum()


def set_in_fill(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = 1.0
    return (out * x).sum()


def set_in_repeat(p: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[1], dtype=x.dtype) + p["a"][0]
    out[0] = p["a"][1]
    return (x * out[:, None]).sum()


MISUSES: Misuses = {
    # entries by their place
    "label shift": (
        lambda p, b, x: F.cross_entropy(
            (x @ p["table"].T)[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum"
        ),
        ("aten.slice", "entries 0:3 along dim 1", "a rank has 4 of 8 positions", SHIFT),
    ),
    "last token": (
        lambda p, b, x: (x[:, -1] @ p["w"]).sum(),
        ("aten.select", "entries -1", ALONG, SHIFT),
    ),
    "first token": (lambda p, b, x: x[:, 0].sum(), ("aten.select", "entries 0", ALONG)),
    "every second token": (lambda p, b, x: x[:, ::2].sum(), ("aten.slice", "entries 0:4:2", ALONG)),
    "halves": (
        lambda p, b, x: (x.chunk(2, 1)[0] - x.chunk(2, 1)[1]).pow(2).sum(),
        ("aten.split", "it cuts pieces", ALONG),
    ),
    "by number": (lambda p, b, x: x[:, [0, 1]].sum(), ("aten.index", "by number", ALONG)),
    "index_select": (
        lambda p, b, x: x.index_select(1, torch.tensor([1, 0])).sum(),
        ("aten.index_select", "by number", ALONG),
    ),
    "gather along positions": (
        lambda p, b, x: x.gather(1, b["tokens"][..., None] % 2).sum(),
        ("aten.gather", "by number", ALONG),
    ),
    "scatter along positions": (
        lambda p, b, x: (
            torch.zeros_like(x).scatter(1, b["tokens"][..., None].expand_as(x) % 2, x).sum()
        ),
        ("aten.scatter", "writes entries by number"),
    ),
    "table of positions by token": (
        lambda p, b, x: F.embedding(b["tokens"] % 2, x[0]).sum(),
        ("aten.embedding", "it looks up rows along dim 0"),
    ),
    "diagonal": (lambda p, b, x: x[:, :4].diagonal(dim1=1, dim2=2).sum(), ("aten.", "positions")),
    "a part overwritten": (
        lambda p, b, x: written(x, (slice(None), 0), 0.0),
        ("aten.select", "entries 0", ALONG),
    ),
    "a part scaled in place": (lambda p, b, x: scaled_part(x), ("aten.select", "entries 0", ALONG)),
    "a part of zeros overwritten": (
        lambda p, b, x: set_in_fill(x),
        ("aten.fill_", "writes the number 1", "torch.cat"),
    ),
    "a part of a repeat overwritten": (
        lambda p, b, x: set_in_repeat(p, x),
        ("aten.copy_", "the same on every rank", "torch.cat"),
    ),
    # neighbours
    "roll": (lambda p, b, x: (x * x.roll(1, 1)).sum(), ("aten.roll", "it rolls", ALONG, MIXES)),
    "flip": (lambda p, b, x: (x * x.flip(1)).sum(), ("aten.flip", "turns around", ALONG)),
    "convolution": (
        lambda p, b, x: F.conv1d(x.transpose(1, 2), p["conv"], padding=1).pow(2).sum(),
        ("aten.convolution", "moves a window of 3 along dim 2"),
    ),
    "windows": (
        lambda p, b, x: x.unfold(1, 2, 1).prod(-1).sum(),
        ("aten.unfold", "takes windows", ALONG),
    ),
    "pooling": (
        lambda p, b, x: F.avg_pool1d(x.transpose(1, 2), 2).pow(2).sum(),
        ("aten.avg_pool", "moves a window along dim 3", "a rank has 4 of 8 positions"),
    ),
    "interpolation": (
        lambda p, b, x: (
            F.interpolate(x.transpose(1, 2), scale_factor=2.0, mode="linear").pow(2).sum()
        ),
        ("aten.upsample_linear1d",),
    ),
    "padding": (
        lambda p, b, x: F.pad(x, (0, 0, 1, 0)).cos().sum(),
        ("aten.constant_pad_nd", "puts padding", ALONG),
    ),
    "diff": (lambda p, b, x: x.diff(dim=1).pow(2).sum(), ("aten.", "along dim 1")),
    # along positions
    "cumsum": (
        lambda p, b, x: x.cumsum(1).pow(2).sum(),
        ("aten.cumsum", "running sum", ALONG, MIXES),
    ),
    "softmax": (
        lambda p, b, x: (x.softmax(1) * x).sum(),
        ("aten._softmax", "takes a softmax", ALONG),
    ),
    "log_softmax": (lambda p, b, x: x.log_softmax(1).sum(), ("aten._log_softmax", ALONG)),
    "logsumexp": (
        lambda p, b, x: x.logsumexp(1).sum(),
        ("aten.logsumexp", "takes the log-sum-exp", ALONG),
    ),
    "maximum": (lambda p, b, x: x.amax(1).sum(), ("aten.amax", "takes the maximum", ALONG)),
    "max with places": (
        lambda p, b, x: x.max(1).values.sum(),
        ("aten.max", "takes the maximum", ALONG),
    ),
    "argmax": (
        lambda p, b, x: x.argmax(1).sum() * x.sum(),
        ("aten.argmax", "looks for the largest", ALONG),
    ),
    "variance": (lambda p, b, x: x.var(1).sum(), ("aten.var", "takes the variance", ALONG)),
    "norm": (
        lambda p, b, x: x.norm(dim=1).sum(),
        ("aten.linalg_vector_norm", "takes the norm", ALONG),
    ),
    "norm of all": (lambda p, b, x: x.norm(), ("aten.linalg_vector_norm", "takes the norm", ALONG)),
    "product": (lambda p, b, x: x.prod(1).sum(), ("aten.prod", "takes the product", ALONG)),
    "any": (
        lambda p, b, x: (x * (x > 1.0).any(1, keepdim=True)).sum(),
        ("aten.any", "asks for any", ALONG),
    ),
    "sort": (lambda p, b, x: (x.sort(1).values * x).sum(), ("aten.sort", "it sorts", ALONG)),
    "topk": (lambda p, b, x: x.topk(2, 1).values.sum(), ("aten.topk", "takes the largest", ALONG)),
    "layer_norm over positions": (
        lambda p, b, x: F.layer_norm(x, x.shape[1:]).pow(3).sum(),
        ("aten.native_layer_norm", "it normalises", ALONG),
    ),
    "layer_norm over positions, turned": (
        lambda p, b, x: F.layer_norm(x.transpose(1, 2), x.shape[1:2]).pow(3).sum(),
        ("aten.native_layer_norm", "it normalises along dim 2"),
    ),
    "batch_norm": (
        lambda p, b, x: F.batch_norm(x.transpose(1, 2), None, None, training=True).pow(3).sum(),
        ("batch_norm", "takes the mean and variance"),
    ),
    "group_norm": (
        lambda p, b, x: F.group_norm(x.transpose(1, 2), 2).pow(3).sum(),
        ("group_norm", "normalises along dim 2"),
    ),
    "centred": (
        lambda p, b, x: (x - x.mean(1, keepdim=True)).pow(2).sum(),
        (
            "aten.sub",
            "a mean over one rank's positions",
            "beside a rank's slice",
            "fp.psum(x, axis)",
        ),
    ),
    "over the sum": (
        lambda p, b, x: (x.exp() / x.exp().sum(1, keepdim=True)).pow(2).sum(),
        ("aten.div", "a sum over one rank's"),
    ),
    "a sum for every position": (
        lambda p, b, x: x.sum(1, keepdim=True).expand_as(x).sum(),
        ("aten.expand", "it repeats a sum over one rank's positions along dim 1"),
    ),
    "square of the sum": (
        lambda p, b, x: x.sum(1).pow(2).sum(),
        ("aten.pow", "it is not linear", "fp.psum(x, axis)"),
    ),
    "product of sums": (
        lambda p, b, x: x.sum() * x.cos().sum(),
        ("aten.mul", "a product of sums is not the sum of products", "fp.psum(x, axis)"),
    ),
    # attention
    "attention by hand": (
        lambda p, b, x: by_hand(x),
        ("aten.bmm", "every position of a rank's slice with every other one", MIXES),
    ),
    "attention by einsum": (
        lambda p, b, x: torch.einsum("bid,bjd->bij", x, x).softmax(-1).pow(2).sum(),
        ("aten.bmm", "none with another rank's", "fp.attention"),
    ),
    "scores by broadcasting": (
        lambda p, b, x: (x[:, :, None] * x[:, None]).sum(-1).exp().sum(),
        ("aten.mul", "positions along dim 1 beside positions along dim 2"),
    ),
    "mixing by a weight": (
        lambda p, b, x: (p["scores"][: x.shape[1], : x.shape[1]] @ x).sum(),
        ("aten.slice", "it takes entries 0:4 of a tensor of shape (8, 8)"),
    ),
    "outer product of positions": (
        lambda p, b, x: torch.outer(x[0, :, 0], x[0, :, 1]).exp().sum(),
        ("aten.mul", "positions along dim 0 beside positions along dim 1"),
    ),
    "causal mask of the local length": (
        lambda p, b, x: attend(x, attn_mask=torch.ones(x.shape[1], x.shape[1]).tril().bool()),
        (
            "an operand of attention at refused_losses.py",
            "aten.tril",
            "takes a triangle",
            "made from the length of a rank's slice",
        ),
    ),
    "mask of the local length": (
        lambda p, b, x: attend(x, attn_mask=torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)),
        (
            "attention at refused_losses.py",
            "the bias, or mask, is a tensor of shape (1, 1, 4, 4)",
            "built from the length of",
            "causal=True",
        ),
    ),
    "mask of two slices": (
        lambda p, b, x: attend(
            x, attn_mask=(b["tokens"][:, :, None] == b["tokens"][:, None])[:, None]
        ),
        (
            "an operand of attention",
            "aten.eq",
            "positions along dim 1 beside positions along dim 2",
        ),
    ),
    "padding mask repeated for every query": (
        lambda p, b, x: attend(
            x, attn_mask=(b["tokens"] > 0)[:, None, None].expand(-1, 1, x.shape[1], -1)
        ),
        ("dim 2 is as long as a rank's slice", "with size 1 along queries"),
    ),
    "whole queries, split keys": (
        lambda p, b, x: F.scaled_dot_product_attention(heads(b["all"]), heads(x), heads(x)).sum(),
        (
            "attention at",
            "queries are",
            "the same on every rank",
            "but keys are",
            "split the queries too",
        ),
    ),
    "split queries, whole keys, causal": (
        lambda p, b, x: F.scaled_dot_product_attention(
            heads(x), heads(b["all"]), heads(b["all"]), is_causal=True
        ).sum(),
        ("every rank has all keys", "causal", "bias that has rows for queries"),
    ),
    "keys without their values": (
        lambda p, b, x: F.scaled_dot_product_attention(
            heads(x), heads(x), heads(b["all"])[:, :, : x.shape[1]]
        ).sum(),
        ("an operand of attention", "aten.slice"),
    ),
    "attention scaled by the length": (
        lambda p, b, x: attend(x, scale=1 / math.sqrt(x.shape[1])),
        (
            "attention at",
            "its scale is 0.5 on a rank and 0.3535",
            "made from the length of a rank's slice",
        ),
    ),
    "attention of positions with the batch": (
        lambda p, b, x: F.scaled_dot_product_attention(x[None], x[None], x[None].flip(2)).sum(),
        ("an operand of attention", "aten.flip"),
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_it_is_refused(name: str) -> None:
    check_refused(*MISUSES[name])


# Those that plain pytest runs on these ranks too.
EVERYWHERE = {"label shift", "padding", "convolution", "centred", "attention by hand"}


@pytest.mark.parametrize(("name", "how"), grid(MISUSES, UNEVEN, EVERYWHERE, turns=False))
def test_it_is_refused_on_any_ranks(name: str, how: dict[str, Any]) -> None:
    check_refused_on(MISUSES[name][0], how)
