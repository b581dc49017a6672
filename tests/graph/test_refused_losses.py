"""Bad loss functions, each refused when the plan is made, with a text that says what, where, why
and what instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import (
    D,
    batch,
    block,
    body,
    count,
    distance,
    loss_fn,
    params,
    refused,
    run_loss,
    start,
    step_of,
)
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe.errors import BatchError, CutError, TraceError

# The sums over microbatches are reordered: a few roundings of 2**-53.
FLOAT64 = 1e-12

Head = Callable[[Any, Any, torch.Tensor], Any]  # (params, batch, rows after the blocks) -> the loss


def headed(head: Head) -> Callable:
    return lambda p, b: head(p, b, body(p, b))


def labels(b: Any) -> torch.Tensor:
    return b["x"].argmax(-1)


def l2(p: Any) -> torch.Tensor:
    return p["w"][0].pow(2).sum()


# ---- not a loss

NOT_A_LOSS: dict[str, tuple[Head, str]] = {
    "vector": (
        lambda p, b, x: x.sum(1),
        "the loss .* tensor of shape \\(4,\\) .* 0-d tensor: sum it, and return Mean",
    ),
    "one-element": (
        lambda p, b, x: x.sum().reshape(1),
        "shape \\(1,\\) and dtype torch.float64; it has to be a 0-d tensor",
    ),
    "int": (
        lambda p, b, x: x.sum().long(),
        "the loss has dtype torch.int64; gradients need a real floating-point loss",
    ),
    "complex": (lambda p, b, x: torch.complex(x, x).sum(), "the loss has dtype torch.complex128"),
    "float": (lambda p, b, x: 3.0, "the loss .* is a float; .* write torch.tensor\\(3.0\\)"),
    "None": (lambda p, b, x: None, "the loss that the loss function returned is None"),
    "tuple": (
        lambda p, b, x: (x.sum(), count(x)),
        "is a tuple of 2; .* fp.Mean\\(total, weight\\); with has_aux=True",
    ),
    "float total": (lambda p, b, x: fp.Mean(1.0, count(x)), "the Mean.total .* is a float"),  # type: ignore[arg-type]
    "int weight": (
        lambda p, b, x: fp.Mean(x.sum(), len(x)),
        "the Mean.weight .* an int; .* write torch.tensor\\(4\\)",
    ),  # type: ignore[arg-type]
    "row weights": (
        lambda p, b, x: fp.Mean(x.sum(), x[:, 0] * 0),
        "the Mean.weight .* tensor of shape \\(4,\\)",
    ),
}


@pytest.mark.parametrize("name", NOT_A_LOSS)
def test_a_loss_is_a_real_0d_tensor(name: str) -> None:
    head, text = NOT_A_LOSS[name]
    with pytest.raises(TraceError, match=text):
        run_loss(headed(head))


def test_a_loss_is_a_real_0d_tensor_in_plain_pytorch_too() -> None:
    with pytest.raises(TraceError, match="it has to be a 0-d tensor"):
        step_of(lambda p, b: body(p, b).sum(1))(params(), batch())


# ---- split batches: what adds up, and what does not

HERE = "at test_refused_losses.py"
MEAN = (
    "Mean.total is a mean over the rows of a part",
    HERE,
    "reduction='sum'",
    "number of rows or tokens as weight",
)
ADDED = (HERE, "and a mean over the rows of a part", *MEAN[2:])
LABELS = ("aten.nll_loss_forward", HERE, "reduction='sum'", "number of labels as Mean.weight")
FREE = (HERE, "it adds", "for every microbatch and shard", "total + weight * l2")
NEITHER = (
    "over the rows of a part",
    HERE,
    "no sum over them",
    "Compute it for every row and sum over rows",
)
MEET = (
    HERE,
    "Rows of a batch that is split do not meet",
    "a first fp.value_and_grad",
    "fp.batch_statistic(fn)(x)",
)

DOES_NOT_ADD_UP: dict[str, tuple[tuple[str, ...], Head]] = {
    "mean": (MEAN, lambda p, b, x: x.mean()),
    "mean of rows": (MEAN, lambda p, b, x: x.pow(2).sum(1).mean()),
    "half a mean": (ADDED, lambda p, b, x: x.sum() + 0.5 * x.mean()),
    "sum over count": (MEAN, lambda p, b, x: x.sum() / len(x)),
    "masked mean": (
        ("aten.clamp", "is not linear", *MEET[1:]),
        lambda p, b, x: x.sum() / (b["x"] > 0).sum().clamp(min=1),
    ),
    "cross_entropy": (LABELS, lambda p, b, x: F.cross_entropy(x, labels(b))),
    "cross_entropy, smooth": (
        LABELS,
        lambda p, b, x: F.cross_entropy(x, labels(b), label_smoothing=0.1),
    ),
    "cross_entropy, soft": (MEAN, lambda p, b, x: F.cross_entropy(x, b["x"].softmax(-1))),
    "mse_loss": (MEAN, lambda p, b, x: F.mse_loss(x, b["x"])),
    "l1_loss": (MEAN, lambda p, b, x: F.l1_loss(x, b["x"])),
    "huber_loss": (MEAN, lambda p, b, x: F.huber_loss(x, b["x"])),
    "bce with logits": (
        MEAN,
        lambda p, b, x: F.binary_cross_entropy_with_logits(x, b["x"].sigmoid()),
    ),
    "kl_div": (
        MEAN,
        lambda p, b, x: F.kl_div(x.log_softmax(-1), b["x"].softmax(-1), reduction="batchmean"),
    ),
    "mean * weight of data": (MEET, lambda p, b, x: x.mean() * (b["x"] == b["x"]).sum()),
    "+ l2": (FREE, lambda p, b, x: x.sum() + l2(p)),
    "+ 0.1 l2": (FREE, lambda p, b, x: x.sum() + 0.1 * l2(p)),
    "+ 1.0": (FREE, lambda p, b, x: x.sum() + 1.0),
    "1 -": (FREE, lambda p, b, x: 1.0 - x.sum()),
    "l2 in sum(stack)": (
        (HERE, "it joins", "aten.sum", "the same in every part"),
        lambda p, b, x: torch.stack([x.sum(), l2(p)]).sum(),
    ),
    "l2 in a scaled sum": (FREE, lambda p, b, x: (x.sum() + l2(p)) * 2),
    "l2 in a sum scaled by a param": (FREE, lambda p, b, x: (x.sum() + l2(p)) * p["w"][1].sum()),
    "l2 beside a loop over rows": (FREE, lambda p, b, x: sum(r.sum() for r in x) + l2(p)),
    "max": (NEITHER, lambda p, b, x: x.max()),
    "norm": (NEITHER, lambda p, b, x: x.norm()),
    "logsumexp": (("aten.logsumexp", *MEET), lambda p, b, x: x.flatten().logsumexp(0)),
}


@pytest.mark.parametrize("name", DOES_NOT_ADD_UP)
def test_a_total_that_does_not_add_up_is_refused(name: str) -> None:
    words, total = DOES_NOT_ADD_UP[name]
    with refused(BatchError, *words):
        run_loss(headed(lambda p, b, x: fp.Mean(total(p, b, x), count(x))))


ADDS_UP: dict[str, Head] = {
    "mean * count": lambda p, b, x: fp.Mean(x.mean() * len(x), count(x)),
    "mean * weight": lambda p, b, x: fp.Mean(F.mse_loss(x, b["x"]) * count(x), count(x)),
    "mean * weight of ones": lambda p, b, x: fp.Mean(
        x.mean() * torch.ones_like(x).sum(), torch.ones_like(b["x"]).sum()
    ),
    "half a mean * count": lambda p, b, x: fp.Mean(x.sum() + 0.5 * x.mean() * len(x), count(x)),
    "weight * l2": lambda p, b, x: fp.Mean(x.sum() + 0.1 * count(x) * l2(p), count(x)),
    "len * l2": lambda p, b, x: fp.Mean(x.sum() + 0.1 * len(x) * l2(p), count(x)),
    "label smoothing": lambda p, b, x: fp.Mean(
        F.cross_entropy(x, labels(b), label_smoothing=0.1, reduction="sum"), count(x)
    ),
    "reduction none": lambda p, b, x: fp.Mean(
        F.cross_entropy(x, labels(b), reduction="none").sum(), count(x)
    ),
    "masked": lambda p, b, x: fp.Mean(
        (x.sum(-1) * (b["x"][:, 0] > 0)).sum(), (b["x"][:, 0] > 0).sum()
    ),
    "where": lambda p, b, x: fp.Mean(torch.where(b["x"] > 0, x, 0).sum(), (b["x"] > 0).sum()),
    "ignore_index": lambda p, b, x: fp.Mean(
        F.cross_entropy(x, torch.where(b["x"][:, 0] > 0, labels(b), -100), reduction="sum"),
        (b["x"][:, 0] > 0).sum(),
    ),
    "over a constant": lambda p, b, x: fp.Mean(x.pow(2).sum() / 3.0, count(x)),
    "several sums": lambda p, b, x: fp.Mean(
        x.pow(2).sum() + 0.1 * x.abs().sum() - x.sum(), count(x)
    ),
    "python sum": lambda p, b, x: fp.Mean(sum(r.sum() for r in x), count(x)),  # type: ignore[arg-type]
    "means of rows": lambda p, b, x: fp.Mean(sum(r.mean() for r in x), count(x)),  # type: ignore[arg-type]
    "zeros +": lambda p, b, x: fp.Mean(x.new_zeros(()) + x.sum(), count(x)),
    "temperature": lambda p, b, x: fp.Mean(x.sum() / p["w"][0].sum().exp(), count(x)),
    "mean over features": lambda p, b, x: fp.Mean(x.pow(2).mean(-1).sum(), count(x)),
    "einsum": lambda p, b, x: fp.Mean(torch.einsum("bd,bd->", x, b["x"]), count(x)),
    "norm squared": lambda p, b, x: fp.Mean(x.norm() ** 2, count(x)),
    "another dtype": lambda p, b, x: fp.Mean(x.float().sum(), torch.tensor(len(x))),
}


@pytest.mark.parametrize("name", ADDS_UP)
def test_a_total_that_adds_up_is_not_refused(name: str) -> None:
    loss = headed(ADDS_UP[name])
    state, metrics = run_loss(loss)
    expected = step_of(loss)(params(), batch())
    tolerance = 1e-6 if name == "another dtype" else FLOAT64  # a float32 total
    assert distance((state, metrics), expected) < tolerance


def test_ready_microbatches_have_no_whole_batch_but_are_checked() -> None:
    ready = fp.Microbatches([batch(4), batch(2)])
    with refused(BatchError, *FREE):
        run_loss(
            headed(lambda p, b, x: fp.Mean(x.sum() + l2(p), count(x))), b=ready, microbatches=None
        )
    with refused(BatchError, *MEAN):
        run_loss(headed(lambda p, b, x: fp.Mean(x.mean(), count(x))), b=ready, microbatches=None)
    run_loss(
        headed(lambda p, b, x: fp.Mean(x.mean() * len(x), count(x))), b=ready, microbatches=None
    )


def test_what_differs_between_ranks_counts_as_from_the_batch() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = body(p, b)
        return fp.Mean(
            x.sum() * (fp.axis_index("data") * 0 + 1) + fp.psum(x, "data").sum() * 0, count(x)
        )

    step = step_of(loss)
    run, state = start(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    state, metrics = run(state, batch())
    assert distance((run.unplace(state), metrics), step(params(), batch())) < FLOAT64


def test_a_scalar_loss_is_refused_when_the_batch_is_split() -> None:
    with refused(BatchError, "pipelined split the batch", "plain scalar", "fp.Mean(total, weight)"):
        run_loss(lambda p, b: body(p, b).sum())
    with refused(BatchError, "accumulated split the batch", "plain scalar"):
        start(fp.accumulated(step_of(lambda p, b: body(p, b).sum()), microbatches=2), fp.Mesh())
    with refused(BatchError, "the batch comes in several microbatches", "plain scalar"):
        step_of(lambda p, b: body(p, b).sum())(params(), fp.Microbatches([batch(4), batch(4)]))


def test_a_scalar_loss_is_fine_when_it_is_not() -> None:
    loss = lambda p, b: body(p, b).sum()  # noqa: E731
    assert distance(run_loss(loss, microbatches=1), step_of(loss)(params(), batch())) < FLOAT64


def test_a_weight_adds_up_and_comes_from_the_batch_alone() -> None:
    with refused(
        BatchError,
        "Mean.weight of the whole batch is 1",
        "2 parts add up to 2",
        "number of tokens or rows",
    ):
        run_loss(headed(lambda p, b, x: fp.Mean(x.sum(), torch.ones(()))))
    with refused(
        BatchError, "Mean.weight of the whole batch is", "add up to", "change with the split"
    ):
        run_loss(headed(lambda p, b, x: fp.Mean(x.sum(), b["x"].norm())))
    with refused(BatchError, "Mean.weight depends on params", "from the batch alone"):
        run_loss(headed(lambda p, b, x: fp.Mean(x.sum(), x.detach().abs().sum())))
    with refused(BatchError, "Mean.weight of the whole batch is 8", "2 parts add up to 16"):
        run_loss(loss_fn, dims=None)  # every microbatch gets the whole batch


# ---- aux


def test_aux_of_a_split_batch_is_mean_or_rows() -> None:
    with refused(
        BatchError,
        "aux['a']['z'] is a plain value",
        "no rule to join",
        "fp.Mean(total, weight)",
        "fp.Rows(x, dim)",
    ):
        run_loss(lambda p, b: (loss_fn(p, b), {"a": {"z": b["x"].sum()}}), has_aux=True)
    with refused(BatchError, "aux['a'] is a plain value"):
        step_of(lambda p, b: (loss_fn(p, b), {"a": b["x"].sum()}), has_aux=True)(
            params(), fp.Microbatches([batch(4), batch(4)])
        )


@pytest.mark.parametrize(
    "out", [lambda x: x, lambda x: [x, 1], lambda x: (x, 1, 2)], ids=["loss", "list", "three"]
)
def test_has_aux_wants_a_pair(out: Callable) -> None:
    with refused(
        TraceError, "with has_aux=True the loss function returns (loss, aux)", "this one returned a"
    ):
        run_loss(lambda p, b: out(loss_fn(p, b)), has_aux=True)


AUX: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "Mean of numbers": (
        lambda x: fp.Mean(1.0, 2.0),
        ("aux['a'] is a Mean of a float, a float", "torch.tensor"),
    ),  # type: ignore[arg-type]
    "Rows of a number": (lambda x: fp.Rows(1.0), ("aux['a'] is a Rows of a float",)),  # type: ignore[arg-type]
    "Rows without the dim": (
        lambda x: fp.Rows(x, 4),
        ("aux['a'] is fp.Rows of a tensor of shape", "dim 4, which it lacks"),
    ),
}


@pytest.mark.parametrize("name", AUX)
def test_aux_summaries_hold_tensors(name: str) -> None:
    make, words = AUX[name]
    loss = lambda p, b: (loss_fn(p, b), {"a": make(b["x"])})  # noqa: E731
    with refused(TraceError, *words):
        run_loss(loss, has_aux=True)
    with refused(TraceError, *words):
        step_of(loss, has_aux=True)(params(), batch())


# ---- tensors that come from elsewhere

SCALE = torch.ones(D, dtype=torch.float64)


class _Model:
    def __init__(self) -> None:
        self.scale = torch.ones(D, dtype=torch.float64)

    def loss(self, p: Any, b: Any) -> fp.Mean:
        return loss_fn(p, {"x": b["x"] * self.scale})


def _closing_over(what: Any) -> Callable:
    return lambda p, b: loss_fn(p, {"x": what(b["x"]) if callable(what) else b["x"] * what})


def _in_a_list() -> Callable:
    scales = [torch.ones(D, dtype=torch.float64)]
    return lambda p, b: loss_fn(p, {"x": b["x"] * scales[0]})


CLOSED_OVER: dict[str, tuple[Callable, str]] = {
    "variable": (_closing_over(torch.ones(D, dtype=torch.float64)), "(it closes over 'what')"),
    "0-d variable": (_closing_over(torch.tensor(2.0)), "(it closes over 'what')"),
    "global": (lambda p, b: loss_fn(p, {"x": b["x"] * SCALE}), "(it closes over 'SCALE')"),
    "module": (_closing_over(torch.nn.Linear(D, D).double()), "(it closes over 'what')"),
    "list": (_in_a_list(), "(it closes over 'scales')"),
    "attribute": (_Model().loss, "(it closes over 'self.scale')"),
    "partial": (
        functools.partial(lambda p, b, scale: loss_fn(p, {"x": b["x"] * scale}), scale=SCALE),
        "(it closes over 'scale'",
    ),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_a_closed_over_tensor_is_named(name: str) -> None:
    loss, named = CLOSED_OVER[name]
    with refused(
        TraceError,
        "a tensor that did not come in through its arguments at test_refused_losses.py",
        named,
        "pass it",
    ):
        run_loss(loss)


def test_a_closed_over_state_is_named() -> None:
    def step(state: Any, b: Any) -> Any:
        def loss(p: Any, b: Any) -> fp.Mean:
            return loss_fn({"w": [p["w"][0], state["w"][1]]}, b)

        out, grads = fp.value_and_grad(loss)(state, b)
        return grads, {"loss": out}

    with refused(
        TraceError,
        "did not come in through its arguments",
        "(it closes over 'state')",
        "through params or batch",
    ):
        start(fp.pipelined(step, axis="pipe", microbatches=2), fp.Mesh(pipe=2))


# ---- randomness


def _dropped(*, inside: bool) -> Callable:
    def drop(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(block(w, x), 0.5)

    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = fp.stage_boundary(
                checkpoint(drop, w, x, use_reentrant=False) if inside else drop(w, x)
            )
        return fp.Mean(x.sum(), count(x))

    return loss


def test_dropout_recomputed_in_a_checkpoint() -> None:
    with refused(
        TraceError,
        "bernoulli",
        "new random mask while torch.utils.checkpoint recomputes",
        "another mask",
        "through batch",
    ):
        run_loss(_dropped(inside=True))


def test_randomness_in_the_loss() -> None:
    words = ("draws random values", "outside the loss", "through batch", "fp.random.dropout")
    with refused(TraceError, "bernoulli", *words):
        run_loss(_dropped(inside=False))
    with refused(TraceError, "aten.rand", *words):
        run_loss(headed(lambda p, b, x: fp.Mean((x * torch.rand(D)).sum(), count(x))))


def test_dropout_of_nothing_and_attention_without_it_are_fine() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = body(p, b).view(-1, 1, 2, D)
        x = F.scaled_dot_product_attention(x, x, x)
        return fp.Mean(F.dropout(x, 0.0).sum() + F.dropout(x, 0.5, training=False).sum(), count(x))

    assert distance(run_loss(loss), step_of(loss)(params(), batch())) < FLOAT64


# ---- data-dependent Python

BY_VALUE: dict[str, Head] = {
    "if": lambda p, b, x: x.sum() if x.sum() > 0 else -x.sum(),
    "item": lambda p, b, x: x.sum() * x.max().item(),
    "int": lambda p, b, x: x.sum() * int(b["x"].max()),
    "tolist": lambda p, b, x: x.sum() * len(b["x"].tolist()),
    "numpy": lambda p, b, x: x.sum() * b["x"].numpy().sum(),
    "range": lambda p, b, x: sum(x[i].sum() for i in range(b["x"].long().max())),
    "allclose": lambda p, b, x: x.sum() * torch.allclose(x, x),
}
BY_SHAPE: dict[str, Head] = {
    "mask index": lambda p, b, x: x[b["x"] > 0].sum(),
    "nonzero": lambda p, b, x: x[b["x"].nonzero(as_tuple=True)].sum(),
    "unique": lambda p, b, x: x.sum() * b["x"].unique().shape[0],
    "masked_select": lambda p, b, x: x.masked_select(b["x"] > 0).sum(),
}


@pytest.mark.parametrize("name", BY_VALUE)
def test_a_decision_by_the_value_of_a_tensor(name: str) -> None:
    with refused(
        TraceError,
        "decides by the value of a tensor at test_refused_losses.py:",
        "(an if, .item(), int()",
        "torch.where",
    ):
        run_loss(headed(lambda p, b, x: fp.Mean(BY_VALUE[name](p, b, x), count(x))))


@pytest.mark.parametrize("name", BY_SHAPE)
def test_a_shape_that_depends_on_data(name: str) -> None:
    with refused(
        TraceError,
        "shape depends on data at test_refused_losses.py:",
        "mask as index",
        "multiply by the mask",
    ):
        run_loss(headed(lambda p, b, x: fp.Mean(BY_SHAPE[name](p, b, x), count(x))))


def test_an_error_of_the_users_own_comes_as_it_is() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        raise KeyError("tokens")

    with pytest.raises(KeyError, match="tokens"):
        run_loss(loss)


# ---- changes in place


def test_an_input_changed_in_place_is_named() -> None:
    def batch_changed(p: Any, b: Any) -> fp.Mean:
        b["x"].add_(1)
        return loss_fn(p, b)

    def row_changed(p: Any, b: Any) -> fp.Mean:
        b["x"][0] = 0
        return loss_fn(p, b)

    def param_changed(p: Any, b: Any) -> fp.Mean:
        p["w"][1].data.mul_(0.5)
        return loss_fn(p, b)

    for loss in (batch_changed, row_changed):
        with refused(
            TraceError, "changes batch['x'] in place", "has to be pure", "Write to a clone"
        ):
            run_loss(loss)
    with refused(TraceError, "changes params['w'][1] in place", "has to be pure"):
        run_loss(param_changed)


def test_a_change_that_autograd_refuses_is_explained() -> None:
    with refused(
        TraceError, "changes a tensor in place", "plain PyTorch refuses too", "Write to a clone"
    ):
        run_loss(headed(lambda p, b, x: fp.Mean((b["x"].add_(1) * x).sum(), count(x))))


# ---- boundaries and checkpoints


def _checkpointed(fn: Callable, **options: Any) -> Callable:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = fp.stage_boundary(checkpoint(fn, w, x, **options))
        return fp.Mean(x.pow(2).sum(), count(x))

    return loss


def test_a_boundary_inside_a_checkpoint() -> None:
    loss = _checkpointed(lambda w, x: block(w, fp.stage_boundary(x)), use_reentrant=False)
    with refused(
        CutError,
        "stage_boundary",
        "while a checkpoint recomputes",
        "checkpoint one block, then stage_boundary",
    ):
        run_loss(loss)


def test_a_reentrant_checkpoint() -> None:
    with refused(TraceError, "use_reentrant=True does not work", "write use_reentrant=False"):
        run_loss(_checkpointed(block, use_reentrant=True))


def test_a_boundary_needs_a_tensor() -> None:
    with refused(CutError, "stage_boundary got dict without any tensor", "pass what goes on"):
        run_loss(lambda p, b: (fp.stage_boundary({"a": 1}), loss_fn(p, b))[1])


def test_params_are_tensors() -> None:
    for step in (step_of(), lambda p, b: fp.simulate(step_of(), fp.Mesh()).init(lambda p: p, p, b)):
        with refused(TraceError, "params['w'][1] is a float, not a tensor", "through a closure"):
            step({"w": [torch.zeros(D, D, dtype=torch.float64), 2.0]}, batch())
