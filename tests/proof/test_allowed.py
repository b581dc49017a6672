"""What the proof allows is what one device computes: functions that people write, and random
ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given
from hypothesis import strategies as st
from support.loss_bodies import (
    FLOAT64,
    PARTS,
    B,
    Body,
    D,
    H,
    V,
    attend,
    count,
    data,
    heads,
    loss_of,
)
from support.models import grid
from support.random_losses import Program, inputs, programs
from support.sequence_ranks import Splits, a_part, far, on_one, on_ranks, proven, sliced
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.functional.dispatch import Held
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.proof.verify import Task, prove
from funcpipe.errors import FuncpipeError, SequenceError

MODULE = torch.nn.Linear(D, D)


def logits(p: Any, x: torch.Tensor) -> torch.Tensor:
    return x @ p["table"].T


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    angle = positions[..., None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat_interleave(2, -1)
    return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin


def rotated_in_place(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin, out = positions[:, None].cos(), positions[:, None].sin(), torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


def rotated_as_complex(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    turns = torch.polar(torch.ones_like(positions, dtype=x.dtype), positions.to(x.dtype))
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns[:, None]
    ).flatten(-2)


def block(p: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + attend(F.rms_norm(x, (D,), p["norm"]), is_causal=True) @ p["w"]
    gate, up, down = (F.layer_norm(x, (D,)) @ p["up"]).chunk(3, -1)
    return x + F.silu(gate) * up + F.dropout(down, 0.0)


def weighed(b: Any) -> torch.Tensor:
    out = torch.zeros_like(b["tokens"], dtype=torch.float64)
    out[b["tokens"] > 1] = 1.0
    out[b["tokens"] > 3] = 0.5
    return out


def added_up(x: torch.Tensor) -> torch.Tensor:
    total, each = torch.zeros((), dtype=x.dtype), torch.zeros(B, dtype=x.dtype)
    for i in range(B):
        total += x[i].sum()
        each[i] = x[i].cos().sum()
    return total + each.sum()


class Straight(torch.autograd.Function):
    """Rounds; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g.clamp(-1, 1)


class Linear(torch.autograd.Function):
    """A product with gradients by hand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, 1).T @ g.flatten(0, 1)


class Squares(torch.autograd.Function):
    """A sum of squares that saves its gradient, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = x @ w
        ctx.save_for_backward(2 * y @ w.T, torch.einsum("bld,ble->de", x, 2 * y))
        return (y * y).sum()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        return tuple(g * saved for saved in ctx.saved_tensors)


def at(b: Any) -> torch.Tensor:
    return fp.positions(b["tokens"])


