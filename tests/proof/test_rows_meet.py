"""Loss functions in which rows of the batch meet, or whose parts do not add up: each is refused, by
op and line.

On one device every one of them is a fine program. Run part by part as it is, each would give other
numbers without a word.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.row_losses import Body, D, N, T, count, prove, refused

import funcpipe as fp


def written(x: torch.Tensor, at: Any, value: Any) -> torch.Tensor:
    out = x.clone()
    out[at] = value
    return out.square().sum()


def last_of_loop(x: torch.Tensor) -> torch.Tensor:
    state = torch.zeros_like(x[0])
    for row in x:
        state = torch.tanh(state + row)
    return state.sum()


def weighted_loop(x: torch.Tensor) -> torch.Tensor:
    return sum(i * row.sum() for i, row in enumerate(x))  # type: ignore[return-value]


def best_of_loop(x: torch.Tensor) -> torch.Tensor:
    best = x[0].sum()
    for row in x:
        best = torch.maximum(best, row.sum())
    return best


def faded_loop(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for row in x:
        total = 0.9 * total + row.sum()
    return total


class MeanGradient(torch.autograd.Function):
    """Whose gradient is that of the mean row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g - g.mean(0)


class UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g / g.norm()


class MeanOfWeight(torch.autograd.Function):
    """A product whose gradient of the weight is a mean over rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g / len(x)


def hooked(x: torch.Tensor) -> torch.Tensor:
    x = x * 2
    x.register_hook(lambda g: g / g.norm())
    return x.sum()


NEIGHBOURS: dict[str, tuple[Body, str]] = {
    # along the rows
    "softmax": (lambda p, b, x: (x.softmax(0) * x).sum(), "softmax"),
    "log_softmax": (lambda p, b, x: x.log_softmax(0).sum(), "softmax"),
    "cumsum": (lambda p, b, x: x.cumsum(0).square().sum(), "cumsum"),
    "cumprod": (lambda p, b, x: x.cumprod(0).sum(), "cumprod"),
    "cummax": (lambda p, b, x: x.cummax(0).values.sum(), "cummax"),
    "logcumsumexp": (lambda p, b, x: x.logcumsumexp(0).sum(), "logcumsumexp"),
    "roll": (lambda p, b, x: (x * x.roll(1, 0)).sum(), "roll"),
    "flip": (lambda p, b, x: (x * x.flip(0)).sum(), "flip"),
    "flipud": (lambda p, b, x: (x * x.flipud()).sum(), "flip"),
    "sort": (lambda p, b, x: (x.sort(0).values * x).sum(), "sort"),
    "sort of one column": (lambda p, b, x: (x[:, 0].sort().values * x[:, 1]).sum(), "mul"),
    "argsort": (lambda p, b, x: (x[:, 0].argsort() * x[:, 1]).sum(), "mul"),
    "topk": (lambda p, b, x: x.topk(1, 0).values.sum(), "topk"),
    "kthvalue": (lambda p, b, x: x.kthvalue(1, 0).values.sum(), "kthvalue"),
    "median": (lambda p, b, x: x.median(0).values.sum(), "median"),
    "diff": (lambda p, b, x: x.diff(dim=0).square().sum(), "slice"),
    "unfold": (lambda p, b, x: x.unfold(0, 1, 1).square().sum() + x.unfold(0, 2, 1).prod(-1).sum(), "unfold"),
    "conv over rows": (lambda p, b, x: F.conv1d(x.T[None], p["conv"], padding=1).square().sum(), "convolution"),
    "bags by frequency": (
        lambda p, b, x: F.embedding_bag(b["tokens"], p["embed"], scale_grad_by_freq=True).sum(),
        "_embedding_bag",
    ),
    "bags of other rows": (
        lambda p, b, x: F.embedding_bag(b["tokens"].T.flatten(), p["embed"], torch.arange(0, b["tokens"].numel(), T)).sum(),
        "_embedding_bag",
    ),
    "bags that begin in the batch": (
        lambda p, b, x: F.embedding_bag(b["tokens"].flatten(), p["embed"], b["length"]).sum(),
        "_embedding_bag",
    ),
    "fft": (lambda p, b, x: torch.fft.fft(x, dim=0).abs().sum(), "fft"),
    "pool over rows": (lambda p, b, x: F.avg_pool1d(x.T[None], 2).square().sum(), "avg_pool"),
    "pad rows": (lambda p, b, x: (F.pad(x, (0, 0, 1, 0))[1:] * x).sum(), "pad"),
    "attention of rows": (lambda p, b, x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]).sum(), "attention"),
    "heads over rows": (
        lambda p, b, x: F.scaled_dot_product_attention(*[x.view(1, -1, 2, 2).transpose(1, 2)] * 3).sum(), "attention",
    ),
    # statistics over rows, beside rows
    "minus mean": (lambda p, b, x: (x - x.mean(0)).square().sum(), "mean"),
    "minus mean of all": (lambda p, b, x: (x - x.mean()).square().sum(), "mean"),
    "minus detached mean": (lambda p, b, x: (x - x.detach().mean(0)).square().sum(), "mean"),
    "over sum": (lambda p, b, x: (x / x.exp().sum(0)).sum(), "div"),
    "over norm": (lambda p, b, x: (x / x.norm(dim=0)).square().sum(), "norm"),
    "normalize": (lambda p, b, x: F.normalize(x, dim=0).sum(), "norm"),
    "minus max": (lambda p, b, x: (x - x.detach().amax(0)).exp().sum(), "amax"),
    "minus min": (lambda p, b, x: (x - x.detach().min()).exp().sum(), "min"),
    "std": (lambda p, b, x: (x / x.std(0)).sum(), "std"),
    "var_mean": (lambda p, b, x: (x - torch.var_mean(x, 0)[1]).square().sum(), "var_mean"),
    "batch_norm": (lambda p, b, x: F.batch_norm(x, None, None, training=True).pow(3).sum(), "batch_norm"),
    "whitened": (lambda p, b, x: (x @ torch.linalg.inv(x.T @ x)).sum(), "linalg"),
    "mean broadcast": (lambda p, b, x: (x * x.mean(0, keepdim=True).expand_as(x)).sum(), "expand"),
    "advantages": (lambda p, b, x: ((b["weight"] - b["weight"].mean()) * x[:, 0]).sum(), "mean"),
    "scaled by largest weight": (lambda p, b, x: (x[:, 0] * b["weight"] / b["weight"].max()).sum(), "max"),
    # every row beside every other
    "gram": (lambda p, b, x: (x @ x.T).square().sum(), "mm"),
    "contrastive": (lambda p, b, x: F.cross_entropy(x @ x.sin().T, torch.arange(len(x)), reduction="sum"), "mm"),
    "sigmoid pairs": (lambda p, b, x: F.logsigmoid(x @ x.T).sum(), "mm"),
    "einsum pairs": (lambda p, b, x: torch.einsum("id,jd->ij", x, x).exp().sum(), "einsum"),
    "broadcast pairs": (lambda p, b, x: (x[:, None] - x[None]).abs().sum(), "sub"),
    "cdist": (lambda p, b, x: torch.cdist(x, x).sum(), "cdist"),
    "outer": (lambda p, b, x: torch.outer(x[:, 0], x[:, 1]).exp().sum(), "mul"),
    "triplets": (lambda p, b, x: F.relu(x[:, 0:1] - x[:, 0:1].T + 1).sum(), "sub"),
    "dot of columns": (lambda p, b, x: (x[:, 0] @ x[:, 1]).square(), "dot"),
    "covariance": (lambda p, b, x: (x.T @ x).square().sum(), "mm"),
    "bmm over rows": (lambda p, b, x: torch.bmm(x.T[None], x[None]).exp().sum(), "bmm"),
    "equal labels": (lambda p, b, x: ((b["label"][:, None] == b["label"]) * x[:, :1]).sum(), "eq"),
    # rows by their place
    "first row": (lambda p, b, x: (x - x[:1]).square().sum(), "slice"),
    "last row": (lambda p, b, x: (x * x[-1]).sum(), "select"),
    "every other": (lambda p, b, x: x[::2].square().sum(), "slice"),
    "first half": (lambda p, b, x: x[: len(x) // 2].sum(), "slice"),
    "halves": (lambda p, b, x: (x.chunk(2)[0] * x.chunk(2)[-1]).sum(), "split"),
    "index": (lambda p, b, x: x[torch.tensor([0, 0])].sum(), "index"),
    "index_select": (lambda p, b, x: x.index_select(0, torch.tensor([0])).sum(), "index_select"),
    "gather": (lambda p, b, x: x.gather(0, b["label"][None, :1].expand(1, D) * 0).sum(), "gather"),
    "by label": (lambda p, b, x: x[b["label"] * 0].sum(), "index"),
    "by sorted label": (lambda p, b, x: (x[b["label"].argsort()] * x).sum(), "mul"),
    "sorted twice, other keys": (
        lambda p, b, x: (x[b["label"].argsort()] * x[b["expert"].argsort()]).sum(), "mul",
    ),
    "shuffled back by other keys": (
        lambda p, b, x: (x[b["label"].argsort()][b["expert"].argsort().argsort()] * x).sum(), "index",
    ),
    "number of the row": (lambda p, b, x: (x[:, 0] * torch.arange(len(x))).sum(), "arange"),
    "number in a table": (lambda p, b, x: (x * p["embed"][torch.arange(len(x)) % 7]).sum(), "arange"),
    "rank of the row": (lambda p, b, x: (x[:, 0].argsort().argsort() * x[:, 1]).sum(), "mul"),
    "numbers but the last": (lambda p, b, x: x[torch.arange(len(x))[:-1]].sum(), "slice"),
    "linspace": (lambda p, b, x: (x[:, 0] * torch.linspace(0, 1, len(x))).sum(), "linspace"),
    "places of rows": (lambda p, b, x: (x[:, 0] * fp.positions(x, 0)).sum(), "mul"),
    "triangle": (lambda p, b, x: (x * torch.ones(len(x), D).tril()).sum(), "tril"),
    "eye": (lambda p, b, x: (torch.eye(len(x)) @ x).sum(), "eye"),
    "table as long as a part": (lambda p, b, x: (p["embed"][: len(x)].sum() + x.sum()), "slice"),
    "diagonal": (lambda p, b, x: (x @ x.T).diagonal().sum(), "mm"),
    # rows written, joined, cut apart
    "first row written": (lambda p, b, x: written(x, 0, 1.0), "select"),
    "first rows written": (lambda p, b, x: written(x, slice(0, 1), 0.0), "slice"),
    "by number written": (lambda p, b, x: written(x, b["label"] * 0, 1.0), "index_put"),
    "index_add": (lambda p, b, x: x.new_zeros(D, D).index_add(0, b["label"], x).square().sum(), "index_add"),
    "scatter_add": (
        lambda p, b, x: x.new_zeros(D).scatter_add(0, b["label"], x[:, 0]).square().sum(), "scatter_add",
    ),
    "a row in front": (lambda p, b, x: torch.cat([p["row"], x]).square().sum(), "cat"),
    "rows joined twice": (lambda p, b, x: (torch.cat([x, x.sin()]) * b["pairs"]).sum(), "mul"),
    "rows as features": (lambda p, b, x: (x.reshape(1, -1).softmax(-1)).square().sum(), "softmax"),
    "rows turned": (lambda p, b, x: (x.T.reshape(-1, D) * x).sum(), "mul"),
    # loops
    "recurrence over rows": (lambda p, b, x: last_of_loop(x), "unbind"),
    "weighted loop": (lambda p, b, x: weighted_loop(x), "unbind"),
    "largest in a loop": (lambda p, b, x: best_of_loop(x), "unbind"),
    "fading loop": (lambda p, b, x: faded_loop(x), "unbind"),
    "first rows in a loop": (lambda p, b, x: sum(x[i].sum() for i in range(2)), "select"),
    "other way for few rows": (lambda p, b, x: (x.sin() if len(x) > 4 else x.cos()).sum(), ""),
    # gradients that the user wrote
    "gradient minus mean": (lambda p, b, x: MeanGradient.apply(x).sum(), "mean"),
    "unit gradient": (lambda p, b, x: UnitGradient.apply(x).sum(), "norm"),
    "mean gradient of a weight": (lambda p, b, x: MeanOfWeight.apply(x, p["w"]).sum(), "MeanOfWeight"),
    "hook on a gradient": (lambda p, b, x: hooked(x), "hook"),
    "gradient of a mean inside": (
        lambda p, b, x: torch.autograd.grad(x.square().mean(), x, create_graph=True)[0].square().sum(), "mul",
    ),
}  # fmt: skip

if not torch.__version__.startswith("2.11."):  # whose quantile looks at values, also of fakes
    NEIGHBOURS["quantile"] = (lambda p, b, x: x.quantile(0.5, 0).sum(), "sort")

NO_SUM: dict[str, tuple[Body, tuple[str, ...]]] = {
    "mean": (lambda p, b, x: x.mean(), ("Mean.total is a mean over the rows of a part", "aten.mean", "reduction='sum'")),
    "sum over count": (lambda p, b, x: x.sum() / len(x), ("is a mean", "aten.div")),
    "sum times count": (lambda p, b, x: x.sum() * len(x), ("aten.mul", "the number")),
    "sum over root": (lambda p, b, x: x.sum() / len(x) ** 0.5, ("aten.div",)),
    "square of the sum": (lambda p, b, x: x.sum().square(), ("aten.pow", "made by aten.sum")),
    "square of the mean": (lambda p, b, x: x.mean().square() * len(x), ("aten.pow", "mean")),
    "product of sums": (lambda p, b, x: x.sum() * x.exp().sum(), ("aten.mul", "a product of sums")),
    "quotient of sums": (lambda p, b, x: x.sum() / b["keep"].sum(), ("aten.div",)),
    "mean times counted": (lambda p, b, x: x.mean() * b["keep"].sum(), ("aten.mul", "a mean over " "the " "rows")),
    "root of the sum": (lambda p, b, x: x.square().sum().sqrt(), ("aten.sqrt",)),
    "log of the sum": (lambda p, b, x: x.exp().sum().log(), ("aten.log",)),
    "logsumexp": (lambda p, b, x: x.logsumexp((0, 1)), ("aten.logsumexp", "do not meet")),
    "variance": (lambda p, b, x: x.var() * len(x), ("aten.var", "do not meet", "fp.batch_statistic")),
    "norm": (lambda p, b, x: x.norm(), ("is a norm over the rows of a part", "linalg_vector_norm")),
    "cube of the norm": (lambda p, b, x: x.norm() ** 3, ("aten.pow", "a norm over the rows")),
    "largest": (lambda p, b, x: x.max(), ("maximum over the rows of a part", "aten.max")),
    "clamped sum": (lambda p, b, x: x.sum().clamp(min=0), ("aten.clamp", "not linear")),
    "rounded sum": (lambda p, b, x: (x.sum() * 10).long().double(), ("rounds",)),
    "product": (lambda p, b, x: x.prod(), ("aten.prod",)),
    "any": (lambda p, b, x: x.sum() * (x > 0).any(), ("aten.any",)),
    "plus a penalty": (lambda p, b, x: x.sum() + p["w"].square().sum(), ("aten.add", "counted once", "weight * " "l2")),
    "plus one": (lambda p, b, x: x.sum() + 1, ("aten.add", "counted once for every microbatch " "and " "shard")),
    "a penalty alone": (lambda p, b, x: p["w"].square().sum(), ("does not depend on the rows", "aten.pow")),
    "balance of experts": (
        lambda p, b, x: (F.one_hot(x.argmax(-1), D).double().sum(0) * x.softmax(-1).sum(0)).sum() / len(x), ("aten.mul",),
    ),
    "cross entropy": (lambda p, b, x: F.cross_entropy(x, b["label"]), ("nll_loss", "reduction='sum'", "number of " "labels")),
    "chosen by a sum": (lambda p, b, x: torch.where(x.sum() > 0, x.sum(), 0.0), ("aten.gt",)),
    "constant weight": (lambda p, b, x: fp.Mean(x.sum(), torch.ones(())), ("Mean.weight does not " "depend on the " "rows",)),
    "root of the count": (lambda p, b, x: fp.Mean(x.sum(), torch.tensor(len(x) ** 0.5)), ("Mean.weight is the " "number",)),
    "norm as a weight": (lambda p, b, x: fp.Mean(x.sum(), b["x"].norm()), ("Mean.weight is a norm",)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_rows_that_meet_are_refused(name: str) -> None:
    body, op = NEIGHBOURS[name]
    with refused(op, "at test_rows_meet.py"):
        prove(body)


@pytest.mark.parametrize("name", NO_SUM)
def test_a_total_that_does_not_add_up_is_refused(name: str) -> None:
    body, words = NO_SUM[name]
    with refused(*words):
        prove(body)


@pytest.mark.parametrize(
    "name", ["softmax", "minus mean", "gram", "first row", "number of the row", "by label", "roll"]
)
@pytest.mark.parametrize("parts", [4, N])
def test_also_of_parts_of_two_rows_and_of_one(name: str, parts: int) -> None:
    with refused():
        prove(NEIGHBOURS[name][0], parts)


def test_enough() -> None:
    assert len(NEIGHBOURS) + len(NO_SUM) >= 100


# ---- ways out


def test_what_bags_need() -> None:
    with refused("scale_grad_by_freq=True counts how often the rows of a part name an entry"):
        prove(NEIGHBOURS["bags by frequency"][0])
    for name in ("bags of other rows", "bags that begin in the batch"):
        with refused("pass indices with two dims, (rows, entries)", "padding_idx"):
            prove(NEIGHBOURS[name][0])


def test_an_error_names_the_ways_out_that_fit() -> None:
    body = NEIGHBOURS["minus mean"][0]
    with refused(
        "a first fp.value_and_grad and pass it through batch", "fp.batch_statistic(fn)(x)"
    ):
        prove(body)
    with refused(
        "gather them (fp.all_gather(x, 'data'), fp.psum(x, 'data'))", "fp.batch_statistic(fn)(x)"
    ):
        prove(body, mesh=fp.Mesh(data=2))


# ---- aux

AUX: dict[str, tuple[Any, tuple[str, ...]]] = {
    "mean of a mean and a count": (
        lambda p, b, x: fp.Mean(x.mean(), count(b)),
        ("aux['a'].total is a mean",),
    ),
    "mean of a square": (
        lambda p, b, x: fp.Mean(x.sum().square(), count(b)),
        ("aux['a'].total", "aten.pow"),
    ),
    "rows that met": (lambda p, b, x: fp.Rows(x - x.mean(0)), ("aux['a']", "aten.sub")),
    "rows along another dim": (lambda p, b, x: fp.Rows(x, 1), ("aux['a'], fp.Rows along dim 1",)),
    "rows of a value": (lambda p, b, x: fp.Rows(p["w"]), ("aux['a'], fp.Rows", "is an fp.Mean")),
}


@pytest.mark.parametrize("name", AUX)
def test_aux(name: str) -> None:
    make, words = AUX[name]
    with refused(*words):
        prove(lambda p, b, x: (x.sum(), {"a": make(p, b, x)}), has_aux=True)
