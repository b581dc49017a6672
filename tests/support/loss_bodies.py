"""Loss functions over a sequence, for tests: a body says what becomes of the features of every
position.

In: a body, a way to split a sequence. Out: a loss function; params, a batch, and how its leaves are
split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import funcpipe as fp
from funcpipe._src.functional.sequence_layout import SequenceLayout
from support.sequence_ranks import Splits, a_part

# Sums over positions, and matrix products over them, are taken rank by rank.
FLOAT64 = 1e-12
B, D, H, V = 2, 4, 2, 5  # rows, features, heads, tokens
Body = Callable[
    [Any, Any, torch.Tensor], Any
]  # (params, batch, features of every position) -> the total, or a Mean

PARTS = {
    "two": a_part(8, 2),
    "uneven": a_part(7, 3),
    "one position each": a_part(4, 4),
    "more ranks than positions": a_part(2, 3),
    "ring": a_part(9, 1, 2, zigzag=True),
    "ring of heads": a_part(10, 2, 2, zigzag=True),
    "as long as the batch": a_part(2 * B, 2),
}


def data(part: SequenceLayout) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Splits]:
    g = torch.Generator().manual_seed(part.size)
    rand = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    ints = lambda n, *s: torch.randint(0, n, s, generator=g)  # noqa: E731
    n = part.size
    params = {
        "w": rand(D, D),
        "a": rand(D),
        "table": rand(V, D),
        "places": rand(16, D),
        "up": rand(D, 3 * D),
    }
    params |= {"conv": rand(D, D, 1), "norm": 1 + 0.1 * rand(D), "one": rand(1)}
    batch = {
        "x": rand(B, n, D),
        "tokens": ints(V, B, n),
        "labels": ints(V, B, n),
        "all": rand(B, n, D),
        "row": rand(B),
    }
    batch |= {
        "keep": ints(2, B, n) > 0,
        "short": rand(B, 3, D),
        "pairs": ints(2, B, 1, n, n) > 0,
        "turned": rand(n, B, D),
    }
    batch["key"] = fp.random.keys(fp.random.key(0), B)
    batch["labels"][0, 0] = -100
    batch["pairs"] |= torch.eye(n, dtype=torch.bool)
    batch["keep"][:, 0] = True
    split: Splits = {k: (1, part) for k in ("x", "tokens", "labels", "keep")}
    return params, batch, split | {"turned": (0, part)}


def count(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(x.shape[0] * x.shape[1]))


def loss_of(body: Body) -> Callable:
    def loss(p: Any, b: Any) -> fp.Mean:
        out = body(p, b, torch.tanh(b["x"] * p["a"]))
        return out if isinstance(out, fp.Mean) else fp.Mean(out, count(b["x"]))

    return loss


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (H, -1)).transpose(1, 2)


def attend(x: torch.Tensor, y: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    y = x if y is None else y
    return (
        F.scaled_dot_product_attention(heads(x), heads(y), heads(y.sin()), **options)
        .transpose(1, 2)
        .flatten(2)
    )
