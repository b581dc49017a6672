"""How often planning runs the user's functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch

import funcpipe as fp
from funcpipe._src.planning.planner import Planner
from funcpipe._src.spec.resolve import resolve
from funcpipe.errors import StateError

PIPE = fp.pipelined(axis="pipe", microbatches=4)
OPTIMIZER = fp.optim.adamw(1e-2)
BATCH = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))


def counted() -> tuple[Counter, Callable, Callable]:
    """How often each function ran, a step and its ``init_state``."""
    runs: Counter = Counter()

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        for weight in params["blocks"]:
            batch = fp.stage_boundary(torch.tanh(batch @ weight))
        return fp.Mean(batch.square().sum(), torch.tensor(float(batch.numel())))

    def step(state: Any, batch: Any) -> Any:
        runs["step"] += 1
        params, moments = state
        loss, grads = fp.value_and_grad(loss_fn)(params, batch)
        grads, norm = fp.clip_by_global_norm(grads, 1.0)
        return OPTIMIZER.update(grads, moments, params), {"loss": loss, "norm": norm}

    def init_state(params: Any) -> Any:
        runs["init_state"] += 1
        return params, OPTIMIZER.init(params)

    return runs, step, init_state


def params() -> Any:
    gen = torch.Generator().manual_seed(1)
    return {"blocks": [torch.randn(2, 2, generator=gen) for _ in range(4)]}


Runs = tuple[int, int]  # of the step, of init_state


def runs_while(counted_runs: Counter, work: Callable[[], Any]) -> tuple[Runs, Any]:
    """How often the step and ``init_state`` run meanwhile."""
    counted_runs.clear()
    out = work()
    return (counted_runs["step"], counted_runs["init_state"]), out


# Ranks of a pipeline; runs while planning, and while a simulation of all ranks begins: once to plan,
# once to rehearse as each rank that lacks leaves, and init_state once per rank for real.
TABLE: dict[int, tuple[Runs, Runs]] = {
    1: ((1, 1), (1, 2)),
    2: ((1, 1), (3, 5)),
    4: ((1, 1), (5, 9)),
}


@pytest.mark.parametrize("ranks", TABLE)
def test_a_step_runs_once_while_it_is_planned(ranks: int) -> None:
    runs, step, init_state = counted()
    transformed, mesh = PIPE(step), fp.Mesh(pipe=ranks)
    planner = Planner(resolve(transformed, mesh), init_state, params())
    planned, _ = runs_while(runs, lambda: planner.plan(BATCH))
    run = fp.simulate(transformed, mesh)
    begun, state = runs_while(runs, lambda: run.init(init_state, params(), BATCH))
    assert (planned, begun) == TABLE[ranks]
    stepped, _ = runs_while(runs, lambda: run(state, BATCH))
    assert stepped == (ranks, 0)


def counting_leaves(state: Any, batch: Any) -> Any:
    """The last rank holds fewer leaves, and none of the first block."""
    _, grads = fp.value_and_grad(first_block)(state[0], batch)
    return state, {"leaves": len(optree.tree_leaves(grads))}


def first_block(params: Any, batch: Any) -> fp.Mean:
    out = fp.stage_boundary(batch @ params["blocks"][0]) @ params["blocks"][1]
    return fp.Mean(out.square().sum(), torch.tensor(float(batch.numel())))


def process() -> tuple[Runs, str]:
    """Of one process of a pipeline: runs until it may take its first step, and why another step is
    refused."""
    runs, step, init_state = counted()
    pipeline = fp.Mesh(pipe=2)
    run = fp.spmd(PIPE(step), pipeline, device="cpu", timeout=60)
    begun, _ = runs_while(runs, lambda: run.init(init_state, params(), BATCH))
    other = fp.spmd(PIPE(counting_leaves), pipeline, device="cpu", timeout=60)
    with pytest.raises(StateError) as caught:
        other.init(init_state, params(), BATCH)
    return begun, str(caught.value)


def test_a_process_rehearses_as_its_own_rank() -> None:
    first, second = fp.launch(process, 2, timeout=120)
    assert first == second and first[0] == (2, 3)
    assert "the step computes another metrics['leaves'] on a rank that does not hold" in first[1]


def test_trees_that_go_with_leaves_are_rehearsed_by_the_planner() -> None:
    """Which ranks have an entry does not follow from one run."""
    runs, step, init_state = counted()

    def with_norms(state: Any, batch: Any) -> Any:
        new, metrics = step(state, batch)
        return new, {**metrics, "norms": fp.optim.statistics(state[0]).norm}

    planner = Planner(resolve(PIPE(with_norms), fp.Mesh(pipe=2)), init_state, params())
    planned, _ = runs_while(runs, lambda: planner.plan(BATCH))
    assert planned == (3, 3)


def test_a_leaf_that_is_missing_against_the_plan() -> None:
    """A single leaf of the state and one of metrics that go with a parameter, by names of their
    own: the plan is made again, of rehearsals as every rank."""
    runs, step, init_state = counted()

    def gated(params: Any) -> Any:
        first = params["blocks"][0]
        return init_state(params), optree.tree_map(lambda leaf: torch.ones(()), first)

    def with_gate(state: Any, batch: Any) -> Any:
        inner, gate = state
        new, metrics = step(inner, batch)
        metrics["gate"] = optree.tree_map(lambda leaf: 2 * metrics["loss"], new[0]["blocks"][3])
        return (new, gate), metrics

    run = fp.simulate(PIPE(with_gate), fp.Mesh(pipe=2))
    begun, state = runs_while(runs, lambda: run.init(gated, params(), BATCH))
    assert begun == (5, 7)  # planned, one rank rehearsed, planned, both rehearsed; init_state twice
    assert [rank[1] is not None for rank in state] == [True, False]
    _, metrics = run(state, BATCH)
    assert metrics["gate"] == 2 * metrics["loss"]