USES: dict[str, Body] = {
    # losses
    "cross entropy of rows": lambda p, b, x: F.cross_entropy(
        logits(p, x).flatten(0, 1), b["labels"].flatten(), reduction="sum"
    ),
    "cross entropy, classes second": lambda p, b, x: F.cross_entropy(
        logits(p, x).transpose(1, 2), b["labels"], reduction="sum"
    ),
    "smoothed cross entropy": lambda p, b, x: F.cross_entropy(
        logits(p, x).view(-1, V), b["labels"].view(-1), reduction="sum", label_smoothing=0.1
    ),
    "cross entropy by hand": lambda p, b, x: (
        -(
            logits(p, x).log_softmax(-1).gather(-1, b["labels"].clamp(min=0)[..., None])[..., 0]
            * (b["labels"] >= 0)
        ).sum()
    ),
    "cross entropy with weights of classes": lambda p, b, x: F.cross_entropy(
        logits(p, x).flatten(0, 1),
        b["labels"].flatten(),
        weight=p["table"][:, 0].detach().abs(),
        reduction="sum",
    ),
    "cross entropy of a one-hot": lambda p, b, x: (
        -(F.one_hot(b["tokens"], V) * logits(p, x).log_softmax(-1)).sum()
    ),
    "nothing reduced": lambda p, b, x: (
        F.cross_entropy(logits(p, x).flatten(0, 1), b["labels"].flatten(), reduction="none").view(
            B, -1
        )
        * weighed(b)
    ).sum(),
    "squares": lambda p, b, x: F.mse_loss(x, b["x"], reduction="sum"),
    "huber of a table": lambda p, b, x: F.smooth_l1_loss(
        x, p["table"][b["tokens"]], reduction="sum"
    ),
    "a divergence": lambda p, b, x: F.kl_div(
        x.log_softmax(-1), b["x"].softmax(-1), reduction="sum"
    ),
    "a similarity": lambda p, b, x: F.cosine_similarity(x, p["table"][b["tokens"]], dim=-1).sum(),
    "bits": lambda p, b, x: F.binary_cross_entropy_with_logits(
        x[..., 0], b["keep"].double(), reduction="sum"
    ),
    "1-norm": lambda p, b, x: torch.linalg.vector_norm(x, 1) + x.abs().sum(),
    "labels that count": lambda p, b, x: fp.Mean(
        (x * (b["labels"] >= 0)[..., None]).sum(), (b["labels"] >= 0).sum()
    ),
    "a weight of floats": lambda p, b, x: fp.Mean((x.sum(-1) * weighed(b)).sum(), weighed(b).sum()),
    "a weight of ones": lambda p, b, x: fp.Mean(x.sum(), x.new_ones(x.shape[:2]).sum()),
    "a weight that is filled": lambda p, b, x: fp.Mean(
        x.sum(), torch.full((), b["labels"].numel(), dtype=torch.float64)
    ),
    "losses of a module": lambda p, b, x: torch.nn.MSELoss(reduction="sum")(x, b["x"]),
    "losses by row": lambda p, b, x: (x.sum((1, 2)) * b["row"]).sum(),
    "a mean times its count": lambda p, b, x: x.mean() * x.numel(),
    "a mean over rows times its count": lambda p, b, x: (
        (x.mean(1) * b["row"][:, None]).sum() * x.shape[1]
    ),
    "a penalty times the count": lambda p, b, x: x.sum() + 0.01 * p["w"].pow(2).sum() * count(x),
    "a penalty times labels": lambda p, b, x: (
        x.sum() + 0.01 * p["w"].norm() * (b["labels"] >= 0).sum()
    ),
    "two losses": lambda p, b, x: 0.5 * x.sum() - (x.cos().sum() + x.sin().sum(1).sum()) / 3,
    "added up in place": lambda p, b, x: added_up(x),
    "stacked totals": lambda p, b, x: torch.stack(
        [x.sum(), x.cos().sum(), count(x).double()]
    ).sum(),
    "nothing": lambda p, b, x: (x * 0).sum() + torch.zeros((), dtype=x.dtype),
    # position by position
    "mlp": lambda p, b, x: F.gelu(F.linear(x, p["w"], p["a"])).pow(2).sum(),
    "rows and back": lambda p, b, x: (
        (x.reshape(-1, D) @ p["w"]).relu().view(B, -1, D) * b["x"]
    ).sum(),
    "positions first": lambda p, b, x: (
        ((x.transpose(0, 1).contiguous() * b["turned"]) @ p["w"]).sin().sum()
    ),
    "einsum": lambda p, b, x: torch.einsum("bld,de,ble->", x, p["w"], b["x"]),
    "einsum of heads": lambda p, b, x: (
        torch.einsum("blhd,bled->blhe", x.unflatten(2, (2, 2)), x.unflatten(2, (2, 2))).sin().sum()
    ),
    "products of rows": lambda p, b, x: (
        torch.bmm(x.flatten(0, 1)[:, :, None], b["x"].flatten(0, 1)[:, None]).sin().sum()
    ),
    "gradients by hand": lambda p, b, x: (torch.einsum("bld,ble->de", x, b["x"]) * p["w"]).sum(),
    "convolution of 1": lambda p, b, x: F.conv1d(x.transpose(1, 2), p["conv"], p["a"]).relu().sum(),
    "parameter broadcast": lambda p, b, x: (
        (x + p["one"]).sin().sum() + (x * p["a"].expand_as(x)).cos().sum()
    ),
    "parameter for every row": lambda p, b, x: (x * b["row"][:, None, None]).sin().sum(),
    "normalised": lambda p, b, x: (
        F.normalize(x, dim=-1) * x.norm(dim=-1, keepdim=True) + x.amax(-1, keepdim=True)
    ).sum(),
    "softmax of features": lambda p, b, x: (
        (x.softmax(-1) * x.sort(-1).values + x.cumsum(-1)).cos().sum()
    ),
    "top of features": lambda p, b, x: x.topk(2, -1).values.sum() + x.argmax(-1).sum() * 1.0,
    "chunks of features": lambda p, b, x: (
        (x.chunk(2, -1)[0] * x.split([1, 3], -1)[1][..., :2]).sum() + x.unbind(-1)[0].sum()
    ),
    "some features": lambda p, b, x: (
        x[..., 1:].sum() + x[..., -1].cos().sum() + x[0].sin().sum() + x[:, :, [2, 0]].sum()
    ),
    "all positions": lambda p, b, x: (x[:, : x.shape[1]] * x.narrow(1, 0, x.shape[1])).sum(),
    "joined": lambda p, b, x: (
        torch.cat([x, torch.zeros_like(x), b["x"]], -1).sin().sum()
        + torch.stack([x, b["x"]], 1).cos().sum()
    ),
    "joined rows": lambda p, b, x: (
        torch.cat([x.flatten(0, 1), b["x"].flatten(0, 1)], 0).sin().sum()
    ),
    "repeated": lambda p, b, x: (
        x.repeat(1, 1, 2).sin().sum()
        + x.repeat_interleave(2, 2).cos().sum()
        + x.repeat(2, 1, 1).sum()
    ),
    "padded features": lambda p, b, x: F.pad(x, (1, 2), value=1.0).cos().sum(),
    "flipped features": lambda p, b, x: (x.flip(-1) * x.roll(1, 2)).sum(),
    "chosen": lambda p, b, x: (
        torch.where(b["keep"][..., None], x, p["a"]).sin().sum()
        + x.masked_fill(x > 0, 0.0).cos().sum()
    ),
    "chosen sums": lambda p, b, x: torch.where(b["row"] > 0, x.sum((1, 2)), 0.0).sum(),
    "looked up": lambda p, b, x: (
        F.embedding(b["tokens"], p["table"])
        * p["table"][b["tokens"]]
        * p["table"].index_select(0, b["tokens"].flatten()).view(B, -1, D)
    ).sum(),
    "types of tokens": lambda p, b, x: (
        (x + F.embedding(torch.zeros_like(b["tokens"]), p["table"])).sin().sum()
    ),
    "written in place": lambda p, b, x: (
        x.clone().mul_(2).add_(b["x"]).masked_fill_(b["keep"][..., None], 0.5).sin_().sum()
    ),
    "features written": lambda p, b, x: rotated_in_place(x, at(b)).sin().sum(),
    "features scattered": lambda p, b, x: (
        torch.zeros_like(x).scatter_(2, b["tokens"][..., None] % D, 1.0).mul(x).sum()
    ),
    "no gradient": lambda p, b, x: (x.detach() * x).sum(),
    "to other dtypes": lambda p, b, x: (
        (x.float().double() + b["tokens"].to(x.dtype)[..., None]).sin().sum()
    ),
    "modules": lambda p, b, x: (
        torch.func.functional_call(MODULE, {"weight": p["w"], "bias": p["a"]}, (x,)).sin().sum()
    ),
    # positions
    "learned places": lambda p, b, x: (
        (x + p["places"][at(b)]).sin().sum() + F.embedding(at(b), p["places"]).cos().sum()
    ),
    "rotary": lambda p, b, x: rotated(x, at(b)).sin().sum(),
    "rotary, complex": lambda p, b, x: rotated_as_complex(x, at(b)).sin().sum(),
    "rotary by outer product": lambda p, b, x: (
        x * torch.outer(at(b).double(), p["a"]).cos()
    ).sum(),
    "weighed by place": lambda p, b, x: (x * (at(b) % 3 == 0)[:, None]).sum(),
    "the last token alone": lambda p, b, x: (x * (at(b) == b["all"].shape[1] - 1)[:, None]).sum(),
    "places of another dim": lambda p, b, x: (x * fp.positions(x, 2)).sin().sum(),
    "places of what all have": lambda p, b, x: (
        (fp.positions(b["all"]) * b["all"][0, :, 0]).sum() * x.sum()
    ),
    "buckets": lambda p, b, x: (
        p["table"][torch.bucketize(at(b), torch.tensor([1, 3, 5]))].mul(x).sum()
    ),
    "dropout by keys": lambda p, b, x: fp.random.dropout(x, 0.5, b["key"]).sin().sum(),
    # attention
    "transformer": lambda p, b, x: block(p, block(p, x)).pow(2).sum(),
    "transformer, checkpointed": lambda p, b, x: (
        checkpoint(block, p, x, use_reentrant=False).pow(2).sum()
    ),
    "boundaries": lambda p, b, x: fp.stage_boundary(block(p, fp.stage_boundary(x))).pow(2).sum(),
    "not causal": lambda p, b, x: attend(x).sin().sum(),
    "positions first, attention": lambda p, b, x: (
        F.scaled_dot_product_attention(*[b["turned"].transpose(0, 1)[:, None]] * 3).sin().sum()
    ),
    "fewer key heads": lambda p, b, x: (
        F.scaled_dot_product_attention(heads(x), heads(x)[:, :1], heads(x)[:, 1:], enable_gqa=True)
        .sin()
        .sum()
    ),
    "own scale": lambda p, b, x: attend(x, scale=0.3).sin().sum(),
    "of a library's module": lambda p, b, x: (
        F.multi_head_attention_forward(
            x.transpose(0, 1),
            x.transpose(0, 1),
            x.transpose(0, 1),
            D,
            H,
            p["up"].T,
            None,
            None,
            None,
            False,
            0.0,
            p["w"],
            None,
            need_weights=False,
        )[0]
        .sin()
        .sum()
    ),
    "padding": lambda p, b, x: attend(x, attn_mask=b["keep"][:, None, None]).sin().sum(),
    "bias by key": lambda p, b, x: attend(x, attn_mask=(x @ p["a"])[:, None, None]).sin().sum(),
    "bias by query": lambda p, b, x: (
        attend(x, attn_mask=(x @ p["a"])[:, None, :, None]).sin().sum()
    ),
    "whole mask": lambda p, b, x: attend(x, attn_mask=b["pairs"]).sin().sum(),
    "whole bias": lambda p, b, x: attend(x, attn_mask=b["pairs"] * p["a"][0]).sin().sum(),
    "one bias for all": lambda p, b, x: attend(x, attn_mask=p["one"].view(1, 1, 1, 1)).sin().sum(),
    "to a context": lambda p, b, x: attend(x, b["short"] * p["a"]).sin().sum(),
    "to a context with a mask": lambda p, b, x: (
        attend(
            x,
            b["short"] * p["a"],
            attn_mask=(x[..., :3] > 0).transpose(1, 2).transpose(1, 2)[:, None]
            | b["keep"][:, None, :, None],
        )
        .sin()
        .sum()
    ),
    "of documents": lambda p, b, x: (
        fp.attention(
            *[x.unflatten(2, (H, -1))] * 3,
            causal=True,
            cu_seqlens=torch.tensor([0, 1, b["all"].shape[1]]),
        )
        .sin()
        .sum()
    ),
    "along features": lambda p, b, x: (
        F.scaled_dot_product_attention(*[x.flatten(0, 1)[:, None, :, None]] * 3).sin().sum()
    ),
    "along heads": lambda p, b, x: (
        F.scaled_dot_product_attention(*[x.unflatten(2, (2, 2))] * 3).sin().sum()
    ),
    "of what all have": lambda p, b, x: (
        attend(b["all"] * p["a"])[:, -1] * x.sum((1, 2))[:, None]
    ).sum(),
    "and nothing of the mask": lambda p, b, x: (
        torch.ones(x.shape[1], x.shape[1]).tril(),
        attend(x).sum(),
    )[1],
    # gradients
    "gradients through functions": lambda p, b, x: (
        (Straight.apply(x) * Linear.apply(x, p["w"])).sum() + Squares.apply(x, p["w"])
    ),
    "gradients in a checkpoint": lambda p, b, x: checkpoint(
        lambda y, w: Linear.apply(y.sin(), w).cos(), x, p["w"], use_reentrant=False
    ).sum(),
    "vmap": lambda p, b, x: torch.func.vmap(lambda r: (r @ p["w"]).sin().sum(-1))(x).sum(),
    "slopes": lambda p, b, x: torch.func.grad(lambda y: (y.sin() * b["x"]).sum())(x).pow(2).sum(),
}


