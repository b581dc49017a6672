"""Python values that a loss reads count as they are at the call; those that are not followed are
refused by the call."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import funcpipe as fp
from funcpipe._src.analysis.host_code import is_user_file
from funcpipe._src.analysis.host_values import Follower, differences
from funcpipe._src.runtime import runner as runtime_file
from funcpipe.errors import MismatchError, StateError, TraceError

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
W = torch.randn(3, generator=torch.Generator().manual_seed(1)).double()


def mean(factor: float, w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
    return fp.Mean(factor * (x @ w).square().sum(), torch.tensor(float(len(x))))


def want(factor: float) -> torch.Tensor:
    return factor * (X @ W).square().sum() / len(X)


def runner(
    loss_of: Callable[[], Callable],
    transform: Callable = lambda s: fp.accumulated(s, microbatches=2),
) -> Any:
    """A runner of a step that leaves the params, with how often it planned."""

    def step(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss, grad = fp.value_and_grad(loss_of())(w, x)
        return w - 0.0 * grad, {"loss": loss}

    run = fp.simulate(transform(step), fp.Mesh())
    return run, run.init(lambda p: p, W, X)


def check(loss_of: Callable[[], Callable], values: dict[float, Callable[[], object]]) -> Any:
    """The loss has the factor of the value at each call: after each change, and back again."""
    run, state = runner(loss_of)
    for factor in (*values, *values):
        values[factor]()
        state, metrics = run(state, X)
        torch.testing.assert_close(metrics["loss"], want(factor), rtol=1e-12, atol=0)
    return run


# ---- where a value may lie


class Settings:
    beta = 1.0


@dataclasses.dataclass
class Inner:
    beta: float = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    beta: float = 1.0
    unused: int = 0


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    betas: list = dataclasses.field(default_factory=lambda: [1.0])


class Model:
    scale = 1.0

    def __init__(self) -> None:
        self.raw = 1.0

    @property
    def beta(self) -> float:
        return self.raw

    def factor(self) -> float:
        return self.beta * self.scale

    def loss(self, w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        return mean(self.factor(), w, x)

    def __call__(self, w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        return self.loss(w, x)


class ByAttribute(dict):
    """As the settings of many libraries: keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def read_beta(settings: Any) -> float:
    return settings.beta


def loss_of(beta: Callable[[], float]) -> Callable:
    return lambda w, x: mean(beta(), w, x)


BETA = 1.0


def test_values_of_a_module_and_a_class() -> None:
    def of_global() -> float:
        return BETA

    check(
        lambda: loss_of(of_global),
        {1.0: lambda: globals().update(BETA=1.0), 3.0: lambda: globals().update(BETA=3.0)},
    )
    set_class = functools.partial(setattr, Settings, "beta")
    check(
        lambda: loss_of(lambda: Settings.beta),
        {1.0: lambda: set_class(1.0), 3.0: lambda: set_class(3.0)},
    )


@pytest.mark.parametrize(
    "make", [Inner, Slotted, lambda: types.SimpleNamespace(beta=1.0), lambda: ByAttribute(beta=1.0)]
)
@pytest.mark.parametrize("read", [lambda s: s.beta, read_beta, lambda s: getattr(s, "beta")])  # noqa: B009
def test_attributes_of_an_object(make: Callable, read: Callable) -> None:
    settings = make()
    change = functools.partial(setattr, settings, "beta")
    if isinstance(settings, dict):
        change = functools.partial(settings.__setitem__, "beta")
    check(
        lambda: loss_of(lambda: read(settings)),
        {1.0: lambda: change(1.0), 3.0: lambda: change(3.0)},
    )


