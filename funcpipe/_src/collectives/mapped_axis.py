"""Mapped axes: a dim whose elements collectives take for the ranks of a named axis.

In: a function, and the mapped dim of each argument.
Out: a function that runs all elements at once, on one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from funcpipe._src.collectives.axis_scope import AxisSpan, bind_mapped
from funcpipe._src.core import pytree as tree
from funcpipe.errors import AxisError


def vmap(
    f: Callable,
    axis_name: str,
    in_dims: Any = 0,
    out_dims: Any = 0,
    axis_size: int | None = None,
) -> Callable:
    """Map a function over a dim; collectives take its elements for the ranks of a named axis.

    Everything runs on one device.

    Args:
        f: a function of pytrees of tensors; it sees them without the mapped dim. It may call
            collectives over the axis.
        axis_name: the name of the axis.
        in_dims: an int, or a pytree prefix of the positional arguments: the mapped dim, or None for
            what every element gets unsplit. Keyword arguments are mapped over dim 0; what is not a
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
        tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        device = next((tensor.device for tensor in tensors), None)

        def body(index: torch.Tensor, *inner: Any) -> Any:
            with bind_mapped(AxisSpan((axis_name,), size, index)):
                inner_args, inner_kwargs = tree.unflatten(spec, inner)
                return f(*inner_args, **inner_kwargs)

        index = torch.arange(size, device=device)
        # Only ever dim 0: elsewhere, torch cannot put a result that is the same for all elements
        # (2.13).
        out = torch.func.vmap(body, (0, *dims), tree.map(lambda _: 0, out_dims))(index, *leaves)
        return _moved(out, out_dims, axis_name)

    return mapped


def _moved(
    out: Any,
    out_dims: Any,
    axis_name: str,
) -> Any:
    """Results with the mapped dim where it is wanted."""
    dims = iter(tree.broadcast_prefix(out_dims, out))

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        dim = next(dims)
        return tensor if dim in (None, 0) else tensor.movedim(0, dim)

    try:
        return tree.map_tensors(moved, out)
    except (IndexError, TypeError) as error:
        raise AxisError(
            f"vmap over {axis_name!r}: out_dims={out_dims!r} does not fit the results: {error}"
        ) from error


def _in_dims(
    in_dims: Any,
    args: tuple,
    kwargs: dict,
    axis_name: str,
) -> list[int | None]:
    """The mapped dim of every leaf of the arguments, None where there is none."""
    prefix = tuple(in_dims) if isinstance(in_dims, list) else in_dims
    try:
        dims = tree.broadcast_prefix((prefix, 0), (args, kwargs))
    except ValueError as error:
        raise AxisError(
            f"vmap over {axis_name!r}: in_dims={in_dims!r} does not fit the arguments: {error}"
        ) from error
    for dim in dims:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise AxisError(
                f"vmap over {axis_name!r}: in_dims={in_dims!r} holds {dim!r}; a dim is an int or "
                "None"
            )
    leaves = zip(dims, tree.leaves((args, kwargs)), strict=True)
    return [dim if isinstance(leaf, torch.Tensor) else None for dim, leaf in leaves]


def _size(
    leaves: list[Any],
    dims: list[int | None],
    axis_size: int | None,
    axis_name: str,
    paths: list[str],
) -> int:
    """The number of elements that are mapped over."""
    sizes: dict[str, int] = {}
    if axis_size is not None:
        sizes["axis_size"] = axis_size
    for path, leaf, dim in zip(paths, leaves, dims, strict=True):
        if dim is None:
            continue
        name = ("args" if path.startswith("[0]") else "kwargs") + path[3:]
        if not -leaf.dim() <= dim < leaf.dim():
            raise AxisError(
                f"vmap over {axis_name!r}: {name} of shape {tuple(leaf.shape)} has no dim {dim}; "
                "write in_dims=None for it"
            )
        sizes[name] = leaf.shape[dim]
    if not sizes:
        raise AxisError(
            f"vmap over {axis_name!r}: no argument is mapped; say how many elements: axis_size=..."
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise AxisError(f"vmap over {axis_name!r}: mapped dims differ in size: {listed}")
    return next(iter(sizes.values()))
