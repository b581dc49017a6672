"""StatePlacement: which rank holds which leaf, and the way there and back.

Terms. A *layout* says, for one parameter, which places on the pipe axis (its *owners*) hold it, and
over which axes it is *sharded*: cut flat into equal pieces, one for each rank of the group on those
axes. To *place* a tree is to turn the single-device pytree into what one rank holds, to *unplace*
to turn what all ranks hold into it again. A leaf that a rank does not hold is None there.

In: `StepAnalysis` (which leaf of the state is which parameter) and the owners of every parameter. Out:
`StatePlacement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import CutError, StateError

if TYPE_CHECKING:
    from funcpipe._src.analysis.rehearsal import Held, Rehearsal


def extent(numel: int, parts: int, index: int) -> tuple[int, int]:
    """Where a shard begins and ends among the elements of its leaf: flat, the last ones may be
    smaller or empty.

    >>> [extent(5, 3, i) for i in range(3)], extent(1, 3, 2)
    ([(0, 2), (2, 4), (4, 5)], (1, 1))
    """
    chunk = -(-numel // parts)
    return min(index * chunk, numel), min((index + 1) * chunk, numel)


def shard_shape(shape: tuple[int, ...], elements: int) -> tuple[int, ...]:
    """The shape of a shard: as many dims as its leaf has."""
    return (elements, *[1] * (len(shape) - 1))


def take(x: torch.Tensor, mesh: Mesh, rank: int, axes: Axes) -> torch.Tensor:
    """A rank's shard of a whole leaf."""
    start, end = extent(x.numel(), mesh.axis_size(axes), mesh.index(rank, axes))
    return x.reshape(-1)[start:end].reshape(shard_shape(tuple(x.shape), end - start))


