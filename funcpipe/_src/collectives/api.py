"""The collectives that a loss function calls, by axis name: the signatures of jax.lax, on pytrees
of tensors.

Every function takes an axis name, or a tuple of names of which the first is major, and works on
what one rank holds. How the name is bound decides what runs (`axis_scope.py`); with one rank, or in
plain PyTorch, nothing does. Shapes below are of one leaf; ``n`` is the number of ranks.

In: a pytree of tensors and numbers, an axis. Out: a pytree of the same structure, differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from funcpipe._src.collectives import batching_rules as rules
from funcpipe._src.collectives import ops
from funcpipe._src.collectives.axis_scope import Run, is_free, operand, runs, tap
from funcpipe._src.core import pytree as tree
from funcpipe.errors import AxisError

Axis = str | Iterable[str]
Runs = tuple[Run, ...]


def psum(x: Any, axis: Axis) -> Any:
    """The sum over all ranks of an axis, on each of them.

    Args:
        x: a pytree of tensors of any shape, or numbers, which are as ``torch.tensor`` makes them.
            Bools are counted, in int64, as ``torch.sum`` does.
        axis: an axis name or several.

    Returns:
        leaves of the same shape, the same on every rank. The gradient of psum is psum.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: psum({"x": x, "ones": torch.ones(())}, "i"), "i")(torch.tensor([1.0, 2.0, 3.0]))
    {'x': tensor([6., 6., 6.]), 'ones': tensor([3., 3., 3.])}
    """
    return _map("psum", _psum, x, axis)


def pmean(x: Any, axis: Axis) -> Any:
    """The mean over all ranks of an axis: ``psum(x) / n``. Ranks with unequal numbers of rows count
    alike.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: pmean(x, "i"), "i")(torch.tensor([1.0, 2.0, 6.0]))
    tensor([3., 3., 3.])
    """

    def leaf(t: torch.Tensor, found: Runs) -> torch.Tensor:
        n = _count(found)
        return t if n == 1 and t.is_floating_point() else _psum(t, found) / n

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

    def leaf(t: torch.Tensor, found: Runs) -> torch.Tensor:
        if t.is_complex():
            raise AxisError(
                f"pmax: complex numbers ({t.dtype}) have no maximum; take it of x.abs()"
            )
        for a in reversed(_names(found)):
            t = rules.pmax(t, next(iter(runs(a, "pmax"))))
        return t

    return _map("pmax", leaf, x, axis)


def all_gather(x: Any, axis: Axis, dim: int = 0, tiled: bool = True) -> Any:
    """What all ranks of an axis hold, in rank order, on each of them. Its transpose is
    `psum_scatter`.

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

    def leaf(t: torch.Tensor, found: Runs) -> torch.Tensor:
        d = _dim("all_gather", t, dim, extra=not tiled)
        return _joined(_gather(t, found), d) if tiled else _gather(t, found).movedim(0, d)

    return _map("all_gather", leaf, x, axis, dim=dim, tiled=tiled)


def psum_scatter(x: Any, axis: Axis, dim: int = 0, tiled: bool = True) -> Any:
    """The sum over all ranks of an axis, of which each rank gets its piece. Its transpose is
    `all_gather`.

    Args:
        x: a pytree of tensors. Bools are counted, in int64.
        axis: an axis name or several.
        dim: the dim that is cut into ``n`` pieces, of which rank ``i`` gets the ``i``-th.
        tiled: ``dim`` shrinks from ``n * k`` to ``k``; if False, it has size ``n`` and is removed.

    Raises:
        AxisError: the dim is not a multiple of ``n`` (not ``n``, if not tiled).

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: psum_scatter(x, "i"), "i")(torch.tensor([[1, 2], [3, 4]]))
    tensor([[4],
            [6]])
    """

    def leaf(t: torch.Tensor, found: Runs) -> torch.Tensor:
        pieces = _pieces("psum_scatter", _counted(t), _dim("psum_scatter", t, dim), found, tiled)
        out = pieces.unflatten(0, [run.size for run in found] or [1])
        if not found:
            return out[0]
        for run in found:
            out = rules.linear("psum_scatter", out, run)
        return out

    return _map("psum_scatter", leaf, x, axis, dim=dim, tiled=tiled)


