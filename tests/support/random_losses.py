"""Random small loss functions: a few ops, position-wise ones and ones that mix positions, on what
was there before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import funcpipe as fp

Tensors = list[torch.Tensor]
B, D, V = 2, 3, 5


@dataclass(frozen=True)
class Line:
    """An op on chosen tensors, with a few numbers to choose dims and places by."""

    op: str
    operands: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Ops one after another, and how the last tensors become total and weight."""

    lines: tuple[Line, ...]
    total: tuple[int, int]
    weight: int

    def __call__(self, params: Any, batch: Any) -> fp.Mean:
        x = batch["x"]
        have = [
            params["a"],
            params["w"],
            batch["all"],
            params["table"],
            batch["other"],
        ]  # the last are taken most often
        have += [F.embedding(batch["ids"], params["table"]), x @ params["w"], x, x * params["a"]]
        for line in self.lines:
            have.append(
                OPS[line.op](*(have[-1 - i % len(have)] for i in line.operands), *line.numbers[:2])
            )
        last = TOTALS[self.total[0] % len(TOTALS)](have[-1], batch["x"], params)
        if self.total[1]:
            last = last + TOTALS[self.total[1] % len(TOTALS)](have[-2], batch["x"], params)
        return fp.Mean(last, WEIGHTS[self.weight % len(WEIGHTS)](batch))


def _dim(x: torch.Tensor, i: int) -> int:
    return i % max(x.dim(), 1)


def _filled(x: torch.Tensor, y: torch.Tensor, i: int) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[..., i % x.shape[-1]] = y[..., 0] if y.dim() == x.dim() else 2.0
    return out


def _set_part(x: torch.Tensor, i: int, j: int) -> torch.Tensor:
    out = x.clone()
    out.select(_dim(x, i), j % 2).mul_(3.0)
    return out


def _set_constant(x: torch.Tensor, i: int, j: int) -> torch.Tensor:
    """Writes to a part of what is constant along a dim."""
    out = x.select(_dim(x, i), 0).unsqueeze(_dim(x, i)).expand(x.shape) * 2
    out.select(_dim(x, j), 0).add_(1.0)
    return out


def _set_mask(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[x > 0.5] = 0.25
    return out


def _added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape[-1:], dtype=x.dtype)
    for row in x.flatten(0, -2).unbind(0)[:2] if x.dim() > 1 else [x]:
        out = out + row
    out += y.sum()
    return out


def _attention(x: torch.Tensor, i: int) -> torch.Tensor:
    h = x.unsqueeze(1) if x.dim() == 3 else x
    return F.scaled_dot_product_attention(h, h.sin(), h, is_causal=bool(i % 2)).reshape(x.shape)


