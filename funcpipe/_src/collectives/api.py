"""The collectives that a loss function calls, by axis name; their signatures are those of jax.lax.

In: a pytree of tensors and numbers, and an axis name, or a tuple of names of which the first is
major.
Out: a pytree of the same structure, differentiable.

Every function works on what one rank holds. How the name is bound decides what runs
(`axis_scope.py`); with one rank, or in plain PyTorch, nothing runs. Shapes below are of one leaf;
``n`` is the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from funcpipe._src.collectives import batching_rules as rules
from funcpipe._src.collectives import over_spans
from funcpipe._src.collectives.axis_scope import (
    axis_spans,
    current_interceptor,
    is_free,
    operand,
)
from funcpipe._src.collectives.over_spans import (
    Spans,
    axes_of_spans,
    check_pairs,
    counted,
    dim_of,
    joined,
    ranks_on,
    shards_of,
)
from funcpipe._src.core import pytree as tree
from funcpipe.errors import AxisError

Axis = str | Iterable[str]
# What a collective makes of a tensor over spans.
OfLeaf = Callable[[torch.Tensor, Spans], torch.Tensor]


def psum(x: Any, axis: Axis) -> Any:
    """The sum over all ranks of an axis, on each of them.

    Args:
        x: a pytree of tensors of any shape, or numbers, which are as ``torch.tensor`` makes them.
            Bools are counted, in int64, as ``torch.sum`` does.
        axis: an axis name or several.

    Returns:
        leaves of the same shape, the same on every rank. The gradient of psum is psum.

    >>> from funcpipe._src.collectives import vmap
    >>> def sums(x):
    ...     return psum({"x": x, "ones": torch.ones(())}, "i")
    >>> vmap(sums, "i")(torch.tensor([1.0, 2.0, 3.0]))
    {'x': tensor([6., 6., 6.]), 'ones': tensor([3., 3., 3.])}
    """
    return _map("psum", over_spans.psum, x, axis)


def pmean(x: Any, axis: Axis) -> Any:
    """The mean over all ranks of an axis: ``psum(x) / n``.

    Ranks with unequal numbers of rows count alike.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: pmean(x, "i"), "i")(torch.tensor([1.0, 2.0, 6.0]))
    tensor([3., 3., 3.])
    """

    def leaf(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
        ranks = ranks_on(spans)
        if ranks == 1 and tensor.is_floating_point():
            return tensor
        return over_spans.psum(tensor, spans) / ranks

    return _map("pmean", leaf, x, axis)


def pmax(x: Any, axis: Axis) -> Any:
    """The maximum over all ranks of an axis, on each of them. NaN where any rank has NaN.

    Args:
        x: a pytree of tensors of any shape and real dtype.
        axis: an axis name or several.

    Returns:
        leaves of the same shape. Its gradient goes to the ranks that hold the maximum; if several
        do, they get equal shares (over several axes: axis by axis, the last one first).

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: pmax(x, "i"), "i")(torch.tensor([1.0, 6.0, 2.0]))
    tensor([6., 6., 6.])
    """

    def leaf(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
        if tensor.is_complex():
            raise AxisError(
                f"pmax: complex numbers ({tensor.dtype}) have no maximum; take it of x.abs()"
            )
        for name in reversed(axes_of_spans(spans)):
            (span,) = axis_spans(name, "pmax")
            tensor = rules.pmax(tensor, span)
        return tensor

    return _map("pmax", leaf, x, axis)


def all_gather(
    x: Any,
    axis: Axis,
    dim: int = 0,
    tiled: bool = True,
) -> Any:
    """What all ranks of an axis hold, in rank order, on each of them.

    Its transpose is `psum_scatter`.

    Args:
        x: a pytree of tensors.
        axis: an axis name or several.
        dim: where the ranks' tensors are put one after another.
        tiled: concatenate along ``dim``, which grows from ``k`` to ``n * k``; if False, stack along
            a new dim ``dim`` of size ``n``. (jax.lax stacks by default.)

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: all_gather(x, "i"), "i")(torch.tensor([[1, 2], [3, 4]]))
    tensor([[1, 2, 3, 4],
            [1, 2, 3, 4]])
    """

    def leaf(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
        where = dim_of("all_gather", tensor, dim, extra=not tiled)
        gathered = over_spans.all_gather(tensor, spans)
        return joined(gathered, where) if tiled else gathered.movedim(0, where)

    return _map("all_gather", leaf, x, axis, dim=dim, tiled=tiled)


def psum_scatter(
    x: Any,
    axis: Axis,
    dim: int = 0,
    tiled: bool = True,
) -> Any:
    """The sum over all ranks of an axis, of which each rank gets its shard.

    Its transpose is `all_gather`.

    Args:
        x: a pytree of tensors. Bools are counted, in int64.
        axis: an axis name or several.
        dim: the dim that is cut into ``n`` shards, of which rank ``i`` gets the ``i``-th.
        tiled: ``dim`` shrinks from ``n * k`` to ``k``; if False, it has size ``n`` and is removed.

    Raises:
        AxisError: the dim is not a multiple of ``n`` (not ``n``, if not tiled).

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: psum_scatter(x, "i"), "i")(torch.tensor([[1, 2], [3, 4]]))
    tensor([[4],
            [6]])
    """

    def leaf(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
        where = dim_of("psum_scatter", tensor, dim)
        summed = shards_of("psum_scatter", counted(tensor), where, spans, tiled)
        summed = summed.unflatten(0, over_spans.sizes(spans))
        if not spans:
            return summed[0]
        for span in spans:
            summed = rules.linear("psum_scatter", summed, span)
        return summed

    return _map("psum_scatter", leaf, x, axis, dim=dim, tiled=tiled)


def all_to_all(
    x: Any,
    axis: Axis,
    split_dim: int,
    concat_dim: int,
    tiled: bool = True,
) -> Any:
    """Every rank of an axis gets a shard of what every rank holds.

    Its transpose is itself, with the dims swapped.

    Args:
        x: a pytree of tensors.
        axis: an axis name or several.
        split_dim: the dim that is cut into ``n`` shards, the ``i``-th for rank ``i``.
        concat_dim: where the shards that came from all ranks are put one after another.
        tiled: ``split_dim`` shrinks from ``n * k`` to ``k``, and ``concat_dim`` grows from ``m`` to
            ``n * m``; if False, ``split_dim`` has size ``n`` and is removed, and ``concat_dim`` is
            a new dim of size ``n``.

    Raises:
        AxisError: the dim is not a multiple of ``n`` (not ``n``, if not tiled).

    >>> from funcpipe._src.collectives import vmap
    >>> def by_heads(x):  # from one row of four heads to all rows of two heads
    ...     return all_to_all(x, "i", split_dim=1, concat_dim=0)
    >>> vmap(by_heads, "i")(torch.arange(8).view(2, 1, 4))  # on two ranks
    tensor([[[0, 1],
             [4, 5]],
    <BLANKLINE>
            [[2, 3],
             [6, 7]]])
    """

    def leaf(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
        split = dim_of("all_to_all", tensor, split_dim)
        concat = dim_of("all_to_all", tensor, concat_dim)
        shards = shards_of("all_to_all", tensor, split, spans, tiled)
        received = over_spans.all_to_all(shards, spans)
        return joined(received, concat) if tiled else received.movedim(0, concat)

    options = {"split_dim": split_dim, "concat_dim": concat_dim, "tiled": tiled}
    return _map("all_to_all", leaf, x, axis, **options)


def ppermute(
    x: Any,
    axis: Axis,
    perm: Iterable[tuple[int, int]],
) -> Any:
    """Every rank of an axis sends what it holds to at most one other.

    Its transpose turns the pairs around.

    Args:
        x: a pytree of tensors.
        axis: an axis name or several.
        perm: (source, destination) pairs of ranks' indices on the axis; no source and no
            destination comes twice.

    Returns:
        what came; zeros on a rank that is no destination. Where no axis is bound, ``x``, unless
        there are no pairs.

    Raises:
        AxisError: an index that the axis does not have, or that comes twice.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: ppermute(x, "i", [(0, 1), (1, 2)]), "i")(torch.tensor([1, 2, 3]))
    tensor([0, 1, 2])
    """
    spans = axis_spans(axis, "ppermute")
    pairs = tuple((int(source), int(destination)) for source, destination in perm)
    # Where no axis is bound, every pair stands for the one rank.
    ranks = None if is_free(axis) else ranks_on(spans)
    check_pairs(pairs, ranks)

    def leaf(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
        if not spans:
            return tensor if pairs else torch.zeros_like(tensor)
        if len(spans) == 1:
            return rules.linear("ppermute", tensor, spans[0], pairs)
        return over_spans.permute(tensor, spans, pairs)

    return _map("ppermute", leaf, x, axis, perm=pairs)


def axis_index(axis: Axis, device: torch.device | str | None = None) -> torch.Tensor:
    """The index of this rank on an axis: a 0-d int64 tensor. Over several axes, the first is major.

    Args:
        axis: an axis name or several.
        device: of the result; by default torch's default device.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: x + 10 * axis_index("i"), "i")(torch.tensor([1, 2, 3]))
    tensor([ 1, 12, 23])
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    interceptor = current_interceptor()
    spans = axis_spans(axis, "axis_index")
    if interceptor is None:
        return over_spans.axis_index(spans, device)

    def index(_: Any, spans: Spans) -> torch.Tensor:
        return over_spans.axis_index(spans, device)

    return interceptor("axis_index", index, None, axis, {})


# ---- leaves


def _map(
    caller: str,
    of_leaf: OfLeaf,
    x: Any,
    axis: Axis,
    **options: Any,
) -> Any:
    """What a collective makes of every leaf; ``options``: with what else it was called."""
    axis = axis if isinstance(axis, str) else tuple(axis)
    interceptor = current_interceptor()
    spans = axis_spans(axis, caller)

    def mapped(leaf: Any) -> torch.Tensor:
        tensor = operand(caller, leaf)
        if interceptor is not None:
            return interceptor(caller, of_leaf, tensor, axis, options)
        return of_leaf(tensor, spans)

    return tree.map(mapped, x)