def all_to_all(x: Any, axis: Axis, split_dim: int, concat_dim: int, tiled: bool = True) -> Any:
    """Every rank of an axis gets a piece of what every rank holds. Its transpose is itself, with
    the dims swapped.

    Args:
        x: a pytree of tensors.
        axis: an axis name or several.
        split_dim: the dim that is cut into ``n`` pieces, the ``i``-th for rank ``i``.
        concat_dim: where the pieces that came from all ranks are put one after another.
        tiled: ``split_dim`` shrinks from ``n * k`` to ``k``, and ``concat_dim`` grows from ``m`` to
            ``n * m``; if False, ``split_dim`` has size ``n`` and is removed, and ``concat_dim`` is
            a new dim of size ``n``.

    Raises:
        AxisError: the dim is not a multiple of ``n`` (not ``n``, if not tiled).

    >>> from funcpipe._src.collectives import vmap
    >>> rows = torch.arange(8).view(2, 1, 4)  # two ranks, each with one row of four heads
    >>> vmap(lambda x: all_to_all(x, "i", split_dim=1, concat_dim=0), "i")(rows)  # ... and with all rows of two heads
    tensor([[[0, 1],
             [4, 5]],
    <BLANKLINE>
            [[2, 3],
             [6, 7]]])
    """

    def leaf(t: torch.Tensor, found: Runs) -> torch.Tensor:
        d, c = _dim("all_to_all", t, split_dim), _dim("all_to_all", t, concat_dim)
        out = _exchange(_pieces("all_to_all", t, d, found, tiled), found)
        return _joined(out, c) if tiled else out.movedim(0, c)

    return _map(
        "all_to_all", leaf, x, axis, split_dim=split_dim, concat_dim=concat_dim, tiled=tiled
    )


def ppermute(x: Any, axis: Axis, perm: Iterable[tuple[int, int]]) -> Any:
    """Every rank of an axis sends what it holds to at most one other. Its transpose turns the pairs
    around.

    Args:
        x: a pytree of tensors.
        axis: an axis name or several.
        perm: (source, destination) pairs of places on the axis; no source and no destination comes
            twice.

    Returns:
        what came; zeros on a rank that is nobody's destination. Where no axis is bound, ``x``,
        unless there are no pairs.

    Raises:
        AxisError: a place that the axis does not have, or that comes twice.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: ppermute(x, "i", [(0, 1), (1, 2)]), "i")(torch.tensor([1, 2, 3]))
    tensor([0, 1, 2])
    """
    found = runs(axis, "ppermute")
    pairs = _checked(
        tuple((int(s), int(d)) for s, d in perm), None if is_free(axis) else _count(found)
    )

    def leaf(t: torch.Tensor, found: Runs) -> torch.Tensor:
        if not found:
            return t if pairs else torch.zeros_like(t)
        return (
            rules.linear("ppermute", t, found[0], pairs)
            if len(found) == 1
            else _permute_over(t, found, pairs)
        )

    return _map("ppermute", leaf, x, axis, perm=pairs)


