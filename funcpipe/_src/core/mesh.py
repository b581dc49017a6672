"""The mesh: named axes and their sizes. The last axis varies fastest over ranks.

An **axis** is a mesh axis, a **dim** is a tensor dimension. A *group* of a rank over some axes is
the tuple of ranks whose coordinates differ from its own on those axes only, in the order in which
the axes are given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from funcpipe.errors import MeshError, StackError

Axes = tuple[str, ...]


def as_axes(axis: str | Iterable[str]) -> Axes:
    """An axis name or several, as a tuple of names; StackError when it is anything else.

    >>> as_axes("pipe"), as_axes(["data", "seq"])
    (('pipe',), ('data', 'seq'))
    """
    single = isinstance(axis, str) or not isinstance(axis, Iterable)
    axes: Any = (axis,) if single else tuple(axis)
    if not all(isinstance(name, str) for name in axes):
        raise StackError(
            f"axis={axis!r}: write the name of a mesh axis, such as axis='data', or a tuple of "
            "names"
        )
    return axes


class Mesh:
    """Named axes of ranks, immutable and hashable.

    Args:
        axes: the size of every axis, at least 1; the last one varies fastest over ranks. None at
            all: one rank.

    Raises:
        MeshError: a size that is not a positive int.

    >>> mesh = Mesh(pipe=2, data=2)
    >>> mesh.size, mesh.coords(3), mesh.group(0, ("pipe",))
    (4, {'pipe': 1, 'data': 1}, (0, 2))
    """

    __slots__ = ("_axes", "_groups", "size")
    size: int

    def __init__(self, **axes: int) -> None:
        for name, size in axes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(
                    f"axis {name!r} of the mesh has size {size!r}; an axis has a whole number of "
                    "ranks, 1 or more"
                )
        self._axes = tuple(axes.items())
        self._groups: dict[tuple[int, Axes], tuple[int, ...]] = {}
        self.size = math.prod(axes.values())

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """A mesh from the text of a command line.

        >>> Mesh.parse("pipe=2,data=4")
        Mesh(pipe=2, data=4)
        """
        try:
            sizes = {}
            for part in filter(None, text.split(",")):
                name, size = part.split("=")
                sizes[name.strip()] = int(size)
            return cls(**sizes)
        except ValueError:
            raise MeshError(
                f"cannot read a mesh from {text!r}; write it like 'pipe=2,data=4'"
            ) from None

    @property
    def axes(self) -> Mapping[str, int]:
        """The size of every axis, in order."""
        return dict(self._axes)

    def axis_size(self, axes: str | Iterable[str]) -> int:
        """How many ranks an axis has, or the product over several."""
        sizes = self.axes
        return math.prod(sizes[name] for name in self.check(axes))

    def check(self, axes: str | Iterable[str], who: str = "") -> Axes:
        """The axes as a tuple; MeshError, naming ``who`` asks, when the mesh lacks one."""
        axes = as_axes(axes)
        known = self.axes
        for name in axes:
            if name not in known:
                asker = f"{who}: " if who else ""
                raise MeshError(
                    f"{asker}axis {name!r} is not in {self!r}; its axes are "
                    f"{', '.join(map(repr, known)) or 'none'}"
                )
        return axes

    def ordered(self, axes: Iterable[str]) -> Axes:
        """The axes without doubles, in mesh order."""
        wanted = set(axes)
        return tuple(name for name, _ in self._axes if name in wanted)

    def coords(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis."""
        out = {}
        for name, size in reversed(self._axes):
            out[name], rank = rank % size, rank // size
        return {name: out[name] for name, _ in self._axes}

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank that stands at the given place on every axis."""
        rank = 0
        for name, size in self._axes:
            rank = rank * size + coords[name]
        return rank

    def group(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` on ``axes`` only; the last of the given axes varies
        fastest."""
        axes = as_axes(axes)
        key = rank, axes
        if key not in self._groups:
            self._groups[key] = tuple(self._ranks_over(rank, self.check(axes)))
        return self._groups[key]

    def _ranks_over(self, rank: int, axes: Axes) -> Iterator[int]:
        """The ranks that differ from ``rank`` on ``axes`` only."""
        sizes = self.axes
        coords = self.coords(rank)
        for places in itertools.product(*(range(sizes[name]) for name in axes)):
            coords.update(zip(axes, places, strict=True))
            yield self.rank(coords)

    def index(self, rank: int, axes: str | Iterable[str]) -> int:
        """The place of a rank in its group over ``axes``."""
        return self.group(rank, axes).index(rank)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and self._axes == other._axes

    def __hash__(self) -> int:
        return hash(self._axes)

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={size}' for name, size in self._axes)})"
