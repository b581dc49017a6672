"""The proof that the rows of a batch that is split do not meet inside a loss: what its parts
compute adds up to what one device computes.

A *part* of the batch is a microbatch of a shard: data axes and microbatches split rows, and
microbatches count as one more axis, which no collective can name. The proof is that of sequences
(`verify.py`), along another dim, and on whole sequences: the loss function is run with the rows of
a part and with those of the whole batch. Here is which dims are split. Nothing may mix rows but a
declared batch statistic (`functional/batch_statistic.py`).

Where two transforms split a leaf along two dims, each of them is proven by itself, on what the one
before it leaves.

In: a loss function; fakes of params and of one part. Out: nothing, or a BatchError that names the
op, its line, the reason and what to write instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import line_of
from funcpipe._src.functional.leaf_cut import LeafCut
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.trace_errors import explain
from funcpipe._src.proof.align import Alignment, text
from funcpipe._src.proof.loss_runs import LossRun, Subject
from funcpipe._src.proof.placements import Placement, Replicate, Shard, Sizes, SplitContext
from funcpipe._src.proof.propagate import Proof
from funcpipe._src.proof.recording import NAMED
from funcpipe._src.proof.row_loss import RowLossCheck
from funcpipe._src.proof.words import Words, words_of_rows
from funcpipe.errors import BatchError, FuncpipeError, SequenceError

MICROBATCHES = "microbatches of a rank"  # the axis of a cut without axes; no mesh has such a name
Leaves = list[Any]
Cuts = Sequence[Sequence[LeafCut]]  # of every leaf, how its rows are split


@dataclass(frozen=True)
class RowLayout:
    """How the rows of some leaves are split.

    Args:
        size: the number of rows of the whole batch; of leaves that have several entries for a row,
            of groups of entries.
        axes: that split them, major first.
    """

    size: int
    axes: Axes


def prove_rows(
    subject: Subject,
    local: Leaves,
    cuts: Cuts,
    mesh: Mesh,
    ready: bool = False,
    dealt: Axes = (),
) -> bool:
    """Prove that the parts of a batch compute what one device does.

    Args:
        subject: the loss function.
        local: the leaves of one part, with whole sequences: fakes, or no tensors.
        cuts: of every leaf, in the order in which they are made.
        mesh: the mesh, with one rank on the axes of sequences.
        ready: whether microbatches came as such: rows of one may meet, but its total may not be a
            mean.
        dealt: the axes over which these are dealt, each to one rank: a collective would join two of
            them.

    Returns:
        whether there are no numbers of 16 bits, of which sums are not exact.

    Raises:
        BatchError: it cannot be proven.
        FuncpipeError: the loss function is wrong on one device, too.
    """
    if ready:
        _check_ready(subject, local, cuts, mesh, dealt)
        cuts = list(map(_over_axes, cuts))
    groups = _groups(cuts)
    exact = bool(groups)
    for place, group in enumerate(groups):
        later: list[str] = []
        for other in groups[place + 1 :]:
            later += other
        with _errors_of_rows():
            proof = _RowProof(subject, local, cuts, mesh, group, later)
            proof.check()
        exact = exact and not _has_16_bits(proof.on_part)
    return exact


def _has_16_bits(run: LossRun) -> bool:
    for entry in run.recording.entries:
        if any(out.dtype.itemsize == 2 for out in entry.outs):
            return True
    return False


def _check_ready(
    subject: Subject,
    local: Leaves,
    cuts: Cuts,
    mesh: Mesh,
    dealt: Axes,
) -> None:
    """The total of a ready microbatch is a sum over its rows, as far as that is known; there is no
    whole batch."""
    twice = list(map(_two_microbatches, cuts))
    for group in _groups(twice):
        with _errors_of_rows():
            proof = _RowProof(subject, local, twice, mesh, group, ())
            _refuse_joining(proof.on_part, dealt)
            proof.check_known()


def _refuse_joining(part: LossRun, dealt: Axes) -> None:
    """Refuse a collective over axes that deal whole microbatches: on one device each is alone."""
    for entry in part.recording.entries:
        if entry.name != NAMED or entry.args["free"]:
            continue
        if not frozenset(entry.args["axes"].split(",")).isdisjoint(dealt):
            raise BatchError(
                f"fp.{entry.args['kind']} over {entry.args['axes']!r}{text(entry.line)}: ready "
                "microbatches whose rows do not divide are dealt to ranks, whole, so it would "
                "join two microbatches, where one device has each alone. Give every microbatch "
                "rows that divide over the axis, or leave the collective out"
            )


@contextlib.contextmanager
def _errors_of_rows() -> Iterator[None]:
    try:
        yield
    except SequenceError as error:
        raise BatchError(str(error)) from error


# ---- which axes split which leaves


def _axes_of(cut: LeafCut) -> Axes:
    return cut.axes or (MICROBATCHES,)


def _over_axes(cuts: Sequence[LeafCut]) -> list[LeafCut]:
    """The cuts that are not into microbatches."""
    return [cut for cut in cuts if cut.axes]


def _two_microbatches(cuts: Sequence[LeafCut]) -> list[LeafCut]:
    """The cuts into microbatches, each into two."""
    return [replace(cut, pieces=2) for cut in cuts if not cut.axes]


def _groups(cuts: Cuts) -> list[Axes]:
    """The axes of every proof: of all cuts together, if no leaf is cut along two dims."""
    found: dict[Axes, None] = {}
    two_dims = False
    for of_leaf in cuts:
        real = [cut for cut in of_leaf if cut.pieces > 1]
        found |= dict.fromkeys(map(_axes_of, real))
        two_dims = two_dims or len({cut.dim for cut in real}) > 1
    if two_dims or not found:
        return list(found)
    together: list[str] = []
    for axes in found:
        together += axes
    return [tuple(together)]


@dataclass(frozen=True)
class _SplitLeaf:
    """A tensor of the batch that a proof splits.

    Args:
        dim: of rows.
        sizes: of that dim, in a part and in the whole batch.
        axes: that split it, major first.
    """

    dim: int
    sizes: Sizes
    axes: Axes


class _RowProof:
    """One proof.

    Args:
        group: the axes that it is about.
        later: those that split what it leaves.
    """

    def __init__(
        self,
        subject: Subject,
        local: Leaves,
        cuts: Cuts,
        mesh: Mesh,
        group: Axes,
        later: Sequence[str],
    ) -> None:
        self.subject = subject
        part = []
        whole = []
        own = []
        for leaf, of_leaf in zip(local, cuts, strict=True):
            in_part = self._before_cuts(leaf, of_leaf, later)
            part.append(in_part)
            whole.append(self._before_cuts(in_part, of_leaf, group))
            own.append([cut for cut in of_leaf if _axes_of(cut)[0] in group and cut.pieces > 1])
        split_leaves = list(map(_split_leaf, part, whole, own))
        layouts = _layouts(split_leaves)
        self.placements = _placements(part, split_leaves, layouts)
        of_part = {axis: 1 if axis in later else count for axis, count in mesh.axes.items()}
        of_one = {axis: 1 if axis in group else count for axis, count in of_part.items()}
        self.on_part = LossRun(subject, part, Mesh(**of_part), Mesh(**of_part))
        named = any(entry.name == NAMED for entry in self.on_part.recording.entries)
        with_microbatches = MICROBATCHES in group
        self.split = SplitContext(
            dict(layouts.values()),
            group,
            rows=True,
            by_hand=_by_hand(part, own) if named and not with_microbatches else frozenset(),
            words=_words(mesh, group),
        )
        self.on_one = LossRun(subject, whole, Mesh(**of_one), Mesh(**of_part))

    def _before_cuts(self, leaf: Any, cuts: Sequence[LeafCut], axes: Sequence[str]) -> Any:
        """A leaf before it was split over some axes."""
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        for cut in cuts:
            if _axes_of(cut)[0] in axes:
                shape[cut.dim] *= cut.pieces
        if shape == list(leaf.shape):
            return leaf
        return fake(shape, leaf, self.subject.mode)

    def check(self) -> None:
        """Raise an error unless it is proven."""
        _raise_errors(self.on_part, self.on_one, self.subject)
        RowLossCheck(self.on_part, self._proof()).check()

    def check_known(self) -> None:
        """Raise an error if what is known does not add up."""
        if self.on_part.error or self.on_one.error:
            return
        try:
            proof = self._proof()
        except SequenceError:
            return
        RowLossCheck(self.on_part, proof).check_known()

    def _proof(self) -> Proof:
        live = frozenset(self.split.live) - {MICROBATCHES}
        words = self.split.words
        recordings = self.on_part.recording, self.on_one.recording
        proof = Proof(Alignment(*recordings, live, rows=True, words=words), self.split, _no_note)
        of_params: list[Placement] = [Replicate()] * (self.on_part.count - len(self.placements))
        proof.run([*of_params, *self.placements])
        return proof


def _no_note(*_: Any) -> None:
    """Where rows are split, known calls run as they are."""


def _words(mesh: Mesh, group: Axes) -> Words:
    axes = mesh.ordered(axis for axis in group if axis in mesh.axes)
    return words_of_rows(axes, MICROBATCHES in group)


def _split_leaf(part: Any, whole: Any, cuts: Sequence[LeafCut]) -> _SplitLeaf | None:
    if not cuts:
        return None
    dim = cuts[0].dim
    axes: list[str] = []
    for cut in cuts:
        axes += _axes_of(cut)
    return _SplitLeaf(dim, (part.shape[dim], whole.shape[dim]), tuple(axes))


def _layouts(leaves: Sequence[_SplitLeaf | None]) -> dict[Axes, tuple[RowLayout, Sizes]]:
    """For all axes over which leaves are split, their layout and its lengths. All rows of a part
    are taken together, so that groups of them may be."""
    by_axes: dict[Axes, list[Sizes]] = {}
    for leaf in leaves:
        if leaf is not None:
            by_axes.setdefault(leaf.axes, []).append(leaf.sizes)
    found = {}
    for axes, sizes in by_axes.items():
        rows = math.gcd(*(full for _, full in sizes))
        local, full = sizes[0]
        if local == 0:
            raise BatchError("the batch has no rows: pass batches that have some")
        found[axes] = RowLayout(rows, axes), (1, full // local)
    return found


def _placements(
    part: Leaves,
    leaves: Sequence[_SplitLeaf | None],
    layouts: dict[Axes, tuple[RowLayout, Sizes]],
) -> list[Placement]:
    """The placements of the tensors of a part."""
    found: list[Placement] = []
    for tensor, leaf in zip(part, leaves, strict=True):
        if not isinstance(tensor, Tensor):
            continue
        if leaf is None:
            found.append(Replicate())
        else:
            found.append(Shard(leaf.dim, layouts[leaf.axes][0], 1, leaf.sizes[0]))
    return found


def _by_hand(part: Leaves, cuts: Cuts) -> frozenset[float]:
    """How many entries of rows all ranks have; no number that a rank may have, too."""
    ranks_of: dict[int, int] = {}
    for leaf, of_leaf in zip(part, cuts, strict=True):
        ranks = math.prod(cut.pieces for cut in of_leaf)
        for cut in of_leaf:
            for end in range(cut.dim + 1, leaf.dim() + 1):
                ranks_of[math.prod(leaf.shape[cut.dim : end])] = ranks
    everywhere = frozenset(count * ranks for count, ranks in ranks_of.items())
    return everywhere - ranks_of.keys()


def _raise_errors(part: LossRun, one: LossRun, subject: Subject) -> None:
    """Raise what the runs raised."""
    for run in (part, one):
        error = run.error
        if error is None:
            continue
        explained = explain(error, subject.loss_fn)
        if isinstance(explained, FuncpipeError):
            raise explained from error
        rows = "the rows of a part" if run is part else "all rows"
        raise SequenceError(
            f"the loss function fails with {rows} of the batch{line_of(error) or ''}: "
            f"{type(error).__name__}: {error}. It has to work for every number of rows"
        ) from error