OPS: dict[str, Callable[..., torch.Tensor]] = {
    # one by one
    "sin": lambda x, i, j: x.sin(),
    "abs": lambda x, i, j: x.abs(),
    "negative": lambda x, i, j: -x,
    "scaled": lambda x, i, j: x * (i + 1) - j,
    "halved": lambda x, i, j: x / 2,
    "clamped": lambda x, i, j: x.clamp(min=-0.5),
    "detached": lambda x, i, j: x.detach(),
    "masked": lambda x, i, j: x.masked_fill(x > 0.3, 0.0),
    "by length": lambda x, i, j: x * x.shape[_dim(x, i)],
    "over length": lambda x, i, j: x / x.shape[_dim(x, i)],
    "by root of length": lambda x, i, j: x / math.sqrt(x.shape[_dim(x, i)]),
    "by count": lambda x, i, j: x * x.numel(),
    "by tensor of count": lambda x, i, j: x * torch.tensor(float(x.numel())),
    "less one position": lambda x, i, j: x * (x.shape[_dim(x, i)] - 1),
    # two
    "add": lambda x, y, i, j: x + y,
    "sub": lambda x, y, i, j: x - y,
    "mul": lambda x, y, i, j: x * y,
    "div": lambda x, y, i, j: x / (1 + y * y),
    "plain div": lambda x, y, i, j: x / (y + 4),
    "where": lambda x, y, i, j: torch.where(x > y, x, y),
    "where zero": lambda x, y, i, j: torch.where(y > 0, x, 0.0),
    "maximum": lambda x, y, i, j: torch.maximum(x, y),
    "addcmul": lambda x, y, i, j: torch.addcmul(x, y, y),
    "lerp": lambda x, y, i, j: torch.lerp(x, y, 0.25),
    # over dims
    "sum": lambda x, i, j: x.sum(_dim(x, i), keepdim=bool(j % 2)),
    "sum of all": lambda x, i, j: x.sum(),
    "mean": lambda x, i, j: x.mean(_dim(x, i), keepdim=bool(j % 2)),
    "mean of all": lambda x, i, j: x.mean(),
    "amax": lambda x, i, j: x.amax(_dim(x, i), keepdim=bool(j % 2)),
    "logsumexp": lambda x, i, j: x.logsumexp(_dim(x, i), keepdim=bool(j % 2)),
    "std": lambda x, i, j: (x * x + 1e-3).var(_dim(x, i), keepdim=bool(j % 2), correction=0),
    "norm": lambda x, i, j: (x + 0.1).norm(dim=_dim(x, i), keepdim=bool(j % 2)),
    "1-norm": lambda x, i, j: torch.linalg.vector_norm(x, 1, dim=_dim(x, i)),
    "count": lambda x, i, j: (x > 0).sum(_dim(x, i)).double(),
    "softmax": lambda x, i, j: x.softmax(_dim(x, i)),
    "cumsum": lambda x, i, j: x.cumsum(_dim(x, i)),
    "flip": lambda x, i, j: x.flip(_dim(x, i)),
    "roll": lambda x, i, j: x.roll(1, _dim(x, i)),
    "sort": lambda x, i, j: x.sort(_dim(x, i)).values,
    "layer norm": lambda x, i, j: F.layer_norm(x, x.shape[-1:]),
    "layer norm of two": lambda x, i, j: F.layer_norm(x, x.shape[-2:]),
    "rms norm": lambda x, i, j: F.rms_norm(x, x.shape[-1:], eps=0.01),
    "normalize": lambda x, i, j: F.normalize(x, dim=_dim(x, i)),
    # elsewhere
    "transpose": lambda x, i, j: x.transpose(_dim(x, i), _dim(x, j)),
    "flat": lambda x, i, j: x.reshape(-1),
    "rows": lambda x, i, j: x.reshape(-1, x.shape[-1]),
    "flatten": lambda x, i, j: x.flatten(min(_dim(x, i), _dim(x, j)), max(_dim(x, i), _dim(x, j))),
    "by row": lambda x, i, j: x.reshape(B, -1),
    "by row and feature": lambda x, i, j: x.reshape(B, -1, D),
    "by feature": lambda x, i, j: x.reshape(-1, D, B),
    "unsqueeze": lambda x, i, j: x.unsqueeze(i % (x.dim() + 1)),
    "squeeze": lambda x, i, j: x.squeeze(),
    "squeeze one": lambda x, i, j: x.squeeze(_dim(x, i)),
    "expand": lambda x, i, j: x.unsqueeze(0).expand(2, *x.shape),
    "expand as": lambda x, y, i, j: x.expand(y.shape),
    "expand to length": lambda x, y, i, j: x.unsqueeze(0).expand(y.shape[_dim(y, i)], *x.shape),
    "repeat": lambda x, i, j: x.repeat(*(2 if d == _dim(x, i) else 1 for d in range(x.dim()))),
    "diagonal": lambda x, i, j: x.diagonal(dim1=_dim(x, i), dim2=_dim(x, i + 1)),
    "unfold": lambda x, i, j: x.unfold(_dim(x, i), 2, 1),
    # some entries
    "narrow": lambda x, i, j: x.narrow(_dim(x, i), 0, 2),
    "to length": lambda x, y, i, j: x[: y.shape[_dim(y, i)]],
    "select": lambda x, i, j: x.select(_dim(x, i), j % 2),
    "last": lambda x, i, j: x.select(_dim(x, i), -1),
    "all of": lambda x, i, j: x.narrow(_dim(x, i), 0, x.shape[_dim(x, i)]),
    "but one": lambda x, i, j: x.narrow(_dim(x, i), 0, x.shape[_dim(x, i)] - 1),
    "chunk": lambda x, i, j: x.chunk(2, _dim(x, i))[j % 2],
    "step": lambda x, i, j: x[..., ::2],
    "at positions": lambda x, y, i, j: x[torch.arange(y.shape[_dim(y, i)]) % x.shape[0]],
    "at global positions": lambda x, y, i, j: x[fp.positions(y, _dim(y, i)) % x.shape[0]],
    "index select": lambda x, i, j: x.index_select(_dim(x, i), torch.tensor([0, 1])),
    "gather": lambda x, y, i, j: x.gather(_dim(x, i), (y > 0).long()),
    "take": lambda x, y, i, j: x[(y > 0).long()],
    # together
    "cat": lambda x, y, i, j: torch.cat([x, y], _dim(x, i)),
    "cat three": lambda x, y, i, j: torch.cat([x, torch.zeros_like(y), x], _dim(x, i)),
    "stack": lambda x, y, i, j: torch.stack([x, y], i % (x.dim() + 1)),
    "pad": lambda x, i, j: F.pad(x, [0, 0] * _dim(x, i) + [j % 2, 1 - j % 2]),
    "matmul": lambda x, y, i, j: x @ y,
    "matmul transposed": lambda x, y, i, j: x @ y.transpose(-1, -2),
    "outer": lambda x, y, i, j: torch.einsum("...i,...j->...ij", x, y),
    "dot": lambda x, y, i, j: torch.einsum("...i,...i->...", x, y),
    "dot over second": lambda x, y, i, j: torch.einsum("bld,ble->bde", x, y),
    "linear": lambda x, y, i, j: F.linear(
        x, y.reshape(-1, x.shape[-1])[:2], torch.ones(2, dtype=x.dtype)
    ),
    "conv1": lambda x, y, i, j: F.conv1d(x, y.reshape(-1)[: x.shape[1]].reshape(1, -1, 1)),
    "conv2": lambda x, y, i, j: F.conv1d(x, y.reshape(-1)[: 2 * x.shape[1]].reshape(1, -1, 2)),
    "mse": lambda x, y, i, j: F.mse_loss(
        x, y.expand(x.shape), reduction=("none", "sum", "mean")[i % 3]
    ),
    "attention": lambda x, i, j: _attention(x, i),
    # from nothing
    "zeros": lambda x, i, j: torch.zeros(x.shape, dtype=x.dtype),
    "ones": lambda x, i, j: torch.ones_like(x),
    "ones of length": lambda x, i, j: x.new_ones(x.shape[_dim(x, i)]),
    "range": lambda x, i, j: torch.arange(x.shape[_dim(x, i)], dtype=x.dtype),
    "range of three": lambda x, i, j: torch.arange(3, dtype=x.dtype),
    "number": lambda x, i, j: torch.full((), 0.5, dtype=x.dtype),
    "length": lambda x, i, j: torch.tensor(float(x.shape[_dim(x, i)]), dtype=x.dtype),
    "positions": lambda x, i, j: fp.positions(x, _dim(x, i)).to(x.dtype),
    "triangle": lambda x, i, j: x.tril(),
    # in place
    "filled": lambda x, y, i, j: _filled(x, y, i),
    "add in place": lambda x, y, i, j: x.clone().add_(y),
    "set a part": lambda x, i, j: _set_part(x, i, j),
    "set a part of a repeat": lambda x, y, i, j: _set_constant(
        x[..., :1, :].expand_as(y) if y.dim() == x.dim() > 1 else x, i, j
    ),
    "set by mask": lambda x, i, j: _set_mask(x),
    "add up": lambda x, y, i, j: _added(x, y),
    "copy in": lambda x, y, i, j: torch.empty_like(x).copy_(y),
    # other ranks
    "psum": lambda x, i, j: fp.psum(x, "seq"),
    "pmean": lambda x, i, j: fp.pmean(x, "seq"),
    "pmax": lambda x, i, j: fp.pmax(x, "seq"),
    "all gather": lambda x, i, j: fp.all_gather(x, "seq", dim=_dim(x, i)),
}
# Of these, programs are made that are allowed, as others are seldom: half of all ops are drawn from
# here.
TAME = (
    "sin", "scaled", "masked", "detached", "add", "sub", "mul", "div", "where", "maximum", "addcmul", "sum", "softmax", "sort",
    "layer norm", "rms norm", "normalize", "transpose", "rows", "flatten", "by row and feature", "unsqueeze", "expand", "narrow",
    "select", "all of", "at global positions", "cat", "stack", "linear", "dot", "attention", "ones", "positions", "filled",
    "set by mask", "add in place", "copy in", "psum",
)  # fmt: skip
BINARY = frozenset(n for n, f in OPS.items() if f.__code__.co_argcount == 4)

