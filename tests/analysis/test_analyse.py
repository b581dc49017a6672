"""Dyed runs: which leaf of a state is which parameter, which calls a step makes, and what a rank's
state looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
from support.models import D, batch, descend, keep, loss_fn, params
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import funcpipe as fp
from funcpipe._src.analysis.state import StepAnalysis, analyse
from funcpipe._src.core import pytree as tree
from funcpipe.optim import adamw, sgd


class State(NamedTuple):
    params: Any
    opt: Any
    step: Any
    extra: Any = None


def seen(
    step: Callable, init: Callable, p: Any = None, b: Any = None
) -> tuple[StepAnalysis, Callable]:
    mode = FakeTensorMode()
    fakes = tree.map_tensors(
        lambda x: torch.empty_like(mode.from_tensor(x)), params() if p is None else p
    )
    return analyse(step, init, fakes, batch() if b is None else b, mode)


def owners(analysis: StepAnalysis) -> dict[str, int | None]:
    return dict(zip(analysis.state_paths, analysis.state, strict=True))


@pytest.mark.parametrize("optimizer", [adamw(1e-2), sgd(1e-2, momentum=0.9)], ids=["adamw", "sgd"])
def test_moments_masters_and_averages_belong_to_their_parameter(optimizer: Any) -> None:
    def init(p: Any) -> State:
        master = optree.tree_map(lambda x: x.float(), p)
        return State(
            p,
            optimizer.init(p),
            torch.zeros(()),
            {"ema": [p["w"][1], p["w"][0]], "master": master, "n": 3},
        )

    def step(state: State, b: Any) -> Any:
        _, grads = fp.value_and_grad(loss_fn)(state.params, b)
        new, opt = optimizer.update(grads, state.opt, state.params)
        return State(new, opt, state.step + 1, state.extra), {}

    analysis, _ = seen(step, init)
    found = owners(analysis)
    assert [found[f".params['w'][{i}]"] for i in (0, 1)] == [0, 1]
    assert [found[f".extra['ema'][{i}]"] for i in (0, 1)] == [1, 0]
    assert [found[f".extra['master']['w'][{i}]"] for i in (0, 1)] == [0, 1]
    assert found[".step"] is None and found[".extra['n']"] is None
    moments = [i for path, i in found.items() if path.startswith(".opt")]
    assert (
        sorted(i for i in moments if i is not None) == sorted([0, 1] * (len(moments) // 2))
        and None in moments
    )


def test_leaves_of_equal_shape_any_dims_and_dtypes_are_told_apart() -> None:
    p = {
        "a": torch.zeros(()),
        "b": torch.zeros(()),
        "c": torch.arange(3),
        "d": torch.zeros(0, 2),
        "e": torch.ones(2, 2, 2).bool(),
    }
    analysis, _ = seen(lambda s, b: (s, {}), lambda p: [p["e"], p["c"], {**p}], p)
    assert analysis.state == (4, 2, 0, 1, 2, 3, 4)
    assert analysis.shapes == ((), (), (3,), (0, 2), (2, 2, 2)) and analysis.dtypes[4] == torch.bool


def test_fresh_tensors_of_a_leafs_size_belong_to_it() -> None:
    analysis, _ = seen(
        lambda s, b: (s, {}), lambda p: optree.tree_map(lambda x: torch.zeros(x.shape), p)
    )
    assert analysis.state == (0, 1)


def test_calls_and_sums_are_noted_in_order() -> None:
    def first(p: Any, b: Any) -> Any:
        return loss_fn({"w": p}, b)

    def second(p: Any, b: Any) -> Any:
        return loss_fn({"w": [p["x"].double()]}, b), {"m": fp.Mean(b["x"].sum(), torch.ones(()))}

    def step(state: Any, b: Any) -> Any:
        _, grads = fp.value_and_grad(first)(state["w"][::-1], b)
        norm = fp.global_norm({"g": grads, "n": torch.zeros(())})
        (_, aux), _ = fp.value_and_grad(second, has_aux=True)(
            {"x": state["w"][1].float()}, {"x": b["x"][:4]}
        )
        return state, {
            "norm": norm,
            "m": aux["m"],
            "total": fp.global_sum([], lambda xs: torch.zeros((), dtype=torch.int32)),
        }

    analysis, _ = seen(step, keep)
    assert [(c.params, c.has_aux, c.dtypes) for c in analysis.calls] == [
        ((1, 0), False, (torch.float64,) * 2),
        ((1,), True, (torch.float32,)),
    ]
    assert analysis.calls[1].batch["x"].shape == (4, D) and not isinstance(
        analysis.calls[1].batch["x"], FakeTensor
    )
    assert [(s.params, s.dtype) for s in analysis.reductions] == [
        ((1, 0, None), torch.float64),
        ((), torch.int32),
    ]


def test_a_step_is_looked_at_without_its_work() -> None:
    """No tensor of a parameter's size is made: a model that fits nowhere can be planned."""
    huge = {"w": torch.empty(1 << 40, 1 << 10, device="meta", dtype=torch.float64)}
    mode = FakeTensorMode()
    fakes = {"w": torch.empty_like(mode.from_tensor(huge["w"]))}

    def loss(p: Any, b: Any) -> Any:
        return fp.Mean(p["w"].sum() * b["x"].sum(), torch.ones(())), {
            "m": fp.Mean(p["w"].sum(), torch.ones(()))
        }

    def step(state: Any, b: Any) -> Any:
        (loss_, aux), grads = fp.value_and_grad(loss, has_aux=True)(state, b)
        grads, norm = fp.clip_by_global_norm(grads, 1.0)
        return descend(state, grads), {"loss": loss_, "norm": norm, **aux}

    analysis, _ = analyse(step, keep, fakes, batch(), mode)
    assert analysis.shapes == ((1 << 40, 1 << 10),)


def test_the_state_of_a_rank_that_holds_some_leaves() -> None:
    optimizer = adamw(1e-2)

    def step(state: State, b: Any) -> Any:
        _, grads = fp.value_and_grad(loss_fn)(state.params, b)
        return State(*optimizer.update(grads, state.opt, state.params), state.step + 1), {
            "norm": fp.global_norm(grads)
        }

    analysis, held_state = seen(step, lambda p: State(p, optimizer.init(p), torch.zeros(())))
    for held in (set(), {1}, {0, 1}):
        leaves = analysis.state_spec.flatten_up_to(held_state(lambda i, held=held: i in held))
        assert [x is not None for x in leaves] == [i is None or i in held for i in analysis.state]
