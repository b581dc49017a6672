"""Axis scope: which axes are bound where a collective is called, and to what.

In: axis names.
Out: spans, the first axis major; or an AxisError that lists what is bound.

An axis is bound to ranks of a mesh (`bind_mesh`: while a loss is traced, or by hand around a rank's
code) or to the elements of a mapped dim (`vmap`: all "ranks" lie in one tensor). The innermost
binding of a name counts. One collective covers a span: neighbouring axes of the mesh together, or
one mapped axis. Axes of one rank are left out, so no span has one rank.

In plain PyTorch nothing is bound: every axis has one rank, and a step runs as it is. In a runner,
or inside `vmap`, a name that is not bound is an error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from funcpipe._src.core.context import current
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import user_line
from funcpipe.errors import AxisError


@dataclass(frozen=True)
class AxisSpan:
    """What one collective covers.

    Args:
        axes: neighbouring axes of the mesh, or one mapped axis.
        size: the number of ranks.
        index: of a mapped axis: this rank's index, a 0-d tensor that is batched over that axis and
            no other. Every collective over the axis takes it as an operand, so that vmap calls the
            collective's rule also for what is the same on all ranks.
    """

    axes: Axes
    size: int
    index: torch.Tensor | None = None


@dataclass(frozen=True)
class _Scope:
    """What is bound.

    Args:
        mesh, axes: a mesh, and those of its axes that may be named.
        mapped: the axes of `vmap`.
        alone: whether any other name is bound to one rank.
        device: where the ranks of the mesh compute.
        interceptor: is called instead of every collective.
    """

    mesh: Mesh | None = None
    axes: Axes = ()
    mapped: Mapping[str, AxisSpan] = field(default_factory=dict)
    alone: bool = False
    device: torch.device | None = None
    interceptor: Callable[..., torch.Tensor] | None = None


_scope: ContextVar[_Scope | None] = ContextVar("funcpipe_axes", default=None)


def _current() -> _Scope:
    return _scope.get() or _Scope()


@contextlib.contextmanager
def _enter(scope: _Scope) -> Iterator[None]:
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


def bind_mesh(
    mesh: Mesh,
    axes: Iterable[str],
    device: torch.device | None = None,
    alone: bool = False,
) -> contextlib.AbstractContextManager[None]:
    """Bind axes of a mesh by name.

    Args:
        mesh: gives their sizes.
        axes: those that a collective may name: the ones that split the batch. On any other axis
            every rank would compute the same (or, along a pipeline, another stage).
        device: where ranks compute: there numbers become tensors, and tensors elsewhere are
            refused; None: anywhere.
        alone: whether any other name is bound to one rank.

    >>> with bind_mesh(Mesh(pipe=2, data=4), ("data",)):
    ...     axis_size("data")
    4
    """
    return _enter(_Scope(mesh, mesh.ordered(mesh.check(axes)), alone=alone, device=device))


@contextlib.contextmanager
def intercepted(interceptor: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Call a function instead of every collective over a mesh.

    Args:
        interceptor: gets the name of the collective, what the collective makes of a tensor over
            spans, the tensor, the axis, and with what else it was called.
    """
    with _enter(replace(_current(), interceptor=interceptor)):
        yield


def current_interceptor() -> Callable[..., torch.Tensor] | None:
    """What is called instead of collectives; nothing under `vmap`."""
    scope = _current()
    return None if scope.mapped else scope.interceptor


def bind_mapped(span: AxisSpan) -> contextlib.AbstractContextManager[None]:
    """Bind the axis of a mapped dim."""
    (name,) = span.axes
    scope = _current()
    return _enter(replace(scope, mapped={**scope.mapped, name: span}))


def one_rank() -> contextlib.AbstractContextManager[None]:
    """Bind every name to one rank: for analysing a loss as one device runs it.

    >>> with one_rank():
    ...     axis_size("data")
    1
    """
    return _enter(_Scope(alone=True))


def axis_size(axis: str | Iterable[str]) -> int:
    """How many ranks an axis has, or the product over several: a Python int.

    >>> axis_size("data")  # plain PyTorch: one device
    1
    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: x * axis_size("i"), "i")(torch.ones(3))
    tensor([3., 3., 3.])
    """
    return math.prod(span.size for span in axis_spans(axis, "axis_size"))


