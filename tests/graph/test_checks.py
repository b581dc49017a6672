"""What a total is made of, and the checks of totals and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import batch, body, count, loss_fn, params, refused
from torch._subclasses.fake_tensor import FakeTensorMode
from units_for_tests import traced

import funcpipe as fp
from funcpipe import tree
from funcpipe.errors import BatchError
from funcpipe.graph.checks import check_additive, check_weight, weight_of
from funcpipe.graph.fakes import fake
from funcpipe.graph.nodes import Nodes, read_nodes
from funcpipe.graph.summands import FREE, MEAN, NEITHER, OTHER, SUM, Term, check_summands, terms

ROWS = 8


def taken_apart(total: Callable, rows: int = ROWS) -> list[tuple[float, str]]:
    """The terms of a total, each as its number and kind."""

    def loss(p: Any, b: Any) -> fp.Mean:
        x = body(p, b)
        return fp.Mean(total(p, b, x), count(x))

    t = traced(loss, params(), batch(rows))
    return [(round(term.number, 6), term.kind) for term in terms(read_nodes(t), t.module) if term.number]


def l2(p: Any) -> torch.Tensor:
    return p["w"][0].pow(2).sum()


TOTALS: dict[str, tuple[Callable, list[tuple[float, str]]]] = {
    "sum": (lambda p, b, x: x.sum(), [(1, SUM)]),
    "numbers multiply": (lambda p, b, x: -(x.sum() * 3 / 2), [(-1.5, SUM)]),
    "rsub": (lambda p, b, x: 1 - x.sum(), [(-1, SUM), (1, FREE)]),
    "alpha": (lambda p, b, x: torch.sub(x.sum(), x.mean(), alpha=3), [(1, SUM), (-3, MEAN)]),
    "constant tensors are numbers": (
        lambda p, b, x: x.sum() * torch.tensor(0.5) + torch.tensor(2.0),
        [(0.5, SUM), (2, FREE)],
    ),
    "counts of rows are numbers": (lambda p, b, x: len(x) * x.mean() + count(x) * l2(p), [(ROWS, MEAN), (ROWS, FREE)]),
    "zeros vanish": (lambda p, b, x: 0 + x.new_zeros(()) + 0.0 * l2(p) + x.sum(), [(1, SUM)]),
    "stack": (lambda p, b, x: 2 * torch.stack([x.sum(), l2(p), x.max()]).sum(), [(2, SUM), (2, FREE), (2, NEITHER)]),
    "a factor from params is let through": (lambda p, b, x: (x.sum() + l2(p)) / l2(p).exp(), [(1, SUM), (1, FREE)]),
    "a factor from the batch hides what it scales": (lambda p, b, x: l2(p) * b["x"].abs().sum(), [(1, SUM)]),
    "products of the batch are other": (lambda p, b, x: x.mean() * b["x"].sum().exp(), [(1, OTHER)]),
    "a quotient of the batch is a mean": (lambda p, b, x: x.sum() / b["x"].abs().sum().clamp(min=1), [(1, MEAN)]),
    "casts are let through": (lambda p, b, x: x.float().sum().double() + x.mean().reshape(()), [(1, SUM), (1, MEAN)]),
    "losses": (
        lambda p, b, x: F.mse_loss(x, b["x"]) + F.mse_loss(x, b["x"], reduction="sum"),
        [(1, MEAN), (1, SUM)],
    ),
    "smooth cross-entropy": (
        lambda p, b, x: F.cross_entropy(x, b["x"].argmax(-1), label_smoothing=0.2),
        [(0.8, MEAN), (0.2 / 4, MEAN)],
    ),
    "norms": (lambda p, b, x: torch.linalg.vector_norm(x, 1) + x.norm(), [(1, SUM), (1, NEITHER)]),
}


@pytest.mark.parametrize("name", TOTALS)
def test_a_total_is_taken_apart(name: str) -> None:
    total, expected = TOTALS[name]
    assert sorted(taken_apart(total)) == sorted((round(n, 6), kind) for n, kind in expected)


def term(number: float, kind: str) -> Term:
    return Term(number, None, kind)


def test_numbers_of_free_terms_and_means_grow_with_the_batch_and_those_of_sums_do_not() -> None:
    for kind in (FREE, MEAN):
        check_summands([term(2, kind)], [4], lambda kind=kind: [term(8, kind)])  # type: ignore[misc]
        with refused(BatchError, "a summand of Mean.total"):
            check_summands([term(2, kind)], [4], lambda kind=kind: [term(2, kind)])  # type: ignore[misc]
    check_summands([term(0.5, SUM)], [4], lambda: [term(0.5, SUM)])
    with refused(BatchError, "is a mean over the rows"):
        check_summands([term(0.5, SUM)], [4], lambda: [term(0.125, SUM)])
    with refused(BatchError, "is no sum over the rows"):
        check_summands([term(1, NEITHER)], [4], lambda: [term(1, NEITHER)])


def test_the_whole_batch_is_traced_only_where_it_matters() -> None:
    def never() -> list[Term]:
        raise AssertionError

    check_summands([term(1, SUM), term(-1, SUM), term(3, OTHER), term(0, FREE)], [4], never)


def test_loops_over_rows_are_compared_by_their_sums() -> None:
    check_summands([term(1, MEAN)] * 2, [4], lambda: [term(1, MEAN)] * 8)
    check_summands([term(1, NEITHER)] * 2, [4], lambda: [term(1, NEITHER)] * 8)
    with refused(BatchError, "does not depend on the batch (3)"):
        check_summands([term(1, SUM), term(3, FREE)], [4], lambda: [*[term(1, SUM)] * 4, term(3, FREE)])


def test_a_text_names_number_and_op() -> None:
    assert str(term(0.25, FREE)) == "0.25"
    t = traced(
        lambda p, b: fp.Mean(0.5 * F.cross_entropy(body(p, b), b["x"].argmax(-1)), torch.ones(())), params(), batch()
    )
    assert [str(x) for x in terms(read_nodes(t), t.module)] == ["0.5 * getitem, made by aten.nll_loss_forward"]


# ---- weights


def nodes(loss: Callable) -> tuple[Nodes, Any]:
    t = traced(loss, params(), batch())
    return read_nodes(t), t.module


def test_a_weight_is_a_function_of_the_batch() -> None:
    n, module = nodes(lambda p, b: fp.Mean(body(p, b).sum(), (b["x"] > 0).sum()))
    check_weight(n)
    assert weight_of(n, module)(batch()["x"]) == (batch()["x"] > 0).sum()
    n, _ = nodes(lambda p, b: fp.Mean(body(p, b).sum(), (p["w"][0] > 0).sum()))
    with refused(BatchError, "Mean.weight depends on params"):
        check_weight(n)


def test_weights_of_parts_add_up_to_that_of_the_whole() -> None:
    mode = FakeTensorMode()
    fakes = tree.map_tensors(lambda x: fake(x.shape, x, mode), params())
    check = lambda parts: check_additive(loss_fn, False, fakes, batch(), parts, mode)  # noqa: E731
    check([torch.tensor(3), torch.tensor(5.0)])
    with refused(BatchError, "Mean.weight of the whole batch is 8, but those of its 2 parts add up to 7"):
        check([torch.tensor(3), torch.tensor(4)])
