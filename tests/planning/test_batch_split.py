"""Batches: all ranks' microbatches in order are the batch again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused

import funcpipe as fp
from funcpipe._src.planning.batch_split import BatchSplit, signature, split_batch
from funcpipe._src.spec.resolve import resolve
from funcpipe.errors import BatchError


def splits_of(
    batch: Any, mesh: fp.Mesh, microbatches: int | None, data: tuple[str, ...] = (), dims: Any = 0
) -> BatchSplit:
    step: Any = lambda state, batch: (state, {})  # noqa: E731
    if data:
        step = fp.data_parallel(step, axis=data, dims=dims)
    if "pipe" in mesh.axes:
        step = fp.pipelined(step, axis="pipe", microbatches=microbatches, dims=dims)
    else:
        step = fp.accumulated(step, microbatches=microbatches, dims=dims)
    return split_batch(resolve(step, mesh), batch)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict, dict, fp.Mesh, tuple[str, ...], int]:
    """A batch whose every leaf is split along a dim of its own, and a mesh."""
    sizes = {
        "d": draw(st.integers(1, 3)),
        "pipe": draw(st.integers(1, 2)),
        "e": draw(st.integers(1, 2)),
    }
    names = draw(st.permutations(list(sizes)))
    axes = tuple(draw(st.permutations(["d", "e"])))
    microbatches = draw(st.integers(1, 3))
    pieces = sizes["d"] * sizes["e"] * microbatches
    batch, dims = {}, {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        shape[dim] = pieces * draw(st.integers(0, 2))
        batch[name], dims[name] = torch.arange(torch.Size(shape).numel()).view(shape), dim
    return batch, dims, fp.Mesh(**{n: sizes[n] for n in names}), axes, microbatches


@given(cases())
def test_microbatches_in_order_are_the_batch(
    case: tuple[dict, dict, fp.Mesh, tuple[str, ...], int],
) -> None:
    batch, dims, mesh, axes, microbatches = case
    splits = splits_of(batch, mesh, microbatches, axes, dims)
    group = mesh.group(0, axes)  # one rank for every place on the data axes, the first axis major
    pieces = [part for rank in group for part in splits.local_leaves(batch, rank)]
    assert len(pieces) == len(group) * microbatches
    for i, name in enumerate(sorted(batch)):
        assert torch.equal(torch.cat([p[i] for p in pieces], dims[name]), batch[name])
        assert all(p[i].is_contiguous() for p in pieces)
        assert {tuple(p[i].shape) for p in pieces} == {splits.shape(0, i, tuple(batch[name].shape))}
    for rank in range(mesh.size):  # ranks that differ on the pipe axis alone get the same
        first = mesh.rank({**mesh.coords(rank), "pipe": 0})
        for a, b in zip(
            splits.local_leaves(batch, rank), splits.local_leaves(batch, first), strict=True
        ):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_data_axes_are_major_and_microbatches_minor() -> None:
    splits = splits_of(torch.arange(8), fp.Mesh(data=2), 2, ("data",))
    assert [[x.tolist() for (x,) in splits.local_leaves(torch.arange(8), r)] for r in (0, 1)] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
    ]


def test_what_goes_to_everyone_whole() -> None:
    batch = {
        "x": torch.arange(4),
        "n": torch.tensor(3),
        "name": "text",
        "k": 5,
        "none": None,
        "table": torch.arange(3),
    }
    splits = splits_of(
        batch,
        fp.Mesh(pipe=2),
        2,
        dims={"x": 0, "n": 0, "name": 0, "k": 0, "none": 0, "table": None},
    )
    k, n, name, table, x = splits.local_leaves(batch, 0)[1]
    assert (k, n.item(), name, table.tolist(), x.tolist()) == (5, 3, "text", [0, 1, 2], [2, 3])


def test_ready_microbatches_differ_in_shape_and_are_split_over_data_axes_only() -> None:
    ready = fp.Microbatches([{"x": torch.arange(4)}, {"x": torch.arange(2)}])
    splits = splits_of(ready, fp.Mesh(pipe=1, data=2), None, ("data",))
    assert splits.microbatches == 2
    assert [[x.tolist() for (x,) in splits.local_leaves(ready, r)] for r in (0, 1)] == [
        [[0, 1], [0]],
        [[2, 3], [1]],
    ]


@pytest.mark.parametrize("dims", [{"x": 0, "z": 0}, (0,), {"x": {"y": 0}}])
def test_a_prefix_that_does_not_fit(dims: Any) -> None:
    with refused(BatchError, f"accumulated: dims={dims!r} is not a prefix of the batch {{'x': *}}"):
        splits_of({"x": torch.zeros(4)}, fp.Mesh(), 2, dims=dims)


def test_a_signature_tells_batches_apart_that_need_plans_of_their_own() -> None:
    x = torch.zeros(2, 3)
    same = [{"x": x, "n": 3}, {"x": x + 1, "n": 3}]
    others = [
        {"x": x, "n": 4},
        {"x": x, "n": 3.0},
        {"x": x.double(), "n": 3},
        {"x": x.t(), "n": 3},
        {"y": x, "n": 3},
        [x, 3],
    ]
    assert signature(same[0]) == signature(same[1])
    assert len({signature(b) for b in [same[0], *others]}) == 7
