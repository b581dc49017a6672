"""Hypothesis strategies: random models, meshes, microbatch counts and schedules.

What is drawn prints as the Python that makes it again. This module needs Hypothesis, which funcpipe
itself does not.

In: bounds.
Out: strategies.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from funcpipe._src import schedule as library
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.schedule import Action, Schedule, ScheduleFn
from funcpipe._src.testing.model import LAYERS, Layer, Model

_SOMETIMES = st.sampled_from([False, False, False, True])


@st.composite
def models(
    draw: st.DrawFn,
    max_segments: int = 5,
    tops: tuple[str, ...] = ("none", "scale"),
) -> Model:
    """Random models.

    Args:
        max_segments: at most so many boundaries; the head is one segment more.
        tops: what may happen to params at the top of the loss; see `Model`. A cast makes a float32
            model's gradients round where they are summed, so it is not among the defaults.

    >>> from hypothesis import find
    >>> find(models(), lambda model: len(model.segments) > 1).segments
    ((), ())
    """
    count = draw(st.integers(1, max_segments))
    sizes = dict.fromkeys("MVSP", 0)
    segments = []
    for number in range(count):
        kinds = [kind for kind in LAYERS if kind != "skip" or number > 1]
        layers = []
        drawn = draw(st.lists(st.sampled_from(kinds), max_size=3))
        for kind in drawn:
            leaves = draw(_leaves(kind, sizes, number))
            layers.append(Layer(kind, leaves))
        segments.append(tuple(layers))
    any_segment = st.integers(0, count - 1)
    carry = draw(st.sampled_from(["tensor", "dict", "tuple"]))
    return Model(
        segments=tuple(segments),
        width=draw(st.sampled_from([4, 6])),
        carry=carry,
        carried=None if carry == "tensor" else draw(st.none() | any_segment),
        tied_head=draw(st.booleans()),
        top=draw(st.sampled_from(tops)),
        aux=draw(st.none() | any_segment),
        unused=draw(st.booleans()),
        zero_rows=draw(st.booleans()),
    )


@st.composite
def _leaves(
    draw: st.DrawFn,
    kind: str,
    sizes: dict[str, int],
    segment: int,
) -> tuple[int, ...]:
    """The leaves of a layer: mostly new ones, sometimes tied; ``sizes`` counts those there are."""
    if kind == "skip":
        return (draw(st.integers(0, segment - 2)),)
    out = []
    for pool in LAYERS[kind]:
        size = sizes[pool]
        if size and draw(_SOMETIMES):
            out.append(draw(st.integers(0, size - 1)))
        else:
            out.append(size)
            sizes[pool] += 1
    return tuple(out)


def meshes(**most: int) -> st.SearchStrategy[Mesh]:
    """Meshes with these axes, in this order, each with at most so many ranks.

    >>> from hypothesis import find
    >>> find(meshes(pipe=4, data=2), lambda mesh: mesh.size > 4)
    Mesh(pipe=3, data=2)
    """
    sizes = {axis: st.integers(1, size) for axis, size in most.items()}
    return st.builds(Mesh, **sizes)


def microbatch_counts(most: int = 4) -> st.SearchStrategy[int]:
    """How many microbatches: from 1 to ``most``.

    >>> from hypothesis import find
    >>> find(microbatch_counts(4), lambda count: count > 2)
    3
    """
    return st.integers(1, most)


def schedules(v: int = 1) -> st.SearchStrategy[ScheduleFn]:
    """Schedules with at most ``v`` stages a rank: those of the library, and random tables.

    >>> from hypothesis import find
    >>> print(find(schedules(v=2), lambda schedule: True)(2, 2))
    rank 0: 0F0 0F1 0B0 0B1
    rank 1: 1F0 1B0 1F1 1B1
    """
    fixed = [library.one_f_one_b, library.gpipe, library.zb_h1]
    if v > 1:
        fixed += [library.zb_v, library.dual_pipe_v, library.v_half, library.v_min]
    one_of_fixed = st.sampled_from([make() for make in fixed])
    strategies: list[Any] = [one_of_fixed]
    if v > 1:
        for make in (library.interleaved_1f1b, library.looped_bfs, library.interleaved_zb):
            strategies.append(st.builds(make, st.integers(2, v)))
    seeds = st.integers(0, 2**16)
    strategies.append(st.builds(RandomTable, seeds, st.integers(1, v)))
    return st.one_of(*strategies)


@dataclass(frozen=True)
class RandomTable:
    """A schedule of any size, with actions in random order, each after those that it needs.

    Args:
        seed: of the random order.
        v: stages a rank; they are placed on ranks in random order.

    >>> print(RandomTable(seed=1)(1, 2))
    rank 0: 0F0 0F1 0B0 0I1 0W1
    """

    seed: int
    v: int = 1

    def __call__(self, ranks: int, microbatches: int) -> Schedule:
        """The table for a number of ranks and microbatches."""
        rng = random.Random(self.seed)
        placement = list(range(ranks)) * self.v
        rng.shuffle(placement)
        stages = len(placement)
        rows: list[list[Action]] = [[] for _ in range(ranks)]
        remaining = _actions(rng, stages, microbatches)
        done: set[Done] = set()
        while remaining:
            ready = []
            for action in remaining:
                if done.issuperset(_needs(action, stages)):
                    ready.append(action)
            action = rng.choice(ready)
            remaining.remove(action)
            rows[placement[action.stage]].append(action)
            kind = "B" if action.kind == "I" else action.kind
            done.add((kind, action.stage, action.microbatch))
        return Schedule(
            repr(self),
            tuple(map(tuple, rows)),
            tuple(placement),
            microbatches,
        )


Done = tuple[str, int, int]  # kind, stage and microbatch; an I counts as B


def _actions(
    rng: random.Random,
    stages: int,
    microbatches: int,
) -> list[Action]:
    """All actions; about half of the backwards are one B, the others two, I and W."""
    actions = []
    for stage, microbatch in itertools.product(range(stages), range(microbatches)):
        kinds = "FB" if rng.random() < 0.5 else "FIW"
        actions += [Action(kind, stage, microbatch) for kind in kinds]
    return actions


def _needs(action: Action, stages: int) -> Iterator[Done]:
    """What must be done before an action."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "W":
        yield "B", stage, microbatch
    elif action.kind == "F":
        if stage:
            yield "F", stage - 1, microbatch
    else:
        yield "F", stage, microbatch
        if stage < stages - 1:
            yield "B", stage + 1, microbatch
