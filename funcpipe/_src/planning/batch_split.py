"""Batch split: which part of a batch each rank gets, in which microbatches.

Data axes are major, in mesh order; microbatches are minor: a rank's microbatch ``m`` is the
``m``-th piece of the rows that its index on the data axes gets. Of its positions a rank gets those
of its *sequence rank* (`functional/sequence_layout.py`), in every microbatch; their number need not
divide, so that not all ranks have the same shapes. A 0-d leaf, and anything that is not a tensor,
goes to everyone whole. Ready microbatches whose rows do not divide are *dealt*: each goes whole to
one index on the data axes, equally many to each, in order.

In: the transforms that split, a batch. Out: `BatchSplit`, which hands a rank its microbatches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.analysis.call_results import Origin
from funcpipe._src.core import pytree
from funcpipe._src.core.batch_leaves import key_of
from funcpipe._src.core.loss_types import Microbatches, check_microbatches
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.functional.leaf_cut import LeafCut
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.planning.leaf_cuts import Cuts, dealt_over, leaf_cuts, row_cuts
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import BatchError

Range = tuple[int, int]  # start and end
Shape = tuple[int, ...]


@dataclass(frozen=True)
class BatchSplit:
    """How a batch of one structure and shape is split.

    A *split rank* says what shapes a rank has: its index on the axes over which microbatches are
    dealt, then its sequence rank.

    Args:
        mesh: the mesh.
        microbatches: how many a rank has.
        cuts: for every ready microbatch (one, unless the batch is `Microbatches`), for every leaf,
            in the order in which they are made: rows, microbatches, positions.
        specs: the structure of every ready microbatch.
        dealt: the axes over which ready microbatches are dealt.
        kinds: the `signature` of every ready microbatch.
        local: whether every rank gets a batch of its own rows.
        rows: like ``cuts``, how the rows of the whole batch are cut, also where a rank's batch is
            its own rows already, or a ready microbatch.
    """

    mesh: Mesh
    microbatches: int
    cuts: tuple[tuple[Cuts, ...], ...]
    specs: tuple[Any, ...]
    dealt: Axes = ()
    kinds: tuple[Any, ...] = ()
    local: bool = False
    rows: tuple[tuple[Cuts, ...], ...] = ()

    # ---- shapes

    def shape(self, ready: int, leaf: int, shape: Shape, sequence_rank: int = 0) -> Shape:
        """The shape of a leaf in one microbatch of a rank."""
        sizes = list(shape)
        for cut in self.cuts[ready][leaf]:
            if cut.part:
                sizes[cut.dim] = cut.part.length(sequence_rank)
            else:
                sizes[cut.dim] //= cut.pieces
        return tuple(sizes)

    def row_shape(self, ready: int, leaf: int, shape: Shape) -> Shape:
        """The shape of a leaf in one microbatch of a rank, with all positions."""
        sizes = list(shape)
        for cut in self.cuts[ready][leaf]:
            if not cut.part:
                sizes[cut.dim] //= cut.pieces
        return tuple(sizes)

    def sequence(self, ready: int, leaf: int) -> tuple[int, SequenceLayout] | None:
        """Along which dim the positions of a leaf are split, and how; None where they are not."""
        for cut in self.cuts[ready][leaf]:
            if cut.part:
                return cut.dim, cut.part
        return None

    @cached_property
    def all_cuts(self) -> tuple[LeafCut, ...]:
        """The cuts of all leaves."""
        found: list[LeafCut] = []
        for of_leaves in self.cuts:
            for cuts in of_leaves:
                found.extend(cuts)
        return tuple(found)

    @cached_property
    def layouts(self) -> tuple[SequenceLayout, ...]:
        """Every way in which positions are split: one for every length."""
        found = [cut.part for cut in self.all_cuts if cut.part]
        return tuple(dict.fromkeys(found))

    # ---- ranks

    @property
    def sequence_ranks(self) -> int:
        """Over how many ranks a sequence is split."""
        return self.layouts[0].members if self.layouts else 1

    def split_rank(self, rank: int) -> int:
        """The split rank of a rank of the mesh."""
        mesh = self.mesh
        index = 0
        if self.dealt:
            index = mesh.index(rank, self.dealt) * self.sequence_ranks
        if self.layouts:
            layout = self.layouts[0]
            index += mesh.index(rank, layout.axes)
        return index

    def sequence_rank(self, split_rank: int) -> int:
        """The sequence rank of a split rank."""
        return split_rank % self.sequence_ranks

    def ready_of(self, split_rank: int) -> range:
        """The ready microbatches of a split rank."""
        if not self.dealt:
            return range(len(self.specs))
        first = split_rank // self.sequence_ranks * self.microbatches
        return range(first, first + self.microbatches)

    @cached_property
    def variant_of(self) -> dict[int, int]:
        """For every split rank the first one that has the same shapes."""
        first_with: dict[tuple, int] = {}
        found = {}
        indices = self.mesh.axis_size(self.dealt)
        for split_rank in range(indices * self.sequence_ranks):
            shapes = self._shapes(split_rank)
            found[split_rank] = first_with.setdefault(shapes, split_rank)
        return found

    def _shapes(self, split_rank: int) -> tuple:
        all_ready = self.ready_of(split_rank)
        kinds = [self.kinds[ready] for ready in all_ready]
        sequence_rank = self.sequence_rank(split_rank)
        lengths = [layout.variant(sequence_rank) for layout in self.layouts]
        return tuple(kinds), tuple(lengths)

    # ---- data

    def local_leaves(self, batch: Any, rank: int) -> list[list[Any]]:
        """The leaves of every microbatch of a rank; tensors contiguous."""
        split_rank = self.split_rank(rank)
        sequence_rank = self.sequence_rank(split_rank)
        is_ready = isinstance(batch, Microbatches)
        parts = _ready_microbatches(batch)
        found: list[list[Any]] = [[] for _ in range(self.microbatches)]
        for number, ready in enumerate(self.ready_of(split_rank)):
            microbatches = [number] if is_ready else range(self.microbatches)
            for leaf, cuts in self._cut_leaves(ready, parts[ready]):
                pieces = self._pieces(leaf, cuts, rank, sequence_rank)
                is_same = len(pieces) == 1
                for microbatch in microbatches:
                    piece = pieces[0] if is_same else pieces[microbatch]
                    found[microbatch].append(piece)
        return found

    def _cut_leaves(self, ready: int, part: Any) -> Iterator[tuple[Any, Cuts]]:
        """The leaves of a ready microbatch, each with its cuts."""
        leaves = self.specs[ready].flatten_up_to(part)
        return zip(leaves, self.cuts[ready], strict=True)

    def own_rows(self, batch: Any) -> Any:
        """A whole batch as the loss function sees it on one device. Where ranks get batches of
        their own, results of earlier calls have the rows of all ranks; those of rank 0 are
        taken."""
        if not self.local:
            return batch
        parts = []
        for ready, part in enumerate(_ready_microbatches(batch)):
            own = []
            for leaf, cuts in self._cut_leaves(ready, part):
                over_axes = tuple(cut for cut in cuts if cut.axes and not cut.part)
                (piece,) = self._pieces(leaf, over_axes, 0, 0)
                own.append(piece)
            parts.append(pytree.unflatten(self.specs[ready], own))
        if isinstance(batch, Microbatches):
            return Microbatches(parts)
        return parts[0]

    def _pieces(self, leaf: Any, cuts: Cuts, rank: int, sequence_rank: int) -> list[Any]:
        """What a rank has of a leaf: one piece for every microbatch, or one for all."""
        pieces = [leaf]
        for cut in cuts:
            if cut.part:
                ranges = cut.part.ranges(sequence_rank)
                pieces = [_ranges(piece, cut.dim, ranges) for piece in pieces]
            elif cut.axes:
                (whole,) = pieces  # rows over axes are cut before microbatches
                size = whole.shape[cut.dim] // cut.pieces
                start = self.mesh.index(rank, cut.axes) * size
                pieces = [whole.narrow(cut.dim, start, size)]
            else:
                chunks = torch.chunk(pieces[0], cut.pieces, cut.dim)
                pieces = list(chunks)
        return [_dense(piece) for piece in pieces]

    # ---- text

    @property
    def counts(self) -> str:
        """How much is split, in one line."""
        leaves = 0
        for of_leaves in self.cuts:
            leaves += sum(map(bool, of_leaves))
        ready = len(self.specs)
        brought = f", {ready} of them ready" if ready > 1 else ""
        return (
            f"microbatches of a rank: {self.microbatches}{brought}, leaves split: {leaves}, "
            f"sequence ranks: {self.sequence_ranks}"
        )

    def __str__(self) -> str:
        lines = [self.counts]
        for number, spec in enumerate(self.specs):
            of_leaves = self.cuts[number]
            leaf_numbers = range(len(of_leaves))
            paths = pytree.paths(pytree.unflatten(spec, leaf_numbers))
            name = f"batch.parts[{number}]" if len(self.specs) > 1 else "batch"
            for path, cuts in zip(paths, of_leaves, strict=True):
                ways = ", then ".join(map(_cut_text, cuts)) or "whole"
                lines.append(f"  {name}{path}: {ways}")
        return "\n".join(lines)


def _cut_text(cut: LeafCut) -> str:
    over = f"over {', '.join(cut.axes)}" if cut.axes else "into microbatches"
    what = "positions" if cut.part else "rows"
    return f"{what} along dim {cut.dim} by {cut.pieces} {over}"


def _ranges(whole: Tensor, dim: int, ranges: Iterable[Range]) -> Tensor:
    found = []
    for start, end in ranges:
        length = end - start
        found.append(whole.narrow(dim, start, length))
    if not found:
        return whole.narrow(dim, 0, 0)
    if len(found) == 1:
        return found[0]
    return torch.cat(found, dim)


def _dense(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.contiguous()
    return leaf


def _ready_microbatches(batch: Any) -> list[Any]:
    if isinstance(batch, Microbatches):
        return list(batch.parts)
    return [batch]


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
    is_ready = isinstance(batch, Microbatches)
    if is_ready:
        check_microbatches(batch)
    count = _count(resolved, batch)
    if origins is None:
        origins = pytree.map(lambda _: Origin.BATCH, batch)
    parts = _ready_microbatches(batch)
    dealt = dealt_over(resolved, parts) if is_ready else ()
    pieces = len(parts) if is_ready else count
    cuts, rows = [], []
    origins_of_parts = _ready_microbatches(origins)
    for part, origin in zip(parts, origins_of_parts, strict=True):
        of_leaves = pytree.leaves(origin)
        cuts.append(leaf_cuts(resolved, part, of_leaves, is_ready, dealt))
        rows.append(row_cuts(resolved, part, of_leaves, pieces, dealt))
    return BatchSplit(
        mesh=resolved.mesh,
        microbatches=pieces // resolved.mesh.axis_size(dealt),
        cuts=tuple(cuts),
        specs=tuple(map(_spec_of, parts)),
        dealt=dealt,
        kinds=tuple(map(signature, parts)),
        local=resolved.local,
        rows=tuple(rows),
    )


def _spec_of(part: Any) -> Any:
    _, spec = pytree.flatten(part)
    return spec


def _count(resolved: ResolvedStep, batch: Any) -> int:
    """The number of microbatches that a transform asks for, or the batch brings."""
    brought = len(batch.parts) if isinstance(batch, Microbatches) else None
    spec = resolved.microbatch_spec
    split = resolved.microbatch_split
    if spec is None or split is None:
        return brought or 1
    if brought is not None and split.count not in (None, brought):
        raise BatchError(
            f"{spec.name} asks for {split.count} microbatches, but the batch brings "
            f"{brought}; pass microbatches=None to take what the batch brings"
        )
    if brought is None and split.count is None:
        raise BatchError(
            f"{spec.name}(microbatches=None) takes ready microbatches, but the batch is "
            f"a {type(batch).__name__}; pass fp.Microbatches([...]) or say how many"
        )
    return brought or split.count or 1


def signature(batch: Any) -> tuple:
    """What a plan depends on: structure, shapes, dtypes, and every value that is not a tensor."""
    leaves, spec = pytree.flatten(batch)
    kinds = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            shape = tuple(leaf.shape)
            kinds.append((shape, leaf.dtype, leaf.device.type))
        else:
            kinds.append(key_of(leaf))
    return spec, tuple(kinds)
