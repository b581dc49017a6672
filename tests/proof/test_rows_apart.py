"""Loss functions whose rows stay apart: each is accepted, and its parts add up to what one device
computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.row_losses import Body, D, N, T, V, check_equal, count, prove
from torch.utils.checkpoint import checkpoint

import funcpipe as fp


def set_column(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 1]
    out[:, 2] += 1
    return out


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (2, -1)).transpose(1, 2)


def attend(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return (
        F.scaled_dot_product_attention(heads(x), heads(x), heads(x.sin()), **options)
        .transpose(1, 2)
        .flatten(2)
    )


def by_hand(x: torch.Tensor) -> torch.Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
    return (x @ x.mT + mask).softmax(-1) @ x


def experts_sorted(p: Any, x: torch.Tensor, expert: torch.Tensor, put_back: Any) -> torch.Tensor:
    """Every row through the matrix of its expert, sorted by experts in between."""
    keys, perm = expert.sort()
    rows = torch.tanh(torch.einsum("nd,nde->ne", x[perm], p["experts"][keys]))
    return put_back(rows, perm)


def inverted(rows: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return rows[inverse]


def two_experts(p: Any, x: torch.Tensor) -> torch.Tensor:
    """Every row to its two best experts, by index_add."""
    share, chosen = (x @ p["w"])[:, :3].softmax(-1).topk(2)
    keys, perm = chosen.reshape(-1).sort(stable=True)
    rows = (
        torch.einsum("nd,nde->ne", x[perm // 2], p["experts"][keys])
        * share.reshape(-1)[perm][:, None]
    )
    return torch.zeros_like(x).index_add(0, perm // 2, rows.sin())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x * x * g


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


def energy(x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(x.sin().square().sum(), x, create_graph=True)[0].square().sum()


def looped(x: torch.Tensor, start: Any) -> torch.Tensor:
    total = start
    for row in x:
        total = total + (row.sin() * row.max()).sum()
    return total


BODIES: dict[str, Body] = {
    # row by row
    "squares": lambda p, b, x: x.square().sum(),
    "linear": lambda p, b, x: F.linear(x, p["w"], p["a"]).sin().sum(),
    "matmul of three dims": lambda p, b, x: (b["seq"] @ p["w"]).sin().sum(),
    "masked": lambda p, b, x: torch.where(b["keep"][:, None], x, 0.0).sum(),
    "masked in place": lambda p, b, x: x.clone().masked_fill_(b["keep"][:, None], 2.0).square().sum(),
    "weighted": lambda p, b, x: (x.sum(1) * b["weight"]).sum(),
    "weighted, and weight": lambda p, b, x: fp.Mean((x.sum(1) * b["weight"]).sum(), b["weight"].sum()),
    "counted": lambda p, b, x: fp.Mean((x.sum(1) * b["keep"]).sum(), b["keep"].sum()),
    "counted in floats": lambda p, b, x: fp.Mean(x.sum(), (b["label"] > 1).double().sum() + 0.0),
    "softmax over features": lambda p, b, x: (x.softmax(-1) * x).sum(),
    "logsumexp of a row": lambda p, b, x: x.logsumexp(-1).sum(),
    "cumsum in a row": lambda p, b, x: b["seq"].cumsum(1).sin().sum() + x.sum(),
    "roll and flip in a row": lambda p, b, x: (b["seq"].roll(1, 1) * b["seq"].flip(1) * p["a"]).sum(),
    "sort in a row": lambda p, b, x: (x.sort(-1).values[:, -1] * x.argsort(-1)[:, 0]).sum(),
    "topk in a row": lambda p, b, x: x.topk(2, -1).values.sum(),
    "max in a row": lambda p, b, x: (x.max(-1).values - x.amin(-1)).square().sum(),
    "norm in a row": lambda p, b, x: (x / (x.norm(dim=-1, keepdim=True) + 0.1)).pow(3).sum(),
    "variance in a row": lambda p, b, x: x.var(-1).sum() + x.std(-1).sum(),
    "minus mean of a row": lambda p, b, x: (x - x.mean(-1, keepdim=True)).square().sum(),
    "minus first feature": lambda p, b, x: (x - x[:, :1]).square().sum(),
    "layer norm": lambda p, b, x: F.layer_norm(x, (D,), p["a"]).pow(3).sum(),
    "rms norm": lambda p, b, x: F.rms_norm(x, (D,), p["a"]).pow(3).sum(),
    "group norm": lambda p, b, x: F.group_norm(x[:, :, None] * b["image"].flatten(1)[:, None], 2).pow(3).sum(),
    "instance norm": lambda p, b, x: F.instance_norm(b["seq"].mT * p["a"][:, None]).pow(3).sum(),
    "batch norm in eval mode": lambda p, b, x: F.batch_norm(x, b["table"][0], b["table"][1].abs() + 1).pow(3).sum(),
    "gelu, silu, relu": lambda p, b, x: (F.gelu(x) + F.silu(x) * F.relu(x)).sum(),
    "glu": lambda p, b, x: F.glu(x).square().sum(),
    "clamped, rounded": lambda p, b, x: (x.clamp(-0.5, 0.5) * (x * 3).round()).sum(),
    "bags": lambda p, b, x: sum(F.embedding_bag(b["tokens"], p["embed"], mode=m).square().sum() for m in ("sum", "mean", "max")),
    "bags, weighted": lambda p, b, x: F.embedding_bag(
        b["tokens"], p["embed"], mode="sum", per_sample_weights=b["seq"][..., 0].sin()
    ).sin().sum(),
    "bags of two": lambda p, b, x: F.embedding_bag(b["tokens"].view(-1, 2), p["embed"], padding_idx=1).sin().sum(),
    "bags by hand": lambda p, b, x: F.embedding_bag(
        b["tokens"].flatten(), p["embed"], torch.arange(0, b["tokens"].numel(), T)
    ).sin().sum(),
    "one_hot": lambda p, b, x: (F.one_hot(b["label"], D) * x).sum(),
    "bucketize": lambda p, b, x: p["embed"][torch.bucketize(b["weight"], torch.arange(-1.0, 2.0, dtype=x.dtype))].sin().sum(),
    # sums
    "mean times count": lambda p, b, x: x.mean() * len(x),
    "half a mean times count": lambda p, b, x: x.sum() + 0.5 * x.mean() * len(x),
    "penalty times count": lambda p, b, x: x.sum() + 0.1 * len(x) * p["w"].square().sum(),
    "penalty times weight": lambda p, b, x: x.sum() + count(b) * p["w"].square().sum(),
    "penalty times counted": lambda p, b, x: fp.Mean(x.sum() + b["keep"].sum() * p["a"].sum(), b["keep"].sum()),
    "penalty for every row": lambda p, b, x: (x.sum(1) + p["w"].square().sum()).sum(),
    "temperature": lambda p, b, x: x.sum() / p["a"][0].exp(),
    "difference of sums": lambda p, b, x: x.square().sum() - 2 * x.sum() + 0.0,
    "square of the norm": lambda p, b, x: x.norm() ** 2,
    "cube of the 3-norm": lambda p, b, x: torch.linalg.vector_norm(x, 3) ** 3,
    "1-norm": lambda p, b, x: torch.linalg.vector_norm(x, 1),
    "sum over rows, then features": lambda p, b, x: (x.sum(0) * p["a"]).sum(),
    "sum of sums": lambda p, b, x: torch.stack([x.sum(), x.sin().sum()]).sum(),
    "dot": lambda p, b, x: x[:, 0] @ b["weight"],
    "einsum": lambda p, b, x: torch.einsum("bd,bd->", x, x.sin()),
    "einsum to a matrix": lambda p, b, x: (torch.einsum("bd,be->de", x, x) * p["w"]).sum(),
    "gram times a param": lambda p, b, x: (x.T @ x * p["w"]).sum(),
    "zero times what meets": lambda p, b, x: x.sum() + 0 * x.roll(1, 0).sum(),
    "sorted, then summed": lambda p, b, x: x[:, 0].sort().values.sin().sum(),
    # losses
    "cross entropy": lambda p, b, x: F.cross_entropy(x, b["label"], reduction="sum"),
    "cross entropy, smooth": lambda p, b, x: F.cross_entropy(x, b["label"], reduction="sum", label_smoothing=0.1),
    "cross entropy, none": lambda p, b, x: (F.cross_entropy(x, b["label"], reduction="none") * b["weight"]).sum(),
    "cross entropy, soft": lambda p, b, x: F.cross_entropy(x, b["x"].softmax(-1), reduction="sum"),
    "cross entropy, weights": lambda p, b, x: F.cross_entropy(x, b["label"], p["a"].detach().abs(), reduction="sum"),
    "cross entropy, ignored": lambda p, b, x: F.cross_entropy(x, b["label"].where(b["keep"], -100), reduction="sum"),
    "cross entropy of tokens": lambda p, b, x: F.cross_entropy(
        (b["seq"] @ p["embed"].T)[:, :-1].flatten(0, 1), b["tokens"][:, 1:].flatten(), reduction="sum"
    ),
    "losses.cross_entropy": lambda p, b, x: fp.losses.cross_entropy(b["seq"] @ p["w"], p["embed"], b["tokens"]).total,
    "nll": lambda p, b, x: F.nll_loss(x.log_softmax(-1), b["label"], reduction="sum"),
    "mse": lambda p, b, x: F.mse_loss(x, b["x"], reduction="sum"),
    "mse mean times count": lambda p, b, x: F.mse_loss(x, b["x"]) * count(b),
    "bce": lambda p, b, x: F.binary_cross_entropy_with_logits(x[:, 0], b["keep"].double(), reduction="sum"),
    "kl": lambda p, b, x: F.kl_div(x.log_softmax(-1), b["x"].softmax(-1), reduction="sum"),
    "huber": lambda p, b, x: F.huber_loss(x, b["x"], reduction="none").mean(1).sum(),
    "cosine": lambda p, b, x: F.cosine_similarity(x, b["x"]).sum(),
    "triplet of a row": lambda p, b, x: F.triplet_margin_loss(x, b["x"], x.sin(), reduction="sum"),
    "preference": lambda p, b, x: -F.logsigmoid(x[:, 0] - x[:, 1]).sum(),
    "clipped ratio": lambda p, b, x: torch.minimum(x[:, 0].exp() * b["weight"], x[:, 0].exp().clamp(0.8, 1.2) * b["weight"]).sum(),
    # numbers of rows, as numbers of rows
    "by row and label": lambda p, b, x: x[torch.arange(len(x)), b["label"]].sin().sum(),
    "last token": lambda p, b, x: (b["seq"][torch.arange(len(x)), b["length"]] * p["a"]).sin().sum(),
    "last token, by gather": lambda p, b, x: (
        b["seq"].gather(1, b["length"][:, None, None].expand(-1, 1, D))[:, 0] * p["a"]
    ).sin().sum(),
    "all rows by number": lambda p, b, x: x[torch.arange(len(x))].sin().sum(),
    "written by row": lambda p, b, x: F.one_hot(b["label"], D).to(x.dtype).scatter(1, b["label"][:, None], 2.0).mul(x).sum(),
    "experts by token": lambda p, b, x: torch.einsum("nd,nde->ne", x, p["experts"][b["expert"]]).sin().sum(),
    "experts sorted, inverted": lambda p, b, x: (experts_sorted(p, x, b["expert"], inverted) * x).sum(),
    "experts sorted, sorted back": lambda p, b, x: (
        experts_sorted(p, x, b["expert"], lambda rows, perm: rows[perm.argsort()]) * x
    ).sum(),
    "experts sorted, index_add": lambda p, b, x: (
        experts_sorted(p, x, b["expert"], lambda rows, perm: torch.zeros_like(x).index_add(0, perm, rows)) * x
    ).sum(),
    "experts sorted, index_put": lambda p, b, x: (
        experts_sorted(p, x, b["expert"], lambda rows, perm: torch.zeros_like(x).index_put((perm,), rows)) * x
    ).sum(),
    "two experts": lambda p, b, x: (two_experts(p, x) * x).sum(),
    "balance within a sequence": lambda p, b, x: (
        F.one_hot(b["tokens"], V).double().mean(1) * (b["seq"] @ p["embed"].T).softmax(-1).mean(1)
    ).sum(),
    # shapes
    "flattened and back": lambda p, b, x: b["seq"].flatten(0, 1).matmul(p["w"]).unflatten(0, (-1, T)).mean(1).sin().sum(),
    "groups of positions": lambda p, b, x: (b["seq"] * p["a"]).flatten(0, 1).unflatten(0, (-1, 3)).mean(1).square().sum(),
    "several entries for a row": lambda p, b, x: (b["pairs"].view(-1, 2, D) * x[:, None]).sin().sum(),
    "pairs of a row": lambda p, b, x: (b["pairs"][:, None].reshape(-1, 2, D).prod(1) * p["a"]).sum(),
    "repeated rows": lambda p, b, x: (x.repeat_interleave(2, 0) * b["pairs"]).sum(),
    "rows along another dim": lambda p, b, x: (b["turned"] * p["places"][:, :1]).sin().sum(),
    "turned and back": lambda p, b, x: (b["seq"].transpose(0, 1) * p["places"][:, None]).cumsum(0).sin().sum(),
    "squeezed": lambda p, b, x: (x[:, None].squeeze(1).unsqueeze(0).squeeze(0)).sin().sum(),
    "expanded": lambda p, b, x: (p["row"].expand(len(x), D) * x).sin().sum(),
    "a token for every row": lambda p, b, x: torch.cat([p["row"].expand(len(x), 1, D), b["seq"]], 1).logsumexp(1).sum(),
    "repeated for every row": lambda p, b, x: (p["places"].repeat(len(x), 1, 1) * b["seq"]).sin().sum(),
    "joined features": lambda p, b, x: torch.cat([x, b["x"], torch.zeros_like(x)], -1).logsumexp(-1).sum(),
    "stacked": lambda p, b, x: torch.stack([x, b["x"]], 1).prod(1).sum(),
    "chunks": lambda p, b, x: (x.chunk(2, -1)[0] * x.split([1, 3], -1)[1][:, :2]).sum(),
    "padded": lambda p, b, x: F.pad(x, (1, 1)).softmax(-1).square().sum(),
    "windows": lambda p, b, x: b["seq"].unfold(1, 3, 1).logsumexp(-1).sum() + x.sum(),
    "set in place": lambda p, b, x: (set_column(x) * p["a"]).sum(),
    "diagonal": lambda p, b, x: ((b["spd"] * p["a"]).diagonal(dim1=1, dim2=2)).sin().sum(),
    "neighbours": lambda p, b, x: (x.view(-1, 2, D)[:, 0] * x.view(-1, 2, D)[:, 1]).sum(),
    "attention of neighbours": lambda p, b, x: attend((x * b["x"]).view(-1, 2, D)).sin().sum(),
    # positions
    "places": lambda p, b, x: (F.embedding(b["tokens"], p["embed"]) + p["places"][torch.arange(T)]).sin().sum(),
    "attention": lambda p, b, x: (attend(b["seq"] * p["a"], is_causal=True) * b["table"]).sum(),
    "attention by hand": lambda p, b, x: by_hand(b["seq"] * p["a"]).sin().sum(),
    "attention, masked": lambda p, b, x: attend(
        b["seq"] * p["a"], attn_mask=(torch.arange(T) <= b["length"][:, None])[:, None, None]
    ).sum(),
    "attention to what all share": lambda p, b, x: F.scaled_dot_product_attention(
        heads(p["places"].expand(len(x), T, D)), heads(b["seq"]), heads(b["seq"])
    ).sin().sum(),
    "dropout": lambda p, b, x: (fp.random.dropout(b["seq"], 0.5, b["key"]) * p["a"]).sin().sum(),
    "conv": lambda p, b, x: F.conv1d(b["seq"].mT, p["conv"], padding=1).sin().sum(),
    "conv2d and pool": lambda p, b, x: F.max_pool2d(F.conv2d(b["image"], p["conv2"], padding=1), 2).square().sum(),
    "adaptive pool": lambda p, b, x: (F.adaptive_avg_pool2d(b["image"] * p["a"][0], 2)).sin().sum(),
    "upsampled": lambda p, b, x: F.interpolate(b["image"] * p["a"][0], scale_factor=2, mode="bilinear").sin().sum(),
    "fft of a row": lambda p, b, x: torch.fft.rfft(b["seq"] * p["a"], dim=1).abs().sum(),
    "inverse of a row": lambda p, b, x: (torch.linalg.inv(b["spd"]) * p["w"]).sin().sum(),
    "solved for a row": lambda p, b, x: torch.linalg.solve(b["spd"], x[..., None]).sin().sum(),
    "cholesky of a row": lambda p, b, x: torch.linalg.cholesky(b["spd"] * (1 + p["a"][0] ** 2)).sin().sum(),
    "distances in a row": lambda p, b, x: torch.cdist(b["seq"], p["places"].expand(len(x), T, D)).sum(),
    "recurrence over positions": lambda p, b, x: sum(torch.tanh(b["seq"][:, t] @ p["w"]).sum() for t in range(T)),
    # whatever else PyTorch can
    "vmap": lambda p, b, x: torch.func.vmap(lambda row: torch.tanh(row @ p["w"]).max())(x).sum(),
    "gradient of a row inside": lambda p, b, x: energy(x),
    "vmap of a gradient": lambda p, b, x: torch.func.vmap(torch.func.grad(lambda r: (r.sin() * p["a"]).sum()))(x).sum(),
    "checkpoint": lambda p, b, x: checkpoint(lambda y, w: torch.tanh(y @ w), x, p["w"], use_reentrant=False).sum(),
    "a gradient of one's own": lambda p, b, x: Cube.apply(x).sum(),
    "a product of one's own": lambda p, b, x: Product.apply(x, p["w"]).sin().sum(),
    "loop over rows": lambda p, b, x: sum(row.logsumexp(0) for row in x),
    "loop over rows and labels": lambda p, b, x: sum((row * weight).sin().sum() for row, weight in zip(x, b["weight"], strict=True)),
    "loop, begun with zeros": lambda p, b, x: looped(x, torch.zeros((), dtype=x.dtype)),
    "rows stacked in a loop": lambda p, b, x: (torch.stack([torch.tanh(row @ p["w"]) for row in x]) * b["x"]).sum(),
    "rows joined in a loop": lambda p, b, x: (torch.cat([row[None].sin() for row in x]) * x).sum(),
}  # fmt: skip


# Of a single entry torch indexes in another way; neighbours come in pairs, all of which are in one
# part.
if not torch.__version__.startswith("2.11."):  # whose quantile looks at values, also of fakes
    BODIES["quantile in a row"] = lambda p, b, x: x.quantile(0.5, -1).sum()
LONG = ("experts sorted, inverted", "neighbours", "attention of neighbours")


@pytest.mark.parametrize("name", BODIES)
def test_rows_that_stay_apart_are_accepted_and_equal(name: str) -> None:
    for parts in (2,) if name in LONG else (2, N):  # four rows in a part, and one
        prove(BODIES[name], parts)
        check_equal(BODIES[name], parts)
