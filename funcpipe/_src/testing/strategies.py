"""Hypothesis strategies: random models, meshes, microbatch counts and schedules.

What is drawn prints as the Python that makes it again. Needs Hypothesis, which funcpipe itself does
not.

In: bounds. Out: strategies.
"""

from __future__ import annotations

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
    draw: st.DrawFn, max_segments: int = 5, tops: tuple[str, ...] = ("none", "scale")
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
    for k in range(count):
        kinds = [kind for kind in LAYERS if kind != "skip" or k > 1]
        drawn = draw(st.lists(st.sampled_from(kinds), max_size=3))
        segments.append(tuple(Layer(kind, draw(_leaves(kind, sizes, k))) for kind in drawn))
    carry = draw(st.sampled_from(["tensor", "dict", "tuple"]))
    return Model(
        segments=tuple(segments),
        width=draw(st.sampled_from([4, 6])),
        carry=carry,
        carried=None if carry == "tensor" else draw(st.none() | st.integers(0, count - 1)),
        tied_head=draw(st.booleans()),
        top=draw(st.sampled_from(tops)),
        aux=draw(st.none() | st.integers(0, count - 1)),
        unused=draw(st.booleans()),
        zero_rows=draw(st.booleans()),
    )


@st.composite
def _leaves(draw: st.DrawFn, kind: str, sizes: dict[str, int], segment: int) -> tuple[int, ...]:
    """The leaves of a layer: mostly new ones, sometimes tied; ``sizes`` counts those there are."""
    if kind == "skip":
        return (draw(st.integers(0, segment - 2)),)
    out = []
    for pool in LAYERS[kind]:
        if sizes[pool] and draw(_SOMETIMES):
            out.append(draw(st.integers(0, sizes[pool] - 1)))
        else:
            out.append(sizes[pool])
            sizes[pool] += 1
    return tuple(out)


def meshes(**most: int) -> st.SearchStrategy[Mesh]:
    """Meshes with these axes, in this order, each of at most so many ranks.

    >>> from hypothesis import find
    >>> find(meshes(pipe=4, data=2), lambda mesh: mesh.size > 4)
    Mesh(pipe=3, data=2)
    """
    return st.builds(Mesh, **{axis: st.integers(1, n) for axis, n in most.items()})


def microbatch_counts(most: int = 4) -> st.SearchStrategy[int]:
    """How many microbatches: from 1 to ``most``.

    >>> from hypothesis import find
    >>> find(microbatch_counts(4), lambda count: count > 2)
    3
    """
    return st.integers(1, most)


def schedules(v: int = 1) -> st.SearchStrategy[ScheduleFn]:
    """Schedules with at most ``v`` stages a rank: those of the library that need no more, and
    random tables.

    >>> from hypothesis import find
    >>> print(find(schedules(v=2), lambda schedule: True)(2, 2))
    rank 0: 0F0 0F1 0B0 0B1
    rank 1: 1F0 1B0 1F1 1B1
    """
    fixed = [library.one_f_one_b, library.gpipe, library.zb_h1]
    fixed += [library.zb_v, library.dual_pipe_v, library.v_half, library.v_min] if v > 1 else []
    looped = [library.interleaved_1f1b, library.looped_bfs, library.interleaved_zb]
    named: list[Any] = [st.sampled_from([make() for make in fixed])]
    named += [st.builds(make, st.integers(2, v)) for make in looped] if v > 1 else []
    tables = st.builds(RandomTable, st.integers(0, 2**16), st.integers(1, v))
    return st.one_of(*named, tables)


@dataclass(frozen=True)
class RandomTable:
    """A schedule in random order, of any size: every action as soon as chance has it after what it
    needs.

    Args:
        seed: which one.
        v: stages a rank; they lie on the ranks in random order.

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
        rows: list[list[Action]] = [[] for _ in range(ranks)]
        cells = [(stage, m) for stage in range(len(placement)) for m in range(microbatches)]
        whole = {cell for cell in cells if rng.random() < 0.5}  # B in one; the others as I and W
        todo = [
            Action(kind, *cell) for cell in cells for kind in ("FB" if cell in whole else "FIW")
        ]
        done: set[tuple[str, int, int]] = set()
        while todo:
            ready = [a for a in todo if all(x in done for x in _needs(a, len(placement)))]
            action = rng.choice(ready)
            todo.remove(action)
            rows[placement[action.stage]].append(action)
            done.add(("B" if action.kind == "I" else action.kind, action.stage, action.microbatch))
        return Schedule(repr(self), tuple(map(tuple, rows)), tuple(placement), microbatches)


def _needs(a: Action, stages: int) -> Iterator[tuple[str, int, int]]:
    if a.kind == "W":
        yield "B", a.stage, a.microbatch
    elif a.kind == "F":
        if a.stage:
            yield "F", a.stage - 1, a.microbatch
    else:
        yield "F", a.stage, a.microbatch
        if a.stage < stages - 1:
            yield "B", a.stage + 1, a.microbatch
