"""What libraries do in a loss function is traced: distributions, lookups with sparse gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Distribution, Normal

import funcpipe as fp
from funcpipe._src.graph.traceable import traceable

W = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
X = torch.sin(torch.arange(32, dtype=torch.float64)).view(8, 4)
DISTRIBUTIONS = {
    "categorical": (lambda y: Categorical(logits=y), torch.arange(8) % 3),
    "normal": (lambda y: Normal(y[:, 0], y[:, 1].exp()), X[:, 0]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("transform", "mesh"),
    [
        (fp.data_parallel(axis="data"), fp.Mesh(data=2)),
        (fp.pipelined(axis="pipe", microbatches=2), fp.Mesh(pipe=2)),
    ],
)
def test_distributions_in_a_loss(name: str, transform: Any, mesh: fp.Mesh) -> None:
    make, actions = DISTRIBUTIONS[name]

    def loss_fn(w: torch.Tensor, b: Any) -> Any:
        found = make(fp.stage_boundary(b["x"] @ w))
        rows = torch.tensor(float(len(b["x"])))
        return fp.Mean(-found.log_prob(b["action"]).sum(), rows), {
            "entropy": fp.Mean(found.entropy().sum(), rows)
        }

    def step(w: torch.Tensor, b: Any) -> Any:
        (loss, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(w, b)
        return optree.tree_map(lambda w, g: w - 0.1 * g, w, grads), {"loss": loss, **aux}

    batch = {"x": X, "action": actions}
    fp.testing.assert_equivalent(step, transform(step), mesh, lambda w: w, W, [batch])


def test_distributions_check_their_arguments_again_after_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile turns it off for good
    with traceable():
        Categorical(logits=torch.tensor([float("nan")]))
        with traceable():
            pass
        Categorical(logits=torch.tensor([float("nan")]))
    assert Distribution._validate_args is True
    with pytest.raises(ValueError, match="logits"):
        Categorical(logits=torch.tensor([float("nan")]))


def test_threads_that_trace_leave_the_checks_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)

    def enter(_: int) -> None:
        with traceable():
            assert Distribution._validate_args is False

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(200)))
    assert Distribution._validate_args is True


def test_every_way_to_ask_for_sparse_gradients_gives_dense_ones() -> None:
    table, ids = torch.ones(4, 2, requires_grad=True), torch.tensor([1, 1])
    with traceable():
        found = [
            F.embedding(ids, table, None, None, 2.0, False, True),
            torch.nn.Embedding(4, 2, _weight=table, sparse=True)(ids),
            F.embedding_bag(ids[:, None], table, mode="sum", sparse=True),
            torch.embedding(table, ids, -1, False, True),
            torch.embedding(table, ids, sparse=True),
            table.gather(0, ids[:, None], sparse_grad=True),
            torch.gather(table, 0, ids[:, None], sparse_grad=True),
        ]
    for x in found:
        (grad,) = torch.autograd.grad(x.sum(), [table if x.requires_grad else x], allow_unused=True)
        assert grad is None or grad.layout is torch.strided
