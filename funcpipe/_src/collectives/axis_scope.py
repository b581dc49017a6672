"""Which axes are bound where a collective is called, and to what. The innermost binding of a name
wins.

Terms. An axis is bound to ranks of a mesh (`bind_mesh`: while a loss is traced, or by hand around a
rank's code) or to the elements of a mapped dim (`vmap`: all "ranks" lie in one tensor). A *run* is
what one collective covers: neighbouring axes of the mesh together, or one mapped axis. Axes of one
rank are left out, so no run is one rank.

Nothing is bound in plain PyTorch: there every axis has one rank, and a step runs as it is. In a
runner, or inside `vmap`, a name that is not bound is an error.

In: axis names. Out: runs, major first; or an AxisError that lists what is bound.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import current
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import user_line
from funcpipe.errors import AxisError


@dataclass(frozen=True)
class Run:
    """What one collective covers.

    Args:
        axes: neighbouring axes of the mesh, or one mapped axis.
        size: the number of ranks.
        index: of a mapped axis: the own place, a 0-d tensor that is batched over that axis and no
            other. Every collective over the axis takes it as an operand, so that vmap calls the
            collective's rule also for what is the same on all ranks.
    """

    axes: Axes
    size: int
    index: torch.Tensor | None = None


@dataclass(frozen=True)
class _Scope:
    """What is bound: a mesh, of which ``axes`` may be named; mapped axes; or, with ``alone``, any
    name to one rank. ``device``: where the ranks of the mesh compute; ``tap``: gets every call of a
    collective instead."""

    mesh: Mesh | None = None
    axes: Axes = ()
    mapped: Mapping[str, Run] = field(default_factory=dict)
    alone: bool = False
    device: torch.device | None = None
    tap: Callable[..., torch.Tensor] | None = None


_scope: ContextVar[_Scope | None] = ContextVar("funcpipe_axes", default=None)


@contextlib.contextmanager
def _enter(scope: _Scope) -> Iterator[None]:
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


def bind_mesh(
    mesh: Mesh, axes: Iterable[str], device: torch.device | None = None, alone: bool = False
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
def tapped(seen: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Hand every call of a collective over a mesh to a function.

    Args:
        seen: gets the name of the collective, what it makes of a tensor over runs, the tensor, the
            axis, and with what else it was called.
    """
    with _enter(replace(_scope.get() or _Scope(), tap=seen)):
        yield


def tap() -> Callable[..., torch.Tensor] | None:
    """Who is told of collectives; nobody under `vmap`."""
    scope = _scope.get()
    return None if scope is None or scope.mapped else scope.tap


def one_rank() -> contextlib.AbstractContextManager[None]:
    """Bind every name to one rank: a runner looks at a loss as one device runs it.

    >>> with one_rank():
    ...     axis_size("data")
    1
    """
    return _enter(_Scope(alone=True))


def axis_size(axis: str | Iterable[str]) -> int:
    """How many ranks an axis has, or the product over several: a Python int.

    >>> axis_size("data")  # plain PyTorch: one device
    1
    >>> vmap(lambda x: x * axis_size("i"), "i")(torch.ones(3))
    tensor([3., 3., 3.])
    """
    return math.prod(run.size for run in runs(axis, "axis_size"))


def runs(axis: str | Iterable[str], who: str) -> tuple[Run, ...]:
    """The runs of an axis or several, major first.

    Raises:
        AxisError: a name that is not bound, or named twice.
    """
    axes = tuple(axis) if isinstance(axis, Iterable) and not isinstance(axis, str) else (axis,)
    if len(set(axes)) < len(axes):
        raise AxisError(f"{who}: {axes} names an axis twice")
    found = [(name, _lookup(name, who)) for name in axes]
    out: list[Run] = []
    for meshed, some in groupby(found, lambda x: isinstance(x[1], Mesh)):
        if not meshed:
            out += [x for _, x in some if isinstance(x, Run) and x.size > 1]
            continue
        sizes = {
            name: mesh.axes[name]
            for name, mesh in some
            if isinstance(mesh, Mesh) and mesh.axes[name] > 1
        }
        if sizes:
            out.append(Run(tuple(sizes), math.prod(sizes.values())))
    return tuple(out)


def operand(who: str, x: Any) -> torch.Tensor:
    """A leaf that a collective gets as a tensor where the ranks compute.

    Raises:
        AxisError: it is no tensor or number, or it lies elsewhere.
    """
    scope = _scope.get() or _Scope()
    if isinstance(x, bool | int | float | complex | np.generic):
        mapped = [run.index.device for run in scope.mapped.values() if run.index is not None]
        return torch.tensor(x, device=scope.device or next(iter(mapped), None))
    if not isinstance(x, torch.Tensor):
        raise AxisError(
            f"{who}: a leaf is {describe(x)}, not a tensor or a number; write torch.tensor(...)"
        )
    if scope.device is not None and x.device.type != scope.device.type:
        raise AxisError(
            f"{who}: a leaf is on {x.device}, but ranks compute on "
            f"{scope.device}{user_line() or ''}: make it there, with device= that of the batch"
        )
    return x


def is_free(axis: str | Iterable[str]) -> bool:
    """Whether nothing binds an axis (or several): it has one rank, whatever a step was written for.

    >>> is_free("data")
    True
    """
    axes = tuple(axis) if not isinstance(axis, str) else (axis,)
    return all(_lookup(name, "is_free") is None for name in axes)


