"""Records: what transforms ask for, and their resolution on a mesh.

A transform wraps nothing: it puts a `TransformSpec` of what it wants on the step. A runner *resolves* all
records in mesh order, so that the order of stacking changes nothing.

In: a step and a mesh. Out: `ResolvedStep`, which says by axis what is split, sharded and pipelined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.mixed_precision import Precision, scaled_step
from funcpipe._src.core.step import describe
from funcpipe._src.schedule.actions import ScheduleFn
from funcpipe.errors import MeshError, StackError


@dataclass(frozen=True)
class Split:
    """Split the batch over the record's axes. ``dims``: a pytree prefix of the batch; an int, or
    None for a leaf that everyone gets whole. ``what``: its rows ("batch"), or its positions, of
    which attention sees all by an exchange of heads ("heads") or around a ring ("ring", perhaps
    ``zigzag``)."""

    dims: Any = 0
    what: str = "batch"
    zigzag: bool = False


@dataclass(frozen=True)
class Micro:
    """Split what a rank gets of the batch into microbatches. ``count`` None: as many as
    `Microbatches` brings."""

    count: int | None
    dims: Any = 0


@dataclass(frozen=True)
class Pipe:
    """Cut the loss into stages along the record's axis. ``stages``: "balanced", "even", or how many
    segments each stage gets. ``profile``: measure the units first, and give the schedule their
    costs."""

    schedule: ScheduleFn
    stages: str | tuple[int, ...] = "balanced"
    profile: bool = False


@dataclass(frozen=True)
class Shard:
    """Split weights, gradients and optimizer state over the record's axes; the fields are
    `sharded_weights`' options."""

    regather: str | int = "microbatch"
    reduce: str = "each"
    prefetch: int = 1
    bucket_bytes: int | None = None
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    only: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Remat:
    """Save fewer values for the backward half of segments; the fields are `remat`'s options."""

    policy: str | None = None
    budget: float | None = None
    save: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    segments: tuple[int, ...] | Callable[[int], bool] | None = None

    def covers(self, segment: int) -> bool:
        """Whether it is about a segment."""
        if self.segments is None:
            return True
        return (
            segment in self.segments
            if isinstance(self.segments, tuple)
            else bool(self.segments(segment))
        )

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in given.items()
            if v not in (None, ())
        }
        return f"remat({', '.join(f'{k}=...' if callable(v) else f'{k}={v!r}' for k, v in given.items())})"