def test_nested_values() -> None:
    outer = Outer()
    inner = functools.partial(setattr, outer.inner, "beta")
    check(
        lambda: loss_of(lambda: outer.inner.beta),
        {1.0: lambda: inner(1.0), 3.0: lambda: inner(3.0)},
    )
    element = functools.partial(outer.betas.__setitem__, 0)
    check(
        lambda: loss_of(lambda: outer.betas[0]),
        {1.0: lambda: element(1.0), 3.0: lambda: element(3.0)},
    )
    other = functools.partial(setattr, outer, "inner")
    check(
        lambda: loss_of(lambda: outer.inner.beta),
        {1.0: lambda: other(Inner(1.0)), 3.0: lambda: other(Inner(3.0))},
    )


@pytest.mark.parametrize("form", ["method", "object", "partial", "wrapped"])
def test_forms_of_a_loss(form: str) -> None:
    model = Model()

    @functools.wraps(model.loss)
    def wrapped(*args: Any) -> Any:
        return model.loss(*args)

    forms: dict[str, Callable] = {
        "method": lambda: model.loss,
        "object": lambda: model,
        "partial": lambda: functools.partial(Model.loss, model),
        "wrapped": lambda: wrapped,
    }
    raw = functools.partial(setattr, model, "raw")
    scale = functools.partial(setattr, model, "scale")
    check(
        forms[form],
        {1.0: lambda: (raw(1.0), scale(1.0)), 3.0: lambda: raw(3.0), 6.0: lambda: scale(2.0)},
    )


class Meta(type):
    raw = 1.0

    @property
    def beta(cls) -> float:
        return cls.raw


class OfMeta(metaclass=Meta):
    pass


class Described:
    @property
    def beta(self) -> float:
        return vars(BOX)["value"]

    @classmethod
    def of_class(cls) -> float:
        return Settings.beta

    def method(self) -> float:
        return 1.0


class Derived(Described):
    def of_class(self) -> float:  # type: ignore[override]
        return super().of_class()


def by_name(w: torch.Tensor, x: torch.Tensor, *, beta: float = 1.0) -> fp.Mean:
    return mean(beta * getattr(by_name, "scale"), w, x)  # noqa: B009


by_name.scale = 1.0  # type: ignore[attr-defined]


def imported() -> float:
    from a_module_of_settings import beta  # type: ignore[import-not-found]

    return beta


BOX = types.SimpleNamespace(value=1.0, fn=lambda: 1.0)
NAMED, ARRAY, QUEUE, OBJECTS = (
    set[str](),
    np.ones(2),
    deque([1.0]),
    [types.SimpleNamespace(weight=1.0)],
)
MODULE = types.ModuleType("a_module_of_settings")
MODULE.__file__ = __file__
MODULE.beta = 1.0  # type: ignore[attr-defined]


def set_at(box: Any, name: str) -> Callable[[Any], object]:
    return functools.partial(setattr, box, name)


