"""`assert_equivalent` says where a loss computes in fewer bits than came in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcpipe as fp
from funcpipe.testing import assert_equivalent

G = torch.Generator().manual_seed(0)
W, X = (torch.randn(shape, dtype=torch.float64, generator=G) for shape in ((5, 7), (12, 5)))


def in_float32(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x.float() @ w.float()).exp().sum().double()


def in_bfloat16(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x @ w).to(torch.bfloat16).tanh().sum().double()


def in_float64(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x @ w).exp().sum()


def message(total: Callable, factor: float = 1.0, **options: Any) -> str:
    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        return fp.Mean(total(w, x), torch.tensor(float(len(x)), dtype=torch.float64))

    def step(w: torch.Tensor, x: torch.Tensor, factor: float = 1.0) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grad * factor, {"loss": loss}

    def other(w: torch.Tensor, x: torch.Tensor) -> Any:
        return step(w, x, factor)

    fast = fp.accumulated(other, microbatches=4)
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(step, fast, fp.Mesh(), lambda w: w, W, [X], **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("total", "words"),
    [
        (
            in_float32,
            (
                "float64 becomes float32 at test_narrowing.py:",
                "`return (x.float() @ w.float())",
                "rtol=1e-05",
            ),
        ),
        (
            in_bfloat16,
            (
                "float64 becomes bfloat16 at test_narrowing.py:",
                "`return (x @ w).to(torch.bfloat16)",
            ),
        ),
    ],
)
def test_the_line_at_which_bits_are_lost(total: Callable, words: tuple[str, ...]) -> None:
    text = message(total)
    assert (
        text.startswith("step 0: ")
        and ", allowed 1.0e-12. The loss function computes in fewer bits than came in: " in text
    )
    assert all(word in text for word in words)
    assert "keep to float64, or allow rtol=" in text


def test_nothing_is_said_where_it_is_not_the_reason() -> None:
    assert message(in_float64, factor=1.0 + 1e-7).endswith(", allowed 1.0e-12")
    assert message(in_float32, factor=3.0, rtol=1e-4).endswith(", allowed 1.0e-04")
