"""The batch: how its leaves are split over mesh axes and into microbatches.

Data axes are major, in mesh order; microbatches are minor: a rank's microbatch ``m`` is the
``m``-th piece of the rows that its place on the data axes gets. Of its positions a rank gets those
of its *member* number (`functional/sequence_layout.py`), in every microbatch; their number need not
divide, so that not all ranks have the same shapes. A 0-d leaf, and anything that is not a tensor,
goes to everyone whole. Ready microbatches whose rows do not divide are *dealt*: each goes whole to
one place on the data axes, equally many to each, in order.

In: the records that split, a batch. Out: `BatchSplit`, which hands a rank its microbatches, or a
BatchError with the path of the leaf that cannot be split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from funcpipe._src.analysis.call_results import Origin
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import as_dicts, key_of
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.step import Microbatches, check_microbatches
from funcpipe._src.functional.leaf_cut import LeafCut
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe._src.spec.transform_spec import TransformSpec
from funcpipe.errors import BatchError

_DEAL = (
    ". Ready microbatches are dealt whole where their number is a multiple of the number of shards"
)


@dataclass(frozen=True)
class BatchSplit:
    """How a batch of one structure and shape is split.

    Args:
        mesh: the mesh.
        count: the number of microbatches of a rank.
        cuttings: for every ready microbatch (one, unless the batch is `Microbatches`), for every
            leaf, its splits, in the order in which they are made: rows, microbatches, positions.
        specs: the structure of every ready microbatch.
        dealt: the axes over which ready microbatches are dealt.
        kinds: the `signature` of every ready microbatch.
        local: whether every rank gets a batch of its own rows.
        rows: like ``cuttings``, how the rows of the whole batch are split, also where a rank's
            batch is its own rows already, or a ready microbatch.
    """

    mesh: Mesh
    count: int
    cuttings: tuple[tuple[tuple[LeafCut, ...], ...], ...]
    specs: tuple[Any, ...]
    dealt: Axes = ()
    kinds: tuple[Any, ...] = ()
    local: bool = False
    rows: tuple[tuple[tuple[LeafCut, ...], ...], ...] = ()

    @property
    def all_cuts(self) -> list[LeafCut]:
        """The splits of all leaves."""
        leaves = itertools.chain.from_iterable(self.cuttings)
        return list(itertools.chain.from_iterable(leaves))

    @property
    def counts(self) -> str:
        """How much is split, in one line."""
        leaves = sum(bool(cuts) for part in self.cuttings for cuts in part)
        ready = f", {len(self.specs)} of them ready" if len(self.specs) > 1 else ""
        sizes = f"sequence ranks: {self.slices}"
        return f"microbatches of a rank: {self.count}{ready}, leaves split: {leaves}, {sizes}"

    def __str__(self) -> str:
        lines = [self.counts]
        for number, (spec, part) in enumerate(zip(self.specs, self.cuttings, strict=True)):
            paths = tree.paths(tree.unflatten(spec, range(len(part))))
            name = f"batch.parts[{number}]" if len(self.specs) > 1 else "batch"
            for path, cuts in zip(paths, part, strict=True):
                ways = ", then ".join(map(_cut_text, cuts)) or "whole"
                lines.append(f"  {name}{path}: {ways}")
        return "\n".join(lines)

    def shape(
        self, part: int, leaf: int, shape: tuple[int, ...], member: int = 0
    ) -> tuple[int, ...]:
        """The shape of a leaf in one microbatch of a rank with this member number."""
        out, member = list(shape), self.slice_of(member)
        for c in self.cuttings[part][leaf]:
            out[c.dim] = c.part.length(member) if c.part else out[c.dim] // c.pieces
        return tuple(out)

    def row_shape(self, part: int, leaf: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a leaf in one microbatch of a rank, with all positions."""
        out = list(shape)
        for c in self.cuttings[part][leaf]:
            out[c.dim] //= 1 if c.part else c.pieces
        return tuple(out)

    def sequence(self, part: int, leaf: int) -> tuple[int, SequenceLayout] | None:
        """Along which dim positions of a leaf are split, and how; None if they are not."""
        return next(((c.dim, c.part) for c in self.cuttings[part][leaf] if c.part), None)

    @property
    def parts(self) -> tuple[SequenceLayout, ...]:
        """Every way in which positions are split: one for every length."""
        return tuple(
            dict.fromkeys(c.part for leaves in self.cuttings for cs in leaves for c in cs if c.part)
        )

    @property
    def slices(self) -> int:
        """Over how many ranks a sequence is split."""
        return self.parts[0].members if self.parts else 1

    def member(self, rank: int) -> int:
        """The member number of a rank, which says what shapes it has: by its place where
        microbatches are dealt, then by its slice of the sequence."""
        place = self.mesh.index(rank, self.dealt) if self.dealt else 0
        return place * self.slices + (
            self.mesh.index(rank, self.parts[0].axes) if self.parts else 0
        )

    def slice_of(self, member: int) -> int:
        """Which slice of the sequence a member has."""
        return member % self.slices

    def ready_of(self, member: int) -> range:
        """The ready microbatches of a member."""
        if not self.dealt:
            return range(len(self.specs))
        first = member // self.slices * self.count
        return range(first, first + self.count)

    def variants(self) -> dict[int, int]:
        """For every member number the first one that has the same shapes."""
        first: dict[Any, int] = {}
        return {
            m: first.setdefault(self._variant(m), m)
            for m in range(self.mesh.axis_size(self.dealt) * self.slices)
        }

    def _variant(self, member: int) -> tuple:
        shapes = tuple(self.kinds[i] for i in self.ready_of(member))
        return shapes, tuple(p.variant(self.slice_of(member)) for p in self.parts)

    def microbatches(self, batch: Any, rank: int) -> list[list[Any]]:
        """The leaves of every microbatch of a rank; tensors contiguous."""
        member, ready = self.member(rank), isinstance(batch, Microbatches)
        parts = batch.parts if ready else [batch]
        out: list[list[Any]] = [[] for _ in range(self.count)]
        for k, i in enumerate(self.ready_of(member)):
            for leaf, cuttings in zip(
                self.specs[i].flatten_up_to(parts[i]), self.cuttings[i], strict=True
            ):
                pieces = self._pieces(leaf, cuttings, rank, self.slice_of(member))
                for m in [k] if ready else range(self.count):
                    out[m].append(pieces[0 if len(pieces) == 1 else m])
        return out

    def own_rows(self, batch: Any) -> Any:
        """A whole batch as the loss function sees it on one device. Where ranks get batches of
        their own, results of earlier calls have the rows of all ranks; those of rank 0 are
        taken."""
        if not self.local:
            return batch
        parts = []
        for (spec, part), leaves in zip(self._parts(batch), self.cuttings, strict=True):
            rows = [tuple(c for c in cuttings if c.axes and not c.part) for cuttings in leaves]
            own = [
                self._pieces(x, cs, 0, 0)[0]
                for x, cs in zip(spec.flatten_up_to(part), rows, strict=True)
            ]
            parts.append(tree.unflatten(spec, own))
        return Microbatches(parts) if isinstance(batch, Microbatches) else parts[0]

    def _parts(self, batch: Any) -> list[tuple[Any, Any]]:
        parts = batch.parts if isinstance(batch, Microbatches) else [batch]
        return list(zip(self.specs, parts, strict=True))

    def _pieces(
        self, leaf: Any, cuttings: tuple[LeafCut, ...], rank: int, member: int
    ) -> list[Any]:
        """What a rank has of a leaf: one piece for every microbatch, or one for all."""
        pieces = [leaf]
        for c in cuttings:
            if c.part:
                ranges = c.part.ranges(member)
                pieces = [_ranges(x, c.dim, ranges) for x in pieces]
            elif c.axes:
                size = leaf.shape[c.dim] // c.pieces
                pieces = [
                    x.narrow(c.dim, self.mesh.index(rank, c.axes) * size, size) for x in pieces
                ]
                leaf = pieces[0]
            else:
                pieces = list(torch.chunk(pieces[0], c.pieces, c.dim))
        return [_dense(x) for x in pieces]


