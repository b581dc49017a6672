"""Place: decides where every leaf of the state lies, and rehearses that ranks can work with it.

In: `StepAnalysis`, the pipeline ranks that use each param. Out: `StatePlacement`, or a StateError
of a rank that cannot run the step with the leaves that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.planning.placement import LeafLayout, LeafMetric, StatePlacement
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import CutError, StateError

if TYPE_CHECKING:
    from funcpipe._src.analysis.rehearsal import Held, Rehearsal


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
    same_reductions = before.reductions == analysis.reductions
    same_overwritable = before.overwritable == analysis.overwritable
    alike = same_reductions and same_overwritable
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
    pipeline_ranks = range(mesh.axis_size(pipe_axis) if pipe_axis else 1)
    apart: frozenset[int] = frozenset()
    if rehearsal.predictable:
        held = [rehearsal.predicted(_held_by(layouts, rank)) for rank in pipeline_ranks]
    else:
        rehearsal.resized(_sharded(layouts))
        apart, held = _rehearsed(rehearsal, layouts, pipeline_ranks)
    placement = StatePlacement(mesh, pipe_axis, analysis, layouts, ())
    present = []
    for rank in held:
        leaves = placement.state_leaves(rank.state, "init_state")
        present.append(tuple(leaf is not None for leaf in leaves))
    metrics, spec = tree.flatten(rehearsal.first.metrics)
    return replace(
        placement,
        present=tuple(present),
        apart=apart,
        metrics_spec=spec,
        leaf_metrics=_leaf_metrics(metrics, [rank.lacks for rank in held]),
    )


def _leaf_metrics(
    metrics: Sequence[Any], lacks: Sequence[frozenset[int]]
) -> tuple[LeafMetric, ...]:
    """The metrics that some pipeline ranks lack.

    Args:
        lacks: by pipeline rank, the numbers of those.
    """
    found = []
    for number in sorted(frozenset().union(*lacks)):
        have = [rank for rank, missing in enumerate(lacks) if number not in missing]
        if not have:
            raise StateError(
                f"metric {number} is None on every rank, though not on one device: compute metrics "
                "of leaves with optree.tree_map"
            )
        found.append(LeafMetric(number, have[0], metrics[number]))
    return tuple(found)


def rehearse(
    rehearsal: Rehearsal, placement: StatePlacement, pipeline_ranks: Iterable[int]
) -> bool:
    """Run the step on fakes as some pipeline ranks will run it.

    Returns:
        whether they have what the placement says. If not, a placement is to be made of runs as
        every rank (``rehearsal.everywhere``).

    Raises:
        StateError: the step fails there, or computes something else than on one device.
    """
    rehearsal.resized(_sharded(placement.layouts))
    for rank in pipeline_ranks:
        held = rehearsal.of_rank(_held_by(placement.layouts, rank))
        leaves = placement.state_leaves(held.state, "init_state")
        present = tuple(leaf is not None for leaf in leaves)
        if held.lacks or present != placement.present[rank]:
            return False
    return True


def _held_by(layouts: Sequence[LeafLayout], pipeline_rank: int) -> Callable[[int], bool]:
    def held(param: int) -> bool:
        return pipeline_rank in layouts[param].owners

    return held


def _sharded(layouts: Sequence[LeafLayout]) -> list[int]:
    return [param for param, layout in enumerate(layouts) if layout.axes]


def _rehearsed(
    rehearsal: Rehearsal, layouts: Sequence[LeafLayout], pipeline_ranks: Iterable[int]
) -> tuple[frozenset[int], list[Held]]:
    """What every pipeline rank has. Trees of global sums are complete there, unless the step takes
    them leaf by leaf."""

    def everyone(apart: frozenset[int]) -> list[Held]:
        return [rehearsal.of_rank(_held_by(layouts, rank), apart) for rank in pipeline_ranks]

    none: frozenset[int] = frozenset()
    try:
        return none, everyone(none)
    except StateError:
        if not rehearsal.separable:
            raise
    return rehearsal.separable, everyone(rehearsal.separable)
