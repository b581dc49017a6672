"""Leaf cuts: along which dims, and into how many pieces, each leaf of a batch is split.

In: a resolved step, a batch or one ready microbatch. Out: for every leaf its `LeafCut`s, in the
order in which they are made: rows, microbatches, positions. Or a BatchError with the path of the
leaf that cannot be split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from funcpipe._src.analysis.call_results import Origin
from funcpipe._src.core import pytree
from funcpipe._src.core.batch_leaves import as_dicts
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.functional.leaf_cut import LeafCut
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe._src.spec.transform_spec import TransformSpec
from funcpipe.errors import BatchError

Cuts = tuple[LeafCut, ...]

NO_ROWS = (
    "{name}: batch{path} of shape {shape} is computed from a loss, fp.Mean or norm of an earlier "
    "value_and_grad, which has no rows, and would be split along dim {dim}: give it None in "
    "dims=..., which hands it out whole"
)
_DEAL = (
    ". Ready microbatches are dealt whole where their number is a multiple of the number of shards"
)


class _Request(NamedTuple):
    """That rows are split: by which transform, over which axes (none: into microbatches), into how
    many pieces, along which dims."""

    name: str
    axes: Axes
    pieces: int
    dims: Any

    @property
    def result(self) -> str:
        """What a leaf would be split into."""
        if not self.axes:
            return f"{self.pieces} microbatches"
        return f"{self.pieces} shards over {', '.join(map(repr, self.axes))}"


@dataclass
class _Leaf:
    """A leaf while it is cut.

    Args:
        path, value: of the leaf.
        origin: what it was computed from.
        cuts: so far.
        sizes: of one piece; none for what is not split: 0-d tensors, and other values.
    """

    path: str
    value: Any
    origin: Origin
    cuts: list[LeafCut] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.value, torch.Tensor):
            self.sizes = list(self.value.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Before it is cut."""
        return tuple(self.value.shape)

    def has_dim(self, dim: int) -> bool:
        """Whether there is such a dim, counted from the front or the back."""
        return -len(self.sizes) <= dim < len(self.sizes)

    def cut(self, dim: int, pieces: int, axes: Axes) -> None:
        """Cut what is left of it."""
        self.sizes[dim] //= pieces
        self.cuts.append(LeafCut(dim % len(self.sizes), pieces, axes))


def _leaves(batch: Any, origins: Sequence[Origin]) -> list[_Leaf]:
    found = zip(pytree.paths(batch), pytree.leaves(batch), origins, strict=True)
    return [_Leaf(*of_leaf) for of_leaf in found]


# ---- what is asked for


def _row_requests(resolved: ResolvedStep) -> list[_Request]:
    requests = []
    for spec in resolved.row_specs:
        split = spec.split_rows()
        assert split is not None
        ranks = resolved.mesh.axis_size(spec.axes)
        requests.append(_Request(spec.name, spec.axes, ranks, split.dims))
    return requests


def _microbatch_request(resolved: ResolvedStep, count: int) -> _Request:
    spec, split = resolved.microbatch_spec, resolved.microbatch_split
    if spec is None or split is None:
        return _Request("", (), count, 0)
    return _Request(spec.name, (), count, split.dims)


def _dims(name: str, dims: Any, batch: Any) -> list[Any]:
    """For every leaf the dim that a transform names, or None."""
    bare = pytree.without_data(as_dicts(batch))
    try:
        found = pytree.broadcast_prefix(dims, bare)
    except ValueError as error:
        raise BatchError(
            f"{name}: dims={dims!r} is not a prefix of the batch {bare!r}: "
            f"{str(error).rstrip('.')}. Write one dim for the whole batch, or a tree with the "
            "batch's keys"
        ) from None
    for dim in found:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise BatchError(
                f"{name}: dims={dims!r} holds {dim!r}; a dim is an int, or None to hand a leaf out "
                "whole"
            )
    return found


# ---- ready microbatches that are dealt


def dealt_over(resolved: ResolvedStep, microbatches: list[Any]) -> Axes:
    """The axes over which ready microbatches are dealt, since their rows do not divide; none if
    they are cut."""
    axes = () if resolved.local else resolved.row_axes
    if not axes or len(microbatches) % resolved.mesh.axis_size(axes):
        return ()
    for microbatch in microbatches:
        if not _rows_divide(resolved, microbatch):
            return axes
    return ()


def _rows_divide(resolved: ResolvedStep, microbatch: Any) -> bool:
    """Whether all rows can be cut; dims that a leaf lacks are refused elsewhere."""
    leaves = [_Leaf("", leaf, Origin.BATCH) for leaf in pytree.leaves(microbatch)]
    divisors = [[1] * len(leaf.sizes) for leaf in leaves]
    for request in _row_requests(resolved):
        dims = _dims(request.name, request.dims, microbatch)
        for leaf, of_dims, dim in zip(leaves, divisors, dims, strict=True):
            if dim is not None and leaf.has_dim(dim):
                of_dims[dim] *= request.pieces
    for leaf, of_dims in zip(leaves, divisors, strict=True):
        for size, divisor in zip(leaf.sizes, of_dims, strict=True):
            if size % divisor:
                return False
    return True


# ---- the cuts of a rank's batch


