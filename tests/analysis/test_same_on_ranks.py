"""What a step computes outside value_and_grad is the same on every rank, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import refused

import funcpipe as fp

X = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)
W = torch.eye(4, dtype=torch.float64)
DATA = fp.Mesh(data=2)


def loss_fn(w: torch.Tensor, batch: Any) -> fp.Mean:
    out = fp.stage_boundary(batch["x"] @ w) + batch["noise"]
    return fp.Mean(out.square().sum(), torch.tensor(float(len(out))))


def stepping(
    noise: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like,
    metric: Callable[[torch.Tensor], Any] = lambda x: 0.0,
    moved: Callable[[torch.Tensor], torch.Tensor] = lambda mu: mu,
) -> Callable:
    def step(state: Any, x: torch.Tensor) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(state["w"], {"x": x, "noise": noise(x)})
        new = {"w": state["w"] - 0.1 * grad, "mu": moved(state["mu"])}
        return new, {"loss": loss, "metric": metric(x)}

    return step


def init_state(w: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"w": w, "mu": torch.zeros(3, dtype=torch.float64)}


def planned(step: Callable, mesh: fp.Mesh = DATA, transform: Any = None) -> Any:
    transform = transform or fp.data_parallel(axis="data")
    return fp.simulate(transform(step), mesh).init(init_state, W, X)


def drawn_with_a_generator(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


DRAWS = {
    "batch": (stepping(noise=torch.randn_like), "batch['noise'] of value_and_grad 0"),
    "computed": (stepping(noise=lambda x: 0.1 * torch.randn(8, 4).double() + x), "batch['noise']"),
    "generator": (stepping(noise=drawn_with_a_generator), "batch['noise']"),
    "number": (stepping(metric=lambda x: torch.rand(()).mul(2).item()), "a Python number"),
    "metric": (stepping(metric=lambda x: torch.randn(3).sum()), "metrics['metric']"),
    "state": (stepping(moved=lambda mu: mu + torch.randn(3)), "state['mu']"),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_values_of_a_rank_s_own_are_refused(name: str) -> None:
    step, where = DRAWS[name]
    said = "the step draws random values at test_same_on_ranks.py"
    with refused(fp.errors.StateError, said, where, "every rank would draw its own", "fp.random"):
        planned(step)


def test_also_under_a_pipeline() -> None:
    pipeline = fp.pipelined(axis="pipe", microbatches=2)
    with refused(fp.errors.StateError, "the step draws random values"):
        planned(DRAWS["batch"][0], fp.Mesh(pipe=2), pipeline)


def test_one_rank_draws_what_one_device_does() -> None:
    step = stepping(noise=torch.randn_like)
    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    states = run.init(init_state, W, X)
    torch.manual_seed(0)
    want, _ = step(init_state(W), X)
    torch.manual_seed(0)
    got = run.unplace(run(states, X)[0])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_draws_before_the_step_are_fine() -> None:
    planned(stepping(noise=lambda x: x * 0.5))
    fp.simulate(fp.data_parallel(stepping(), axis="data"), DATA).init(
        lambda w: {"w": w, "mu": torch.full((3,), 0.5)}, torch.randn(4, 4).double(), X
    )


def own_rows(step: Callable) -> str:
    """What `fp.spmd` says of a step where every rank brings its own rows."""
    run = fp.spmd(fp.data_parallel(step, axis="data"), DATA, batch="local", device="cpu")
    try:
        run.init(init_state, W, X)
    except fp.errors.FuncpipeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        run.close()
    return "accepted"


def all_own_rows() -> list[str]:
    of_rows = [
        stepping(metric=lambda x: x.mean()),
        stepping(metric=lambda x: x.mean(0).sum() * 2),
        stepping(noise=lambda x: 0.5 * x),
    ]
    return list(map(own_rows, of_rows))


def test_results_that_follow_from_own_rows_are_refused() -> None:
    for metric, computed, batch in fp.launch(all_own_rows, 2, timeout=120):
        for said in (metric, computed):
            assert "StateError: metrics['metric'] is computed from the batch outside" in said
            assert "batch='local'" in said and "fp.Mean" in said
        assert batch == "accepted"


def test_a_transformed_step_inside_a_step_is_refused() -> None:
    inner = fp.mixed_precision(stepping(), compute="bfloat16")

    def logged(state: Any, x: torch.Tensor) -> Any:
        return inner(state, x)

    logged(init_state(W), X)  # on one device it is the step as written
    with refused(fp.errors.StackError, "a step calls <step step", "mixed_precision", "lost"):
        planned(logged)


@pytest.mark.parametrize("most", [-1.0, 0, float("nan"), "1", None, True])
def test_a_norm_that_is_no_number_above_0(most: Any) -> None:
    with refused(fp.errors.OptimError, "clip_by_global_norm: max_norm=", "a number above 0"):
        fp.clip_by_global_norm([torch.ones(2)], most)
