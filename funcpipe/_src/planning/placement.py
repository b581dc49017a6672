"""Placement: which rank holds which leaf of the state, and the way there and back.

A param lies on the pipeline ranks that use it, its *owners*, and may be sharded over axes: cut flat
into equal pieces, one for each rank of the group on those axes. To *place* a tree is to turn the
single-device pytree into what one rank holds, to *unplace* to turn what all ranks hold into it
again. A leaf that a rank does not hold is None there.

In: `StepAnalysis`, the pipeline ranks that use each param. Out: `StatePlacement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.program.shard_shapes import extent, shard_shape
from funcpipe.errors import StateError

if TYPE_CHECKING:
    pass


def take(x: torch.Tensor, mesh: Mesh, rank: int, axes: Axes) -> torch.Tensor:
    """A rank's shard of a whole leaf."""
    start, end = extent(x.numel(), mesh.axis_size(axes), mesh.index(rank, axes))
    return x.reshape(-1)[start:end].reshape(shard_shape(tuple(x.shape), end - start))


def join(shards: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The whole leaf of all its shards, in order."""
    return torch.cat([shard.reshape(-1) for shard in shards]).view(shape)


@dataclass(frozen=True)
class LeafLayout:
    """Where a parameter is held.

    Args:
        owners: the pipeline ranks, lowest first (0 without a pipeline).
        shape: of the unsharded leaf.
        axes: the axes it is sharded over, in mesh order; none: each owner holds it unsharded.
    """

    owners: tuple[int, ...]
    shape: tuple[int, ...]
    axes: Axes = ()


@dataclass(frozen=True)
class LeafMetric:
    """A metric that some ranks do not compute: its number, a pipeline rank that does, and what it is
    like there (a fake, or a value of Python)."""

    number: int
    pipeline_rank: int
    like: Any


@dataclass(frozen=True)
class StatePlacement:
    """Which rank holds which leaf of the state.

    Args:
        mesh: the mesh.
        pipe_axis: the axis along which ranks hold different leaves.
        analysis: which leaf of the state is which param.
        layouts: of every param.
        present: for every pipeline rank, which leaves of the state it holds.
        apart: the global sums whose trees have, on a rank, entries of the leaves that it holds.
        metrics_spec: the structure of the metrics.
        leaf_metrics: those that some ranks do not compute, for want of a leaf.
    """

    mesh: Mesh
    pipe_axis: str | None
    analysis: StepAnalysis
    layouts: tuple[LeafLayout, ...]
    present: tuple[tuple[bool, ...], ...]
    apart: frozenset[int] = frozenset()
    metrics_spec: Any = None
    leaf_metrics: tuple[LeafMetric, ...] = ()

    def __str__(self) -> str:
        analysis, lines = self.analysis, []
        for path, layout in zip(analysis.paths, self.layouts, strict=True):
            over = f", sharded over {', '.join(layout.axes)}" if layout.axes else ""
            ranks = ", ".join(map(str, layout.owners))
            lines.append(f"params{path} {layout.shape} on pipeline ranks {ranks}{over}")
        for pipeline_rank, present in enumerate(self.present):
            held = f"{sum(present)} of {len(present)} leaves of the state"
            lines.append(f"pipeline rank {pipeline_rank} holds {held}")
        return "\n".join(lines)

    # ---- ranks

    def pipeline_rank(self, rank: int) -> int:
        """The pipeline rank of a rank of the mesh."""
        return self.mesh.coords(rank)[self.pipe_axis] if self.pipe_axis else 0

    def holds(self, rank: int, param: int) -> bool:
        """Whether a rank holds a param."""
        return self.pipeline_rank(rank) in self.layouts[param].owners

    def shape(self, rank: int, param: int) -> tuple[int, ...]:
        """The shape of what a rank holds of a param."""
        layout = self.layouts[param]
        if not layout.axes:
            return layout.shape
        elements = math.prod(layout.shape)
        shards = self.mesh.axis_size(layout.axes)
        start, end = extent(elements, shards, self.mesh.index(rank, layout.axes))
        return shard_shape(layout.shape, end - start)

    def counts(self, rank: int, param: int | None) -> bool:
        """Whether a rank counts its part of a leaf in a sum over the mesh: the lowest of those that
        hold the part."""
        if param is None:
            return self.tells(rank, 0)
        layout = self.layouts[param]
        return self._is_lowest(rank, layout.owners[0], layout.axes)

    def tells(self, rank: int, pipeline_rank: int) -> bool:
        """Whether a rank is the lowest with a pipeline rank."""
        return self._is_lowest(rank, pipeline_rank, ())

    def _is_lowest(self, rank: int, pipeline_rank: int, free: Axes) -> bool:
        """Whether a rank is the lowest with a pipeline rank and its coordinates on free axes."""
        for axis, coordinate in self.mesh.coords(rank).items():
            lowest = pipeline_rank if axis == self.pipe_axis else 0
            if axis not in free and coordinate != lowest:
                return False
        return True

    # ---- leaves of the state

    def free(self, rank: int) -> frozenset[int]:
        """Which of the leaves that a rank holds, counted among those, a step may write to
        (`core/buffer_donation.py`)."""
        present = self.present[self.pipeline_rank(rank)]
        held = [leaf for leaf, here in enumerate(present) if here]
        overwritable = self.analysis.overwritable
        return frozenset(number for number, leaf in enumerate(held) if leaf in overwritable)

    def holders(self, leaf: int) -> tuple[int, ...]:
        """The lowest ranks that hold a leaf of the state: one, or one for each of its shards, in
        order."""
        coordinates = dict.fromkeys(self.mesh.axes, 0)
        if self.pipe_axis:
            coordinates[self.pipe_axis] = self._holding(leaf)[0]
        first = self.mesh.rank(coordinates)
        return self.mesh.group(first, self._axes(leaf))

    def held_as(self, rank: int, leaf: int) -> tuple:
        """What a rank holds of a leaf of the state: ranks that have the same, hold copies."""
        axes = self._axes(leaf)
        return self._holding(leaf), axes, self.mesh.index(rank, axes)

    def copies(self, rank: int, leaf: int) -> int:
        """How many ranks hold the same part of a leaf of the state as this one; 0 if it holds
        none."""
        holding = self._holding(leaf)
        if self.pipeline_rank(rank) not in holding:
            return 0
        shards = self.mesh.axis_size(self._axes(leaf))
        return len(holding) * self.mesh.size // (len(self.present) * shards)

    def _holding(self, leaf: int) -> tuple[int, ...]:
        """The pipeline ranks that hold a leaf of the state."""
        ranks = enumerate(self.present)
        return tuple(rank for rank, present in ranks if present[leaf])

    def _axes(self, leaf: int) -> Axes:
        param = self.analysis.state[leaf]
        return () if param is None else self.layouts[param].axes

    # ---- trees

    def params(self, leaf: Callable[[int], torch.Tensor], rank: int) -> Any:
        """What a rank holds of the params, in tensors of its own.

        Args:
            leaf: makes or fetches an unsharded one, by number.
        """
        held: list[Any] = []
        for param, layout in enumerate(self.layouts):
            if self.holds(rank, param):
                held.append(own(self._part(leaf(param), layout.axes, rank)))
            else:
                held.append(None)
        return tree.unflatten(self.analysis.params_spec, held)

    def place(self, full: Any, rank: int) -> Any:
        """What a rank holds of the full state, in tensors of its own."""
        leaves = self.state_leaves(full, "place")
        present = self.present[self.pipeline_rank(rank)]
        held = []
        for number, here in enumerate(present):
            part = None
            if here:
                part = own(self._part(leaves[number], self._axes(number), rank))
            held.append(part)
        return tree.unflatten(self.analysis.state_spec, held)

    def _part(self, leaf: Any, axes: Axes, rank: int) -> Any:
        return take(leaf, self.mesh, rank, axes) if axes else leaf

    def unplace(self, leaf: Callable[[int, int], Any]) -> Any:
        """The full state.

        Args:
            leaf: fetches what a rank holds of a leaf of the state, by rank and number.
        """
        out = []
        for number, param in enumerate(self.analysis.state):
            parts = [leaf(rank, number) for rank in self.holders(number)]
            if param is not None and self.layouts[param].axes:
                out.append(join(parts, self.layouts[param].shape))
            else:
                out.append(own(parts[0]))
        return tree.unflatten(self.analysis.state_spec, out)

    def state_leaves(self, state: Any, who: str) -> list[Any]:
        """The leaves of a rank's state (None where it holds nothing), in the order of the full
        state's."""
        try:
            return tree.leaves_up_to(self.analysis.state_spec, state)
        except ValueError as error:
            raise StateError(
                f"{who}: the state has another structure than init_state made: "
                f"{str(error).rstrip('.')}. Write init_state and the step with tree_map, which "
                "keeps the places of leaves that a rank does not hold"
            ) from None


def own(x: Any) -> Any:
    """A tensor in memory of its own (ranks of one process must not share any); anything else as it
    is."""
    return x.detach().clone() if isinstance(x, torch.Tensor) else x
