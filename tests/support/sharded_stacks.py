"""Meshes and stacks that shard any model, and a training step: for tests of sharding and of
checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe.testing import Model, schedules

# eps well above rounding and below gradients; see training_steps.py.
OPTIMIZERS = {"adamw": fp.optim.adamw(1e-2, eps=1e-3), "sgd": fp.optim.sgd(0.1, momentum=0.9)}


def training(model: Model, optimizer: str = "adamw") -> tuple[Callable, Callable]:
    """A step with clipping, an optimizer and an average of the params, and its ``init_state``."""
    opt = OPTIMIZERS[optimizer]

    def init_state(params: Any) -> dict[str, Any]:
        return {"params": params, "opt": opt.init(params), "ema": params, "n": 0}

    def step(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state["params"], batch)
        loss, aux = out if model.has_aux else (out, None)
        clipped, norm = fp.clip_by_global_norm(grads, 0.5)
        params, moved = opt.update(clipped, state["opt"], state["params"])
        ema = optree.tree_map(
            lambda e, p: 0.9 * e + 0.1 * p if e.is_floating_point() else e, state["ema"], params
        )
        new = {"params": params, "opt": moved, "ema": ema, "n": state["n"] + 1}
        return new, {"loss": loss, "norm": norm, "aux": aux, "size": fp.global_norm(params)}

    return step, init_state


class Only:
    """A predicate on paths that prints."""

    def __init__(self, odd: bool) -> None:
        self.odd = odd

    def __call__(self, path: str) -> bool:
        return sum(map(ord, path)) % 2 == self.odd

    def __repr__(self) -> str:
        return f"Only({self.odd})"


options = st.fixed_dictionaries(
    {},
    optional={
        "regather": st.sampled_from(["microbatch", "step", 1, 2, 3]),
        "reduce": st.sampled_from(["each", "last"]),
        "prefetch": st.integers(0, 4),
        "bucket_bytes": st.sampled_from([1, 100, 400]),
    },
)


@st.composite
def stacks(draw: st.DrawFn, model: Model, most: int = 8) -> tuple[fp.Mesh, list[Callable], int]:
    """A mesh, transforms that fit it and the model, and into how many parts they split the
    batch."""
    sizes: dict[str, int] = {}
    if draw(st.booleans()):
        sizes["pipe"] = draw(st.integers(1, min(4, 1 + len(model.segments))))
    for axis in draw(st.sampled_from([("a",), ("a", "b")])):
        left = most
        for n in sizes.values():
            left //= n
        sizes[axis] = draw(st.integers(1, max(1, min(5, left))))
    axes = [a for a in sizes if a != "pipe"]
    split = draw(st.lists(st.sampled_from(axes), unique=True))
    sharded = draw(st.lists(st.sampled_from(axes), unique=True, min_size=1))
    split += [a for a in axes if a not in split and a not in sharded]
    transforms = [*draw(splits(split)), *draw(shardings(sharded))]
    microbatches = draw(st.integers(1, 4))
    if "pipe" in sizes:
        transforms.append(draw(pipelines(model, sizes["pipe"], microbatches)))
    elif microbatches > 1:
        transforms.append(fp.accumulated(microbatches=microbatches))
    mesh = fp.Mesh(**{a: sizes[a] for a in draw(st.permutations(list(sizes)))})
    return mesh, transforms, microbatches * mesh.axis_size(split)


@st.composite
def pipelines(draw: st.DrawFn, model: Model, ranks: int, microbatches: int) -> Callable:
    schedule = draw(schedules(v=2))
    if schedule(ranks, microbatches).stages > len(model.segments) + 1:
        schedule = fp.schedules.zb_h1()
    return fp.pipelined(axis="pipe", microbatches=microbatches, schedule=schedule)


@st.composite
def splits(draw: st.DrawFn, axes: list[str]) -> list[Callable]:
    """One `data_parallel` over all axes, or one for each."""
    if axes and draw(st.booleans()):
        return [fp.data_parallel(axis=tuple(axes))]
    return [fp.data_parallel(axis=a) for a in axes]


@st.composite
def shardings(draw: st.DrawFn, axes: list[str]) -> list[Callable]:
    """One `sharded_weights` over all axes, or one for each: for all leaves, or each for its own
    with its own options; or two that share axes, each for its own leaves."""
    if draw(st.booleans()):
        some = draw(st.lists(st.sampled_from(axes), unique=True, min_size=1))
        return [
            fp.sharded_weights(axis=tuple(some), only=Only(False), **draw(options)),
            fp.sharded_weights(axis=tuple(axes), only=Only(True), **draw(options)),
        ]
    if len(axes) == 1 or draw(st.booleans()):
        only = draw(st.none() | st.builds(Only, st.booleans()))
        return [fp.sharded_weights(axis=tuple(axes), only=only, **draw(options))]
    if draw(st.booleans()):
        same = draw(options)
        return [fp.sharded_weights(axis=a, **same) for a in axes]
    return [fp.sharded_weights(axis=a, only=Only(i), **draw(options)) for i, a in enumerate(axes)]