def _cut_text(cut: LeafCut) -> str:
    over = f"over {', '.join(cut.axes)}" if cut.axes else "into microbatches"
    what = "positions" if cut.part else "rows"
    return f"{what} along dim {cut.dim} by {cut.pieces} {over}"


def _ranges(x: torch.Tensor, dim: int, ranges: Iterable[tuple[int, int]]) -> torch.Tensor:
    found = [x.narrow(dim, a, b - a) for a, b in ranges]
    return torch.cat(found, dim) if len(found) > 1 else found[0] if found else x.narrow(dim, 0, 0)


def _dense(x: Any) -> Any:
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def split_batch(resolved: ResolvedStep, batch: Any, origins: Any = None) -> BatchSplit:
    """How a batch is split.

    Args:
        origins: a tree like the batch, with an `Origin` for every leaf; None where all come from
            the step's batch.

    Raises:
        BatchError: a leaf that does not divide, a ``dims`` that does not fit the batch, another
            number of ready microbatches than asked for; results of an earlier call that would be
            split and have no rows.
    """
    ready = isinstance(batch, Microbatches)
    asked = resolved.microbatch_split
    count = asked.count if asked else 1
    who = resolved.microbatch_spec.name if resolved.microbatch_spec else ""
    if ready:
        check_microbatches(batch)
    if ready and count not in (None, len(batch.parts)) and asked:
        raise BatchError(
            f"{who} asks for {count} microbatches, but the batch brings "
            f"{len(batch.parts)}; pass microbatches=None to take what the batch brings"
        )
    if count is None and not ready:
        raise BatchError(
            f"{who}(microbatches=None) takes ready microbatches, but the batch is "
            f"a {type(batch).__name__}; pass fp.Microbatches([...]) or say how many"
        )
    parts = list(batch.parts) if ready else [batch]
    dealt = _dealt_over(resolved, parts) if ready else ()
    origins = tree.map(lambda _: Origin.BATCH, batch) if origins is None else origins
    made = list(origins.parts) if ready else [origins]
    cuttings = tuple(
        tuple(_leaf_cuttings(resolved, part, tree.leaves(some), ready, dealt))
        for part, some in zip(parts, made, strict=True)
    )
    specs = tuple(tree.flatten(part)[1] for part in parts)
    pieces = len(parts) if ready else count or 1
    rows = tuple(
        tuple(_row_cuttings(resolved, part, tree.leaves(some), pieces, dealt))
        for part, some in zip(parts, made, strict=True)
    )
    count = len(parts) // resolved.mesh.axis_size(dealt) if ready else count or 1
    return BatchSplit(
        resolved.mesh,
        count,
        cuttings,
        specs,
        dealt,
        tuple(map(signature, parts)),
        resolved.local,
        rows,
    )