def axis_spans(axis: str | Iterable[str], caller: str) -> tuple[AxisSpan, ...]:
    """The spans of an axis or several, the first major.

    Raises:
        AxisError: a name that is not bound, or named twice.
    """
    axes = _as_tuple(axis)
    if len(set(axes)) < len(axes):
        raise AxisError(f"{caller}: {axes} names an axis twice")
    bound = [(name, _lookup(name, caller)) for name in axes]
    spans: list[AxisSpan] = []
    for on_mesh, neighbours in groupby(bound, _is_on_mesh):
        if on_mesh:
            found = [_span_on_mesh(neighbours)]
        else:
            found = [span for _, span in neighbours if isinstance(span, AxisSpan)]
        spans += [span for span in found if span.size > 1]
    return tuple(spans)


def _as_tuple(axis: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(axis, Iterable) and not isinstance(axis, str):
        return tuple(axis)
    return (axis,)


def _is_on_mesh(bound: tuple[str, AxisSpan | Mesh | None]) -> bool:
    return isinstance(bound[1], Mesh)


def _span_on_mesh(bound: Iterable[tuple[str, AxisSpan | Mesh | None]]) -> AxisSpan:
    """The span of neighbouring axes of a mesh."""
    sizes = {}
    for name, mesh in bound:
        if isinstance(mesh, Mesh) and mesh.axes[name] > 1:
            sizes[name] = mesh.axes[name]
    return AxisSpan(tuple(sizes), math.prod(sizes.values()))


def operand(caller: str, leaf: Any) -> torch.Tensor:
    """A leaf that a collective gets, as a tensor where the ranks compute.

    Raises:
        AxisError: it is no tensor or number, or it lies elsewhere.
    """
    scope = _current()
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return torch.tensor(leaf, device=scope.device or _mapped_device(scope))
    if not isinstance(leaf, torch.Tensor):
        raise AxisError(
            f"{caller}: a leaf is {describe(leaf)}, not a tensor or a number; write "
            "torch.tensor(...)"
        )
    if scope.device is not None and leaf.device.type != scope.device.type:
        raise AxisError(
            f"{caller}: a leaf is on {leaf.device}, but ranks compute on "
            f"{scope.device}{user_line() or ''}: make it there, with device= that of the batch"
        )
    return leaf


def _mapped_device(scope: _Scope) -> torch.device | None:
    for span in scope.mapped.values():
        if span.index is not None:
            return span.index.device
    return None


def is_free(axis: str | Iterable[str]) -> bool:
    """Whether nothing binds an axis (or several): it has one rank, whatever a step was written for.

    >>> is_free("data")
    True
    """
    return all(_lookup(name, "is_free") is None for name in _as_tuple(axis))


def _lookup(name: str, caller: str) -> AxisSpan | Mesh | None:
    """What a name is bound to: a mapped axis, a mesh; None: one rank."""
    if not isinstance(name, str):
        raise AxisError(
            f"{caller}: an axis is given by its name, or a tuple of names, not by {name!r}"
        )
    scope = _current()
    if name in scope.mapped:
        return scope.mapped[name]
    if name in scope.axes:
        return scope.mesh
    plain_pytorch = not scope.mapped and scope.mesh is None and current().is_plain
    if scope.alone or plain_pytorch:
        return None
    raise AxisError(f"{caller}: {_unbound(name, scope)}")


def _unbound(name: str, scope: _Scope) -> str:
    bound = [f"{axis!r} (of the mesh)" for axis in scope.axes if axis not in scope.mapped]
    bound += [f"{axis!r} (of vmap)" for axis in scope.mapped]
    listed = f"bound are {', '.join(bound)}" if bound else "no axis is bound"
    if scope.mesh is not None and name in scope.mesh.axes:
        return (
            f"axis {name!r} of {scope.mesh!r} does not split the batch, so no collective runs over "
            f"it: its ranks have the same rows, or other stages of a pipeline. Here, {listed}; "
            "name one of those, or stack a transform that splits the batch over it (data_parallel)"
        )
    if scope.mesh is not None:
        return (
            f"axis {name!r} is not bound here: {scope.mesh!r} lacks it, and {listed}. Name one of "
            "those, or add it to the mesh and stack a transform on it"
        )
    if scope.mapped:
        return (
            f"axis {name!r} is not bound here: {listed}. Name one of those, or map over it with "
            f"fp.vmap(f, axis_name={name!r})"
        )
    return (
        f"axis {name!r} is not bound here: the step runs on a mesh, and this is outside "
        "value_and_grad, where every rank has the global batch. Call it inside the loss function; "
        "fp.global_sum sums over leaves out here"
    )
