"""Placement: which rank holds which leaf, and the way there and back.

Terms. A *layout* says, for one parameter, which places on the pipe axis (its *owners*) hold it. To *place* a tree is to
turn the single-device pytree into what one rank holds, to *unplace* to turn what all ranks hold into it again. A leaf
that a rank does not hold is None there.

In: `Dyed` (which leaf of the state is which parameter) and the owners of every parameter. Out: `Placement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcpipe import tree
from funcpipe.errors import StateError
from funcpipe.mesh import Mesh
from funcpipe.state import Dyed, Dyes, held_state


@dataclass(frozen=True)
class Layout:
    """Where a parameter is held: the places on the pipe axis, lowest first (place 0 without a pipe axis)."""

    owners: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Which rank holds which leaf of the state.

    Args:
        mesh: the mesh; pipe_axis: the axis along which ranks hold different leaves.
        dyed: which leaf is which.
        layouts: of every parameter.
        present: for every place on the pipe axis, which leaves of the state its ranks hold.
    """

    mesh: Mesh
    pipe_axis: str | None
    dyed: Dyed
    layouts: tuple[Layout, ...]
    present: tuple[tuple[bool, ...], ...]

    def stage_rank(self, rank: int) -> int:
        """The place of a rank on the pipe axis."""
        return self.mesh.coords(rank)[self.pipe_axis] if self.pipe_axis else 0

    def holds(self, rank: int, param: int) -> bool:
        """Whether a rank holds a parameter."""
        return self.stage_rank(rank) in self.layouts[param].owners

    def counts(self, rank: int, param: int | None) -> bool:
        """Whether a rank is the one that counts a leaf in a sum over the mesh: the lowest of those that hold it."""
        here = self.mesh.coords(rank)
        first = 0 if param is None else self.layouts[param].owners[0]
        return all(here[a] == (first if a == self.pipe_axis else 0) for a in self.mesh.axes)

    def holder(self, leaf: int) -> int:
        """The lowest rank that holds a leaf of the state."""
        place = next(p for p, present in enumerate(self.present) if present[leaf])
        zero = dict.fromkeys(self.mesh.axes, 0)
        return self.mesh.rank(zero | ({self.pipe_axis: place} if self.pipe_axis else {}))

    def params(self, full: Any, rank: int) -> Any:
        """What a rank holds of the full params, in tensors of its own."""
        leaves = self.dyed.params_spec.flatten_up_to(full)
        held = [own(x) if self.holds(rank, i) else None for i, x in enumerate(leaves)]
        return tree.unflatten(self.dyed.params_spec, held)

    def place(self, full: Any, rank: int) -> Any:
        """What a rank holds of the full state, in tensors of its own."""
        leaves = self.state_leaves(full, "place")
        return tree.unflatten(
            self.dyed.state_spec,
            [own(x) if p else None for x, p in zip(leaves, self.present[self.stage_rank(rank)], strict=True)],
        )

    def unplace(self, leaf: Callable[[int, int], Any]) -> Any:
        """The full state; ``leaf(rank, number)`` fetches a leaf of the state from a rank that holds it."""
        count = len(self.dyed.state)
        return tree.unflatten(self.dyed.state_spec, [own(leaf(self.holder(j), j)) for j in range(count)])

    def state_leaves(self, state: Any, who: str) -> list[Any]:
        """The leaves of a rank's state (None where it holds nothing), in the order of the full state's."""
        try:
            return self.dyed.state_spec.flatten_up_to(state)
        except ValueError as error:
            raise StateError(
                f"{who}: the state has another structure than init_state made: {error}. Write init_state and the step with "
                "tree_map, which keeps the places of leaves that a rank does not hold"
            ) from error


def own(x: Any) -> Any:
    """A tensor in memory of its own (ranks of one process must not share any); anything else as it is."""
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def place_params(
    mesh: Mesh,
    pipe_axis: str | None,
    dyed: Dyed,
    dyes: Dyes,
    init_state: Callable,
    owners: Sequence[Iterable[int]],
) -> Placement:
    """The placement that follows from the owners of every parameter."""
    layouts = tuple(Layout(tuple(sorted(set(o))) or (0,)) for o in owners)
    places = mesh.axis_size(pipe_axis) if pipe_axis else 1
    placement = Placement(mesh, pipe_axis, dyed, layouts, ())
    present = []
    for p in range(places):
        state = held_state(init_state, dyes, lambda i, p=p: p in layouts[i].owners)  # type: ignore[misc]
        present.append(tuple(x is not None for x in placement.state_leaves(state, "init_state")))
    return Placement(mesh, pipe_axis, dyed, layouts, tuple(present))