def _row_wishes(resolved: ResolvedStep) -> list[tuple[str, Axes, int, Any]]:
    """Who splits rows, over which axes, into how many pieces, along which dims."""
    wishes = []
    for spec in resolved.row_specs:
        split = spec.split_rows()
        assert split is not None
        wishes.append((spec.name, spec.axes, resolved.mesh.axis_size(spec.axes), split.dims))
    return wishes


def _row_cuttings(
    resolved: ResolvedStep, batch: Any, origins: list[Origin], microbatches: int, dealt: Axes
) -> list[tuple[LeafCut, ...]]:
    """How the rows of every leaf are split, whoever does it."""
    wanted = [] if dealt else _row_wishes(resolved)
    spec, asked = resolved.microbatch_spec, resolved.microbatch_split
    name, dims = spec.name if spec else "", asked.dims if asked else 0
    wanted.append((name, (), microbatches, dims))
    leaves = tree.leaves(batch)
    out: list[list[LeafCut]] = [[] for _ in leaves]
    for name, axes, pieces, dims in wanted:
        for cuts, x, origin, dim in zip(
            out, leaves, origins, _dims(name, dims, batch), strict=True
        ):
            whole = (
                axes and resolved.local and not origin
            )  # a loss, or the like: all ranks have the same
            if dim is not None and isinstance(x, torch.Tensor) and x.dim() and not whole:
                cuts.append(LeafCut(dim % x.dim(), pieces, axes))
    return [tuple(c) for c in out]


