"""`restored`: after a plan a model has the caches that it had, and computes what it computed."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, ClassVar

import optree
import pytest
import torch
from torch import nn

import funcpipe as fp
from funcpipe._src.graph.restore import restored
from funcpipe.testing import assert_equivalent

D = 4
TABLES: dict[int, torch.Tensor] = {}
LAST: torch.Tensor | None = None
X = torch.randn(8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(length: int) -> torch.Tensor:
    """What all of them keep."""
    return torch.arange(1.0, length + 1, dtype=torch.float64)


class Kept:
    """A table that grows, and says how long it is."""

    def __init__(self) -> None:
        self.table: torch.Tensor | None = None
        self.length = 0

    def of(self, length: int) -> torch.Tensor:
        if self.length < length:
            self.table, self.length = made(length), length
        assert self.table is not None
        return self.table[:length]


class InClass(nn.Module):
    """A dict and an attribute of its class."""

    tables: ClassVar[dict[int, torch.Tensor]] = {}
    last = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if D not in self.tables:
            self.tables[D] = made(D)
        if type(self).last is None:
            type(self).last = made(D)
        return x * self.tables[D] * self.last


class InObject(nn.Module):
    """An object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.kept.of(x.shape[-1])


class InContainers(nn.Module):
    """Containers of kinds that a call does not copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Kept()
        self.inside.table = {"dict": OrderedDict(), "list": [], "deque": deque()}  # type: ignore[assignment]
        self.defaults: defaultdict[int, torch.Tensor] = defaultdict(lambda: made(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held: Any = self.inside.table
        held["dict"].setdefault(D, made(D))
        for name in ("list", "deque"):
            if not held[name]:
                held[name].append(made(D))
        return x * self.defaults[D] * held["dict"][D] * held["list"][0] * held["deque"][0]


def in_global(length: int) -> torch.Tensor:
    global LAST
    if length not in TABLES:
        TABLES[length] = made(length)
    if LAST is None:
        LAST = made(length)
    return TABLES[length] * LAST


class InGlobal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * in_global(x.shape[-1])


@functools.lru_cache(maxsize=8)
def cached(length: int) -> tuple[torch.Tensor, int]:
    return made(length), length


def closed_over() -> Callable[[int], torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    last = None

    def memo(length: int) -> torch.Tensor:
        nonlocal last
        if length not in found:
            found[length] = made(length)
        last = made(length) if last is None else last
        return found[length] * last

    return memo


class InFunctions(nn.Module):
    """An ``lru_cache`` of a function, one of a method, a closure and a default."""

    memo = staticmethod(closed_over())

    @functools.cache  # noqa: B019
    def method(self, length: int) -> torch.Tensor:
        return made(length)

    def forward(self, x: torch.Tensor, known: dict[int, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
        known.setdefault(D, made(D))
        return x * cached(D)[0] * self.method(D) * self.memo(D) * known[D]


def step_of(module: nn.Module) -> tuple[Callable, Any]:
    model = nn.Sequential(nn.Linear(D, D), module, nn.Linear(D, 1)).double()
    apply_fn, params, _ = fp.from_module(model, ["1"])

    def loss_fn(params: Any, batch: torch.Tensor) -> Any:
        out, _ = apply_fn(params, {}, batch)
        rows = torch.tensor(float(len(batch)), dtype=torch.float64)
        return fp.Mean(out.square().sum(), rows), {"out": fp.Mean(out.sum(), rows)}

    def step(params: Any, batch: torch.Tensor) -> Any:
        (loss, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return optree.tree_map(lambda p, g: p - 0.01 * g, params, grads), {"loss": loss, **aux}

    return step, params


KINDS = [InClass, InObject, InContainers, InGlobal, InFunctions]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_keeps_tables_works_before_and_after_a_plan(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    step, params = step_of(kind())
    fast = fp.pipelined(step, axis="pipe", microbatches=2)
    run = fp.simulate(fast, fp.Mesh(pipe=2))
    state, metrics = run(run.init(lambda params: params, params, X), X)
    want, plain = step(params, X)  # fills the tables for real
    assert torch.allclose(metrics["loss"], plain["loss"], rtol=1e-12)
    full = run.unplace(state)
    assert all(torch.allclose(full[name], want[name], rtol=1e-12) for name in want)


def test_caches_that_hold_real_tensors_are_emptied_for_a_run() -> None:
    """As after a call of the plain model."""
    cached.cache_clear()
    full = cached(D)[0]

    def loss_fn(w: torch.Tensor, batch: torch.Tensor) -> fp.Mean:
        return fp.Mean((batch @ w * cached(D)[0].sum()).sum(), torch.tensor(float(len(batch))))

    def step(w: torch.Tensor, batch: torch.Tensor) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, batch)
        return w - grad, {"loss": loss}

    assert_equivalent(step, fp.accumulated(step, microbatches=2), fp.Mesh(), lambda w: w, full, [X])
    assert cached(D)[0].sum().item() == 10


def test_what_holds_no_tensor_stays() -> None:
    """Counts, and caches of numbers: what a run changed without tensors is left alone."""
    counts = {"calls": 0}

    @functools.lru_cache
    def square(n: int) -> int:
        return n * n

    def loss_fn(x: torch.Tensor) -> torch.Tensor:
        counts["calls"] += 1
        return x * square(3)

    with restored(loss_fn):
        loss_fn(torch.ones(1))
    assert counts == {"calls": 1} and square.cache_info().currsize == 1


def test_what_changed_beside_a_tensor_is_put_back_too() -> None:
    kept, names = Kept(), {"a"}

    def loss_fn(x: torch.Tensor) -> torch.Tensor:
        names.add("b")
        return x * kept.of(D)

    with pytest.raises(ZeroDivisionError), restored(loss_fn):
        loss_fn(torch.ones(D))
        raise ZeroDivisionError
    assert (kept.table, kept.length, names) == (None, 0, {"a"})
    assert torch.equal(loss_fn(torch.ones(D)), made(D).to(torch.float64)) and kept.length == D
