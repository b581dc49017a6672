"""Bad steps: what is done to leaves, state and metrics outside ``value_and_grad``, each refusal
with its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.models import D, batch, descend, distance, keep, loss_fn, params, pipe, refused, start

import funcpipe as fp
from funcpipe.errors import StateError

FLOAT64 = 1e-12  # sums over microbatches are reordered: a few roundings of 2**-53
TWO = fp.Mesh(pipe=2)

Rest = Callable[
    [Any, Any, torch.Tensor, Any], Any
]  # (state, batch, loss, grads) -> what the step returns


def step_with(rest: Rest) -> Callable:
    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state, b)
        return rest(state, b, loss, grads)

    return step


def metric(make: Callable[[Any, Any], Any]) -> Callable:
    """A step with a metric made of state and gradients."""
    return step_with(lambda s, b, loss, g: (descend(s, g), {"m": make(s, g)}))


def each(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """A step that puts every leaf through a function."""
    return step_with(lambda s, b, loss, g: (optree.tree_map(f, s), {}))


# ---- not elementwise

INSTEAD = ("outside value_and_grad", "not elementwise", "fp.global_norm or fp.global_sum")

NOT_ELEMENTWISE: dict[str, tuple[Callable, str]] = {
    "mean of a leaf": (metric(lambda s, g: s["w"][1].mean()), "aten.mean to params['w'][1]"),
    "mean of a gradient": (metric(lambda s, g: g["w"][0].mean()), "aten.mean to params['w'][0]"),
    "norm": (metric(lambda s, g: g["w"][1].norm()), "aten.linalg_vector_norm to params['w'][1]"),
    "get_total_norm": (
        metric(lambda s, g: torch.nn.utils.get_total_norm(g["w"])),
        "norm to params['w'][0]",
    ),
    "foreach norm": (
        metric(lambda s, g: torch._foreach_norm(g["w"])[0]),
        "aten._foreach_norm to params['w'][0]",
    ),
    "flatten and cat": (
        metric(lambda s, g: torch.cat([x.flatten() for x in g["w"]]).norm()),
        "to params['w'][0]",
    ),
    "stack": (metric(lambda s, g: torch.stack(g["w"]).sum()), "aten.stack to params['w'][0]"),
    "matmul": (each(lambda w: w @ w), "aten.mm to params['w'][0]"),
    "transpose": (each(lambda w: w.t()), "aten.t to params['w'][0]"),
    "index": (each(lambda w: w[0]), "aten.select to params['w'][0]"),
    "mask": (each(lambda w: w[w > 0]), "aten.index to params['w'][0]"),
    "eye": (each(lambda w: w + torch.eye(w.shape[0])), "aten.eye"),
}


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_leaves_are_touched_elementwise(name: str) -> None:
    step, what = NOT_ELEMENTWISE[name]
    with refused(StateError, "the step applies", what, *INSTEAD):
        start(pipe(step), TWO)


def test_init_state_touches_leaves_elementwise() -> None:
    with refused(StateError, "aten.linalg_qr to params['w'][0]", *INSTEAD):
        start(
            pipe(step_with(lambda s, b, loss, g: (s, {}))),
            TWO,
            init=lambda p: optree.tree_map(lambda w: torch.linalg.qr(w)[0], p),
        )


ELEMENTWISE: dict[str, Callable] = {
    "where": each(lambda w: torch.where(torch.isfinite(w), w * 0.5, 0)),
    "clamp, sign, pow": each(lambda w: w.clamp(-1, 1).sign() * w.abs() ** 1.5),
    "casts and fresh tensors": each(
        lambda w: (w.float() + torch.zeros(w.shape) + torch.full_like(w, 0.1)).double()
    ),
    "foreach": step_with(
        lambda s, b, loss, g: (
            optree.tree_map(lambda p, x: torch._foreach_sub([p], [x], alpha=0.1)[0], s, g),
            {
                "norm": fp.global_norm(g),
                "sum": fp.global_sum(s, lambda xs: sum((x.sum() for x in xs), torch.zeros(()))),
            },
        )
    ),
    "nan check": step_with(
        lambda s, b, loss, g: (descend(s, g), {"nan": torch.isnan(loss), "loss": loss})
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_is_elementwise_is_not_refused(name: str) -> None:
    step = ELEMENTWISE[name]
    run, state = start(pipe(step), TWO)
    state, metrics = run(state, batch())
    expected = step(params(), batch())
    tolerance = 1e-6 if "casts" in name else FLOAT64  # through float32
    assert distance((run.unplace(state), metrics), expected) < tolerance


def test_two_leaves_mixed() -> None:
    for step in (
        step_with(lambda s, b, loss, g: ({"w": [s["w"][0] + s["w"][1], s["w"][1]]}, {})),
        step_with(
            lambda s, b, loss, g: ({"w": list(torch._foreach_add(s["w"], g["w"][::-1]))}, {})
        ),
    ):
        with refused(
            StateError,
            "the step mixes params['w'][0] and params['w'][1] in aten.",
            "hold only one of them",
        ):
            start(pipe(step), TWO)


def test_random_values_for_leaves() -> None:
    for noise in (torch.randn_like, lambda w: torch.randn(w.shape), F.dropout):
        with refused(
            StateError,
            "draws random values (aten.",
            "for params['w'][0]",
            "would draw different ones",
        ):
            start(pipe(each(lambda w, noise=noise: w + noise(w))), TWO)  # type: ignore[misc]


# ---- state and metrics

STATES: dict[str, tuple[Rest, tuple[str, ...]]] = {
    "one more leaf": (
        lambda s, b, loss, g: ({**s, "n": torch.zeros(())}, {}),
        ("another structure than it takes", "'n': *", "instead of"),
    ),
    "tuple for list": (
        lambda s, b, loss, g: ({"w": tuple(s["w"])}, {}),
        ("another structure than it takes", "instead of"),
    ),
    "leaves swapped": (
        lambda s, b, loss, g: ({"w": s["w"][::-1]}, {}),
        (
            "state['w'][0] belongs to params['w'][0] before the step and to params['w'][1] after it",
            "keep its place",
        ),
    ),
    "leaf replaced": (
        lambda s, b, loss, g: ({"w": [s["w"][0], torch.zeros(())]}, {}),
        ("state['w'][1] belongs to params['w'][1] before", "no parameter after it"),
    ),
    "no metrics": (
        lambda s, b, loss, g: s,
        ("a step returns (state, metrics); this one returned a dict",),
    ),
    "a list": (lambda s, b, loss, g: [s, {}], ("this one returned a list of 2",)),
    "three": (lambda s, b, loss, g: (s, {}, 1), ("this one returned a tuple of 3",)),
    "a param as metric": (
        lambda s, b, loss, g: (s, {"w": s["w"][1]}),
        ("metrics['w'] is params['w'][1]", "no rank holds alone", "fp.global_sum"),
    ),
    "gradients as metrics": (
        lambda s, b, loss, g: (s, {"g": g}),
        ("metrics['g']['w'][0] is params['w'][0]",),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_and_metrics(name: str) -> None:
    rest, words = STATES[name]
    with refused(StateError, *words):
        start(pipe(step_with(rest)), TWO)


# ---- what goes into value_and_grad


def test_params_of_value_and_grad_are_parameters() -> None:
    def step(state: Any, b: Any) -> Any:
        fp.value_and_grad(loss_fn)({"w": [torch.zeros(D, D)] * 2}, b)
        return state, {}

    with refused(
        StateError,
        "value_and_grad: its params['w'][0] is no parameter of the state",
        "through batch",
    ):
        start(pipe(step), TWO)


def test_a_parameter_does_not_go_through_batch() -> None:
    def step(state: Any, b: Any) -> Any:
        fp.value_and_grad(loss_fn)(state, {**b, "target": state["w"][1]})
        return state, {}

    with refused(
        StateError, "value_and_grad: batch['target'] is params['w'][1]", "pass it through params"
    ):
        start(pipe(step), TWO)


# ---- decisions

BY_VALUE: dict[str, Rest] = {
    "if": lambda s, b, loss, g: (descend(s, g) if loss > 0 else s, {}),
    "item": lambda s, b, loss, g: (s, {"loss": loss.item()}),
    "int": lambda s, b, loss, g: (s, {"loss": int(loss)}),
    "norm": lambda s, b, loss, g: (s, {"big": bool(fp.global_norm(g) > 1)}),
    "mask index": lambda s, b, loss, g: (s, {"loss": loss[loss > 0]}),
}


@pytest.mark.parametrize("name", BY_VALUE)
def test_a_decision_by_the_value_of_a_tensor(name: str) -> None:
    with refused(
        StateError,
        "decides by the value of a tensor outside value_and_grad at test_refused_steps.py:",
        "torch.where",
        "metrics",
    ):
        start(pipe(step_with(BY_VALUE[name])), TWO)


# ---- leaves that a rank does not hold

NOT_HELD: dict[str, Rest] = {
    "zip": lambda s, b, loss, g: ({"w": [p - x for p, x in zip(s["w"], g["w"], strict=True)]}, {}),
    "in place": lambda s, b, loss, g: (
        {"w": [p.add_(x) for p, x in zip(s["w"], g["w"], strict=True)]},
        {},
    ),
    "foreach": lambda s, b, loss, g: ({"w": list(torch._foreach_add(s["w"], g["w"]))}, {}),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_a_step_that_does_not_pass_over_absent_leaves(name: str) -> None:
    step = step_with(NOT_HELD[name])
    with refused(
        StateError,
        "the step fails on a rank that does not hold all leaves",
        "None there",
        "optree.tree_map",
    ):
        start(pipe(step), TWO)
    start(fp.accumulated(step, microbatches=2), fp.Mesh())  # one rank holds all


def test_an_init_state_that_does_not_pass_over_absent_leaves() -> None:
    init = lambda p: {"w": p["w"], "m": [torch.zeros_like(w) for w in p["w"]]}  # noqa: E731
    step = lambda s, b: ({**s, "w": fp.value_and_grad(loss_fn)({"w": s["w"]}, b)[1]["w"]}, {})  # noqa: E731
    with refused(
        StateError,
        "init_state fails on a rank that does not hold all leaves",
        "zeros_like",
        "optree.tree_map",
    ):
        start(pipe(step), TWO, init=init)


# ---- a step that does not do the same every time


def counting(rest: Callable[[int, Any, Any], Any]) -> Callable:
    """A step that is told how often it ran before."""
    runs = iter(range(1000))
    return lambda state, b: rest(next(runs), state, b)


def test_a_step_makes_the_same_calls_every_time() -> None:
    planned = 3  # looked at once, and rehearsed as each of two ranks

    def more(n: int, state: Any, b: Any) -> Any:
        for _ in range(1 + (n >= planned)):
            loss, grads = fp.value_and_grad(loss_fn)(state, b)
        return grads, {"loss": loss}

    def fewer(n: int, state: Any, b: Any) -> Any:
        return (state, {}) if n >= planned else (fp.value_and_grad(loss_fn)(state, b)[1], {})

    def summing(n: int, state: Any, b: Any) -> Any:
        grads = fp.value_and_grad(loss_fn)(state, b)[1]
        return grads, {"norm": fp.global_norm(grads)} if n >= planned else {}

    def other_rows(n: int, state: Any, b: Any) -> Any:
        return fp.value_and_grad(loss_fn)(state, {"x": b["x"][: 4 if n >= planned else 8]})[1], {}

    cases = [
        (more, "calls value_and_grad more often than when it was planned"),
        (
            fewer,
            "called value_and_grad 0 times and global sums 0 times, but 1 and 0 times when it was "
            "planned",
        ),
        (summing, "takes more global sums than when it was planned"),
        (
            other_rows,
            "value_and_grad 0 got a batch of other shapes or values than when the step was planned",
        ),
    ]
    for rest, words in cases:
        run, state = start(pipe(counting(rest)), TWO, init=keep)
        with refused(StateError, words):
            run(state, batch())
