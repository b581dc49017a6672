"""Params from a key: identical on every mesh, and a rank makes the leaves that it holds and no
others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import funcpipe as fp
from funcpipe._src.planning.lazy_init import LazyParams
from funcpipe.errors import StateError

BLOCKS, WIDTH = 4, 6


def params_fn(key: torch.Tensor) -> Any:
    normal = lambda *shape: fp.random.scaled_normal(shape, dtype=torch.float64)  # noqa: E731
    blocks = [
        {"w": normal(WIDTH, WIDTH), "b": fp.random.constant((WIDTH,), 0.0, torch.float64)}
        for _ in range(BLOCKS)
    ]
    made = fp.random.init(key, {"blocks": blocks, "head": normal(WIDTH, 5)})
    made["tail"] = made["head"] * 2  # one leaf follows from another
    made["order"] = torch.arange(WIDTH)
    return made


def loss_fn(params: Any, batch: Any) -> fp.Mean:
    x = batch[:, params["order"]]
    for block in params["blocks"]:
        x = fp.stage_boundary(torch.tanh(x @ block["w"] + block["b"]))
    x = x @ (params["head"] + params["tail"])
    return fp.Mean(x.square().sum(), torch.ones_like(x).sum())


def step(params: Any, batch: Any) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(params, batch)
    return optree.tree_map(
        lambda p, g: p - 0.1 * g if p.is_floating_point() else p, params, grads
    ), {"loss": loss}


BATCH = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
pipe, data = fp.pipelined(axis="pipe", microbatches=2), fp.data_parallel(axis="data")
sharded = fp.sharded_weights(axis="data")
MESHES: dict[str, tuple[fp.Mesh, list[Callable]]] = {
    "one rank": (fp.Mesh(), []),
    "pipe=4": (fp.Mesh(pipe=4), [pipe]),
    "data=4": (fp.Mesh(data=4), [data, sharded]),
    "pipe=2 data=2": (fp.Mesh(pipe=2, data=2), [pipe, data, sharded]),
    "data=1 pipe=2": (fp.Mesh(data=1, pipe=2), [pipe, data]),
}


def equal(a: Any, b: Any) -> bool:
    return optree.tree_all(optree.tree_map(torch.equal, a, b))


@pytest.mark.parametrize("name", MESHES)
def test_params_are_identical_on_every_mesh(name: str) -> None:
    mesh, stack = MESHES[name]
    run = fp.simulate(fp.compose(*stack)(step), mesh)
    state = run.init(lambda p: p, params_fn, BATCH, key=3)
    assert equal(run.unplace(state), params_fn(fp.random.key(3)))
    again = run.init(lambda p: p, params_fn, BATCH, key=fp.random.key(3))
    assert all(map(equal, optree.tree_leaves(state), optree.tree_leaves(again)))
    other = run.init(lambda p: p, params_fn, BATCH, key=4)
    assert not equal(run.unplace(other)["head"], run.unplace(state)["head"])
    run(state, BATCH)


def test_a_rank_makes_only_the_leaves_that_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block and what stands at the ends; the shapes of all others are known without data."""
    made: Counter[int] = Counter()
    leaf = LazyParams.leaf

    def counted(self: LazyParams, number: int) -> torch.Tensor:
        made[number] += 1
        return leaf(self, number)

    monkeypatch.setattr(LazyParams, "leaf", counted)
    mesh, stack = MESHES["pipe=4"]
    run = fp.simulate(fp.compose(*stack)(step), mesh)
    state = run.init(lambda p: p, params_fn, BATCH)
    held = [[x is not None for x in optree.tree_leaves(s, none_is_leaf=True)] for s in state]
    assert made == Counter({i: sum(h[i] for h in held) for i in range(len(held[0]))})
    assert all(sum(h) <= 4 + 2 for h in held) and len(held[0]) == 2 * BLOCKS + 3


class Draws(TorchDispatchMode):
    """Counts what is drawn."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "funcpipe_random"
        return func(*args, **(kwargs or {}))


def test_a_leaf_is_computed_from_what_it_depends_on_alone() -> None:
    lazy = LazyParams(params_fn, fp.random.key(0))
    leaves, draws = [], []
    for i in range(len(optree.tree_leaves(lazy.fakes))):
        with Draws() as mode:
            leaves.append(lazy.leaf(i))
        draws.append(mode.count)
    params = optree.tree_unflatten(optree.tree_structure(lazy.fakes), leaves)
    assert equal(params, params_fn(fp.random.key(0)))
    block = {"w": 1, "b": 0}
    assert optree.tree_unflatten(optree.tree_structure(params), draws) == {
        "blocks": [block] * BLOCKS, "head": 1, "tail": 1, "order": 0
    }  # fmt: skip


def test_no_leaf_exists_before_it_is_asked_for() -> None:
    """Also one that would not fit into memory."""
    huge = 1 << 44
    lazy = LazyParams(
        lambda key: {"a": fp.random.normal(key, (huge, 2)), "b": torch.zeros(3)}, fp.random.key(0)
    )
    assert lazy.fakes["a"].shape == (huge, 2)
    assert torch.equal(lazy.leaf(1), torch.zeros(3))


def test_the_global_generator_is_refused() -> None:
    with pytest.raises(
        StateError,
        match=r"^params_fn draws from the global random generator \(aten\.randn\.default\), so ",
    ):
        LazyParams(lambda key: [torch.randn(3)], fp.random.key(0))
    with pytest.raises(
        StateError, match=r"draw from its key with fp\.random\.normal or fp\.random\.uniform"
    ):
        LazyParams(lambda key: [torch.empty(3).uniform_()], fp.random.key(0))