TOTALS: tuple[Callable[..., torch.Tensor], ...] = (
    lambda y, x, p: y.sum(),
    lambda y, x, p: (y * y).sum(),
    lambda y, x, p: y.mean() * x.numel(),
    lambda y, x, p: y.sum() + (p["w"] * p["w"]).sum() * x.shape[1],
    lambda y, x, p: y.sum() * x.shape[1],
    lambda y, x, p: y.mean(),
    lambda y, x, p: y.sum() + (p["w"] * p["w"]).sum(),
)
WEIGHTS: tuple[Callable[[Any], torch.Tensor], ...] = (
    lambda b: torch.tensor(float(b["ids"].numel())),
    lambda b: (b["ids"] > 0).sum().double(),
    lambda b: b["x"].new_ones(b["x"].shape[:2]).sum(),
    lambda b: b["x"].new_ones(()),
    lambda b: torch.tensor(float(b["x"].shape[1] - 1)),
)


@st.composite
def programs(draw: Any, most: int = 6) -> Program:
    small = st.integers(0, 8)
    lines = []
    for _ in range(draw(st.integers(1, most))):
        op = draw(st.sampled_from(TAME) | st.sampled_from(sorted(OPS)))
        operands = tuple(draw(st.just(0) | small) for _ in range(2 if op in BINARY else 1))
        lines.append(Line(op, operands, (draw(small), draw(small))))
    first, second = (
        draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5])),
        draw(st.sampled_from([0, 0, 0, 0, 1, 5])),
    )
    return Program(tuple(lines), (first, second), draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4])))


def inputs(
    length: int, other: int, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Params and a batch, with a sequence of another length, and one that all ranks have whole."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    params = {"a": rand(D), "w": rand(D, D), "table": rand(V, D)}
    batch = {"x": rand(B, length, D), "other": rand(B, other, D), "all": rand(B, length, D)}
    return params, batch | {"ids": torch.randint(0, V, (B, length), generator=g)}
