"""Loss functions that take a slice of the sequence for all of it: its length, its positions, its
sums and gradients for those of the whole. Each is refused, by op, line and reason.

On one device every one of them is a fine program. Run on slices as it is, each would give other
numbers without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.loss_bodies import B, D, count, loss_of
from support.models import grid
from support.refused_losses import (
    UNEVEN,
    Misuses,
    attend,
    check_refused,
    check_refused_on,
    inputs,
    refused,
    splits,
)
from support.sequence_ranks import proven

import funcpipe as fp
from funcpipe.errors import BatchError, SequenceError, TraceError


def one_by_one(x: torch.Tensor) -> torch.Tensor:
    state = torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        state = torch.tanh(state + x[:, i])
    return state.sum()


def long_only(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() if x.shape[1] > 4 else x.cos()).sum()


class Clipped(torch.autograd.Function):
    """Whose gradient is scaled to norm 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g / g.norm()


class Averaged(torch.autograd.Function):
    """A product whose gradient of the weight is a mean over positions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, torch.einsum("bld,ble->de", x, g) / x.shape[1]


def hooked(x: torch.Tensor) -> torch.Tensor:
    x = x * 2
    x.register_hook(lambda g: g / g.norm())
    return x.sum()


def hooked_node(x: torch.Tensor) -> torch.Tensor:
    x = x * 2
    x.grad_fn.register_hook(
        lambda inner, outer: tuple(None if g is None else g / g.norm() for g in inner)
    )
    return x.sum()


def hooked_saves(x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t / t.norm()):
        return x.sin().sum()


def hooked_module(x: torch.Tensor) -> torch.Tensor:
    module = torch.nn.Tanh()
    module.register_full_backward_hook(
        lambda _, inner, outer: tuple(g / g.norm() for g in inner if g is not None)
    )
    return module(x).sum()


MISUSES: Misuses = {
    # positions counted from a slice's first
    "arange as positions": (
        lambda p, b, x: (x + p["places"][torch.arange(x.shape[1])]).sum(),
        (
            "Mean.total",
            "aten.arange at test_refused_local_sizes.py",
            "its end is 4 on a rank and 8 on one device",
            "fp.positions(x, dim)",
        ),
    ),
    "arange in arithmetic": (
        lambda p, b, x: (x * torch.arange(x.shape[1])[:, None]).sum(),
        ("aten.arange", "made from the length of a rank's slice"),
    ),
    "linspace": (
        lambda p, b, x: (x * torch.linspace(0, 1, x.shape[1])[:, None]).sum(),
        ("aten.linspace", "its steps is 4"),
    ),
    "cumsum of ones as positions": (
        lambda p, b, x: (x * b["tokens"].new_ones(b["tokens"].shape).cumsum(1)[..., None]).sum(),
        ("aten.cumsum", "running sum", "whose size is made from the length of a rank's slice"),
    ),
    "table cut to length": (
        lambda p, b, x: (x + p["places"][: x.shape[1]]).sum(),
        (
            "aten.slice",
            "it takes entries 0:4 of a tensor of shape (8, 4)",
            "Index with fp.positions(x, dim)",
        ),
    ),
    "table of the whole length": (
        lambda p, b, x: (x + p["places"]).sum(),
        (
            "fails on a rank, with its slice of the sequence at test_refused_local_sizes.py",
            "It has to work for every length",
        ),
    ),
    "a batch leaf that is not split": (
        lambda p, b, x: (x * b["all"][:, : x.shape[1]]).sum(),
        ("aten.slice", "it takes entries 0:4 of a tensor of shape (2, 8, 4)"),
    ),
    "list of positions": (
        lambda p, b, x: (x + p["places"][torch.tensor(list(range(x.shape[1])))]).sum(),
        (
            "constant at test_refused_local_sizes.py",
            "a tensor of shape (4,)",
            "made from the length of a rank's slice",
        ),
    ),
    # the length as a number
    "division by the length": (
        lambda p, b, x: (x / x.shape[1]).sin().sum(),
        (
            "aten.div",
            "the number 4 (8 on one device) beside a rank's slice",
            "divided once, after all sums",
        ),
    ),
    "scale by the root of the length": (
        lambda p, b, x: (x * x.shape[1] ** -0.5).sum(),
        ("aten.mul", "the number 0.5 (0.353553 on one device)"),
    ),
    "length as a tensor": (
        lambda p, b, x: (x * torch.tensor(float(x.shape[1]))).sum(),
        ("aten.mul", "the number 4"),
    ),
    "params by the length": (
        lambda p, b, x: (p["w"] / x.shape[1]).sum() + x.sum(),
        ("aten.div", "made from the length"),
    ),
    "another way for another length": (
        lambda p, b, x: long_only(x),
        (
            "takes another way for another number of positions",
            "aten.cos",
            "aten.sin",
            "must not depend on the number of positions",
        ),
    ),
    "one by one": (
        lambda p, b, x: one_by_one(x),
        ("takes another way for another number of positions",),
    ),
    "rows one by one": (
        lambda p, b, x: sum(r.sin().sum() for r in x.transpose(0, 1)),
        ("gives 4 tensors on a rank and 8",),
    ),
    "positions cut in blocks": (
        lambda p, b, x: x.unflatten(1, (-1, 2)).prod(2).sum(),
        ("aten.view", "cuts positions"),
    ),
    "positions in groups of features": (
        lambda p, b, x: x.reshape(B, D, -1).prod(1).sum(),
        ("aten.view", "cuts positions apart"),
    ),
    "a token before all": (
        lambda p, b, x: torch.cat([p["token"].expand(B, 1, D), x], 1).sin().sum(),
        ("aten.cat", "before or behind a rank's slice", "before the sequence is split"),
    ),
    "squeeze": (
        lambda p, b, x: x[:, :, 0].reshape(B, -1, 1, 2).sum(),
        ("aten.view", "cuts positions apart"),
    ),
    "repeated to the length": (
        lambda p, b, x: (p["w"].repeat(x.shape[1], 1).sin()[: x.shape[1]] * x).sum(),
        ("aten.repeat", "as often as a rank has positions"),
    ),
    # totals and weights
    "mean of the loss": (
        lambda p, b, x: F.cross_entropy((x @ p["table"].T).flatten(0, 1), b["labels"].flatten()),
        ("aten.nll_loss_forward", "number of labels", "reduction='sum'"),
    ),
    "mean of squares": (
        lambda p, b, x: F.mse_loss(x, b["x"]),
        ("Mean.total is a mean over a rank's positions", "reduction='sum'", "as Mean.weight"),
    ),
    "mean": (
        lambda p, b, x: x.mean(),
        ("Mean.total is a mean over a rank's positions", "reduction='sum'"),
    ),
    "sum over count": (
        lambda p, b, x: x.sum() / x.numel(),
        ("Mean.total is a mean over a rank's positions",),
    ),
    "mean times labels": (
        lambda p, b, x: x.mean() * (b["labels"] > 0).sum(),
        ("aten.mul", "a mean over one rank's positions"),
    ),
    "unscaled penalty": (
        lambda p, b, x: x.sum() + p["w"].pow(2).sum(),
        (
            "aten.add",
            "the same on every rank",
            "once for each of them",
            "number of this rank's tokens",
        ),
    ),
    "constant added": (
        lambda p, b, x: x.sum() + 1.0,
        ("aten.add", "the number 1", "once for each of them"),
    ),
    "total without the sequence": (
        lambda p, b, x: (b["all"] * p["a"]).sum(),
        ("Mean.total is the same on every rank", "has to come from the split sequence"),
    ),
    "weight that is a number": (
        lambda p, b, x: fp.Mean(x.sum(), torch.ones(())),
        ("Mean.weight is the number 1", "has to come from the split sequence"),
    ),
    "weight that is a mean": (
        lambda p, b, x: fp.Mean(x.sum(), (b["labels"] > 0).double().mean()),
        ("Mean.weight is a mean",),
    ),
    "weight that is less than the length": (
        lambda p, b, x: fp.Mean(x.sum(), torch.tensor(float(x.shape[1] - 1))),
        ("Mean.weight is the number 3 (7 on one device)", "does not add up"),
    ),
    "weight kept from zero": (
        lambda p, b, x: fp.Mean(x.sum(), (b["labels"] > 0).sum().clamp(min=1)),
        ("Mean.weight", "aten.clamp", "it is not linear"),
    ),
    "total over its own weight": (
        lambda p, b, x: x.sum() / (b["labels"] > 0).sum(),
        ("aten.div", "it divides by a sum over one rank's positions"),
    ),
    "a row's loss": (
        lambda p, b, x: fp.Mean(x.sum(1).logsumexp(1).sum(), count(x)),
        ("aten.logsumexp", "it is not linear", "a sum over one rank's positions"),
    ),
    # collectives
    "mean of means": (
        lambda p, b, x: (x - fp.pmean(x.mean(), "seq")).pow(2).sum(),
        ("fp.psum", "a mean over one rank's positions", "take the sum over positions first"),
    ),
    "mean of sums": (
        lambda p, b, x: (x - fp.pmean(x.sum(), "seq")).pow(2).sum(),
        (
            "fp.pmean at test_refused_local_sizes.py",
            "unequal numbers of positions",
            "fp.psum of a sum over fp.psum of a count",
        ),
    ),
    "sum over ranks of a slice": (
        lambda p, b, x: fp.psum(x, "seq").pow(2).sum(),
        ("fp.psum", "take the sum over positions first"),
    ),
    "sum over ranks of what all have": (
        lambda p, b, x: x.sum() * fp.psum(p["a"].sum(), "seq"),
        ("fp.psum", "hold it once for every rank"),
    ),
    "total that is whole already": (
        lambda p, b, x: fp.psum(x.sum(), "seq"),
        ("Mean.total is the same on every rank",),
    ),
    "maximum over ranks": (
        lambda p, b, x: (x - fp.pmax(x, "seq")).pow(2).sum(),
        ("fp.pmax", "not a maximum over positions"),
    ),
    "place among ranks": (
        lambda p, b, x: (x * fp.axis_index("seq")).sum(),
        ("fp.axis_index over 'seq'", "fp.positions(x, dim) numbers positions"),
    ),
    "neighbour rank": (
        lambda p, b, x: (x * fp.ppermute(x, "seq", [(0, 0)])).sum(),
        ("fp.ppermute over 'seq'",),
    ),
    "all ranks' slices": (
        lambda p, b, x: fp.all_gather(x, "seq", dim=1).sum(),
        ("fp.all_gather over 'seq'",),
    ),
    "number of ranks": (
        lambda p, b, x: (x / fp.axis_size("seq")).sin().sum(),
        ("aten.div", "the number 2 (1 on one device)"),
    ),
    # gradients
    "gradient that is clipped": (
        lambda p, b, x: Clipped.apply(x).sum(),
        ("autograd.Function Clipped", "takes the norm"),
    ),
    "gradient that is a mean": (
        lambda p, b, x: Averaged.apply(x, p["w"]).sum(),
        (
            "autograd.Function Averaged",
            "a mean over one rank's positions",
            "not the gradient that one device makes",
        ),
    ),
    "hook on a gradient": (
        lambda p, b, x: hooked(x),
        ("hook on a gradient", "at test_refused_local_sizes.py", "after fp.value_and_grad"),
    ),
    "hook on a node": (lambda p, b, x: hooked_node(x), ("hook on a gradient",)),
    "hooks on what is saved": (
        lambda p, b, x: hooked_saves(x),
        ("on tensors that are saved for one at test_refused_local_sizes.py",),
    ),
    "hook of a module": (lambda p, b, x: hooked_module(x), ("hook on a gradient",)),
    "gradient through attention": (
        lambda p, b, x: (x * torch.autograd.grad(attend(x), x, retain_graph=True)[0]).sum(),
        ("takes a gradient through attention", "Leave gradients to fp.value_and_grad"),
    ),
    "gradient penalty over positions": (
        lambda p, b, x: torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0].norm(),
        ("aten.linalg_vector_norm", "takes the norm"),
    ),
    # randomness
    "random numbers": (
        lambda p, b, x: (x * torch.rand(x.shape)).sum(),
        ("aten.rand", "draws random values"),
    ),
    "dropout": (
        lambda p, b, x: F.dropout(x, 0.5).sum(),
        ("draws random values", "Draw them outside the loss"),
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_it_is_refused(name: str) -> None:
    check_refused(*MISUSES[name])


# Those that plain pytest runs on these ranks too.
EVERYWHERE = {
    "arange as positions",
    "division by the length",
    "mean of the loss",
    "place among ranks",
    "rows one by one",
}


@pytest.mark.parametrize(("name", "how"), grid(MISUSES, UNEVEN, EVERYWHERE, turns=False))
def test_it_is_refused_on_any_ranks(name: str, how: dict[str, Any]) -> None:
    check_refused_on(MISUSES[name][0], how)


def test_memory_that_is_shared_for_one_length_alone() -> None:
    """With one position, a transposed tensor is contiguous as it is, and what is written to it is
    written to the other."""

    def body(p: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
        x = b["x"] * 2
        x.transpose(1, 2).contiguous().add_(1.0)
        return (x * p["a"]).sum()

    params, batch = inputs()
    with refused(
        SequenceError,
        "aten.add_",
        "a copy for one length, and to a view for another",
        "Write to a clone",
    ):
        proven(loss_of(body), params, batch, splits(heads=8))
    proven(loss_of(body), params, batch, splits())


def test_a_mean_on_a_rank_that_has_no_positions() -> None:
    """Also of a fill: it is not a number there."""
    loss = loss_of(lambda p, b, x: x.sum() + x.new_ones(x.shape).mean() * count(x))
    params, batch = inputs()
    proven(loss, params, batch, splits())
    with refused(
        SequenceError,
        "aten.mean",
        "the mean over positions, of which a rank has none",
        "This rank has 0 positions",
    ):
        proven(loss, params, batch, splits(heads=9))


def test_gradients_that_depend_on_the_length() -> None:
    def body(p: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(x.shape[1] > 4):
            x = x.sin()
        return (x * p["a"]).sum()

    params, batch = inputs()
    with refused(SequenceError, "takes another way for another number of positions"):
        proven(loss_of(body), params, batch, splits())


def test_a_plain_scalar_is_refused() -> None:
    params, batch = inputs()
    with refused(BatchError, "the sequence is split", "plain scalar", "fp.Mean(total, weight)"):
        proven(lambda p, b: (b["x"] * p["a"]).sum(), params, batch, splits())


def test_a_loss_without_attention_is_refused() -> None:
    params, batch = inputs()
    with refused(SequenceError, "no attention over it was seen", "attn_implementation='sdpa'"):
        proven(loss_of(lambda p, b, x: x.sum()), params, batch, splits(), attention=True)
    with refused(SequenceError, "no attention over it was seen"):
        proven(
            loss_of(lambda p, b, x: x.sum() + 0 * attend(b["all"]) * count(x)),
            params,
            batch,
            splits(),
            attention=True,
        )


AUX: dict[str, tuple[Callable[[Any, torch.Tensor], Any], tuple[str, ...]]] = {
    "mean of a mean": (
        lambda b, x: fp.Mean(x.mean(), count(x)),
        ("aux['a'].total is a mean over",),
    ),
    "weight of one": (
        lambda b, x: fp.Mean(x.sum(), torch.ones(())),
        ("aux['a'].weight is the number 1",),
    ),
    "rows that mix": (
        lambda b, x: fp.Rows(x.cumsum(1)),
        ("aux['a'] is not what one device computes", "aten.cumsum"),
    ),
    "rows of sums": (
        lambda b, x: fp.Rows(x.sum(1)),
        ("aux['a'], fp.Rows along dim 0, is a sum over one rank's",),
    ),
    "rows of merged dims": (
        lambda b, x: fp.Rows(x.flatten(0, 1)),
        ("aux['a'], fp.Rows along dim 0", "(rows, positions)"),
    ),
    "rows along positions": (
        lambda b, x: fp.Rows(x, 1),
        ("fp.Rows along dim 1", "in a dim of their own"),
    ),
    "rows of a slice's length": (
        lambda b, x: fp.Rows(torch.ones(B, x.shape[1])),
        ("aux['a'], fp.Rows along dim 0",),
    ),
}


@pytest.mark.parametrize("name", AUX)
def test_an_aux_value_is_refused(name: str) -> None:
    make, words = AUX[name]
    params, batch = inputs()
    loss = loss_of(lambda p, b, x: x.sum())
    with refused(SequenceError, *words):
        proven(
            lambda p, b: (loss(p, b), {"a": make(b, b["x"] * p["a"])}),
            params,
            batch,
            splits(),
            has_aux=True,
        )


def test_operands_of_equal_shapes_that_lie_otherwise() -> None:
    params, batch = inputs()
    batch["half"] = batch["all"][:, :4]
    loss = loss_of(lambda p, b, x: attend(x) + attend(b["half"]) * count(x))
    with refused(
        SequenceError,
        "another call of fp.attention has operands of the same shapes",
        "another number of dims or rows",
    ):
        proven(loss, params, batch, splits())


def test_what_is_wrong_on_one_device_is_told_as_there() -> None:
    params, batch = inputs()
    with refused(
        TraceError, "decides by the value of a tensor at test_refused_local_sizes.py", "torch.where"
    ):
        proven(
            loss_of(lambda p, b, x: x.sum() if x.sum() > 0 else -x.sum()), params, batch, splits()
        )
    with pytest.raises(RuntimeError, match="reduction dim"):
        proven(loss_of(lambda p, b, x: (x @ p["table"]).sum()), params, batch, splits())
    scale = torch.ones(D, dtype=torch.float64)
    with refused(
        TraceError, "a tensor that did not come in through its arguments", "pass it through"
    ):
        proven(loss_of(lambda p, b, x: (x * scale).sum()), params, batch, splits())