@dataclass(frozen=True)
class TransformSpec:
    """What one transform wants: any of the roles below, on its axes."""

    name: str
    axes: Axes = ()
    split: Split | None = None
    micro: Micro | None = None
    pipe: Pipe | None = None
    shard: Shard | None = None
    remat: Remat | None = None
    precision: Precision | None = None

    def __str__(self) -> str:
        said = self.remat or self.precision
        return str(said) if said else f"{self.name}({', '.join(f'axis={a!r}' for a in self.axes)})"

    @property
    def text(self) -> str:
        """With all options that can be compared between processes; functions cannot."""
        roles = [
            x
            for x in (self.split, self.micro, self.pipe, self.shard, self.remat, self.precision)
            if x is not None
        ]
        options = [(f.name, getattr(x, f.name)) for x in roles for f in fields(x)]
        given = [f"{name}={value!r}" for name, value in options if not callable(value)]
        return f"{self.name}({', '.join([f'axis={self.axes!r}'] * bool(self.axes) + given)})"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that take an axis for themselves."""
        return tuple(r for r in ("split", "pipe", "shard") if getattr(self, r) is not None)


class TransformedStep:
    """A step and the records on it. Called, it is the step as written, on one device."""

    def __init__(
        self, fn: Callable[[Any, Any], Any], records: tuple[TransformSpec, ...] = ()
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn, self.records = fn, records

    def __call__(self, state: Any, batch: Any) -> Any:
        return self.fn(state, batch)

    def __repr__(self) -> str:
        stack = "".join(f"\n  {r}" for r in self.records)
        return f"<step {getattr(self.fn, '__name__', self.fn)!s}{stack}>"


class Transform:
    """A transform to apply to a step later."""

    def __init__(self, apply: Callable[[Any], Any], name: str) -> None:
        self.apply, self.name = apply, name

    def __call__(self, *step: Any) -> Any:
        if len(step) != 1:
            raise StackError(self.unapplied())
        return self.apply(step[0])

    def unapplied(self) -> str:
        """What to say where a step is expected."""
        return (
            f"{self.name} is a transform that was not applied to a step: it got no step, and "
            "stands where one is expected. Write it with the step as its first argument, or "
            "fp.compose(...)(step)"
        )

    def __repr__(self) -> str:
        return f"<transform {self.name}>"


def record(step: Callable | None, what: TransformSpec) -> Any:
    """Put a record on a step; without a step, a transform to apply later."""
    if step is None:
        return Transform(functools.partial(record, what=what), str(what))
    if isinstance(step, Transform):
        raise StackError(f"{what}: {step.unapplied()}")
    if not callable(step):
        raise StackError(
            f"{what.name}: the step is {describe(step)}; pass a function (state, batch) -> (state, "
            "metrics)"
        )
    if not isinstance(step, TransformedStep):
        step = TransformedStep(step)
    return TransformedStep(step.fn, (*step.records, what))


def compose(*transforms: Callable) -> Callable[[Callable], TransformedStep]:
    """One transform from several; the first is applied to the step first.

    >>> from funcpipe.transforms import accumulated
    >>> compose(accumulated(microbatches=4))(lambda state, batch: (state, {})).records[0].name
    'accumulated'
    """

    def all_of_them(step: Any) -> Any:
        for transform in transforms:
            step = transform(step)
        return step

    names = [
        t.name if isinstance(t, Transform) else getattr(t, "__name__", repr(t)) for t in transforms
    ]
    return Transform(all_of_them, f"compose({', '.join(names)})")


@dataclass(frozen=True)
class ResolvedStep:
    """The records of a step on a mesh, in mesh order: what every rank derives its plan from."""

    step: Callable[[Any, Any], Any]
    mesh: Mesh
    splits: tuple[TransformSpec, ...]
    micro: Micro | None
    micro_name: str
    pipe: Pipe | None
    pipe_axis: str | None
    shards: tuple[TransformSpec, ...]
    records: tuple[TransformSpec, ...]
    local: bool = False  # whether the batch that a rank gets is its own rows already

    def __str__(self) -> str:
        count = "as the batch brings" if self.micro and self.micro.count is None else 1
        if self.micro and self.micro.count is not None:
            count = self.micro.count
        lines = [f"{self.mesh!r}, transforms: {len(self.records)}, microbatches: {count}"]
        return "\n".join([*lines, *(f"  {spec.text}" for spec in self.records)])

    def sharded_over(self, path: str, shape: tuple[int, ...]) -> Axes:
        """S: the axes that a parameter is sharded over; a 0-d parameter stays whole.

        Raises:
            StackError: several records shard it over the same axis.
        """
        if not shape:
            return ()
        found: dict[str, TransformSpec] = {}
        for r in self._shards_of(path):
            for axis in r.axes:
                other = found.setdefault(axis, r)
                if other is not r:
                    raise StackError(
                        f"params{path} is sharded over axis {axis!r} by both {other} and {r}: an "
                        "axis cuts a leaf once. Give each its own leaves (only=...)"
                    )
        return self.mesh.ordered(found)

    def shard_options(self, path: str) -> Shard:
        """The options of a sharded parameter; StackError when several records shard it with
        different ones."""
        first, *others = self._shards_of(path)
        assert first.shard is not None
        for other in others:
            for f in fields(Shard):
                a, b = (getattr(r.shard, f.name) for r in (first, other))
                if f.name != "only" and a != b:
                    raise StackError(
                        f"{first} and {other} both shard params{path}, one with {f.name}={a!r}, "
                        f"the other with {f.name}={b!r}: give both the same options, or each its "
                        "own leaves (only=...)"
                    )
        return first.shard

    def _shards_of(self, path: str) -> list[TransformSpec]:
        return [r for r in self.shards if r.shard and (r.shard.only is None or r.shard.only(path))]

    @property
    def split_axes(self) -> Axes:
        """V: the axes that split the batch."""
        return self.mesh.ordered(a for r in self.splits for a in r.axes)

    @property
    def row_splits(self) -> tuple[TransformSpec, ...]:
        """The records that split rows of the batch."""
        return tuple(r for r in self.splits if r.split and r.split.what == "batch")

    @property
    def row_axes(self) -> Axes:
        """The axes that split rows of the batch, in the order in which they do, major first."""
        return tuple(a for r in self.row_splits for a in r.axes)

    @property
    def sequence_splits(self) -> tuple[TransformSpec, ...]:
        """The records that split positions, rings first."""
        return tuple(
            r for what in ("ring", "heads") for r in self.splits if r.split and r.split.what == what
        )

    @property
    def remats(self) -> tuple[Remat, ...]:
        """What is said of values that are computed again."""
        return tuple(r.remat for r in self.records if r.remat)

    @property
    def precision(self) -> Precision | None:
        """In which dtype the loss function computes, if that is said."""
        return next((r.precision for r in self.records if r.precision), None)

    @property
    def ranks(self) -> int:
        """The number of ranks on the pipe axis, 1 without one."""
        return self.mesh.axis_size(self.pipe_axis) if self.pipe_axis else 1


def resolve(step: Callable, mesh: Mesh) -> ResolvedStep:
    """All records of a step on a mesh, whatever the order they were stacked in.

    Raises:
        MeshError: a record names an axis that the mesh lacks.
        StackError: two records that do not go together, or an axis of the mesh that nothing uses.
    """
    if isinstance(step, Transform):
        raise StackError(step.unapplied())
    if not isinstance(mesh, Mesh):
        raise MeshError(
            f"the mesh is {describe(mesh)}; write fp.Mesh(...) with a size for every axis"
        )
    records = step.records if isinstance(step, TransformedStep) else ()
    for r in records:
        mesh.check(r.axes, who=str(r))
        if len(set(r.axes)) < len(r.axes):
            raise StackError(f"{r} names an axis twice")
    place = list(mesh.axes).index
    records = tuple(sorted(records, key=lambda r: ([place(a) for a in r.axes], r.name, r.text)))
    _check_pairs(records)
    unused = [a for a in mesh.axes if not any(a in r.axes for r in records)]
    if unused:
        raise StackError(
            f"axis {unused[0]!r} of {mesh!r} is used by no transform: its ranks would all compute "
            "the same; leave it out of the mesh or stack a transform on it"
        )
    pipe = next((r for r in records if r.pipe), None)
    micro = next((r for r in records if r.micro), None)
    precision = next((r.precision for r in records if r.precision), None)
    fn = step.fn if isinstance(step, TransformedStep) else step
    return ResolvedStep(
        step=scaled_step(fn, precision) if precision and precision.dynamic else fn,
        mesh=mesh,
        splits=tuple(r for r in records if r.split),
        micro=micro.micro if micro else None,
        micro_name=micro.name if micro else "",
        pipe=pipe.pipe if pipe else None,
        pipe_axis=pipe.axes[0] if pipe else None,
        shards=tuple(r for r in records if r.shard),
        records=records,
    )


def _check_pairs(records: tuple[TransformSpec, ...]) -> None:
    for i, a in enumerate(records):
        for b in records[:i]:
            if a.pipe and b.pipe:
                raise StackError(
                    f"two pipelines on one step: {b} and {a}; a loss is cut along one axis"
                )
            if a.micro and b.micro:
                raise StackError(
                    f"{b} and {a} both split the batch into microbatches; keep one of them"
                )
            if a.precision and b.precision:
                raise StackError(
                    "two mixed_precision on one step: the loss function computes in one dtype; "
                    "keep one of them"
                )
            shared = sorted(set(a.axes) & set(b.axes))
            if shared and (a.pipe or b.pipe):
                raise StackError(
                    f"{b} and {a} share axis {shared[0]!r}; the axis of a pipeline carries nothing "
                    "else"
                )
            both = set(a.roles) & set(b.roles)
            if shared and both and not _may_share(a, b):
                raise StackError(
                    f"{b} and {a} both {both.pop()} over axis {shared[0]!r}; give each its own axis"
                )


def _may_share(a: TransformSpec, b: TransformSpec) -> bool:
    """Whether two records may share an axis: each may shard its own leaves, which are known with
    the params."""
    return bool(a.shard and b.shard and (a.shard.only or b.shard.only))


def require_positive(who: str, name: str, value: Any) -> None:
    """StackError unless ``value`` is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StackError(f"{who}: {name} is {value!r}; it has to be a whole number, 1 or more")