def axis_index(axis: Axis, device: torch.device | str | None = None) -> torch.Tensor:
    """The place of this rank on an axis: a 0-d int64 tensor. Over several axes, the first is major.

    Args:
        axis: an axis name or several.
        device: of the result; by default torch's default device.

    >>> from funcpipe._src.collectives import vmap
    >>> vmap(lambda x: x + 10 * axis_index("i"), "i")(torch.tensor([1, 2, 3]))
    tensor([ 1, 12, 23])
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    seen, found = tap(), runs(axis, "axis_index")
    if seen is None:
        return _index(found, device)
    return seen("axis_index", lambda _, found: _index(found, device), None, axis, {})


# ---- leaves


def _map(
    who: str, fn: Callable[[torch.Tensor, Runs], torch.Tensor], x: Any, axis: Axis, **options: Any
) -> Any:
    """Every leaf of a tree, by what a collective makes of a tensor over some runs; ``options``:
    what it was called with."""
    axis = axis if isinstance(axis, str) else tuple(axis)
    seen, found = tap(), runs(axis, who)
    if seen is None:
        return tree.map(lambda t: fn(operand(who, t), found), x)
    return tree.map(lambda t: seen(who, fn, operand(who, t), axis, options), x)


def _names(found: Runs) -> list[str]:
    return [a for run in found for a in run.axes]


def _count(found: Runs) -> int:
    return math.prod(run.size for run in found)


def _counted(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.int64) if t.dtype == torch.bool else t


def _psum(t: torch.Tensor, found: Runs) -> torch.Tensor:
    t = _counted(t)
    for run in reversed(found):
        t = rules.linear("psum", t, run)
    return t


def _gather(t: torch.Tensor, found: Runs) -> torch.Tensor:
    """``(n, *s)``."""
    for run in reversed(found):
        t = rules.linear("all_gather", t, run)
    return t.flatten(0, len(found) - 1) if found else t.unsqueeze(0)


def _exchange(t: torch.Tensor, found: Runs) -> torch.Tensor:
    """All-to-all of ``(n, *s)`` over several runs: one after another, each along its own dim."""
    t = t.unflatten(0, [run.size for run in found] or [1])
    for k, run in enumerate(found):
        t = rules.linear("all_to_all", t.movedim(k, 0), run).movedim(0, k)
    return t.flatten(0, len(found) - 1) if found else t


def _index(found: Runs, device: torch.device) -> torch.Tensor:
    out: torch.Tensor | None = None
    for run in found:
        own = ops.axis_index(run.axes, device) if run.index is None else run.index.to(device)
        out = own if out is None else out * run.size + own
    return torch.zeros((), dtype=torch.int64, device=device) if out is None else out


def _permute_over(t: torch.Tensor, found: Runs, pairs: rules.Pairs) -> torch.Tensor:
    """A permutation over several runs, which none of them can do alone: pieces for all ranks, at
    most one not zero."""
    index, zero, sources = _index(found, t.device), torch.zeros_like(t), {d: s for s, d in pairs}
    pieces = [
        torch.where(index == sources[d], t, zero) if d in sources else zero
        for d in range(_count(found))
    ]
    got = _exchange(torch.stack(pieces), found)
    out = zero
    for s, d in pairs:
        out = torch.where(index == d, got[s], out)
    return out


def _pieces(who: str, t: torch.Tensor, dim: int, found: Runs, tiled: bool) -> torch.Tensor:
    """``(n, *s)``: the pieces of a dim."""
    n, size = _count(found), t.shape[dim]
    if size % n if tiled else size != n:
        raise AxisError(
            f"{who}: dim {dim} of a tensor of shape {tuple(t.shape)} "
            f"{'is no multiple of' if tiled else 'is not'} {n}, the number of ranks on "
            f"{', '.join(map(repr, _names(found))) or 'the axis'}; "
            f"{'pad it, or name another dim' if tiled else 'use tiled=True to cut it into pieces'}"
        )
    return t.unflatten(dim, (n, size // n)).movedim(dim, 0) if tiled else t.movedim(dim, 0)


def _joined(t: torch.Tensor, dim: int) -> torch.Tensor:
    """From ``(n, *s)`` to the pieces one after another along a dim of ``s``."""
    return t.movedim(0, dim).flatten(dim, dim + 1)


def _dim(who: str, t: torch.Tensor, dim: int, extra: bool = False) -> int:
    dims = t.dim() + extra
    if not -dims <= dim < dims:
        raise AxisError(f"{who}: a tensor of shape {tuple(t.shape)} has no dim {dim}")
    return dim % dims


def _checked(pairs: rules.Pairs, n: int | None) -> rules.Pairs:
    """The pairs. ``n``: the number of ranks, None where no axis is bound: there every pair stands
    for the one rank."""
    for what, places in (("source", [s for s, _ in pairs]), ("destination", [d for _, d in pairs])):
        for p in places:
            if n is not None and not 0 <= p < n:
                raise AxisError(
                    f"ppermute: {what} {p} is no place on an axis of {n} ranks: 0 to {n - 1}"
                )
        if len(set(places)) < len(places):
            raise AxisError(
                f"ppermute: {list(pairs)} names a {what} twice; use all_gather to send to several "
                "ranks"
            )
    return pairs
