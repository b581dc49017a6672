"""Traces: markers, labels, inputs and outputs of the joint graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import D, batch, block, body, count, loss_fn, params, refused
from support.units import assert_units_are_eager, ops, traced, units
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe._src.graph.node_labels import read_nodes
from funcpipe._src.graph.ops import MARK, is_seeded
from funcpipe.errors import CutError


def test_inputs_are_params_then_batch_and_outputs_are_heads_then_gradients() -> None:
    t = traced(loss_fn, params(3), {**batch(), "name": "text", "none": None})
    nodes = list(t.module.graph.nodes)
    assert (t.params, t.batch, t.boundaries, t.has_weight, t.aux_count) == (3, 1, 3, True, 0)
    assert [x.op for x in nodes[:4]] == ["placeholder"] * 4 and nodes[4].op != "placeholder"
    assert [tuple(x.meta["val"].shape) for x in nodes[-1].args[0]] == [
        (),
        (),
        (D, D),
        (D, D),
        (D, D),
    ]


def test_marks_go_up_through_the_forward_half_and_on_through_the_backward_half() -> None:
    t = traced(loss_fn, params(3), batch())
    assert [x.args[0] for x in t.module.graph.nodes if x.target is MARK] == [1, 2, 3, 4, 5, 6, 7]


def test_a_boundary_adds_nothing_to_the_graph() -> None:
    def unmarked(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = block(w, x)
        return fp.Mean(x.pow(2).sum(), count(x))

    with_boundaries, without = (
        [
            str(x.target)
            for x in traced(loss, params(3), batch()).module.graph.nodes
            if x.target is not MARK
        ]
        for loss in (loss_fn, unmarked)
    )
    assert with_boundaries == without


def test_frozen_and_unused_leaves_have_no_gradient() -> None:
    p = {**params(1), "ids": torch.arange(D), "unused": torch.ones(2)}
    t = traced(lambda p, b: loss_fn(p, {"x": b["x"][:, p["ids"]]}), p, batch())
    out = list(t.module.graph.nodes)[-1].args[0]
    assert [x is None for x in out[2:]] == [True, True, False]  # ids, unused, w


def test_aux_keeps_its_structure_and_numbers_its_tensors() -> None:
    def loss(p: Any, b: Any) -> Any:
        x = body(p, b)
        return loss_fn(p, b), {"m": fp.Mean(x.sum(), count(x)), "r": fp.Rows(x, 0), "n": 3}

    t = traced(loss, params(), batch(), has_aux=True)
    assert isinstance(t.aux["m"], fp.Mean) and isinstance(t.aux["r"], fp.Rows)
    assert (t.aux["m"], t.aux["r"], t.aux["n"], t.aux_count) == ((0, 1), (2, 0), 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_other_kinds_in_the_batch_are_constants(dtype: torch.dtype) -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"].to(b["dtype"]) * b["scale"]
        return fp.Mean((x @ p["w"][0].to(b["dtype"])).float().sum(), count(x))

    t = traced(loss, params(1), {**batch(), "dtype": dtype, "scale": 2})
    assert t.batch == 1 and str(dtype) in str(t.module.graph)


def test_in_place_ops_on_intermediates_become_functional() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x, out = b["x"].clone(), torch.zeros_like(b["x"])
        for i, w in enumerate(p["w"]):
            y = x @ w + 1
            y.mul_(2)
            y[:, 0] = 0
            x = fp.stage_boundary(x + y.relu_())
            out[:, i] += x[:, i]
        return fp.Mean(x.sum() + out.pow(2).sum(), count(x))

    assert_units_are_eager(loss, params(3), batch())
    names = {name for u in units(loss, params(3), batch()).units.values() for name in ops(u)}
    assert not any(name.endswith("_") for name in names)


def test_the_gradient_of_a_gradient_may_cross_boundaries() -> None:
    def penalty(p: Any, b: Any) -> fp.Mean:
        x = b["x"].detach().requires_grad_()
        slope = torch.autograd.grad(body(p, {"x": x}).pow(2).sum(), x, create_graph=True)[0]
        return fp.Mean(slope.pow(2).sum(), count(x))

    assert_units_are_eager(penalty, params(3), batch())


def test_boundaries_inside_vmap_and_torch_func_grad() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        rows = torch.vmap(lambda r: body(p, {"x": r[None]})[0])(b["x"])
        slopes = torch.func.grad(lambda x: body(p, {"x": x}).pow(2).sum())(b["x"])
        return fp.Mean((rows * slopes).sum(), count(rows))

    assert_units_are_eager(loss, params(), batch())


def test_a_boundary_at_the_end_of_a_checkpoint_is_as_good_as_one_behind_it() -> None:
    """The recomputation stops early, before it comes to the boundary again."""

    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = checkpoint(lambda w, x: fp.stage_boundary(block(w, x)), w, x, use_reentrant=False)
        return fp.Mean(x.pow(2).sum(), count(x))

    assert assert_units_are_eager(loss, params(3), batch()).segments == 4


def test_a_boundary_in_a_checkpoint_is_refused() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = checkpoint(
            lambda x: fp.stage_boundary(x.sin()).cos(), b["x"] @ p["w"][0], use_reentrant=False
        )
        return fp.Mean(x.sum(), count(x))

    with refused(CutError, "while a checkpoint recomputes"):
        traced(loss, params(1), batch())


def test_random_ops_are_known_by_their_arguments() -> None:
    def seeded(loss: Any) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("funcpipe._src.graph.trace.refuse_impure", lambda *_: None)
            return any(map(is_seeded, traced(loss, params(1), batch()).module.graph.nodes))

    attend = torch.nn.functional.scaled_dot_product_attention
    q = lambda p, b: (b["x"] @ p["w"][0]).view(2, 1, -1, D)  # noqa: E731
    weight = torch.tensor
    assert seeded(lambda p, b: fp.Mean(torch.rand(3).sum() * p["w"][0].sum(), weight(1.0)))
    for options in ({}, {"is_causal": True}, {"dropout_p": 0.0}):
        assert not seeded(
            lambda p, b, o=options: fp.Mean(
                attend(q(p, b), q(p, b), q(p, b), **o).sum(), weight(1.0)
            )
        )
    mask = lambda x: torch.zeros(x.shape[-2], x.shape[-2], dtype=x.dtype)  # noqa: E731
    assert not seeded(
        lambda p, b: fp.Mean(attend(q(p, b), q(p, b), q(p, b), mask(q(p, b))).sum(), weight(1.0))
    )


def test_labels_follow_the_order_of_units() -> None:
    n = read_nodes(traced(loss_fn, params(4), batch()))
    labels = [n.label[x] for x in n.graph.nodes if x in n.label]
    for x in n.label:
        assert all(n.label[a] <= n.label[x] for a in x.all_input_nodes if a in n.label)
    assert set(labels) == set(range(10))
