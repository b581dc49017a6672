"""Findings: what the proof says of attentions, positions and rows, for whoever rewrites them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.loss_bodies import PARTS, B, Body, D, H, attend, count, data, loss_of
from support.sequence_ranks import proven

import funcpipe as fp
from funcpipe._src.functional.dispatch import Held, Spec
from funcpipe.errors import SequenceError


def findings(body: Body) -> Any:
    return proven(loss_of(body), *data(PARTS["two"]), attention=True)[0]


HELD: dict[str, tuple[Body, list[Held]]] = {
    "self": (lambda p, b, x: attend(x).sum(), [Held(PARTS["two"], PARTS["two"])]),
    "context": (lambda p, b, x: attend(x, b["short"]).sum(), [Held(PARTS["two"], None)]),
    "bias": (
        lambda p, b, x: attend(x, attn_mask=(x @ p["a"])[:, None, :, None]).sum(),
        [Held(PARTS["two"], PARTS["two"], bias_query=True)],
    ),
    "padding": (
        lambda p, b, x: attend(x, attn_mask=b["keep"][:, None, None]).sum(),
        [Held(PARTS["two"], PARTS["two"], bias_key=True)],
    ),
    "whole mask": (
        lambda p, b, x: attend(x, attn_mask=b["pairs"]).sum(),
        [Held(PARTS["two"], PARTS["two"])],
    ),
    "another": (
        lambda p, b, x: attend(x).sum() + (attend(b["all"])[:, 0] * x.sum((1, 2))[:, None]).sum(),
        [Held(PARTS["two"], PARTS["two"]), Held()],
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_how_operands_lie_on_ranks(name: str) -> None:
    body, held = HELD[name]
    assert list(findings(body).calls.values()) == held


def test_findings_are_looked_up_by_shape() -> None:
    found = findings(
        lambda p, b, x: attend(x).sum() + fp.positions(x).sum() + (fp.positions(x, 2) * x).sum()
    )
    q = torch.zeros(B, H, 4, D // H)
    assert found.attention(q, q, q, Spec()) == Held(PARTS["two"], PARTS["two"])
    assert (
        found.positions(torch.zeros(B, 4, D), 1) == PARTS["two"]
        and found.positions(torch.zeros(B, 4, D), 2) is None
    )
    with pytest.raises(
        SequenceError, match=r"fp.attention .* was not called when the proof ran the loss function"
    ):
        found.attention(q, q, q, Spec(causal=True))


def test_rows_and_means_of_aux() -> None:
    params, batch, splits = data(PARTS["two"])

    def loss(p: Any, b: Any) -> Any:
        x = torch.tanh(b["x"] * p["a"])
        aux = {
            "a": fp.Rows(x),
            "b": fp.Rows(b["row"]),
            "c": fp.Mean(x.sum(), count(x)),
            "d": fp.Rows(x.transpose(0, 1), 1),
        }
        return fp.Mean(x.sum(), count(x)), aux

    (found, _) = proven(loss, params, batch, splits, has_aux=True)
    assert found.rows == ((1, PARTS["two"]), None, (0, PARTS["two"]))