def leaf_cuts(
    resolved: ResolvedStep, batch: Any, origins: list[Origin], ready: bool, dealt: Axes
) -> tuple[Cuts, ...]:
    """How a batch, or a ready microbatch, is cut for a rank.

    Args:
        origins: of every leaf.
        ready: whether it is a ready microbatch.
        dealt: the axes over which ready microbatches are dealt.

    Raises:
        BatchError: a leaf that does not divide, or has no rows; dims that do not fit the batch.
    """
    has_all_rows = not resolved.local or any(Origin.ROWS in origin for origin in origins)
    requests = _row_requests(resolved) if has_all_rows and not dealt else []
    split = resolved.microbatch_split
    if split is not None and not ready:
        requests.append(_microbatch_request(resolved, split.count or 1))
    leaves = _leaves(batch, origins)
    for request in requests:
        dims = _dims(request.name, request.dims, batch)
        for leaf, dim in zip(leaves, dims, strict=True):
            if dim is not None and leaf.sizes and _has_rows(resolved, request, leaf):
                _cut_rows(leaf, request, dim, ready)
    _cut_positions(resolved, batch, leaves)
    return tuple(tuple(leaf.cuts) for leaf in leaves)


def _has_rows(resolved: ResolvedStep, request: _Request, leaf: _Leaf) -> bool:
    """Whether a leaf has the rows that a request splits: where every rank gets a batch of its own,
    only `Rows` of an earlier call have those of all ranks."""
    if not (request.axes and resolved.local):
        return True
    if Origin.ROWS in leaf.origin and Origin.BATCH in leaf.origin:
        raise BatchError(
            f"batch{leaf.path} is computed from fp.Rows of an earlier value_and_grad, which has "
            "the rows of all ranks, and from a tensor of the batch, which has this rank's alone "
            "(batch='local'): pass both through the batch and combine them in the loss function, "
            "or use batch='global'"
        )
    return Origin.ROWS in leaf.origin


def _cut_rows(leaf: _Leaf, request: _Request, dim: int, ready: bool) -> None:
    name, pieces = request.name, request.pieces
    if pieces > 1 and not leaf.origin:
        raise BatchError(NO_ROWS.format(name=name, path=leaf.path, shape=leaf.shape, dim=dim))
    if not leaf.has_dim(dim) or leaf.sizes[dim] % pieces:
        split = f", {tuple(leaf.sizes)} after other splits," if leaf.cuts else ""
        raise BatchError(
            f"{name}: batch{leaf.path} of shape {leaf.shape}{split} does not split along "
            f"dim {dim} into {request.result}; leave the last rows out (drop_last=True of a "
            "DataLoader), pad with rows of weight 0, or name another dim for this leaf "
            f"(dims=..., None hands it out whole){_DEAL if ready else ''}"
        )
    leaf.cut(dim, pieces, request.axes)


def row_cuts(
    resolved: ResolvedStep, batch: Any, origins: list[Origin], microbatches: int, dealt: Axes
) -> tuple[Cuts, ...]:
    """How the rows of every leaf of the whole batch are cut, also where a rank's batch is its own
    rows already, or a ready microbatch."""
    requests = [] if dealt else _row_requests(resolved)
    requests.append(_microbatch_request(resolved, microbatches))
    leaves = _leaves(batch, origins)
    for request in requests:
        for leaf, dim in zip(leaves, _dims(request.name, request.dims, batch), strict=True):
            # Where ranks have batches of their own, a loss or the like is the same on all.
            same = request.axes and resolved.local and not leaf.origin
            if dim is not None and leaf.sizes and not same:
                leaf.cut(dim % len(leaf.sizes), request.pieces, request.axes)
    return tuple(tuple(leaf.cuts) for leaf in leaves)


# ---- positions


def _cut_positions(resolved: ResolvedStep, batch: Any, leaves: list[_Leaf]) -> None:
    """Add how positions are split, by all transforms that do so together."""
    specs = resolved.sequence_specs
    if not specs:
        return
    dims_of_specs = []
    for spec in specs:
        split = spec.split_positions()
        assert split is not None
        dims_of_specs.append(_dims(spec.name, split.dims, batch))
    for leaf, *dims in zip(leaves, *dims_of_specs, strict=True):
        dim = _position_dim(specs, leaf, dims) if leaf.sizes else None
        if dim is not None:
            layout = _sequence_layout(specs, resolved.mesh, leaf.sizes[dim])
            leaf.cuts.append(LeafCut(dim, layout.members, layout.axes, layout))


def _position_dim(specs: Sequence[TransformSpec], leaf: _Leaf, dims: list[Any]) -> int | None:
    """The dim of a leaf's positions, which all transforms name alike."""
    for spec, dim in zip(specs, dims, strict=True):
        if dim is not None and not leaf.has_dim(dim):
            raise BatchError(
                f"{spec.name}: batch{leaf.path} of shape {leaf.shape} has no dim {dim} to split "
                "the sequence along; name another dim for this leaf (dims=..., None hands it "
                "out whole)"
            )
    found = {None if dim is None else dim % len(leaf.sizes) for dim in dims}
    if len(found) > 1:
        raise BatchError(
            f"{' and '.join(map(str, specs))} split batch{leaf.path} along dims "
            f"{' and '.join(map(str, dims))}: give both the same dims=..., since they cut one "
            "sequence"
        )
    return found.pop()


def _sequence_layout(specs: Sequence[TransformSpec], mesh: Mesh, size: int) -> SequenceLayout:
    axes: dict[str, list[str]] = {"ring": [], "heads": []}
    zigzag = False
    for spec in specs:
        split = spec.split_positions()
        assert split is not None
        axes[split.attention] += spec.axes
        zigzag = zigzag or split.zigzag
    ring, heads = tuple(axes["ring"]), tuple(axes["heads"])
    ring_ranks, head_ranks = mesh.axis_size(ring), mesh.axis_size(heads)
    return SequenceLayout(size, ring, heads, ring_ranks, head_ranks, zigzag and ring_ranks > 1)
