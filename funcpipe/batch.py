"""The batch: how its leaves are split over mesh axes and into microbatches.

Data axes are major, in mesh order; microbatches are minor: a rank's microbatch ``m`` is the ``m``-th piece of the rows
that its place on the data axes gets. A 0-d leaf, and anything that is not a tensor, goes to everyone whole.

In: the records that split, a batch. Out: `Splits`, which hands a rank its microbatches, or a BatchError with the path
of the leaf that cannot be split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from funcpipe import tree
from funcpipe.errors import BatchError
from funcpipe.mesh import Axes, Mesh
from funcpipe.records import Resolved
from funcpipe.step import Microbatches, check_microbatches


@dataclass(frozen=True)
class Cutting:
    """One split of one leaf: into how many pieces along which dim; over mesh axes, or (no axes) into microbatches."""

    dim: int
    pieces: int
    axes: Axes


@dataclass(frozen=True)
class Splits:
    """How a batch of one structure and shape is split.

    Args:
        mesh: the mesh.
        count: the number of microbatches of a rank.
        cuttings: for every ready microbatch (one, unless the batch is `Microbatches`), for every leaf, its splits, major
            first.
        specs: the structure of every ready microbatch.
    """

    mesh: Mesh
    count: int
    cuttings: tuple[tuple[tuple[Cutting, ...], ...], ...]
    specs: tuple[Any, ...]

    def shape(self, part: int, leaf: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a leaf in one microbatch of one rank."""
        out = list(shape)
        for c in self.cuttings[part][leaf]:
            out[c.dim] //= c.pieces
        return tuple(out)

    def microbatches(self, batch: Any, rank: int) -> list[list[Any]]:
        """The leaves of every microbatch of a rank; tensors contiguous."""
        parts = [self._local(spec.flatten_up_to(part), i, rank) for i, (spec, part) in enumerate(self._parts(batch))]
        if isinstance(batch, Microbatches):
            return parts
        pieces = []
        for leaf, cuttings in zip(parts[0], self.cuttings[0], strict=True):
            micro = next((c for c in cuttings if not c.axes), None)
            pieces.append([leaf] * self.count if micro is None else torch.chunk(leaf, micro.pieces, micro.dim))
        return [[_dense(p[m]) for p in pieces] for m in range(self.count)]

    def _parts(self, batch: Any) -> list[tuple[Any, Any]]:
        parts = batch.parts if isinstance(batch, Microbatches) else [batch]
        return list(zip(self.specs, parts, strict=True))

    def _local(self, leaves: list[Any], part: int, rank: int) -> list[Any]:
        out = []
        for leaf, cuttings in zip(leaves, self.cuttings[part], strict=True):
            for c in cuttings:
                if c.axes:
                    size = leaf.shape[c.dim] // c.pieces
                    leaf = leaf.narrow(c.dim, self.mesh.index(rank, c.axes) * size, size)
            out.append(_dense(leaf))
        return out


def _dense(x: Any) -> Any:
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def plan_splits(resolved: Resolved, batch: Any) -> Splits:
    """How a batch is split.

    Raises:
        BatchError: a leaf that does not divide, a ``dims`` that does not fit the batch, another number of ready
            microbatches than asked for.
    """
    ready = isinstance(batch, Microbatches)
    count = resolved.micro.count if resolved.micro else 1
    if ready:
        check_microbatches(batch)
    if ready and count not in (None, len(batch.parts)) and resolved.micro:
        raise BatchError(
            f"{resolved.micro_name} asks for {count} microbatches, but the batch brings {len(batch.parts)}; "
            "pass microbatches=None to take what the batch brings"
        )
    if count is None and not ready:
        raise BatchError(
            f"{resolved.micro_name}(microbatches=None) takes ready microbatches, but the batch is a "
            f"{type(batch).__name__}; pass fp.Microbatches([...]) or say how many"
        )
    parts = list(batch.parts) if ready else [batch]
    cuttings = tuple(tuple(_leaf_cuttings(resolved, part, ready)) for part in parts)
    specs = tuple(tree.flatten(part)[1] for part in parts)
    return Splits(resolved.mesh, len(parts) if ready else count or 1, cuttings, specs)


def _leaf_cuttings(resolved: Resolved, batch: Any, ready: bool) -> list[tuple[Cutting, ...]]:
    wanted = [
        (r.name, r.axes, resolved.mesh.axis_size(r.axes), r.split.dims)
        for r in resolved.splits
        if r.split and not resolved.local
    ]
    if resolved.micro and not ready:
        wanted.append((resolved.micro_name, (), resolved.micro.count or 1, resolved.micro.dims))
    leaves = list(zip(tree.paths(batch), tree.leaves(batch), strict=True))
    out: list[list[Cutting]] = [[] for _ in leaves]
    sizes = [list(x.shape) if isinstance(x, torch.Tensor) else [] for _, x in leaves]
    for name, axes, pieces, dims in wanted:
        for i, ((path, x), dim) in enumerate(zip(leaves, _dims(name, dims, batch), strict=True)):
            if dim is None or not isinstance(x, torch.Tensor) or x.dim() == 0:
                continue
            into = f"{pieces} microbatches" if not axes else f"{pieces} shards over {', '.join(map(repr, axes))}"
            if not -x.dim() <= dim < x.dim() or sizes[i][dim] % pieces:
                split = "" if out[i] == [] else f", {tuple(sizes[i])} after other splits,"
                raise BatchError(
                    f"{name}: batch{path} of shape {tuple(x.shape)}{split} does not split along dim {dim} into {into}; "
                    f"change the batch, or name another dim for this leaf (dims=..., None hands it out whole)"
                )
            sizes[i][dim] //= pieces
            out[i].append(Cutting(dim % x.dim(), pieces, axes))
    return [tuple(c) for c in out]


def _dims(name: str, dims: Any, batch: Any) -> list[Any]:
    bare = tree.without_data(batch)
    try:
        out = tree.broadcast_prefix(dims, bare)
    except ValueError as error:
        raise BatchError(
            f"{name}: dims={dims!r} is not a prefix of the batch {bare!r}: {str(error).rstrip('.')}. Write one dim for the whole batch, or a "
            "tree with the batch's keys"
        ) from None
    for d in out:
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise BatchError(f"{name}: dims={dims!r} holds {d!r}; a dim is an int, or None to hand a leaf out whole")
    return out


def signature(batch: Any) -> tuple:
    """What a plan depends on: structure, shapes, dtypes, and every value that is not a tensor."""
    leaves, spec = tree.flatten(batch)
    return spec, tuple(
        (tuple(x.shape), x.dtype, x.device.type) if isinstance(x, torch.Tensor) else (type(x), x) for x in leaves
    )
