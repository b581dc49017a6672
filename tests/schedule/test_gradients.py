"""Every schedule gives GPipe's gradients, bit by bit: on random models, cuts and orders, in a
simulated pipeline."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedule_tables import LIBRARY

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.graph.ops import is_heavy
from funcpipe._src.graph.partition import Units
from funcpipe._src.planning.planner import Planner
from funcpipe._src.schedule import Action, Schedule, ScheduleFn
from funcpipe.testing import Layer, Model, models

BACKWARD = [name for name in sorted(LIBRARY) if name != "forward_only"]


class Pipelines:
    """One model and batch on any number of pipelines. The model is traced once for all of them."""

    def __init__(self, model: Model, microbatches: int) -> None:
        self.model, self.microbatches, self.losses = model, microbatches, {}
        self.params, self.batch = model.init(seed=0), model.batch(seed=0, rows=microbatches)

    @property
    def segments(self) -> int:
        return len(self.model.segments) + 1

    def run(self, schedule_fn: ScheduleFn, ranks: int, stages: Any = "balanced") -> list[Any]:
        """The loss and all gradients."""

        def step(params: Any, batch: Any) -> tuple[Any, dict]:
            loss, grads = fp.value_and_grad(self.model.loss_fn, has_aux=self.model.has_aux)(
                params, batch
            )
            return grads, {"loss": loss}

        transformed = fp.pipelined(
            step, axis="pipe", microbatches=self.microbatches, schedule=schedule_fn, stages=stages
        )
        run = fp.simulate(transformed, fp.Mesh(pipe=ranks))
        run._planner = Planner(run._resolved, lambda params: params, self.params)
        run._planner.memory.losses = self.losses
        run._planner.plan(self.batch)
        state, metrics = run(run.place(self.params), self.batch)
        return tree.leaves((metrics, run.unplace(state)))


def random_sizes(segments: int, stages: int, rng: random.Random) -> list[int]:
    """How many segments every stage gets."""
    ends = [0, *sorted(rng.sample(range(1, segments), stages - 1)), segments]
    return [b - a for a, b in pairwise(ends)]


def mixed(schedule_fn: ScheduleFn, sizes: list[int], rng: random.Random) -> ScheduleFn:
    """The schedule with some B as I and W, some I and W as B, and some W by segment in any order,
    later than before."""

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        table = schedule_fn(ranks, microbatches)
        cells = sorted({(a.stage, a.microbatch) for row in table.ranks for a in row})
        way = {cell: rng.choice(["B", "IW", "segments"]) for cell in cells}
        rows = tuple(tuple(_mixed_row(row, way, sizes, rng)) for row in table.ranks)
        return replace(table, name=f"mixed {table.name}", ranks=rows)

    return lay_out


def _mixed_row(
    row: tuple[Action, ...], way: dict, sizes: list[int], rng: random.Random
) -> list[Action]:
    out: list[Action] = []
    late: list[Action] = []
    for action in row:
        if action.kind in "BI":
            how = way[action.stage, action.microbatch]
            out.append(action._replace(kind="B" if how == "B" else "I"))
            whole = action._replace(kind="W")
            late += [whole] if how == "IW" else []
            late += (
                [whole._replace(segment=k) for k in range(sizes[action.stage])]
                if how == "segments"
                else []
            )
            rng.shuffle(late)
        elif action.kind == "F":
            out.append(action)
        while late and rng.random() < 0.4:
            out.append(late.pop())
    return out + late


def equal(got: list[Any], want: list[Any]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if isinstance(b, torch.Tensor) else a == b
        for a, b in zip(got, want, strict=True)
    )


def check_all(model: Model, microbatches: int, names: list[str], rng: random.Random) -> None:
    pipelines = Pipelines(model, microbatches)
    want = pipelines.run(fp.schedules.gpipe(), 1)
    for name in names:
        factory, takes_v = LIBRARY[name]
        schedule_fn = factory(rng.choice([1, 2, 3])) if takes_v else factory()
        per_rank = len(schedule_fn(1, 1).placement)
        ranks = rng.randint(1, max(1, min(4, pipelines.segments // per_rank)))
        if ranks * per_rank > pipelines.segments:
            continue
        sizes = random_sizes(pipelines.segments, ranks * per_rank, rng)
        for fn in (schedule_fn, mixed(schedule_fn, sizes, rng)):
            assert equal(pipelines.run(fn, ranks, sizes), want), (fn(ranks, microbatches), sizes)


@given(
    model=models(max_segments=8),
    microbatches=st.integers(1, 8),
    rng=st.randoms(use_true_random=False),
)
@settings(max_examples=max(settings().max_examples // 4, 3))
def test_random_models(model: Model, microbatches: int, rng: random.Random) -> None:
    """A few schedules each, on any number of ranks, cut anywhere, as the library has them and
    mixed."""
    check_all(model, microbatches, rng.sample(BACKWARD, 3), rng)


# A tied matrix in the first and the last segment, which a V puts on one rank; a skip over all of
# them; a tied head.
LONG = Model(
    segments=(
        (Layer("linear", (0, 0)),),
        *((Layer("gated", (k, k + 1)), Layer("norm", (2 * k, 1))) for k in range(1, 6)),
        (Layer("linear", (0, 1)), Layer("skip", (0,))),
    ),
    tied_head=True,
)


@pytest.fixture(scope="module")
def long() -> tuple[Pipelines, list[Any]]:
    pipelines = Pipelines(LONG, 5)
    return pipelines, pipelines.run(fp.schedules.gpipe(), 1)


@pytest.mark.parametrize("name", BACKWARD)
def test_every_schedule(name: str, long: tuple[Pipelines, list[Any]]) -> None:
    """Four ranks (with two stages each where it takes them), tied weights across the V, W per
    segment."""
    pipelines, want = long
    factory, takes_v = LIBRARY[name]
    schedule_fn = factory(2) if takes_v else factory()
    stages = len(schedule_fn(4, 1).placement)
    rng = random.Random(name)
    sizes = random_sizes(pipelines.segments, stages, rng)
    assert equal(pipelines.run(schedule_fn, 4, sizes), want)
    assert equal(pipelines.run(mixed(schedule_fn, sizes, rng), 4, sizes), want)


def products(cut: Units, kinds: str) -> Counter[str]:
    """How many heavy ops of a kind units run, by segment and op."""
    return Counter(
        f"{unit.segment} {node.target}"
        for unit in cut.units.values()
        if unit.kind in kinds
        for node in unit.code.module.graph.nodes
        if is_heavy(node)
    )


def checkpointed(params: Any, batch: Any) -> fp.Mean:
    x = batch
    for w in params:
        block = lambda x, w=w: torch.tanh(torch.tanh(x @ w) @ w)  # noqa: E731
        x = fp.stage_boundary(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    return fp.Mean(x.sum(), torch.tensor(float(len(x))))


def test_each_product_once(long: tuple[Pipelines, list[Any]]) -> None:
    """I and W together run the products of B, none twice: of the first and the last segment, of
    checkpoints too."""
    pipelines, _ = long
    pipelines.run(fp.schedules.zb_h1(), 2)
    cuts = [loss.units for loss in pipelines.losses.values() if ("W", 0) in loss.units.units]
    step = lambda p, b: (p, {"loss": fp.value_and_grad(checkpointed)(p, b)[0]})  # noqa: E731
    run = fp.simulate(
        fp.pipelined(step, axis="pipe", microbatches=2, schedule=fp.schedules.zb_h1()),
        fp.Mesh(pipe=2),
    )
    params, batch = [torch.ones(3, 3) for _ in range(3)], torch.ones(4, 3)
    run.plan(run.init(lambda p: p, params, batch), batch)
    cuts += [loss.units for loss in run._planner.memory.losses.values()]
    for one in cuts:
        both = products(one, "IW")
        assert both == products(one, "B") and both
        assert products(one, "W")
