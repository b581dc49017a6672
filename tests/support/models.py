"""A small model, and short ways to run and to refuse steps on it, for the unit tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import optree
import pytest
import torch

import funcpipe as fp

D = 4  # the width of the model


def params(layers: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {"w": [torch.randn(D, D, generator=g, dtype=dtype) / D for _ in range(layers)]}


def batch(
    rows: int = 8, dtype: torch.dtype = torch.float64, seed: int = 1
) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)}


def block(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x + torch.tanh(x @ w)


def body(p: Any, b: Any) -> torch.Tensor:
    """The rows after all blocks, a boundary behind each."""
    x = b["x"]
    for w in p["w"]:
        x = fp.stage_boundary(block(w, x))
    return x


def count(x: torch.Tensor) -> torch.Tensor:
    """The number of rows."""
    return x.new_tensor(float(x.shape[0]))


def loss_fn(p: Any, b: Any) -> fp.Mean:
    x = body(p, b)
    return fp.Mean(x.pow(2).sum(), count(x))


def descend(state: Any, grads: Any) -> Any:
    return optree.tree_map(lambda p, g: p - 0.1 * g if p.is_floating_point() else p, state, grads)


def step_of(loss: Callable = loss_fn, has_aux: bool = False) -> Callable:
    """A step of plain descent; its state is the params."""

    def step(state: Any, b: Any) -> Any:
        out, grads = fp.value_and_grad(loss, has_aux)(state, b)
        return descend(state, grads), {"loss": out[0], "aux": out[1]} if has_aux else {"loss": out}

    return step


def keep(p: Any) -> Any:
    """The ``init_state`` of a state that is the params."""
    return p


def start(
    step: Callable, mesh: fp.Mesh, p: Any = None, b: Any = None, init: Callable = keep
) -> tuple[Any, Any]:
    """A simulated runner and its first state."""
    run = fp.simulate(step, mesh)
    return run, run.init(init, params() if p is None else p, batch() if b is None else b)


def pipe(step: Callable, microbatches: int | None = 2, **options: Any) -> Any:
    return fp.pipelined(
        step, axis=options.pop("axis", "pipe"), microbatches=microbatches, **options
    )


def run_loss(
    loss: Callable, p: Any = None, b: Any = None, has_aux: bool = False, **options: Any
) -> tuple[Any, Any]:
    """The state and metrics after a step of a pipeline of two ranks."""
    step = pipe(step_of(loss, has_aux), **options)
    run, state = start(step, fp.Mesh(pipe=2), p, b)
    state, metrics = run(state, batch() if b is None else b)
    return run.unplace(state), metrics


def refused(kind: type[Exception], *words: str) -> Any:
    """Expect an error of a kind whose text has all these words, in this order."""
    assert issubclass(kind, fp.errors.FuncpipeError)
    return pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, words)))


def distance(a: Any, b: Any) -> float:
    """The largest difference between two trees, relative to the largest entry."""
    assert optree.tree_structure(a) == optree.tree_structure(b)
    pairs = [
        (x.double(), y.double())
        for x, y in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
        if isinstance(x, torch.Tensor)
    ]
    size = max((y.abs().max().item() for _, y in pairs if y.numel()), default=1.0)
    return max(((x - y).abs().max().item() for x, y in pairs if x.numel()), default=0.0) / (
        size or 1.0
    )


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit by bit."""
    xs, ys = optree.tree_leaves(a), optree.tree_leaves(b)
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return len(xs) == len(ys) and all(equal(x, y) for x, y in zip(xs, ys, strict=True))


def grid(
    names: Collection[str], kinds: Collection[Any], everywhere: Collection[str], turns: bool
) -> list:
    """All pairs of a name and a kind, as parameters of a test. Those of a name in ``everywhere``
    are plain, and so is one of every other name where the names take turns; the rest are slow."""
    pairs = []
    for i, name in enumerate(names):
        for k, kind in enumerate(kinds):
            plain = name in everywhere or (turns and i % len(kinds) == k)
            marks = () if plain else pytest.mark.slow
            pairs.append(pytest.param(name, kind, marks=marks, id=f"{name}-{kind}"))
    return pairs
