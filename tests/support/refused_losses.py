"""What the tests of misuse share: a loss's inputs, how they are split, and that a body is refused,
or a text has words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from funcpipe.errors import SequenceError
from support.loss_bodies import B, Body, D, V, loss_of
from support.sequence_ranks import Splits, a_part, on_one, proven

L = 8
ALONG = "along dim 1 of a tensor of shape (2, 4, 4), along which a rank has 4 of 8 positions"
MIXES = "Only attention may mix positions"
# A body, and what its refusal says.
Misuses = dict[str, tuple[Body, tuple[str, ...]]]
# Slices of unequal length, of one position, or of none.
UNEVEN: list[dict[str, Any]] = [
    {"heads": 3},
    {"heads": 2, "ring": 2, "zigzag": True},
    {"heads": 8},
    {"heads": 9},
]


@contextlib.contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    """Expect an error whose text, without the line of code that it quotes, has all these words, in
    this order."""
    with pytest.raises(kind) as found:
        yield
    text = re.sub("`[^`]*`", "", str(found.value))
    assert re.search(".*".join(map(re.escape, words)), text, re.DOTALL), text


def inputs(length: int = L) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    ints = lambda *s: torch.randint(0, V, s, generator=g)  # noqa: E731
    params = {
        "w": rand(D, D),
        "a": rand(D),
        "table": rand(V, D),
        "places": rand(length, D),
        "token": rand(D),
    }
    params |= {"conv": rand(D, D, 3), "scores": rand(length, length)}
    batch = {
        "x": rand(B, length, D),
        "tokens": ints(B, length),
        "labels": ints(B, length),
        "all": rand(B, length, D),
    }
    return params, batch


def splits(length: int = L, **how: Any) -> Splits:
    part = a_part(length, **how)
    return {"x": (1, part), "tokens": (1, part), "labels": (1, part)}


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (2, 2)).transpose(1, 2)


def attend(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), **options).sum()


def check_refused(body: Body, words: tuple[str, ...]) -> None:
    """On one device it runs; on slices it is refused, with these words."""
    params, batch = inputs()
    on_one(loss_of(body), params, batch)
    with refused(SequenceError, *words):
        proven(loss_of(body), params, batch, splits())


def check_refused_on(body: Body, how: dict[str, Any]) -> None:
    """It is refused on other slices too."""
    params, batch = inputs()
    with pytest.raises(SequenceError):
        proven(loss_of(body), params, batch, splits(**how))
