"""Mesh: ranks, places on axes, groups."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused

from funcpipe import Mesh
from funcpipe._src.core.mesh import as_axes
from funcpipe.errors import MeshError, StackError

SIZES = st.lists(st.integers(1, 4), max_size=4)


def mesh_of(sizes: list[int]) -> Mesh:
    return Mesh(**{f"a{i}": n for i, n in enumerate(sizes)})


@given(SIZES)
def test_ranks_count_places_with_the_last_axis_fastest(sizes: list[int]) -> None:
    mesh = mesh_of(sizes)
    assert mesh.size == math.prod(sizes)
    places = [tuple(mesh.coords(r).values()) for r in range(mesh.size)]
    assert places == list(itertools.product(*map(range, sizes)))
    assert [mesh.rank(mesh.coords(r)) for r in range(mesh.size)] == list(range(mesh.size))


@given(SIZES, st.data())
def test_groups_divide_the_ranks(sizes: list[int], data: st.DataObject) -> None:
    mesh = mesh_of(sizes)
    axes = tuple(data.draw(st.permutations(list(mesh.axes))))[
        : data.draw(st.integers(0, len(sizes)))
    ]
    groups = {mesh.group(r, axes) for r in range(mesh.size)}
    assert sorted(itertools.chain(*groups)) == list(range(mesh.size))
    for group in groups:
        assert len(group) == mesh.axis_size(axes)
        assert [mesh.index(r, axes) for r in group] == list(range(len(group)))
        for r in group:  # all others stay where they are
            there, first = mesh.coords(r), mesh.coords(group[0])
            assert all(there[a] == first[a] for a in mesh.axes if a not in axes)
    if len(axes) > 1:  # the last of the given axes varies fastest
        assert (
            mesh.coords(mesh.group(0, axes)[mesh.axis_size(axes[-1:]) - 1])[axes[-1]]
            == mesh.axes[axes[-1]] - 1
        )


def test_a_mesh_without_axes_is_one_rank() -> None:
    assert (Mesh().size, Mesh().coords(0), Mesh().group(0, ())) == (1, {}, (0,))


def test_meshes_are_values() -> None:
    assert Mesh(a=2, b=3) == Mesh(a=2, b=3) != Mesh(b=3, a=2)
    assert len({Mesh(a=2), Mesh(a=2), Mesh(a=3)}) == 2
    assert repr(Mesh(a=2, b=3)) == "Mesh(a=2, b=3)"
    assert Mesh.parse("a=2, b=3") == Mesh(a=2, b=3)
    assert Mesh.parse("") == Mesh()


def test_axes_in_mesh_order_without_doubles() -> None:
    assert Mesh(a=1, b=2, c=3).ordered(["c", "a", "c"]) == ("a", "c")
    assert Mesh(a=1, b=2, c=3).axis_size(("c", "b")) == 6


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_sizes_are_whole_numbers(size: object) -> None:
    with refused(
        MeshError,
        f"axis 'pipe' of the mesh has size {size!r}",
        "a whole number of ranks, 1 or more",
    ):
        Mesh(pipe=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["pipe", "pipe=x", "pipe=1=2"])
def test_a_text_that_is_no_mesh(text: str) -> None:
    with refused(MeshError, f"cannot read a mesh from {text!r}", "'pipe=2,data=4'"):
        Mesh.parse(text)


def test_an_axis_that_is_not_there() -> None:
    with refused(MeshError, "axis 'x' is not in Mesh(a=2)", "its axes are 'a'"):
        Mesh(a=2).group(0, "x")
    with refused(MeshError, "loader: axis 'x' is not in Mesh()", "its axes are none"):
        Mesh().check("x", who="loader")
    with refused(StackError, "axis=5: write the name of a mesh axis"):
        as_axes(5)  # type: ignore[arg-type]
    with refused(StackError, "axis=('a', 1): write the name"):
        as_axes(("a", 1))  # type: ignore[arg-type]