def _dealt_over(resolved: ResolvedStep, parts: list[Any]) -> Axes:
    """The axes over which ready microbatches are dealt, since their rows do not divide; none if
    they are cut."""
    axes = () if resolved.local else resolved.row_axes
    if not axes or len(parts) % resolved.mesh.axis_size(axes):
        return ()
    return () if all(_rows_divide(resolved, part) for part in parts) else axes


def _rows_divide(resolved: ResolvedStep, part: Any) -> bool:
    leaves = tree.leaves(part)
    pieces = [
        dict.fromkeys(range(-x.dim(), x.dim()), 1) if isinstance(x, torch.Tensor) else {}
        for x in leaves
    ]
    for name, _, parts, dims in _row_wishes(resolved):
        for x, cut, dim in zip(leaves, pieces, _dims(name, dims, part), strict=True):
            if dim in cut:
                cut[dim % x.dim()] *= parts
    return all(
        x.shape[dim] % n == 0
        for x, cut in zip(leaves, pieces, strict=True)
        for dim, n in cut.items()
    )


def _leaf_cuttings(
    resolved: ResolvedStep, batch: Any, origins: list[Origin], ready: bool, dealt: Axes
) -> list[tuple[LeafCut, ...]]:
    has_all_rows = not resolved.local or any(Origin.ROWS in o for o in origins)
    wanted = _row_wishes(resolved) if has_all_rows and not dealt else []
    spec, asked = resolved.microbatch_spec, resolved.microbatch_split
    if spec and asked and not ready:
        wanted.append((spec.name, (), asked.count or 1, asked.dims))
    leaves = list(zip(tree.paths(batch), tree.leaves(batch), strict=True))
    out: list[list[LeafCut]] = [[] for _ in leaves]
    sizes = [list(x.shape) if isinstance(x, torch.Tensor) else [] for _, x in leaves]
    for name, axes, pieces, dims in wanted:
        for i, ((path, x), dim) in enumerate(zip(leaves, _dims(name, dims, batch), strict=True)):
            if dim is None or not isinstance(x, torch.Tensor) or x.dim() == 0:
                continue
            if axes and resolved.local and not _has_all_rows(f"batch{path}", origins[i]):
                continue
            if pieces > 1 and not origins[i]:
                raise BatchError(
                    NO_ROWS.format(name=name, path=path, shape=tuple(x.shape), dim=dim)
                )
            into = (
                f"{pieces} microbatches"
                if not axes
                else f"{pieces} shards over {', '.join(map(repr, axes))}"
            )
            if not -x.dim() <= dim < x.dim() or sizes[i][dim] % pieces:
                split = "" if out[i] == [] else f", {tuple(sizes[i])} after other splits,"
                raise BatchError(
                    f"{name}: batch{path} of shape {tuple(x.shape)}{split} does not split along "
                    f"dim {dim} into {into}; leave the last rows out (drop_last=True of a "
                    "DataLoader), pad with rows of weight 0, or name another dim for this leaf "
                    f"(dims=..., None hands it out whole){_DEAL * ready}"
                )
            sizes[i][dim] //= pieces
            out[i].append(LeafCut(dim % x.dim(), pieces, axes))
    _cut_sequences(resolved, batch, leaves, sizes, out)
    return [tuple(c) for c in out]


