"""The checks of weights; totals are proven, see `sequence/test_rows_meet.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models_for_tests import batch, body, loss_fn, params, refused
from torch._subclasses.fake_tensor import FakeTensorMode
from units_for_tests import traced

import funcpipe as fp
from funcpipe import tree
from funcpipe.errors import BatchError
from funcpipe.graph.checks import check_additive, check_weight, weight_of
from funcpipe.graph.fakes import fake
from funcpipe.graph.nodes import Nodes, read_nodes

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