def join(shards: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The whole leaf of all its shards, in order."""
    return torch.cat([s.reshape(-1) for s in shards]).view(shape)


@dataclass(frozen=True)
class LeafLayout:
    """Where a parameter is held.

    Args:
        owners: the places on the pipe axis, lowest first (place 0 without a pipe axis).
        shape: of the whole leaf.
        axes: the axes it is sharded over, in mesh order; none: each owner holds it whole.
    """

    owners: tuple[int, ...]
    shape: tuple[int, ...]
    axes: Axes = ()


@dataclass(frozen=True)
class LeafMetric:
    """A metric that some ranks do not compute: its number, a place on the pipe axis that does, and
    what it is like there (a fake, or a value of Python)."""

    number: int
    place: int
    like: Any


@dataclass(frozen=True)
class StatePlacement:
    """Which rank holds which leaf of the state.

    Args:
        mesh: the mesh; pipe_axis: the axis along which ranks hold different leaves.
        dyed: which leaf is which.
        layouts: of every parameter.
        present: for every place on the pipe axis, which leaves of the state its ranks hold.
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

    def pipeline_rank(self, rank: int) -> int:
        """The place of a rank on the pipe axis."""
        return self.mesh.coords(rank)[self.pipe_axis] if self.pipe_axis else 0

    def holds(self, rank: int, param: int) -> bool:
        """Whether a rank holds a parameter."""
        return self.pipeline_rank(rank) in self.layouts[param].owners

    def shape(self, rank: int, param: int) -> tuple[int, ...]:
        """The shape of what a rank holds of a parameter."""
        layout = self.layouts[param]
        if not layout.axes:
            return layout.shape
        parts, index = self.mesh.axis_size(layout.axes), self.mesh.index(rank, layout.axes)
        start, end = extent(math.prod(layout.shape), parts, index)
        return shard_shape(layout.shape, end - start)

    def counts(self, rank: int, param: int | None) -> bool:
        """Whether a rank counts its part of a leaf in a sum over the mesh: the lowest of those that
        hold the part."""
        here = self.mesh.coords(rank)
        layout = LeafLayout((0,), ()) if param is None else self.layouts[param]
        fixed = {a: 0 for a in self.mesh.axes if a not in layout.axes}
        return all(
            here[a] == (layout.owners[0] if a == self.pipe_axis else n) for a, n in fixed.items()
        )

    def tells(self, rank: int, place: int) -> bool:
        """Whether a rank is the lowest at a place on the pipe axis."""
        return all(
            n == (place if a == self.pipe_axis else 0) for a, n in self.mesh.coords(rank).items()
        )

    def free(self, rank: int) -> frozenset[int]:
        """The places, among the leaves of a rank's state, of those that a step may write to
        (`core/buffer_donation.py`)."""
        held = [j for j, here in enumerate(self.present[self.pipeline_rank(rank)]) if here]
        return frozenset(k for k, j in enumerate(held) if j in self.analysis.free)

    def holders(self, leaf: int) -> tuple[int, ...]:
        """The lowest ranks that hold a leaf of the state: one, or one for each of its shards, in
        order."""
        place = next(p for p, present in enumerate(self.present) if present[leaf])
        zero = dict.fromkeys(self.mesh.axes, 0)
        first = self.mesh.rank(zero | ({self.pipe_axis: place} if self.pipe_axis else {}))
        return self.mesh.group(first, self._axes(leaf))

    def _axes(self, leaf: int) -> Axes:
        param = self.analysis.state[leaf]
        return () if param is None else self.layouts[param].axes

    def held_as(self, rank: int, leaf: int) -> tuple:
        """What a rank holds of a leaf of the state: ranks that have the same, hold copies."""
        places, axes = self._places(leaf), self._axes(leaf)
        return places, axes, self.mesh.index(rank, axes)

    def copies(self, rank: int, leaf: int) -> int:
        """How many ranks hold the same part of a leaf of the state as this one; 0 if it holds
        none."""
        places = self._places(leaf)
        if self.pipeline_rank(rank) not in places:
            return 0
        return (
            len(places)
            * self.mesh.size
            // (len(self.present) * self.mesh.axis_size(self._axes(leaf)))
        )

    def _places(self, leaf: int) -> tuple[int, ...]:
        return tuple(p for p, present in enumerate(self.present) if present[leaf])

    def params(self, leaf: Callable[[int], torch.Tensor], rank: int) -> Any:
        """What a rank holds of the params, in tensors of its own; ``leaf(i)`` makes or fetches a
        whole one."""
        held = [
            own(self._part(leaf(i), layout.axes, rank)) if self.holds(rank, i) else None
            for i, layout in enumerate(self.layouts)
        ]
        return tree.unflatten(self.analysis.params_spec, held)

    def place(self, full: Any, rank: int) -> Any:
        """What a rank holds of the full state, in tensors of its own."""
        leaves = self.state_leaves(full, "place")
        present = self.present[self.pipeline_rank(rank)]
        held = [
            own(self._part(x, self._axes(j), rank)) if here else None
            for j, (x, here) in enumerate(zip(leaves, present, strict=True))
        ]
        return tree.unflatten(self.analysis.state_spec, held)

    def _part(self, x: Any, axes: Axes, rank: int) -> Any:
        return take(x, self.mesh, rank, axes) if axes else x

    def unplace(self, leaf: Callable[[int, int], Any]) -> Any:
        """The full state; ``leaf(rank, number)`` fetches what a rank holds of a leaf of the
        state."""
        out = []
        for j, param in enumerate(self.analysis.state):
            parts = [leaf(rank, j) for rank in self.holders(j)]
            sharded = bool(self._axes(j)) and param is not None
            out.append(join(parts, self.layouts[param].shape) if sharded else own(parts[0]))  # type: ignore[index]
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


def place(
    resolved: ResolvedStep,
    analysis: StepAnalysis,
    rehearsal: Rehearsal,
    users: Sequence[Set[int]],
    earlier: StatePlacement | None,
) -> StatePlacement:
    """Where every leaf of the state lies: a param on the pipeline ranks that use it.

    Args:
        users: for every param the pipeline ranks that read it or make gradients of it.
        earlier: a placement that is kept, if there is one.

    Raises:
        CutError: with this shape of batch, another rank uses a param than those that hold it.
        StateError: a rank cannot run ``init_state`` or the step with the leaves that it holds.
    """
    placement = earlier
    if placement is None:
        axes = list(map(resolved.sharded_over, analysis.paths, analysis.shapes))
        layouts = _layouts(analysis, users, axes)
        placement = place_params(resolved.mesh, resolved.pipe_axis, analysis, rehearsal, layouts)
    for path, ranks, layout in zip(analysis.paths, users, placement.layouts, strict=True):
        if not ranks <= set(layout.owners):
            raise CutError(
                f"with a batch of this shape, params{path} is used by a stage that does not hold it"
            )
    return placement


def place_again(
    known: StatePlacement, analysis: StepAnalysis, rehearsal: Rehearsal, changed: bool
) -> StatePlacement:
    """A known placement, for a step that may do other things outside its calls.

    Args:
        changed: whether Python values have changed, so that what ranks do is to be rehearsed
            again.

    Raises:
        StateError: ``init_state`` makes another state than before.
    """
    before = known.analysis
    if (before.state_spec, before.state) != (analysis.state_spec, analysis.state):
        raise StateError(
            f"init_state makes another state than at run.init: {analysis.state_spec}, not "
            f"{before.state_spec}. A Python value that it reads has changed: call "
            "run.init again, or keep the value"
        )
    alike = (before.sums, before.free) == (analysis.sums, analysis.free)
    metrics_spec = tree.flatten(rehearsal.first.metrics)[1]
    if alike and not changed and metrics_spec == known.metrics_spec:
        return known
    return place_params(known.mesh, known.pipe_axis, analysis, rehearsal, known.layouts)


def _layouts(
    analysis: StepAnalysis, users: Sequence[Iterable[int]], axes: Sequence[Axes]
) -> tuple[LeafLayout, ...]:
    """A param that nobody uses lies on pipeline rank 0."""
    return tuple(
        LeafLayout(tuple(sorted(ranks)) or (0,), shape, own_axes)
        for ranks, shape, own_axes in zip(users, analysis.shapes, axes, strict=True)
    )


def place_params(
    mesh: Mesh,
    pipe_axis: str | None,
    analysis: StepAnalysis,
    rehearsal: Rehearsal,
    layouts: tuple[LeafLayout, ...],
) -> StatePlacement:
    """The placement that follows from the layout of every param."""
    rehearsal.resized([i for i, layout in enumerate(layouts) if layout.axes])
    places = mesh.axis_size(pipe_axis) if pipe_axis else 1
    apart, held = _rehearsed(rehearsal, layouts, places)
    placement = StatePlacement(mesh, pipe_axis, analysis, layouts, ())
    leaves = [placement.state_leaves(rank.state, "init_state") for rank in held]
    present = tuple(tuple(x is not None for x in some) for some in leaves)
    metrics, spec = tree.flatten(rehearsal.first.metrics)
    own = _leaf_metrics(metrics, [rank.lacks for rank in held])
    return replace(placement, present=present, apart=apart, metrics_spec=spec, leaf_metrics=own)


def _leaf_metrics(
    metrics: Sequence[Any], lacks: Sequence[frozenset[int]]
) -> tuple[LeafMetric, ...]:
    out = []
    for number in sorted(frozenset().union(*lacks)):
        place = next((p for p, some in enumerate(lacks) if number not in some), None)
        if place is None:
            raise StateError(
                f"metric {number} is None on every rank, though not on one device: compute metrics "
                "of leaves with optree.tree_map"
            )
        out.append(LeafMetric(number, place, metrics[number]))
    return tuple(out)


def _rehearsed(
    rehearsal: Rehearsal, layouts: Sequence[LeafLayout], places: int
) -> tuple[frozenset[int], list[Held]]:
    """What every place on the pipe axis has. Trees of global sums are whole there, unless the step
    takes them leaf by leaf."""

    def all_places(apart: frozenset[int]) -> list[Held]:
        def held_at(place: int) -> Held:
            return rehearsal.of_rank(lambda i: place in layouts[i].owners, apart)

        return [held_at(place) for place in range(places)]

    whole: frozenset[int] = frozenset()
    try:
        return whole, all_places(whole)
    except StateError:
        if not rehearsal.separable:
            raise
    return rehearsal.separable, all_places(rehearsal.separable)