WAYS: dict[str, tuple[Callable, Callable[[Any], object]]] = {
    "metaclass": (loss_of(lambda: OfMeta.beta), set_at(Meta, "raw")),
    "property": (loss_of(lambda: Described().beta), set_at(BOX, "value")),
    "super": (loss_of(lambda: Derived().of_class()), set_at(Settings, "beta")),
    "function of a namespace": (loss_of(lambda: BOX.fn()), lambda k: setattr(BOX, "fn", lambda: k)),
    "method of a class": (
        loss_of(lambda: Described().method()),
        lambda k: setattr(Described, "method", lambda self: k),
    ),
    "default by name": (by_name, lambda k: by_name.__kwdefaults__.update(beta=k)),  # type: ignore[union-attr]
    "attribute of a function": (by_name, set_at(by_name, "scale")),
    "import": (loss_of(imported), set_at(MODULE, "beta")),
    "set": (
        loss_of(lambda: 3.0 if "k" in NAMED else 1.0),
        lambda k: NAMED.add("k") if k == 3.0 else NAMED.clear(),
    ),
    "array": (loss_of(lambda: float(ARRAY[0])), ARRAY.fill),
    "deque": (loss_of(lambda: QUEUE[-1]), QUEUE.append),
    "element": (loss_of(lambda: sum(x.weight for x in OBJECTS)), set_at(OBJECTS[0], "weight")),
    "type": (
        loss_of(lambda: 3.0 if BOX.value is True else 1.0),
        lambda k: setattr(BOX, "value", True if k == 3.0 else 1.0),
    ),
    "made in the step": (fp.value_and_grad, set_at(BOX, "value")),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_read(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_module_of_settings", MODULE)
    loss_fn, change = WAYS[way]

    def made() -> Callable:
        return loss_of(lambda: BOX.value) if loss_fn is fp.value_and_grad else loss_fn

    check(made, {k: functools.partial(change, k) for k in (1.0, 3.0)})
    change(1.0)


def test_a_module_thaws_and_changes_its_dropout() -> None:
    module = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Dropout(0.0)).double()
    apply_fn, params, _ = fp.from_module(module)
    batch = {"x": X, "key": fp.random.keys(fp.random.key(0), len(X))}

    def loss_fn(p: Any, b: Any) -> fp.Mean:
        y, _ = apply_fn(p, {}, b["x"], dropout_key=b["key"])
        return fp.Mean(y.square().sum(), torch.tensor(float(len(y))))

    def step(p: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(p, b)
        return p, {"loss": loss, "norm": fp.global_norm(grads)}

    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    state = run.init(lambda p: p, params, batch)
    changes: list[Callable[[], object]] = [
        lambda: module[0].weight.requires_grad_(False),
        lambda: module[0].weight.requires_grad_(True),
        lambda: setattr(module[1], "p", 0.5),
        module.eval,
    ]
    for change in changes:
        change()
        state, metrics = run(state, batch)
        expected = step(params, batch)[1]
        for name, x in metrics.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-300)


# ---- plans


def test_a_value_that_comes_back_has_its_plan() -> None:
    run = check(
        lambda: loss_of(lambda: Settings.beta),
        {b: functools.partial(setattr, Settings, "beta", b) for b in (1.0, 3.0)},
    )
    (variants,) = run._planner.variants.values()
    assert len(variants.plans) == 2 and len(run._bound) == 2


def test_what_the_step_alone_reads_needs_no_plan() -> None:
    traced = []
    rate = types.SimpleNamespace(value=0.1)

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        traced.append(1)
        return mean(1.0, w, x)

    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, x)
        return w - rate.value * grad, {"loss": loss}

    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    state, plain = run.init(lambda p: p, W, X), W
    before = len(traced)
    for rate.value in (0.1, 0.2, 0.3):
        state, _ = run(state, X)
    assert len(traced) == before
    for rate.value in (0.1, 0.2, 0.3):
        plain, _ = step(plain, X)
    torch.testing.assert_close(run.unplace(state), plain, rtol=1e-12, atol=0)


