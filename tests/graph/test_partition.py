"""Cuts: units run by hand are eager PyTorch, to the bit; what is carried, folded, rebuilt, shared
and deferred."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.models import D, batch, block, count, loss_fn, params
from support.units import assert_units_are_eager, heavy, ops, traced, units
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import funcpipe as fp
from funcpipe._src.graph.partition import Units, cut
from funcpipe._src.graph.unit_code import flops
from funcpipe._src.program import owners, partial_segments

Block = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (weight, rows) -> rows


def chain(fn: Block) -> Callable:
    """A loss whose blocks are a function of one weight and the rows."""

    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = fp.stage_boundary(fn(w, x))
        return fp.Mean(x.pow(2).sum(), count(x))

    return loss


def attention(w: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    q = (x @ w).view(2, -1, 2, D // 2).transpose(1, 2)
    return x + F.scaled_dot_product_attention(q, q, q, **options).transpose(1, 2).reshape(-1, D)


class Odd(torch.autograd.Function):
    """A product whose gradients are not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return 2 * (g @ w.t()), 3 * (x.t() @ g)


def in_place(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = x @ w + 1
    y.mul_(2)
    y[:, 0] = 0
    return x + y.relu_()


def hooked(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = x @ w
    if y.requires_grad:
        y.register_hook(lambda g: g * 0.5)
    return y.tanh()


def half_graded(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        still = x @ w
    return (x @ w).tanh() + still + x.detach()


def selective(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, w, x, use_reentrant=False, context_fn=contexts)


LINEAR = torch.nn.Linear(D, D, device="meta")  # its own weights are never read
BLOCKS: dict[str, Block] = {
    "tanh": block,
    "layer_norm": lambda w, x: F.layer_norm(x, (D,), w[0], w[1]) @ w,
    "rms_norm": lambda w, x: F.rms_norm(x, (D,), w[0]) @ w,
    "group_norm": lambda w, x: F.group_norm(x @ w, 2, w[0], w[1]),
    "batch_norm": lambda w, x: F.batch_norm(x @ w, None, None, w[0], w[1], training=True),
    "attention": attention,
    "causal attention": functools.partial(attention, is_causal=True),
    "masked attention": lambda w, x: attention(w, x, attn_mask=torch.ones(4, 4).tril().bool()),
    "convolution": lambda w, x: torch.tanh(
        F.conv2d(x.view(2, 1, -1, D), w[:3, :3].reshape(1, 1, 3, 3), padding=1)
    ).view(-1, D),
    "checkpoint": lambda w, x: checkpoint(block, w, x, use_reentrant=False),
    "nested checkpoint": lambda w, x: checkpoint(
        lambda w, x: checkpoint(block, w, x, use_reentrant=False) * 2, w, x, use_reentrant=False
    ),
    "selective checkpoint": selective,
    "custom Function": lambda w, x: torch.tanh(Odd.apply(x, w)),
    "in place": in_place,
    "hook": hooked,
    "no_grad and detach": half_graded,
    "unbind": lambda w, x: torch.stack([torch.tanh(r @ w) for r in x]),
    "split": lambda w, x: torch.cat([c.sin() for c in (x @ w).split(2, -1)], -1),
    "chunk of a param": lambda w, x: torch.cat([x @ c for c in w.chunk(2, -1)], -1),
    "row of a param": lambda w, x: x * w[1] + w.unbind(0)[0],
    "max and sort": lambda w, x: (x @ w).sort(-1).values + x.max(-1, keepdim=True).values,
    "topk and scatter": lambda w, x: torch.zeros_like(x).scatter(
        -1, *reversed((x @ w).topk(2, -1))
    ),
    "index by a list": lambda w, x: (x @ w)[[1, 0, 3, 2, 5, 4, 7, 6]],
    "complex": lambda w, x: torch.view_as_real(
        torch.view_as_complex((x @ w).view(-1, 2, 2)) * (1 + 2j)
    ).flatten(1),
    "fft": lambda w, x: torch.fft.ifft(torch.fft.fft(x @ w) * 2).real,
    "solve": lambda w, x: torch.linalg.solve(w @ w.t() + torch.eye(D, dtype=w.dtype), x.t()).t(),
    "constants": lambda w, x: (
        x @ w * torch.tensor([1.0, 2, 3, 4]) + torch.linspace(0, 1, D, dtype=x.dtype)
    ),
    "not contiguous": lambda w, x: (w.t() @ x.t()).t().tanh(),
    "strided": lambda w, x: (x @ torch.cat([w, w], 1)).tanh()[:, ::2],
    "expanded": lambda w, x: (x @ w).sum(-1, keepdim=True).expand(-1, D),
    "vmap": lambda w, x: torch.vmap(lambda r: torch.tanh(r @ w))(x),
    "torch.func.grad": lambda w, x: torch.func.grad(lambda y: torch.tanh(y @ w).sum())(x) + x,
    "functional_call": lambda w, x: torch.func.functional_call(
        LINEAR, {"weight": w, "bias": w[0]}, (x,)
    ).tanh(),
    "a param that gets no gradient": lambda w, x: x.sin() @ w.detach(),
    "nothing": lambda w, x: x,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_units_are_eager_to_the_bit(name: str) -> None:
    assert_units_are_eager(chain(BLOCKS[name]), params(3), batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    assert_units_are_eager(chain(attention), params(3, dtype), batch(dtype=dtype))


def test_autocast() -> None:
    def cast(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.tanh(x @ w).float()

    assert_units_are_eager(chain(cast), params(3, torch.float32), batch(dtype=torch.float32))


# ---- tied params, skips, pytrees


def language_model(p: Any, b: Any) -> fp.Mean:
    """Embedding and head are one leaf; a skip over all blocks; a frozen table; a boundary that
    carries a dict."""
    x = F.embedding(p["table"][b["ids"]], p["embed"])
    first = x
    for w in p["w"]:
        out = fp.stage_boundary(
            {
                "x": block(p["w"][0], block(w, x)),
                "mask": b["ids"] > 2,
                "n": 3,
                "none": None,
                "on": True,
            }
        )
        x = out["x"] * out["n"] if out["on"] else x
    logits = F.rms_norm(x + first, (D,)) @ p["embed"].t()
    losses = F.cross_entropy(logits.flatten(0, 1), b["ids"].flatten(), reduction="none")
    return fp.Mean((losses * out["mask"].flatten()).sum(), out["mask"].sum())


VOCAB = 7


def language(layers: int = 3) -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(0)
    embed = torch.randn(VOCAB, D, generator=g, dtype=torch.float64)
    p = {**params(layers), "embed": embed, "table": torch.arange(VOCAB).flip(0)}
    return p, {"ids": torch.randint(VOCAB, (4, 3), generator=g)}


def test_tied_leaves_have_a_partial_gradient_for_every_segment_that_uses_them() -> None:
    p, b = language()
    c = assert_units_are_eager(language_model, p, b)
    segments = dict(zip(optree.tree_paths(p), partial_segments(c), strict=True))
    assert segments["embed",] == (3, 0) and segments["table",] == ()
    assert segments["w", 1] == (1,) and set(segments["w", 0]) == {0, 1, 2}
    places = dict(
        zip(optree.tree_paths(p), owners(c, [(0,), (1,), (2, 3)], (0, 1, 2)), strict=True)
    )
    assert places == {
        ("embed",): {0, 2},
        ("table",): {0},
        ("w", 0): {0, 1, 2},
        ("w", 1): {1},
        ("w", 2): {2},
    }


def test_one_gradient_of_two_leaves() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = fp.stage_boundary(b["x"] @ (p["a"] + p["b"]))
        return fp.Mean((x + p["c"]).sum(), count(x))

    w = params(3)["w"]
    assert_units_are_eager(loss, dict(zip("abc", (*w[:2], w[2][0]), strict=True)), batch())


def test_params_cast_at_the_top_belong_to_the_segments_that_use_them() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        p = optree.tree_map(lambda w: w.to(torch.bfloat16), p)
        return chain(block)(p, {"x": b["x"].bfloat16()})

    c = assert_units_are_eager(loss, params(3, torch.float32), batch(dtype=torch.float32))
    assert partial_segments(c) == ((0,), (1,), (2,))
    assert owners(c, [(0,), (1,), (2, 3)], (0, 1, 2)) == [{0}, {1}, {2}]
    for u in c.units.values():  # weights come in as they are held, and are cast where they are used
        assert all(v.dtype == torch.float32 for v in u.inputs if v.kind == "param")
        assert u.kind == "W" or not any(
            v.shape == (D, D) for v in u.outputs if v not in sum(c.grads, ())
        )


# ---- constants, views, values of the batch


def masked(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A block that makes a mask for itself, used turned around in the backward pass."""
    mask = torch.ones(len(x), len(x), dtype=x.dtype).tril()
    return torch.tanh(mask @ (x * torch.arange(D, dtype=x.dtype).sin()) @ w)


def test_constants_are_folded_once_whatever_the_depth() -> None:
    for depth in (2, 5):
        c = assert_units_are_eager(chain(masked), params(depth), batch())
        assert sorted(v.shape for v in c.constants) == [
            (),
            (D,),
            (8, 8),
        ]  # the number of rows, the sines, the mask
        assert not any(v in c.constants for u in c.units.values() for v in u.outputs)
        assert not {"tril", "sin", "arange"} & {name for u in c.units.values() for name in ops(u)}


def test_constants_are_the_ranks_own() -> None:
    c = units(chain(masked), params(2), batch())
    for make in c.constants.values():
        assert make().data_ptr() != make().data_ptr()


def carried(c: Units) -> list[str]:
    return [
        str(v) for u in c.units.values() if u.kind == "F" for v in u.outputs if v not in c.heads
    ]


def test_views_are_rebuilt_and_not_carried() -> None:
    def turned(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = (x @ w).view(2, -1, 2, 2).transpose(1, 2)
        return (y.sin() * y[..., :1].expand(-1, -1, -1, 2)).transpose(1, 2).reshape(-1, D)

    c = assert_units_are_eager(chain(turned), params(2), batch())
    assert not any(
        name.startswith(("view", "transpose", "expand", "_unsafe_view", "clone"))
        for name in carried(c)
    )
    assert "mm: float64[8, 4]" in carried(c) and "slice_1: float64[2, 2, 4, 1]" in carried(c)
    first = {v.name: v for v in c.units["F", 0].outputs}
    assert first["slice_1"].storage == "mm" and first["slice_1"].nbytes == first["mm"].nbytes


def test_values_of_the_batch_alone_are_rebuilt_and_not_carried() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x, scale = b["x"], b["x"].cos().sum(1, keepdim=True)
        for w in p["w"]:
            x = fp.stage_boundary(block(w, x) * scale.expand(-1, D))
        return fp.Mean(x.pow(2).sum(), count(x))

    c = assert_units_are_eager(loss, params(3), batch())
    assert all("cos" in ops(c.units[k, s]) for k in "FB" for s in range(3))
    assert not any("cos" in name or "[8, 1]" in name for name in carried(c))


def test_only_what_the_backward_pass_needs_is_carried() -> None:
    c = units(loss_fn, params(3), batch())
    assert carried(c) == [
        f"{name}{'' if s == 0 else f'_{s}'}: float64[8, 4]"
        for s in range(3)
        for name in ("tanh", "add")
    ]


def test_recomputed_blocks_carry_their_input_alone() -> None:
    c = units(chain(BLOCKS["checkpoint"]), params(3), batch())
    assert carried(c) == [f"add{'' if s == 0 else f'_{s}'}: float64[8, 4]" for s in range(3)]


# ---- shared code


@pytest.mark.parametrize(
    "fn", [block, masked, BLOCKS["attention"], BLOCKS["checkpoint"], BLOCKS["layer_norm"]]
)
def test_equal_blocks_share_their_code_whatever_the_depth(fn: Block) -> None:
    codes = [
        {u.code.key for u in units(chain(fn), params(n), batch()).units.values()} for n in (4, 7)
    ]
    assert codes[0] == codes[1] and len(codes[0]) <= 12


def test_code_that_differs_in_a_constant_is_not_shared() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for i, w in enumerate(p["w"]):
            x = fp.stage_boundary(block(w, x) * (1 + i % 2))
        return fp.Mean(x.pow(2).sum(), count(x))

    c = assert_units_are_eager(loss, params(6), batch())
    keys = [c.units["F", s].code.key for s in range(1, 6)]
    assert keys[0] == keys[2] == keys[4] != keys[1] == keys[3]


# ---- I and W


@pytest.mark.parametrize(
    "name", ["tanh", "attention", "layer_norm", "custom Function", "checkpoint"]
)
def test_weight_gradients_wait_also_in_the_first_segment(name: str) -> None:
    c = units(chain(BLOCKS[name]), params(3), batch())
    for s in range(3):
        assert "aten.mm.default" in heavy(c.units["W", s]) and c.units["W", s].outputs == c.grads[s]
        assert s == 0 or len(heavy(c.units["W", s])) == 1
    assert not heavy(c.units["W", 3])


def test_what_comes_before_the_first_block_is_not_on_the_way_to_another_segment() -> None:
    p, b = language()
    c = units(language_model, p, b)
    assert heavy(c.units["W", 0]) == [
        "aten.mm.default",
        "aten.mm.default",
        "aten.embedding_dense_backward.default",
    ]
    assert heavy(c.units["W", 3]) == ["aten.mm.default"]


def test_a_cut_without_i_and_w_has_the_same_f_and_b() -> None:
    whole, both = (cut(traced(loss_fn, params(), batch()), split=split) for split in (False, True))
    assert {k for k, _ in whole.units} == {"F", "B"} and {k for k, _ in both.units} == set("FBIW")
    assert all(both.units[key].code.key == u.code.key for key, u in whole.units.items())


def test_flops_of_grouped_queries() -> None:
    """torch counts an attention's FLOPs for equal numbers of heads only."""
    q, k = (torch.empty(2, h, 8, 16, device="meta", dtype=torch.bfloat16) for h in (4, 2))
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    for x, val in zip(inputs, (q, k, k), strict=True):
        x.meta["val"] = val
    out = graph.call_function(
        torch.ops.aten._scaled_dot_product_flash_attention.default, tuple(inputs)
    )
    out.meta["val"] = (q,)
    assert flops(out) == 2 * 2 * 4 * 8 * 8 * (16 + 16)
