"""fp.testing itself: it finds what is wrong and says where, and its strategies draw what they
promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe._src.core.context import current
from funcpipe._src.testing.model import LAYERS
from funcpipe.testing import (
    Layer,
    Model,
    RandomTable,
    assert_equivalent,
    meshes,
    microbatch_counts,
    models,
    schedules,
)

MODEL = Model(tuple((Layer("linear", (k, k)),) for k in range(3)), tied_head=True)


def step(params: Any, batch: Any, wrong: Callable[[Any], Any] = lambda x: x) -> Any:
    loss, grads = fp.value_and_grad(MODEL.loss_fn)(params, batch)
    return optree.tree_map(lambda p, g: p - wrong(0.1) * g, params, grads), {"loss": loss}


def compare(other: Callable, runner: Callable | None = None, **options: Any) -> Any:
    transformed = fp.pipelined(other, axis="pipe", microbatches=2)
    batches = [MODEL.batch(k, 4) for k in range(2)]
    return assert_equivalent(
        step,
        transformed,
        fp.Mesh(pipe=2),
        lambda p: p,
        MODEL.init(),
        batches,
        runner=runner,
        **options,
    )


def refused(other: Callable, runner: Callable | None = None, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        compare(other, runner, **options)
    return str(caught.value)


# ---- assert_equivalent


def test_report() -> None:
    report = compare(step)
    assert 0 < report.error < 1e-12
    assert report.where.startswith("step ")
    # In each of two steps: the losses of two ranks, their leaves (the embedding on both), a metric,
    # and the state.
    leaves = 1 + 2 * 3
    assert report.compared == 2 * (2 + (leaves + 1) + 1 + leaves)


def with_loss(loss_fn: Callable, factor: float = 1.0) -> Callable:
    """The step of another loss function; it says that the loss is what it should be."""

    def other(params: Any, batch: Any) -> Any:
        loss, _ = fp.value_and_grad(loss_fn)(params, batch)
        return params, {"loss": loss * factor}

    return other


def test_wrong_losses_and_gradients() -> None:
    def half(params: Any, batch: Any) -> fp.Mean:
        mean = MODEL.loss_fn(params, batch)
        return fp.Mean(mean.total, mean.weight * 2)

    def detached(params: Any, batch: Any) -> Any:
        return MODEL.loss_fn(params | {"embed": params["embed"].detach()}, batch)

    assert refused(with_loss(half, factor=2.0)) == (
        "step 0: loss of value_and_grad 0 on rank 0: relative error 5.0e-01, allowed 1.0e-12"
    )
    assert refused(with_loss(detached)) == (
        "step 0: grads['embed'] of value_and_grad 0 on rank 0: relative error 1.0e+00, allowed "
        "1.0e-12"
    )


def test_wrong_state_and_metrics() -> None:
    def saying(metrics: Callable[[Any], Any]) -> Callable:
        def other(params: Any, batch: Any) -> Any:
            params, right = step(params, batch)
            return params, metrics(right)

        return other

    text = refused(lambda params, batch: step(params, batch, wrong=lambda rate: rate * 1.5))
    assert text.startswith("step 0: state['embed']: relative error ") and text.endswith(
        ", allowed 1.0e-12"
    )
    assert refused(saying(lambda right: {"loss": torch.ones(())})) == (
        "step 0: metrics['loss']: float32[] instead of float64[]"
    )
    named = refused(saying(lambda right: {"lost": right["loss"]}))
    assert named.startswith("step 0: metrics: another structure than on one device: ")
    text = refused(saying(lambda right: {"loss": right["loss"] * torch.nan}))
    assert text.startswith("step 0: metrics['loss']: nan instead of ") and text[-4:].isdigit()
    assert refused(lambda params, batch: step(step(params, batch)[0], batch)) == (
        "step 0: rank 0 called value_and_grad 2 times instead of 1"
    )


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        (
            [1.0, 2.0, torch.nan],
            [1.0, torch.nan, torch.nan],
            "nan instead of 2.0 at 1 of 3 elements",
        ),
        ([torch.inf, 2.0, 0.0], [-torch.inf, 2.0, 0.0], "-inf instead of inf at 1 of 3 elements"),
        ([1, 2, 3], [1, 3, 4], "3 instead of 2 at 2 of 3 elements"),
    ],
    ids=["nan", "infinite", "integers"],
)
def test_what_has_no_relative_error_is_shown(right: list, wrong: list, said: str) -> None:
    def saying(x: list) -> Callable:
        return lambda params, batch: (step(params, batch)[0], {"x": torch.tensor(x)})

    transformed = fp.pipelined(saying(wrong), axis="pipe", microbatches=2)
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(
            saying(right),
            transformed,
            fp.Mesh(pipe=2),
            lambda p: p,
            MODEL.init(),
            [MODEL.batch(0, 4)],
        )
    assert str(caught.value) == f"step 0: metrics['x']: {said}"


def test_what_is_nan_on_one_device_may_be_nan() -> None:
    def nan(params: Any, batch: Any) -> Any:
        return params, {"loss": step(params, batch)[1]["loss"] * torch.nan}

    transformed = fp.pipelined(nan, axis="pipe", microbatches=2)
    assert_equivalent(
        nan, transformed, fp.Mesh(pipe=2), lambda p: p, MODEL.init(), [MODEL.batch(0, 4)]
    )


class Changed:
    """A simulation in which one rank's gradients are changed after they were returned."""

    def __init__(self, transformed: Callable, mesh: fp.Mesh, rank: int, by: Callable) -> None:
        self.run = fp.simulate(transformed, mesh)
        self.init, self.unplace, self.rank, self.by = self.run.init, self.run.unplace, rank, by

    def __call__(self, state: Any, batch: Any) -> Any:
        out = self.run(state, batch)
        for context, _, grads in current().calls_seen or []:
            if getattr(context, "rank", None) and context.rank.comm.rank == self.rank:
                grads["embed"].copy_(self.by(grads["embed"]))
        return out


