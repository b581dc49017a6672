"""States and params in objects that trees do not look into: refused by name when a run begins;
registered, they are trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from support.models import refused

import funcpipe as fp
from funcpipe.errors import StateError

PARAMS = {"w": torch.ones(3)}
X = torch.arange(12.0).view(4, 3)


@dataclasses.dataclass
class Data:
    params: Any
    count: int = 0


class Plain:
    def __init__(self, params: Any) -> None:
        self.params = params


class Slots:
    __slots__ = ("params",)

    def __init__(self, params: Any) -> None:
        self.params = params


class Table(dict):
    """A dict of another class is a leaf."""


@optree.dataclasses.dataclass(namespace="")
class Registered:
    params: Any
    count: Any


@optree.register_pytree_node_class(namespace="funcpipe")
class Node(Plain):
    def tree_flatten(self) -> tuple:
        return (self.params,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Node:
        return cls(*children)


def loss_fn(p: Any, x: torch.Tensor) -> fp.Mean:
    return fp.Mean((x @ p["w"]).square().sum(), torch.tensor(float(len(x))))


def descend(p: Any, x: torch.Tensor) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(p, x)
    return optree.tree_map(lambda p, g: p - 0.1 * g, p, grads), {"loss": loss}


def start(step: Callable, init_state: Callable, params: Any = PARAMS) -> Any:
    return fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh()).init(init_state, params, X)


def unused(state: Any, x: torch.Tensor) -> Any:
    return state, {}


DATACLASS = '@optree.dataclasses.dataclass(namespace="") in place of @dataclasses.dataclass'
CLASS = '@optree.register_pytree_node_class(namespace="funcpipe")'
WAYS = [
    (Data, "an instance of the dataclass Data", DATACLASS),
    (Plain, "an instance of the class Plain", CLASS),
    (Slots, "an instance of the class Slots", CLASS),
    (Table, "an instance of the class Table", CLASS),
    (lambda p: set(p.values()), "a set", "use a list or dict"),
    (lambda p: Plain([Slots((p,))]), "an instance of the class Plain", CLASS),
]


@pytest.mark.parametrize(("wrap", "what", "remedy"), WAYS)
def test_a_container_that_is_not_registered_is_refused_in_a_state(
    wrap: Any, what: str, remedy: str
) -> None:
    with refused(StateError, f"state is {what}, which holds tensors but is not registered", remedy):
        start(unused, wrap)
    with refused(StateError, f"state['inner'][1] is {what}", remedy):
        start(unused, lambda p: {"inner": [p, wrap(p)]})


def test_it_is_refused_in_params() -> None:
    with refused(StateError, "params['k'] is an instance of the dataclass Data", DATACLASS):
        start(unused, lambda p: p, {"k": Data(PARAMS)})
    with refused(StateError, "params is the module Linear", "fp.from_module(module)"):
        start(unused, lambda p: p, torch.nn.Linear(2, 2))
    with refused(StateError, "params is an instance of the dataclass Data", DATACLASS):
        fp.value_and_grad(lambda p, x: x.sum())(Data(PARAMS), X)


def test_it_is_refused_where_a_step_returns_it() -> None:
    with refused(StateError, "the step returns state: state is an instance of the dataclass Data"):
        start(lambda p, x: (Data(p), {}), lambda p: p)
    with refused(
        StateError, "the step returns metrics: metrics['m'] is an instance of the dataclass Data"
    ):
        start(lambda p, x: (p, {"m": Data(fp.global_norm(p))}), lambda p: p)


def test_settings_without_tensors_are_leaves() -> None:
    start(lambda s, x: (s, {}), lambda p: {"p": p, "settings": Data(None, 3), "names": {"a", "b"}})


@pytest.mark.parametrize(
    "make", [lambda p: Registered(p, torch.zeros(())), Node], ids=["dataclass", "class"]
)
def test_a_registered_container_is_a_tree(make: Callable) -> None:
    def step(state: Any, x: torch.Tensor) -> Any:
        params, metrics = descend(state.params, x)
        return (
            Registered(params, state.count + 1) if isinstance(state, Registered) else Node(params)
        ), metrics

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    state, metrics = run(run.init(make, PARAMS, X), X)
    want, told = descend(PARAMS, X)
    torch.testing.assert_close((run.unplace(state).params, metrics), (want, told))