NO_ROWS = (
    "{name}: batch{path} of shape {shape} is computed from a loss, fp.Mean or norm of an earlier "
    "value_and_grad, which has no rows, and would be split along dim {dim}: give it None in "
    "dims=..., which hands it out whole"
)


def _has_all_rows(name: str, origin: Origin) -> bool:
    """Whether a leaf has the rows of all ranks, though every rank gets a batch of its own."""
    if Origin.ROWS in origin and Origin.BATCH in origin:
        raise BatchError(
            f"{name} is computed from fp.Rows of an earlier value_and_grad, which has the rows of "
            "all ranks, and from a tensor of the batch, which has this rank's alone "
            "(batch='local'): pass both through the batch and combine them in the loss function, "
            "or use batch='global'"
        )
    return Origin.ROWS in origin


def _cut_sequences(
    resolved: ResolvedStep,
    batch: Any,
    leaves: list[tuple[str, Any]],
    sizes: list[list[int]],
    out: list[list[LeafCut]],
) -> None:
    """Add how positions are split: by all records that do so together."""
    records = resolved.sequence_specs
    if not records:
        return
    asked = [(spec.name, spec.split_positions()) for spec in records]
    found = [_dims(name, split.dims, batch) for name, split in asked if split]
    for i, ((path, x), *dims) in enumerate(zip(leaves, *found, strict=True)):
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            continue
        for r, dim in zip(records, dims, strict=True):
            if dim is not None and not -x.dim() <= dim < x.dim():
                raise BatchError(
                    f"{r.name}: batch{path} of shape {tuple(x.shape)} has no dim {dim} to split "
                    "the sequence along; name another dim for this leaf (dims=..., None hands it "
                    "out whole)"
                )
        places = {None if d is None else d % x.dim() for d in dims}
        if len(places) > 1:
            raise BatchError(
                f"{' and '.join(map(str, records))} split batch{path} along dims "
                f"{' and '.join(map(str, dims))}: give both the same dims=..., since they cut one "
                "sequence"
            )
        if (dim := places.pop()) is not None:
            part = _part(records, resolved.mesh, sizes[i][dim])
            out[i].append(LeafCut(dim, part.members, part.axes, part))


def _part(records: tuple[TransformSpec, ...], mesh: Mesh, size: int) -> SequenceLayout:
    axes: dict[str, list[str]] = {"ring": [], "heads": []}
    zigzag = False
    for spec in records:
        split = spec.split_positions()
        assert split is not None
        axes[split.attention] += spec.axes
        zigzag = zigzag or split.zigzag
    ring, heads = tuple(axes["ring"]), tuple(axes["heads"])
    zigzag = zigzag and mesh.axis_size(ring) > 1
    return SequenceLayout(size, ring, heads, mesh.axis_size(ring), mesh.axis_size(heads), zigzag)


def _dims(name: str, dims: Any, batch: Any) -> list[Any]:
    bare = tree.without_data(as_dicts(batch))
    try:
        out = tree.broadcast_prefix(dims, bare)
    except ValueError as error:
        raise BatchError(
            f"{name}: dims={dims!r} is not a prefix of the batch {bare!r}: "
            f"{str(error).rstrip('.')}. Write one dim for the whole batch, or a tree with the "
            "batch's keys"
        ) from None
    for d in out:
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise BatchError(
                f"{name}: dims={dims!r} holds {d!r}; a dim is an int, or None to hand a leaf out "
                "whole"
            )
    return out


def signature(batch: Any) -> tuple:
    """What a plan depends on: structure, shapes, dtypes, and every value that is not a tensor."""
    leaves, spec = tree.flatten(batch)
    return spec, tuple(
        (tuple(x.shape), x.dtype, x.device.type) if isinstance(x, torch.Tensor) else key_of(x)
        for x in leaves
    )