def test_ranks_that_hold_other_bits() -> None:
    nudge = lambda x: torch.nextafter(x, torch.full_like(x, torch.inf))  # noqa: E731
    assert refused(step, lambda s, mesh: Changed(s, mesh, 1, nudge)) == (
        "step 0: grads['embed'] of value_and_grad 0 on rank 1: other bits than on rank 0"
    )
    assert refused(step, lambda s, mesh: Changed(s, mesh, 1, lambda x: x * 0)) == (
        "step 0: grads['embed'] of value_and_grad 0 on rank 1: relative error 1.0e+00, allowed "
        "1.0e-12"
    )


def test_bits_and_tolerance() -> None:
    """Two microbatches are summed in another order than one."""
    assert refused(step, bitwise=True).startswith("step 0: ")
    assert "other bits than on one device (relative error " in refused(step, bitwise=True)
    assert refused(step, rtol=0.0).endswith(", allowed 0.0e+00")


# ---- strategies


def uses(model: Model) -> list[tuple[str, int, int]]:
    """Pool, number and segment of every use of a leaf."""
    layers = [(k, layer) for k, layers in enumerate(model.segments) for layer in layers]
    return [
        (p, i, k)
        for k, layer in layers
        for p, i in zip(LAYERS[layer.kind], layer.leaves, strict=False)
    ]


def counts(model: Model) -> Counter:
    return Counter((pool, i) for pool, i, _ in uses(model))


def spans(model: Model) -> list[int]:
    """Over how many segments leaves are tied."""
    where: dict[tuple[str, int], list[int]] = {}
    for pool, i, k in uses(model):
        where.setdefault((pool, i), []).append(k)
    return [max(ks) - min(ks) for ks in where.values()]


def skips(model: Model) -> list[tuple[int, int]]:
    """From where to where."""
    layers = [(k, layer) for k, layers in enumerate(model.segments) for layer in layers]
    return [(layer.leaves[0], k) for k, layer in layers if layer.kind == "skip"]


PROMISED: dict[str, Callable[[Model], bool]] = {
    "a leaf used three times": lambda m: max(counts(m).values(), default=0) >= 3,
    "a leaf tied over three segments": lambda m: max(spans(m), default=0) >= 3,
    "embedding and head tied": lambda m: m.tied_head,
    "a skip over two segments": lambda m: any(b - a > 2 for a, b in skips(m)),
    "a skip carried through boundaries": lambda m: any(a == m.carried for a, _ in skips(m)),
    "a skip by a local variable": lambda m: any(a != m.carried for a, _ in skips(m)),
    "dict boundaries": lambda m: m.carry == "dict",
    "tuple boundaries": lambda m: m.carry == "tuple",
    "a frozen integer leaf": lambda m: ("P", 0) in counts(m),
    "a 0-d leaf": lambda m: ("S", 0) in counts(m),
    "an unused leaf": lambda m: m.unused,
    "unequal segments": lambda m: len({len(layers) for layers in m.segments}) > 1,
    "an empty segment": lambda m: not all(m.segments),
    "params scaled at the top": lambda m: m.top == "scale",
    "rows without weight": lambda m: m.zero_rows,
    "aux values in the middle": lambda m: m.aux is not None and 0 < m.aux < len(m.segments) - 1,
}


@pytest.mark.parametrize("feature", PROMISED)
def test_models_have_what_is_promised(feature: str) -> None:
    few = settings(
        max_examples=2000,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    find(models(), PROMISED[feature], settings=few)


@given(models(), st.integers(0, 9))
def test_a_model_prints_as_itself(model: Model, seed: int) -> None:
    again = eval(repr(model), {"Model": Model, "Layer": Layer})
    assert again == model
    loss = [m.loss_fn(m.init(seed), m.batch(seed, 2)) for m in (model, again)]
    first, second = (x[0] if model.has_aux else x for x in loss)
    assert torch.equal(first.total, second.total) and first.total.isfinite() and first.weight > 0


@given(st.integers(0, 99), st.integers(1, 3), meshes(pipe=4), microbatch_counts(5))
def test_random_tables_are_schedules(seed: int, v: int, mesh: fp.Mesh, microbatches: int) -> None:
    table = RandomTable(seed, v)(mesh.size, microbatches)
    assert fp.schedules.check(table).actions == sum(map(len, table.ranks))
    assert table == RandomTable(seed, v)(mesh.size, microbatches)


@given(schedules(v=3), meshes(pipe=4), microbatch_counts(5))
def test_schedules(schedule: Callable, mesh: fp.Mesh, microbatches: int) -> None:
    fp.schedules.check(schedule(mesh.size, microbatches))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'funcpipe.testing' has no attribute 'mdels'"):
        fp.testing.mdels  # noqa: B018
