"""The checks of weights; totals are proven, see `sequence/test_rows_meet.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.models import batch, body, loss_fn, params, refused
from support.units import traced
from torch._subclasses.fake_tensor import FakeTensorMode

import funcpipe as fp
from funcpipe._src.analysis.loss_checks import check_additive, check_weight, weight_of
from funcpipe._src.core import pytree as tree
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.node_labels import Nodes, read_nodes
from funcpipe.errors import BatchError

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
    with refused(
        BatchError, "Mean.weight of the whole batch is 8, but those of its 2 parts add up to 7"
    ):
        check([torch.tensor(3), torch.tensor(4)])
