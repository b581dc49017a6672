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
from typing import Any

import torch

from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.program.shard_shapes import extent, shard_shape
from funcpipe.errors import StateError

Shape = tuple[int, ...]


def take(leaf: torch.Tensor, mesh: Mesh, rank: int, axes: Axes) -> torch.Tensor:
    """A rank's shard of a whole leaf."""
    shards = mesh.axis_size(axes)
    index = mesh.index(rank, axes)
    start, end = extent(leaf.numel(), shards, index)
    elements = leaf.reshape(-1)[start:end]
    count = end - start
    shape = shard_shape(tuple(leaf.shape), count)
    return elements.reshape(shape)


def join(shards: Sequence[torch.Tensor], shape: Shape) -> torch.Tensor:
    """The whole leaf of all its shards, in order."""
    elements = [shard.reshape(-1) for shard in shards]
    return torch.cat(elements).view(shape)


@dataclass(frozen=True)
class LeafLayout:
    """Where a parameter is held.

    Args:
        owners: the pipeline ranks, lowest first (0 without a pipeline).
        shape: of the unsharded leaf.
        axes: the axes it is sharded over, in mesh order; none: each owner holds it unsharded.
    """

    owners: tuple[int, ...]
    shape: Shape
    axes: Axes = ()


@dataclass(frozen=True)
class LeafMetric:
    """A metric that some ranks do not compute: its number, a pipeline rank that does, and what it
    is like there (a fake, or a value of Python)."""

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
        paths = self.analysis.paths
        lines = []
        for path, layout in zip(paths, self.layouts, strict=True):
            lines.append(f"params{path} {_layout_text(layout)}")
        for pipeline_rank, present in enumerate(self.present):
            held = f"{sum(present)} of {len(present)} leaves of the state"
            lines.append(f"pipeline rank {pipeline_rank} holds {held}")
        return "\n".join(lines)

    # ---- ranks

    def pipeline_rank(self, rank: int) -> int:
        """The pipeline rank of a rank of the mesh."""
        if not self.pipe_axis:
            return 0
        coordinates = self.mesh.coords(rank)
        return coordinates[self.pipe_axis]

    def holds(self, rank: int, param: int) -> bool:
        """Whether a rank holds a param."""
        owners = self.layouts[param].owners
        return self.pipeline_rank(rank) in owners

    def shape(self, rank: int, param: int) -> Shape:
        """The shape of what a rank holds of a param."""
        layout = self.layouts[param]
        if not layout.axes:
            return layout.shape
        elements = math.prod(layout.shape)
        shards = self.mesh.axis_size(layout.axes)
        index = self.mesh.index(rank, layout.axes)
        start, end = extent(elements, shards, index)
        count = end - start
        return shard_shape(layout.shape, count)

    def counts(self, rank: int, param: int | None) -> bool:
        """Whether a rank counts its part of a leaf in a sum over the mesh: the lowest of those that
        hold the part."""
        if param is None:
            return self.tells(rank, 0)
        layout = self.layouts[param]
        first_owner = layout.owners[0]
        return self._is_lowest(rank, first_owner, layout.axes)

    def tells(self, rank: int, pipeline_rank: int) -> bool:
        """Whether a rank is the lowest with a pipeline rank."""
        return self._is_lowest(rank, pipeline_rank, ())

    def _is_lowest(self, rank: int, pipeline_rank: int, free: Axes) -> bool:
        """Whether a rank is the lowest with a pipeline rank and its coordinates on free axes."""
        coordinates = self.mesh.coords(rank)
        for axis, coordinate in coordinates.items():
            lowest = pipeline_rank if axis == self.pipe_axis else 0
            if axis not in free and coordinate != lowest:
                return False
        return True

    # ---- leaves of the state

    def free(self, rank: int) -> frozenset[int]:
        """Which of the leaves that a rank holds, counted among those, a step may write to
        (`core/buffer_donation.py`)."""
        overwritable = self.analysis.overwritable
        held = 0
        found = set()
        for leaf, is_here in enumerate(self._present(rank)):
            if not is_here:
                continue
            if leaf in overwritable:
                found.add(held)
            held += 1
        return frozenset(found)

    def holders(self, leaf: int) -> tuple[int, ...]:
        """The lowest ranks that hold a leaf of the state: one, or one for each of its shards, in
        order."""
        coordinates = dict.fromkeys(self.mesh.axes, 0)
        if self.pipe_axis:
            holding = self._holding(leaf)
            coordinates[self.pipe_axis] = holding[0]
        lowest = self.mesh.rank(coordinates)
        axes = self._axes(leaf)
        return self.mesh.group(lowest, axes)

    def held_as(self, rank: int, leaf: int) -> tuple:
        """What a rank holds of a leaf of the state: ranks that have the same, hold copies."""
        axes = self._axes(leaf)
        shard = self.mesh.index(rank, axes)
        return self._holding(leaf), axes, shard

    def copies(self, rank: int, leaf: int) -> int:
        """How many ranks hold the same part of a leaf of the state as this one; 0 if it holds
        none."""
        holding = self._holding(leaf)
        if self.pipeline_rank(rank) not in holding:
            return 0
        ranks_of_each = self.mesh.size // len(self.present)  # ranks with one pipeline rank
        shards = self.mesh.axis_size(self._axes(leaf))
        return len(holding) * ranks_of_each // shards

    def _present(self, rank: int) -> tuple[bool, ...]:
        """Which leaves of the state a rank holds."""
        return self.present[self.pipeline_rank(rank)]

    def _holding(self, leaf: int) -> tuple[int, ...]:
        """The pipeline ranks that hold a leaf of the state."""
        ranks = enumerate(self.present)
        return tuple(rank for rank, present in ranks if present[leaf])

    def _axes(self, leaf: int) -> Axes:
        """Over which axes a leaf of the state is sharded."""
        param = self.analysis.state[leaf]
        if param is None:
            return ()
        return self.layouts[param].axes

    # ---- trees

    def params(self, leaf: Callable[[int], torch.Tensor], rank: int) -> Any:
        """What a rank holds of the params, in tensors of its own.

        Args:
            leaf: makes or fetches an unsharded one, by number.
        """
        held: list[Any] = []
        for param, layout in enumerate(self.layouts):
            part = None
            if self.holds(rank, param):
                part = self._own_part(leaf(param), layout.axes, rank)
            held.append(part)
        return tree.unflatten(self.analysis.params_spec, held)

    def place(self, full: Any, rank: int) -> Any:
        """What a rank holds of the full state, in tensors of its own."""
        leaves = self.state_leaves(full, "place")
        held = []
        for number, is_here in enumerate(self._present(rank)):
            part = None
            if is_here:
                axes = self._axes(number)
                part = self._own_part(leaves[number], axes, rank)
            held.append(part)
        return tree.unflatten(self.analysis.state_spec, held)

    def _own_part(self, leaf: Any, axes: Axes, rank: int) -> Any:
        """A rank's part of a whole leaf, in memory of its own."""
        if axes:
            leaf = take(leaf, self.mesh, rank, axes)
        return own(leaf)

    def unplace(self, leaf: Callable[[int, int], Any]) -> Any:
        """The full state.

        Args:
            leaf: fetches what a rank holds of a leaf of the state, by rank and number.
        """
        full = []
        for number, param in enumerate(self.analysis.state):
            holders = self.holders(number)
            parts = [leaf(rank, number) for rank in holders]
            full.append(self._whole(parts, param))
        return tree.unflatten(self.analysis.state_spec, full)

    def _whole(self, parts: Sequence[Any], param: int | None) -> Any:
        """A leaf of the state, from one rank or from all its shards."""
        if param is not None:
            layout = self.layouts[param]
            if layout.axes:
                return join(parts, layout.shape)
        return own(parts[0])

    def state_leaves(self, state: Any, who: str) -> list[Any]:
        """The leaves of a rank's state (None where it holds nothing), in the order of the full
        state's."""
        spec = self.analysis.state_spec
        try:
            return tree.leaves_up_to(spec, state)
        except ValueError as error:
            raise StateError(
                f"{who}: the state has another structure than init_state made: "
                f"{str(error).rstrip('.')}. Write init_state and the step with tree_map, which "
                "keeps the places of leaves that a rank does not hold"
            ) from None


def own(leaf: Any) -> Any:
    """A tensor in memory of its own (ranks of one process must not share any); anything else as it
    is."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone()
    return leaf


def _layout_text(layout: LeafLayout) -> str:
    ranks = ", ".join(map(str, layout.owners))
    text = f"{layout.shape} on pipeline ranks {ranks}"
    if layout.axes:
        text += f", sharded over {', '.join(layout.axes)}"
    return text
