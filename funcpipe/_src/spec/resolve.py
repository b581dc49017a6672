"""Resolve: all transforms of a step on a mesh, whatever the order they were stacked in.

In: a step and a mesh. Out: `ResolvedStep`, or an error of two transforms that do not go together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.mixed_precision import Precision
from funcpipe._src.schedule.costs import Costs
from funcpipe._src.spec.requests import MicrobatchSplit, Pipeline, Remat, WeightSharding
from funcpipe._src.spec.transform_spec import Transform, TransformedStep, TransformSpec
from funcpipe.errors import MeshError, StackError


@dataclass(frozen=True)
class ResolvedStep:
    """A step, and the specs on it in mesh order: what every rank derives its plan from.

    Args:
        step: as it runs.
        mesh: the mesh.
        specs: in mesh order.
        local: whether the batch that a rank gets is its own rows already.
        measured: costs of units, where the schedule is to be chosen for measured ones.
    """

    step: Callable[[Any, Any], Any]
    mesh: Mesh
    specs: tuple[TransformSpec, ...]
    local: bool = False
    measured: Costs | None = None

    def __str__(self) -> str:
        split = self.microbatch_split
        count = 1 if split is None else split.count or "as the batch brings"
        lines = [f"{self.mesh!r}, transforms: {len(self.specs)}, microbatches: {count}"]
        return "\n".join([*lines, *(f"  {spec.text}" for spec in self.specs)])

    # ---- the pipeline

    @cached_property
    def pipeline(self) -> Pipeline | None:
        """How the loss is cut into stages; None without a pipeline."""
        return _first(spec.pipeline() for spec in self.specs)

    @cached_property
    def pipe_axis(self) -> str | None:
        """The axis of the pipeline."""
        for spec in self.specs:
            if spec.pipeline():
                return spec.axes[0]
        return None

    @cached_property
    def ranks(self) -> int:
        """The number of pipeline ranks, 1 without a pipeline."""
        return self.mesh.axis_size(self.pipe_axis) if self.pipe_axis else 1

    # ---- how the batch is split

    @cached_property
    def microbatch_spec(self) -> TransformSpec | None:
        """The transform that splits into microbatches."""
        for spec in self.specs:
            if spec.microbatches():
                return spec
        return None

    @cached_property
    def microbatch_split(self) -> MicrobatchSplit | None:
        """How a rank's batch is split into microbatches."""
        return self.microbatch_spec.microbatches() if self.microbatch_spec else None

    @cached_property
    def row_specs(self) -> tuple[TransformSpec, ...]:
        """The transforms that split rows of the batch."""
        return tuple(spec for spec in self.specs if spec.split_rows())

    @cached_property
    def sequence_specs(self) -> tuple[TransformSpec, ...]:
        """The transforms that split positions, rings first."""
        found: dict[str, list[TransformSpec]] = {"ring": [], "heads": []}
        for spec in self.specs:
            split = spec.split_positions()
            if split is not None:
                found[split.attention].append(spec)
        return (*found["ring"], *found["heads"])

    @cached_property
    def splits(self) -> tuple[TransformSpec, ...]:
        """The transforms that split the batch over axes."""
        return tuple(spec for spec in self.specs if spec.split_rows() or spec.split_positions())

    @cached_property
    def split_axes(self) -> Axes:
        """The axes that split the batch."""
        return self.mesh.ordered(_axes_of(self.splits))

    @cached_property
    def row_axes(self) -> Axes:
        """The axes that split rows of the batch, in the order in which they do, major first."""
        return _axes_of(self.row_specs)

    # ---- weights

    def sharded_over(self, path: str, shape: tuple[int, ...]) -> Axes:
        """The axes that a param is sharded over; a 0-d param is held unsharded.

        Raises:
            StackError: several transforms shard it over the same axis.
        """
        if not shape:
            return ()
        found: dict[str, TransformSpec] = {}
        for spec, axis in self._shard_axes(path, shape):
            other = found.setdefault(axis, spec)
            if other is not spec:
                raise StackError(
                    f"params{path} is sharded over axis {axis!r} by both {other} and {spec}: an "
                    "axis cuts a leaf once. Give each its own leaves (only=...)"
                )
        return self.mesh.ordered(found)

    def _shard_axes(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[TransformSpec, str]]:
        for spec in self._sharders(path, shape):
            for axis in spec.axes:
                yield spec, axis

    def shard_options(self, path: str, shape: tuple[int, ...]) -> WeightSharding:
        """The options of a sharded param.

        Raises:
            StackError: several transforms shard it with different ones.
        """
        first, *others = self._sharders(path, shape)
        options = first.weight_layout(path, shape)
        assert options is not None
        for other in others:
            for option in fields(WeightSharding):
                own = getattr(options, option.name)
                theirs = getattr(other.weight_layout(path, shape), option.name)
                if own != theirs:
                    raise StackError(
                        f"{first} and {other} both shard params{path}, one with "
                        f"{option.name}={own!r}, the other with {option.name}={theirs!r}: give "
                        "both the same options, or each its own leaves (only=...)"
                    )
        return options

    def _sharders(self, path: str, shape: tuple[int, ...]) -> list[TransformSpec]:
        return [spec for spec in self.specs if spec.weight_layout(path, shape) is not None]

    # ---- the loss function

    @cached_property
    def remats(self) -> tuple[Remat, ...]:
        """What transforms ask to be computed again."""
        return tuple(filter(None, (spec.remat() for spec in self.specs)))

    @cached_property
    def precision(self) -> Precision | None:
        """In which dtype the loss function computes, if a transform says so."""
        return _first(spec.precision() for spec in self.specs)

    def dtype_of(self, path: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the loss function sees a param: the first one asked for."""
        wanted = _first(spec.dtype_of(path, dtype) for spec in self.specs)
        return dtype if wanted is None else wanted

    def loss(self, loss_fn: Callable, has_aux: bool) -> Callable:
        """The loss function that is traced."""
        for spec in self.specs:
            loss_fn = spec.wrap_loss(loss_fn, has_aux) or loss_fn
        return loss_fn

    @contextlib.contextmanager
    def contexts(self) -> Iterator[None]:
        """The modes under which transforms want the loss to be proven and traced."""
        with contextlib.ExitStack() as stack:
            for spec in self.specs:
                context = spec.context()
                if context is not None:
                    stack.enter_context(context)
            yield


def resolve(step: Callable, mesh: Mesh) -> ResolvedStep:
    """All transforms of a step on a mesh.

    Raises:
        MeshError: a transform names an axis that the mesh lacks.
        StackError: two transforms that do not go together, or an axis of the mesh that nothing
            uses.
    """
    if isinstance(step, Transform):
        raise StackError(step.unapplied())
    if not isinstance(mesh, Mesh):
        raise MeshError(
            f"the mesh is {describe(mesh)}; write fp.Mesh(...) with a size for every axis"
        )
    specs = step.specs if isinstance(step, TransformedStep) else ()
    fn = step.fn if isinstance(step, TransformedStep) else step
    for spec in specs:
        mesh.check(spec.axes, who=str(spec))
        if len(set(spec.axes)) < len(spec.axes):
            raise StackError(f"{spec} names an axis twice")
    specs = _in_mesh_order(specs, mesh)
    _check_conflicts(specs)
    _check_all_used(specs, mesh)
    for spec in specs:
        fn = spec.wrap_step(fn) or fn
    return ResolvedStep(fn, mesh, specs)


def _first(answers: Iterable[Any]) -> Any:
    """The first answer that is not None; None if all are."""
    for answer in answers:
        if answer is not None:
            return answer
    return None


def _axes_of(specs: Iterable[TransformSpec]) -> Axes:
    """The axes of some specs, one after the other."""
    axes: list[str] = []
    for spec in specs:
        axes += spec.axes
    return tuple(axes)


def _in_mesh_order(specs: tuple[TransformSpec, ...], mesh: Mesh) -> tuple[TransformSpec, ...]:
    position = list(mesh.axes).index

    def order(spec: TransformSpec) -> tuple:
        return list(map(position, spec.axes)), spec.name, spec.text

    return tuple(sorted(specs, key=order))


def _check_conflicts(specs: tuple[TransformSpec, ...]) -> None:
    for number, spec in enumerate(specs):
        for earlier in specs[:number]:
            why = earlier.conflicts(spec) or spec.conflicts(earlier)
            if why is not None:
                raise StackError(why)


def _check_all_used(specs: tuple[TransformSpec, ...], mesh: Mesh) -> None:
    used = _axes_of(specs)
    for axis in mesh.axes:
        if axis not in used:
            raise StackError(
                f"axis {axis!r} of {mesh!r} is used by no transform: its ranks would all compute "
                "the same; leave it out of the mesh or stack a transform on it"
            )
