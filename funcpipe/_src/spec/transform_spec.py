"""Transform specs: what transforms ask of the compiler.

A transform wraps nothing: it puts a `TransformSpec` on the step. A stage asks every spec, in mesh
order, for what concerns the stage; a spec answers None to requests that it does not know. So a
transform that asks for what stages already understand is one new file.

In: a step. Out: a `TransformedStep`, which carries specs and computes as written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from funcpipe._src.core.context import PlainContext, current
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.mesh import Axes
from funcpipe._src.core.mixed_precision import Precision
from funcpipe._src.spec.requests import (
    MicrobatchSplit,
    Pipeline,
    PositionSplit,
    Remat,
    RowSplit,
    WeightSharding,
)
from funcpipe.errors import StackError


@dataclass(frozen=True)
class TransformSpec:
    """What one transform asks for. A transform overrides the requests that it has.

    Args:
        name: of the transform, as errors say it.
        axes: the mesh axes that it uses.
    """

    name: str
    axes: Axes = ()

    # ---- requests: None is "nothing asked"

    def split_rows(self) -> RowSplit | None:
        """Split rows of the batch over the axes."""
        return None

    def split_positions(self) -> PositionSplit | None:
        """Split positions of a sequence over the axes."""
        return None

    def microbatches(self) -> MicrobatchSplit | None:
        """Split a rank's batch into microbatches."""
        return None

    def pipeline(self) -> Pipeline | None:
        """Cut the loss into stages along the axis."""
        return None

    def shards_weights(self) -> bool:
        """Whether some leaf is sharded over the axes; `weight_layout` says which."""
        return False

    def weight_layout(self, path: str, shape: tuple[int, ...]) -> WeightSharding | None:
        """Shard the param with this path over the axes."""
        return None

    def remat(self) -> Remat | None:
        """Compute values of the forward half again."""
        return None

    def precision(self) -> Precision | None:
        """Compute the loss in another dtype, with a loss scale."""
        return None

    def dtype_of(self, path: str, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype in which the loss function sees the param with this path."""
        return None

    def wrap_step(self, step: Callable) -> Callable | None:
        """The step that runs in place of the written one."""
        return None

    def wrap_loss(self, loss_fn: Callable, has_aux: bool) -> Callable | None:
        """The loss function that is traced in place of the written one."""
        return None

    def context(self) -> AbstractContextManager[Any] | None:
        """A mode under which the loss is proven and traced, a new one for each call."""
        return None

    # ---- what goes together

    def conflicts(self, other: TransformSpec) -> str | None:
        """Why this transform and one after it, in mesh order, do not go together; None if they
        do."""
        both = f"{self} and {other}"
        if self.pipeline() and other.pipeline():
            return f"two pipelines on one step: {both}; a loss is cut along one axis"
        if self.microbatches() and other.microbatches():
            return f"{both} both split the batch into microbatches; keep one of them"
        if self.precision() and other.precision():
            return (
                "two mixed_precision on one step: the loss function computes in one dtype; "
                "keep one of them"
            )
        shared = sorted(set(self.axes) & set(other.axes))
        if not shared:
            return None
        if self.pipeline() or other.pipeline():
            return f"{both} share axis {shared[0]!r}; the axis of a pipeline carries nothing else"
        work = set(self.axis_work) & set(other.axis_work)
        if work and not self.may_share_axes(other):
            return f"{both} both {work.pop()} over axis {shared[0]!r}; give each its own axis"
        return None

    @property
    def axis_work(self) -> tuple[str, ...]:
        """What it does over its axes that another transform may not do over the same."""
        splits = self.split_rows() or self.split_positions()
        work = ("split", bool(splits)), ("shard", self.shards_weights())
        return tuple(word for word, does in work if does)

    def may_share_axes(self, other: TransformSpec) -> bool:
        """Whether two transforms that do the same may do so over one axis."""
        return False

    # ---- text

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'axis={axis!r}' for axis in self.axes)})"

    @property
    def text(self) -> str:
        """With all options that can be compared between processes; functions cannot."""
        given = [f"axis={self.axes!r}"] if self.axes else []
        for name, value in _options(self, skip=2):
            if not callable(value):
                given.append(f"{name}={value!r}")
        return f"{self.name}({', '.join(given)})"


def _options(record: Any, skip: int = 0) -> Iterator[tuple[str, Any]]:
    """The fields of a record; those of a record in it in its place."""
    for option in fields(record)[skip:]:
        value = getattr(record, option.name)
        if is_dataclass(value):
            yield from _options(value)
        else:
            yield option.name, value


class TransformedStep:
    """A step and the specs on it. Called, it is the step as written, on one device."""

    def __init__(
        self, fn: Callable[[Any, Any], Any], specs: tuple[TransformSpec, ...] = ()
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.specs = specs

    def __call__(self, state: Any, batch: Any) -> Any:
        """Run the step as it was written.

        Raises:
            StackError: another step calls it while that one is planned or run by a runner: the
                transforms on this one would be lost.
        """
        if self.specs and type(current()) is not PlainContext:
            raise StackError(
                f"a step calls {self!r}: its transforms are lost inside another step. Wrap the "
                "step that you wrote first, and transform what comes of it last"
            )
        return self.fn(state, batch)

    def __repr__(self) -> str:
        stack = "".join(f"\n  {spec}" for spec in self.specs)
        return f"<step {getattr(self.fn, '__name__', self.fn)!s}{stack}>"


class Transform:
    """A transform to apply to a step later."""

    def __init__(self, apply: Callable[[Any], Any], name: str) -> None:
        self.apply = apply
        self.name = name

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


def with_spec(step: Callable | None, spec: TransformSpec) -> Any:
    """Put a spec on a step; without a step, a transform to apply later.

    >>> with_spec(lambda state, batch: (state, {}), TransformSpec("mine", ("data",)))
    <step <lambda>
      mine(axis='data')>
    """
    if not isinstance(spec, TransformSpec):
        raise StackError(
            f"with_spec: the spec is {describe(spec)}; pass an object whose class derives from "
            "TransformSpec"
        )
    if step is None:
        return Transform(functools.partial(with_spec, spec=spec), str(spec))
    if isinstance(step, Transform):
        raise StackError(f"{spec}: {step.unapplied()}")
    if not callable(step):
        raise StackError(
            f"{spec.name}: the step is {describe(step)}; pass a function (state, batch) -> (state, "
            "metrics)"
        )
    if not isinstance(step, TransformedStep):
        step = TransformedStep(step)
    return TransformedStep(step.fn, (*step.specs, spec))


def compose(*transforms: Callable) -> Callable[[Callable], TransformedStep]:
    """One transform from several; the first is applied to the step first.

    Raises:
        StackError: one of them is a step.

    >>> from funcpipe.transforms import accumulated
    >>> compose(accumulated(microbatches=4))(lambda state, batch: (state, {})).specs[0].name
    'accumulated'
    """

    for transform in transforms:
        if isinstance(transform, TransformedStep):
            raise StackError(
                f"compose: {transform!r} is a step, not a transform. Compose the transforms "
                "alone, and apply what comes of it to the step: fp.compose(a, b)(step)"
            )

    def all_of_them(step: Any) -> Any:
        for transform in transforms:
            step = transform(step)
        return step

    return Transform(all_of_them, f"compose({', '.join(map(_name_of, transforms))})")


def _name_of(transform: Callable) -> str:
    if isinstance(transform, Transform):
        return transform.name
    return getattr(transform, "__name__", repr(transform))


def require_positive(who: str, name: str, value: Any) -> None:
    """StackError unless ``value`` is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StackError(f"{who}: {name} is {value!r}; it has to be a whole number, 1 or more")