def _lookup(name: str, who: str) -> Run | Mesh | None:
    """What a name is bound to: a mapped axis, a mesh; None: one rank."""
    if not isinstance(name, str):
        raise AxisError(
            f"{who}: an axis is given by its name, or a tuple of names, not by {name!r}"
        )
    scope = _scope.get() or _Scope()
    if name in scope.mapped:
        return scope.mapped[name]
    if name in scope.axes:
        return scope.mesh
    if scope.alone or (not scope.mapped and scope.mesh is None and current().is_plain):
        return None
    raise AxisError(f"{who}: {_unbound(name, scope)}")


def _unbound(name: str, scope: _Scope) -> str:
    bound = [f"{a!r} (of the mesh)" for a in scope.axes if a not in scope.mapped]
    bound += [f"{a!r} (of vmap)" for a in scope.mapped]
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


# ---- vmap


def vmap(
    f: Callable,
    axis_name: str,
    in_dims: Any = 0,
    out_dims: Any = 0,
    axis_size: int | None = None,
) -> Callable:
    """Map a function over a dim, whose elements collectives then take for the ranks of a named
    axis, on one device.

    Args:
        f: a function of pytrees of tensors; it sees them without the mapped dim. It may call
            collectives over the axis.
        axis_name: the name of the axis.
        in_dims: an int, or a pytree prefix of the positional arguments: the mapped dim, or None for
            what every element gets whole. Keyword arguments are mapped over dim 0; what is not a
            tensor goes to every element.
        out_dims: where the mapped dim goes in the results: an int or a pytree prefix of them; None
            for a result that is not mapped.
        axis_size: the number of elements, needed only where no argument is mapped.

    Returns:
        a function like ``f`` on arguments with the mapped dim. It nests with itself (the innermost
        binding of a name wins) and with torch.func's transforms in any order.

    Raises:
        AxisError: ``in_dims`` does not fit the arguments, or mapped dims differ in size.

    After jax.vmap(axis_name=...).

    >>> normalize = lambda x: x / psum(x, "i")
    >>> from funcpipe._src.collectives import psum
    >>> vmap(normalize, "i")(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """

    @functools.wraps(f)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree.flatten((args, kwargs))
        dims = _in_dims(in_dims, args, kwargs, axis_name)
        size = _size(leaves, dims, axis_size, axis_name, tree.paths((args, kwargs)))
        device = next((x.device for x in leaves if isinstance(x, torch.Tensor)), None)

        def body(index: torch.Tensor, *inner: Any) -> Any:
            scope = _scope.get() or _Scope()
            bound = {**scope.mapped, axis_name: Run((axis_name,), size, index)}
            with _enter(replace(scope, mapped=bound)):
                inner_args, inner_kwargs = tree.unflatten(spec, inner)
                return f(*inner_args, **inner_kwargs)

        index = torch.arange(size, device=device)
        # Only ever dim 0: elsewhere, torch cannot put a result that is the same for all elements
        # (2.13).
        out = torch.func.vmap(body, (0, *dims), tree.map(lambda _: 0, out_dims))(index, *leaves)
        return _moved(out, out_dims, axis_name)

    return mapped


def _moved(out: Any, out_dims: Any, axis_name: str) -> Any:
    """Results with the mapped dim where it is wanted."""
    dims = iter(tree.broadcast_prefix(out_dims, out))
    try:
        return tree.map_tensors(
            lambda x: x if (d := next(dims)) in (None, 0) else x.movedim(0, d), out
        )
    except (IndexError, TypeError) as error:
        raise AxisError(
            f"vmap over {axis_name!r}: out_dims={out_dims!r} does not fit the results: {error}"
        ) from error


def _in_dims(in_dims: Any, args: tuple, kwargs: dict, axis_name: str) -> list[int | None]:
    """The mapped dim of every leaf of the arguments, None where there is none."""
    prefix = tuple(in_dims) if isinstance(in_dims, list) else in_dims
    try:
        dims = tree.broadcast_prefix((prefix, 0), (args, kwargs))
    except ValueError as error:
        raise AxisError(
            f"vmap over {axis_name!r}: in_dims={in_dims!r} does not fit the arguments: {error}"
        ) from error
    for d in dims:
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise AxisError(
                f"vmap over {axis_name!r}: in_dims={in_dims!r} holds {d!r}; a dim is an int or None"
            )
    leaves = tree.leaves((args, kwargs))
    return [d if isinstance(x, torch.Tensor) else None for d, x in zip(dims, leaves, strict=True)]


def _size(
    leaves: list[Any], dims: list[int | None], asked: int | None, axis_name: str, paths: list[str]
) -> int:
    """The number of elements that are mapped over."""
    sizes: dict[str, int] = {} if asked is None else {"axis_size": asked}
    for path, x, d in zip(paths, leaves, dims, strict=True):
        if d is None:
            continue
        name = ("args" if path.startswith("[0]") else "kwargs") + path[3:]
        if not -x.dim() <= d < x.dim():
            raise AxisError(
                f"vmap over {axis_name!r}: {name} of shape {tuple(x.shape)} has no dim {d}; write "
                "in_dims=None for it"
            )
        sizes[name] = x.shape[d]
    if not sizes:
        raise AxisError(
            f"vmap over {axis_name!r}: no argument is mapped; say how many elements: axis_size=..."
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{n} in {name}" for name, n in sizes.items())
        raise AxisError(f"vmap over {axis_name!r}: mapped dims differ in size: {listed}")
    return next(iter(sizes.values()))