def test_a_flag_of_the_step_may_change_what_it_sums() -> None:
    flags = types.SimpleNamespace(clip=False)

    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        loss, grad = fp.value_and_grad(functools.partial(mean, 1.0))(w, x)
        if flags.clip:
            grad, _ = fp.clip_by_global_norm(grad, 0.1)
        return w - grad, {"loss": loss}

    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    state, plain = run.init(lambda p: p, W, X), W
    for flags.clip in (False, True, False, True):
        state, _ = run(state, X)
        plain, _ = step(plain, X)
    torch.testing.assert_close(run.unplace(state), plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_loss_made_in_the_step_of_what_it_reads(steps: int) -> None:
    beta = types.SimpleNamespace(value=1.0)

    def annealed() -> Callable:
        now = beta.value**2
        return lambda w, x: mean(now, w, x)

    set_beta = functools.partial(setattr, beta, "value")
    check(
        annealed,
        {1.0: lambda: set_beta(1.0), 4.0: lambda: set_beta(2.0), 9.0: lambda: set_beta(3.0)},
    )


def test_a_value_that_is_another_at_each_run_of_the_step_is_refused() -> None:
    counted = iter(range(100))

    def changing() -> Callable:
        k = float(next(counted))
        return lambda w, x: mean(k, w, x)

    run, state = runner(changing)
    said = r"the loss function at test_host_values.py:\d+ reads from Python `k` \(\d\.0 when it was planned, \d\.0 now\)"
    with pytest.raises(
        StateError,
        match=rf"^{said}: it is another each time that the step runs.*tensor in the batch",
    ):
        run(state, X)


def test_a_value_that_keeps_changing_warns_once() -> None:
    run, state = runner(lambda: loss_of(lambda: Settings.beta))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(8):
            Settings.beta = float(k + 2)
            state, _ = run(state, X)
    Settings.beta = 1.0
    (warning,) = caught
    said = (
        "reads `Settings.beta` from Python, which has changed 5 times, and each value makes a new "
        "plan. Pass it as a tensor"
    )
    assert said in str(warning.message) and str(warning.message).startswith(
        "the loss function at test_host_values.py:"
    )
    assert warning.filename == __file__


def test_old_plans_go() -> None:
    run, state = runner(lambda: loss_of(lambda: Settings.beta))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(20):
            Settings.beta = float(k)
            state, metrics = run(state, X)
            torch.testing.assert_close(metrics["loss"], want(k), rtol=1e-12, atol=0)
    Settings.beta = 1.0
    assert len(run._planner.plans) == len(run._bound) == 16


def test_values_that_the_step_sets_between_its_calls() -> None:
    config = types.SimpleNamespace(scale=1.0)

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        return mean(config.scale, w, x)

    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        found = []
        for config.scale in (1.0, 3.0):
            found.append(fp.value_and_grad(loss_fn)(w, x)[0])
        return w, found

    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    state = run.init(lambda p: p, W, X)
    for _ in range(3):
        state, metrics = run(state, X)
        torch.testing.assert_close(metrics, [want(1.0), want(3.0)], rtol=1e-12, atol=0)
    assert len(run._planner.plans) == 1


def test_what_a_loss_writes_makes_no_plan() -> None:
    seen: list[int] = []

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        seen.append(1)
        return mean(1.0, w, x)

    run, state = runner(lambda: loss_fn)
    runs = len(seen)
    for _ in range(3):
        state, _ = run(state, X)
    assert len(seen) == runs and len(run._planner.plans) == 1


def test_a_number_that_a_loss_changes_is_refused() -> None:
    model = types.SimpleNamespace(count=0)

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        model.count += 1
        return mean(model.count, w, x)

    said = r"^the loss function at test_host_values.py:\d+ changes `model.count` from 0 to \d while it runs.*Count in the step"
    with pytest.raises(TraceError, match=said):
        runner(lambda: loss_fn)


def test_a_tensor_that_a_loss_reads_as_a_number() -> None:
    beta = torch.tensor(1.0)
    check(
        lambda: loss_of(lambda: beta.item()),
        {1.0: lambda: beta.fill_(1.0), 3.0: lambda: beta.fill_(3.0)},
    )


# ---- what is read


def test_only_what_is_named_counts() -> None:
    settings = types.SimpleNamespace(beta=1.0, steps=0)

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        return mean(settings.beta, w, x)

    follower = Follower(set())
    before = follower.values(loss_fn)
    settings.steps = 1
    assert follower.values(loss_fn) == before
    settings.beta = 1.0 + 0.0
    assert follower.values(loss_fn) == before
    settings.beta = 2.0
    ((path, (old, new)),) = differences(before, follower.values(loss_fn)).items()
    assert (path, str(old), str(new)) == ("settings.beta", "1.0", "2.0")


def test_whose_code_a_file_is() -> None:
    """Nothing is read of what lies in a library, or in any room of funcpipe."""
    libraries = [fp.__file__, fp.pipelined.__code__.co_filename, runtime_file.__file__]
    libraries += [torch.__file__, np.__file__, pytest.__file__, functools.__file__]
    assert not any(map(is_user_file, libraries))
    assert is_user_file(__file__)


# ---- ranks


def annealed_on_ranks() -> tuple[list[float], str]:
    """How far off losses are whose factor the step computes from what it reads, in both of its
    calls; what is said where an optimizer has written to the state between them."""
    settings = types.SimpleNamespace(beta=1.0, second=1.0)

    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        first, second = settings.beta**2, settings.second
        a, _ = fp.value_and_grad(lambda w, x: mean(first, w, x))(w, x)
        b, grad = fp.value_and_grad(lambda w, x: mean(second, w, x))(w, x)
        return w - 0.0 * grad, {"a": a, "b": b}

    run = fp.spmd(fp.data_parallel(step, axis="data"), fp.Mesh(data=2), device="cpu", timeout=30)
    state, far = run.init(lambda p: p, W, X), []
    for settings.beta, settings.second in (
        (1.0, 1.0),
        (2.0, 1.0),
        (3.0, 1.0),
        (2.0, 1.0),
        (2.0, 5.0),
    ):
        state, metrics = run(state, X)
        far += [
            float((metrics["a"] - want(settings.beta**2)).abs()),
            float((metrics["b"] - want(settings.second)).abs()),
        ]
    optimizer = fp.optim.adamw(1e-2)

    def two_updates(state: Any, x: torch.Tensor) -> Any:
        w, second = state[0], settings.second
        _, grad = fp.value_and_grad(functools.partial(mean, 1.0))(w, x)
        w, kept = optimizer.update(grad, state[1], w)
        loss, _ = fp.value_and_grad(lambda w, x: mean(second, w, x))(w, x)
        return (w, kept), {"loss": loss}

    run = fp.spmd(
        fp.data_parallel(two_updates, axis="data"), fp.Mesh(data=2), device="cpu", timeout=30
    )
    state = run.init(lambda p: (p, optimizer.init(p)), W, X)
    settings.second = 7.0
    try:
        run(state, X)
    except fp.errors.FuncpipeError as error:
        return far, str(error)
    return far, "nothing"


def test_ranks_plan_again_in_the_middle_of_a_step() -> None:
    for far, said in fp.launch(annealed_on_ranks, 2, timeout=60):
        assert max(far) <= 1e-12
        assert (
            "reads from Python `second` (5.0 when it was planned, 7.0 now), in the middle of a "
            "step that has updated" in said
        )


def ranks_that_differ(how: str) -> tuple[str, str, bool]:
    """What is said at a step whose value differs on rank 1, at an init, and whether both go on."""
    import os

    rank = int(os.environ["RANK"])
    settings = types.SimpleNamespace(beta=1.0)

    def loss_fn(w: torch.Tensor, x: torch.Tensor) -> fp.Mean:
        if how == "constant":
            return mean(1.0, w, x * torch.full((3,), settings.beta))
        return mean(settings.beta, w, x)

    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.0 * grad, {"loss": loss}

    run = fp.spmd(fp.data_parallel(step, axis="data"), fp.Mesh(data=2), device="cpu", timeout=30)
    state = run.init(lambda p: p, W, X)
    state, _ = run(state, X)
    said = []
    settings.beta = 1.0 + rank
    for go in (lambda: run(state, X), lambda: run.init(lambda p: p, W, X)):
        try:
            go()
        except MismatchError as error:
            said.append(str(error))
    settings.beta = 3.0
    state, metrics = run(state, X)
    power = 2 if how == "constant" else 1
    fine = bool((metrics["loss"] - want(3.0**power)).abs() < 1e-9)
    run.close()
    return said[0], said[1], fine


@pytest.mark.parametrize("how", ["factor", "constant"])
def test_ranks_that_read_other_values_are_refused(how: str) -> None:
    first, second = fp.launch(ranks_that_differ, 2, how, timeout=60)
    assert first == second and first[2]
    for said in first[:2]:
        assert (
            "reads from Python: 'settings.beta = 1.0' on rank 0, 'settings.beta = 2.0' on rank 1"
            in said
        )
