"""The mesh: named axes and their sizes. The last axis varies fastest over ranks.

An **axis** is a mesh axis, a **dim** is a tensor dimension. A *group* of a rank over some axes is
the tuple of ranks whose coordinates differ from its own on those axes only, in the order in which
the axes are given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

from funcpipe.errors import MeshError, StackError

Axes = tuple[str, ...]


def as_axes(axis: str | Iterable[str]) -> Axes:
    """An axis name or several, as a tuple of names; StackError when it is anything else.

    >>> as_axes("pipe"), as_axes(["data", "seq"])
    (('pipe',), ('data', 'seq'))
    """
    axes = (
        (axis,) if isinstance(axis, str) else tuple(axis) if isinstance(axis, Iterable) else (axis,)
    )
    if not all(isinstance(a, str) for a in axes):
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
        for name, n in axes.items():
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise MeshError(
                    f"axis {name!r} of the mesh has size {n!r}; an axis has a whole number of "
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
            return cls(
                **{
                    name.strip(): int(n)
                    for name, n in (part.split("=") for part in text.split(",") if part)
                }
            )
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
        return math.prod(sizes[a] for a in self.check(axes))

    def check(self, axes: str | Iterable[str], who: str = "") -> Axes:
        """The axes as a tuple; MeshError, naming ``who`` asks, when the mesh lacks one."""
        axes = as_axes(axes)
        for a in axes:
            if a not in dict(self._axes):
                raise MeshError(
                    f"{who + ': ' if who else ''}axis {a!r} is not in {self!r}; its axes are "
                    f"{', '.join(repr(n) for n, _ in self._axes) or 'none'}"
                )
        return axes

    def ordered(self, axes: Iterable[str]) -> Axes:
        """The axes without doubles, in mesh order."""
        wanted = set(axes)
        return tuple(n for n, _ in self._axes if n in wanted)

    def coords(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis."""
        out = {}
        for name, n in reversed(self._axes):
            out[name], rank = rank % n, rank // n
        return {name: out[name] for name, _ in self._axes}

    def rank(self, coords: Mapping[str, int]) -> int:
        """The rank that stands at the given place on every axis."""
        r = 0
        for name, n in self._axes:
            r = r * n + coords[name]
        return r

    def group(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` on ``axes`` only; the last of the given axes varies
        fastest."""
        key = (rank, as_axes(axes))
        if key not in self._groups:
            sizes, here = self.axes, self.coords(rank)
            places = itertools.product(*(range(sizes[a]) for a in self.check(key[1])))
            self._groups[key] = tuple(
                self.rank({**here, **dict(zip(key[1], p, strict=True))}) for p in places
            )
        return self._groups[key]

    def index(self, rank: int, axes: str | Iterable[str]) -> int:
        """The place of a rank in its group over ``axes``."""
        return self.group(rank, axes).index(rank)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and self._axes == other._axes

    def __hash__(self) -> int:
        return hash(self._axes)

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{name}={n}' for name, n in self._axes)})"