# Refused on a rank that has no more positions than that: a mean of nothing, or an op that is
# another one for so few.
FEW = {
    "cross entropy, classes second": 0,
    "a mean times its count": 0,
    "a mean over rows times its count": 0,
    "convolution of 1": 0,
    "einsum": 1,
    "einsum of heads": 1,
    "gradients by hand": 1,
    "gradients through functions": 1,
}


# Those that are run on every split by plain pytest too; of the others, each is run on one.
EVERYWHERE = {*FEW, "transformer, checkpointed", "rotary"}


@pytest.mark.parametrize(("name", "kind"), grid(USES, PARTS, EVERYWHERE, turns=True))
def test_it_is_what_one_device_computes(name: str, kind: str) -> None:
    params, batch, splits = data(PARTS[kind])
    loss, least = loss_of(USES[name]), PARTS[kind].length(PARTS[kind].members - 1)
    if least <= FEW.get(name, -1):
        with pytest.raises(SequenceError, match=f"This rank has [{least}1] positions"):
            proven(loss, params, batch, splits)
        return
    found = proven(loss, params, batch, splits)
    assert far(on_one(loss, params, batch), on_ranks(found, loss, params, batch, splits)) < FLOAT64


@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")  # on a rank that has no positions
@given(programs(), st.data())
def test_a_random_program_is_refused_or_equal(program: Program, draw: st.DataObject) -> None:
    """Whatever is allowed computes what one device computes: loss, weight and gradients."""
    heads, ring = draw.draw(
        st.sampled_from([(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]), label="heads, ring"
    )
    part = a_part(
        draw.draw(st.integers(2, 9), label="length"),
        heads,
        ring,
        draw.draw(st.booleans(), label="zigzag"),
    )
    other = replace(part, size=draw.draw(st.integers(1, 9), label="other length"))
    params, batch = inputs(part.size, other.size, draw.draw(st.integers(0, 9), label="seed"))
    splits: Splits = {"x": (1, part), "ids": (1, part), "other": (1, other)}
    try:
        one = on_one(program, params, batch)
    except (RuntimeError, IndexError, ValueError, TypeError, FuncpipeError):
        assume(False)  # no program
    assume(all(x.isfinite().all() for x in one))
    try:
        found = proven(program, params, batch, splits)
    except FuncpipeError:
        event("refused")
        return
    event("allowed")
    assert (
        far(one, on_ranks(found, program, params, batch, splits)) < 1e-9
    )  # of random quotients and powers


# ---- other sequences, losses and axes


def test_a_sequence_for_queries_and_another_for_keys() -> None:
    long, short = a_part(9, 2), a_part(5, 2)
    params, batch, _ = data(long)
    batch["memory"] = torch.randn(B, 5, D, dtype=torch.float64)
    splits: Splits = {"x": (1, long), "memory": (1, short)}
    loss = loss_of(lambda p, b, x: attend(x, b["memory"] * p["a"]).sin().sum())
    found = proven(loss, params, batch, splits, attention=True)
    assert list(found[0].calls.values()) == [Held(long, short)]
    assert far(on_one(loss, params, batch), on_ranks(found, loss, params, batch, splits)) < FLOAT64


def test_chunked_losses() -> None:
    params, batch, splits = data(PARTS["uneven"])
    for head in (True, False):

        def loss(p: Any, b: Any, head: bool = head) -> fp.Mean:
            x = torch.tanh(b["x"] * p["a"])
            return fp.losses.cross_entropy(
                x if head else logits(p, x), p["table"] if head else None, b["labels"]
            )

        found = proven(loss, params, batch, splits)
        assert list(found[0].calls.values()) == [PARTS["uneven"]]
        assert (
            far(on_one(loss, params, batch), on_ranks(found, loss, params, batch, splits)) < FLOAT64
        )


@pytest.mark.parametrize("kind", ["two", "uneven", "ring of heads"])
def test_sums_over_ranks(kind: str) -> None:
    """A global mean, and a loss of the pooled sequence, which every rank computes and its tokens
    share."""
    params, batch, splits = data(PARTS[kind])
    axes = PARTS[kind].axes
    over = lambda x: fp.psum(x, axes)  # noqa: E731
    uses: dict[str, Body] = {
        "centred": lambda p, b, x: (
            (x - over(x.sum(1))[:, None] / over(b["keep"].new_ones(B, x.shape[1]).sum()))
            .pow(2)
            .sum()
        ),
        "softmax": lambda p, b, x: (x.exp() / over(x.exp().sum(1, keepdim=True))).pow(2).sum(),
        "pooled": lambda p, b, x: (over(x.sum(1)).logsumexp(1) * b["row"]).sum() * count(x),
        "axis by axis": lambda p, b, x: (
            x.sum() / fp.psum(fp.psum(b["keep"].sum(), axes[0]), axes[1:])
        ),
        "largest weight": lambda p, b, x: x.sum() * fp.pmax(p["w"].sum(), axes),
    }
    for name, body in uses.items():
        loss = loss_of(body)
        found = proven(loss, params, batch, splits)
        assert (
            far(on_one(loss, params, batch), on_ranks(found, loss, params, batch, splits)) < FLOAT64
        ), name


def test_collectives_over_rows() -> None:
    """The data axes are nothing to positions: what is summed over them stays split."""
    part, mode = PARTS["two"], FakeTensorMode()
    params, batch, splits = data(part)
    mesh = fp.Mesh(data=2, seq=2)
    local = {k: sliced(x, splits.get(k), 0) for k, x in batch.items()}
    leaves = [fake(local[k].shape, local[k], mode) for k in sorted(local)]
    fakes = {k: fake(x.shape, x, mode) for k, x in params.items()}

    def allowed(body: Body) -> None:
        each = [splits.get(k) for k in sorted(batch)]
        spec = tree.flatten(batch)[1]
        prove(Task(loss_of(body), False, fakes, leaves, spec, each, 0, mode, mesh, ("data", "seq")))

    allowed(lambda p, b, x: (x - fp.pmean(x, "data")).pow(2).sum() + fp.pmax(x, "data").sum())
    allowed(lambda p, b, x: (fp.all_gather(x, "data") * fp.axis_index("data")).sum())
    allowed(
        lambda p, b, x: fp.psum_scatter(x, "data").sum() + fp.ppermute(x, "data", [(0, 1)]).sum()
    )
    allowed(lambda p, b, x: x.sum() / fp.psum(b["keep"].sum(), ("data", "seq")))
    allowed(lambda p, b, x: fp.all_to_all(x, "data", 0, 2).sin().sum())
    for body in (
        lambda p, b, x: x.sum() * fp.psum(p["a"].sum(), ("data", "seq")),
        lambda p, b, x: (x * fp.axis_index(("data", "seq"))).sum(),
        lambda p, b, x: fp.pmax(x.sum(), "data"),
        lambda p, b, x: fp.psum_scatter(x, "data", dim=1).sin().sum(),
        lambda p, b, x: (
            fp.psum(torch.zeros_like(x), "seq").sin().sum()
        ),  # ranks have other shapes, though all is zero
    ):
        with pytest.raises(SequenceError):
            allowed(body)
