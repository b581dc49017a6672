"""Steps around any model, and pipelines that fit it: for tests of transforms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import optree
import torch
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe.optim import adamw
from funcpipe.testing import Model, schedules

STEPS = 3
# Adam divides a gradient by its own size. One that is zero but for rounding would become a step of
# full length, with a sign that means nothing; so eps is well above rounding (1e-17), and below
# gradients (1e-2).
OPTIMIZER = adamw(1e-2, eps=1e-3)


def training(model: Model) -> tuple[Callable, Callable]:
    """A step as people write them, and its ``init_state``: clipping, AdamW, an average of the
    params, two counters."""

    def init_state(params: Any) -> dict[str, Any]:
        return {
            "params": params,
            "opt": OPTIMIZER.init(params),
            "ema": params,
            "seen": torch.zeros(()),
            "n": 0,
        }

    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        loss, grads, aux = loss_and_grads(model, state["params"], batch)
        clipped, norm = fp.clip_by_global_norm(grads, 0.5)
        params, opt = OPTIMIZER.update(clipped, state["opt"], state["params"])
        ema = optree.tree_map(
            lambda e, p: 0.9 * e + 0.1 * p if e.is_floating_point() else e, state["ema"], params
        )
        new = {
            "params": params,
            "opt": opt,
            "ema": ema,
            "seen": state["seen"] + loss,
            "n": state["n"] + 1,
        }
        return new, {"loss": loss, "norm": norm, "aux": aux, "size": fp.global_norm(params)}

    return step, init_state


def descending(model: Model) -> tuple[Callable, Callable]:
    """A step without any sum outside the loss function; its state is the params and the last
    gradients."""

    def step(state: Any, batch: Any) -> Any:
        loss, grads, aux = loss_and_grads(model, state[0], batch)
        params = optree.tree_map(
            lambda p, g: p - 0.1 * g if p.is_floating_point() else p, state[0], grads
        )
        return (params, grads), {"loss": loss, "aux": aux}

    return step, lambda params: (params, optree.tree_map(torch.zeros_like, params))


def loss_and_grads(model: Model, params: Any, batch: Any) -> tuple[torch.Tensor, Any, Any]:
    out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(params, batch)
    return (out[0], grads, out[1]) if model.has_aux else (out, grads, None)


def batches(model: Model, rows: int, count: int = STEPS) -> list[Any]:
    return [model.batch(seed, rows) for seed in range(count)]


@st.composite
def groupings(draw: st.DrawFn, segments: int, stages: int) -> str | list[int]:
    """How segments become stages: a word, or a list of how many segments each stage gets."""
    if draw(st.booleans()):
        return draw(st.sampled_from(["balanced", "even"]))
    cuts = draw(
        st.lists(
            st.integers(1, segments - 1), min_size=stages - 1, max_size=stages - 1, unique=True
        )
    )
    ends = [0, *sorted(cuts), segments]
    return [b - a for a, b in pairwise(ends)]


@st.composite
def pipelines(
    draw: st.DrawFn, model: Model, microbatches: int, ranks: int
) -> Callable[[Callable], Callable]:
    """A `pipelined` that fits a model."""
    segments = pieces(model)
    schedule = draw(schedules(v=min(2, segments // ranks)))
    stages = draw(groupings(segments, schedule(ranks, microbatches).stages))
    return fp.pipelined(axis="pipe", microbatches=microbatches, schedule=schedule, stages=stages)


def pieces(model: Model) -> int:
    """How many segments: the head is one more."""
    return len(model.segments) + 1


def equal(a: Any, b: Any) -> bool:
    return optree.tree_all(optree.tree_map(torch.equal, a, b))
