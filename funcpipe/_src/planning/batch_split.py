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

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

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

    def shape(
        self, ready: int, leaf: int, shape: tuple[int, ...], sequence_rank: int = 0
    ) -> tuple[int, ...]:
        """The shape of a leaf in one microbatch of a rank."""
        sizes = list(shape)
        for cut in self.cuts[ready][leaf]:
            if cut.part:
                sizes[cut.dim] = cut.part.length(sequence_rank)
            else:
                sizes[cut.dim] //= cut.pieces
        return tuple(sizes)

    def row_shape(self, ready: int, leaf: int, shape: tuple[int, ...]) -> tuple[int, ...]:
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
        leaves = itertools.chain.from_iterable(self.cuts)
        return tuple(itertools.chain.from_iterable(leaves))

    @cached_property
    def layouts(self) -> tuple[SequenceLayout, ...]:
        """Every way in which positions are split: one for every length."""
        return tuple(dict.fromkeys(cut.part for cut in self.all_cuts if cut.part))

    # ---- ranks

    @property
    def sequence_ranks(self) -> int:
        """Over how many ranks a sequence is split."""
        return self.layouts[0].members if self.layouts else 1

    def split_rank(self, rank: int) -> int:
        """The split rank of a rank of the mesh."""
        dealt = self.mesh.index(rank, self.dealt) if self.dealt else 0
        sequence = self.mesh.index(rank, self.layouts[0].axes) if self.layouts else 0
        return dealt * self.sequence_ranks + sequence

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
        for split_rank in range(self.mesh.axis_size(self.dealt) * self.sequence_ranks):
            shapes = self._shapes(split_rank)
            found[split_rank] = first_with.setdefault(shapes, split_rank)
        return found

    def _shapes(self, split_rank: int) -> tuple:
        kinds = [self.kinds[ready] for ready in self.ready_of(split_rank)]
        sequence_rank = self.sequence_rank(split_rank)
        lengths = [layout.variant(sequence_rank) for layout in self.layouts]
        return tuple(kinds), tuple(lengths)

    # ---- data

    def local_leaves(self, batch: Any, rank: int) -> list[list[Any]]:
        """The leaves of every microbatch of a rank; tensors contiguous."""
        split_rank, is_ready = self.split_rank(rank), isinstance(batch, Microbatches)
        sequence_rank = self.sequence_rank(split_rank)
        parts = _ready_microbatches(batch)
        out: list[list[Any]] = [[] for _ in range(self.microbatches)]
        for number, ready in enumerate(self.ready_of(split_rank)):
            leaves = self.specs[ready].flatten_up_to(parts[ready])
            targets = [number] if is_ready else range(self.microbatches)
            for leaf, cuts in zip(leaves, self.cuts[ready], strict=True):
                pieces = self._pieces(leaf, cuts, rank, sequence_rank)
                for microbatch in targets:
                    piece = pieces[0] if len(pieces) == 1 else pieces[microbatch]
                    out[microbatch].append(piece)
        return out

    def own_rows(self, batch: Any) -> Any:
        """A whole batch as the loss function sees it on one device. Where ranks get batches of
        their own, results of earlier calls have the rows of all ranks; those of rank 0 are
        taken."""
        if not self.local:
            return batch
        parts = []
        for number, part in enumerate(_ready_microbatches(batch)):
            spec = self.specs[number]
            own = []
            for leaf, cuts in zip(spec.flatten_up_to(part), self.cuts[number], strict=True):
                over_axes = tuple(cut for cut in cuts if cut.axes and not cut.part)
                own.append(self._pieces(leaf, over_axes, 0, 0)[0])
            parts.append(pytree.unflatten(spec, own))
        return Microbatches(parts) if isinstance(batch, Microbatches) else parts[0]

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
                pieces = list(torch.chunk(pieces[0], cut.pieces, cut.dim))
        return [_dense(piece) for piece in pieces]

    # ---- text

    @property
    def counts(self) -> str:
        """How much is split, in one line."""
        leaves = 0
        for ready in self.cuts:
            leaves += sum(map(bool, ready))
        brought = f", {len(self.specs)} of them ready" if len(self.specs) > 1 else ""
        return (
            f"microbatches of a rank: {self.microbatches}{brought}, leaves split: {leaves}, "
            f"sequence ranks: {self.sequence_ranks}"
        )

    def __str__(self) -> str:
        lines = [self.counts]
        for number, spec in enumerate(self.specs):
            of_leaves = self.cuts[number]
            paths = pytree.paths(pytree.unflatten(spec, range(len(of_leaves))))
            name = f"batch.parts[{number}]" if len(self.specs) > 1 else "batch"
            for path, cuts in zip(paths, of_leaves, strict=True):
                ways = ", then ".join(map(_cut_text, cuts)) or "whole"
                lines.append(f"  {name}{path}: {ways}")
        return "\n".join(lines)


def _cut_text(cut: LeafCut) -> str:
    over = f"over {', '.join(cut.axes)}" if cut.axes else "into microbatches"
    what = "positions" if cut.part else "rows"
    return f"{what} along dim {cut.dim} by {cut.pieces} {over}"


def _ranges(whole: torch.Tensor, dim: int, ranges: Iterable[tuple[int, int]]) -> torch.Tensor:
    found = [whole.narrow(dim, start, end - start) for start, end in ranges]
    if not found:
        return whole.narrow(dim, 0, 0)
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _dense(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, torch.Tensor) else leaf


def _ready_microbatches(batch: Any) -> list[Any]:
    return list(batch.parts) if isinstance(batch, Microbatches) else [batch]


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
    for part, made in zip(parts, _ready_microbatches(origins), strict=True):
        of_leaves = pytree.leaves(made)
        cuts.append(leaf_cuts(resolved, part, of_leaves, is_ready, dealt))
        rows.append(row_cuts(resolved, part, of_leaves, pieces, dealt))
    return BatchSplit(
        mesh=resolved.mesh,
        microbatches=pieces // resolved.mesh.axis_size(dealt),
        cuts=tuple(cuts),
        specs=tuple(pytree.flatten(part)[1] for part in parts),
        dealt=dealt,
        kinds=tuple(map(signature, parts)),
        local=resolved.local,
        rows=tuple(rows),
    )


def _count(resolved: ResolvedStep, batch: Any) -> int:
    """The number of microbatches that a transform asks for, or the batch brings."""
    brought = len(batch.parts) if isinstance(batch, Microbatches) else None
    spec, split = resolved.microbatch_spec, resolved.microbatch_split
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
        if isinstance(leaf, torch.Tensor):
            kinds.append((tuple(leaf.shape), leaf.dtype, leaf.device.type))
        else:
            kinds.append(key_of(leaf))
    return spec, tuple(kinds)
