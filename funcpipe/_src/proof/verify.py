"""The proof that a loss function, run on each rank's slice of the sequence, computes what one
device computes.

The loss function is run twice on fake tensors, with the lengths of a rank and with those of one
device, and both runs are compared op by op. A dim whose size differs is one of positions; so it
does not matter which sizes happen to be equal. From the inputs, the placement of every tensor
follows by rules. An op that mixes positions, or that no rule knows, makes a tensor of which nothing
is known, and the loss must not come from one.

The proof holds for the lengths at hand: it is made for every kind of rank
(`SequenceLayout.variant`).

In: a loss function; fakes of params and of one microbatch, as a rank has it. Out: `SequenceProof`,
or a SequenceError that names the op, the line of the user's code, the reason and what to write
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.core.loss_types import SCALAR_LOSS, Mean, Rows
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import line_of
from funcpipe._src.functional.dispatch import Held
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.trace_errors import explain
from funcpipe._src.proof.align import Alignment
from funcpipe._src.proof.loss_runs import LossRun, Subject
from funcpipe._src.proof.placements import (
    Average,
    Number,
    Partial,
    Placement,
    Replicate,
    Shard,
    Sizes,
    SplitContext,
    as_partial,
    replicated,
)
from funcpipe._src.proof.propagate import Proof
from funcpipe._src.proof.rules import Sliced
from funcpipe._src.proof.sequence_proof import Findings, SequenceProof
from funcpipe.errors import BatchError, FuncpipeError, SequenceError


@dataclass(frozen=True)
class Task:
    """What is to be proven; the arguments of `prove_sequence`."""

    loss_fn: Callable
    has_aux: bool
    params: Any
    local: Sequence[Any]
    spec: Any
    sequences: Sequence[Sliced]
    sequence_rank: int
    mode: FakeTensorMode
    mesh: Mesh
    axes: Axes

    def lengths(self) -> dict[SequenceLayout, Sizes]:
        """How many positions of each layout the rank has, and one device. Of a layout of which the
        rank has all positions, one device is given more."""
        found = {}
        for sliced in self.sequences:
            if sliced is not None:
                layout = sliced[1]
                own = layout.length(self.sequence_rank)
                found[layout] = (own, layout.size if own != layout.size else 2 * own + 1)
        return found


def prove_sequence(
    loss_fn: Callable,
    has_aux: bool,
    params: Any,
    local: Sequence[Any],
    spec: Any,
    sequences: Sequence[Sliced],
    sequence_rank: int,
    mode: FakeTensorMode,
    mesh: Mesh,
    axes: Axes,
) -> SequenceProof:
    """Prove that a loss function may run on slices of the sequence.

    Args:
        params: the full tree, of fakes of ``mode``.
        local, spec: the leaves of one microbatch as a rank has them, fakes or no tensors, and their
            structure.
        sequences: for every leaf the dim of positions and their layout.
        sequence_rank: stands for all ranks with the same `SequenceLayout.variant`.
        mesh, axes: the mesh, and those of its axes that a collective in the loss may name.

    Returns:
        how the operands of known calls are split over ranks.

    Raises:
        SequenceError: it cannot be proven, or no attention sees the sequence, as when the model
            calls one that funcpipe does not know.
        FuncpipeError: the loss function is wrong on one device, too.
    """
    task = Task(loss_fn, has_aux, params, local, spec, sequences, sequence_rank, mode, mesh, axes)
    proof = prove(task)
    attentions = [found for found in proof.calls.values() if isinstance(found, Held)]
    if all(found.queries is None for found in attentions):
        raise SequenceError(
            "the sequence is split, but no attention over it was seen: positions would never be "
            "mixed. Call torch.nn.functional.scaled_dot_product_attention or fp.attention (Hugging "
            "Face: attn_implementation='sdpa'), and look whether dims= names the dim of positions"
        )
    return proof


def prove(task: Task) -> SequenceProof:
    """`prove_sequence`, for a loss function that need not call attention."""
    try:
        return _proven(task)
    except SequenceError as error:
        few = min((own for own, _ in task.lengths().values()), default=2)
        if few > 1:
            raise
        raise SequenceError(
            f"{error}. This rank has {few} positions of a sequence; with fewer than two, torch "
            "itself takes other ways. The loss function might be proven for fewer ranks, or for "
            "longer sequences"
        ) from error


def _proven(task: Task) -> SequenceProof:
    lengths, ranks = task.lengths(), task.mesh.axes
    axes: set[str] = set()
    for layout in lengths:
        axes.update(axis for axis in layout.axes if ranks[axis] > 1)
    live = task.mesh.ordered(axes)
    alone = Mesh(**{axis: 1 if axis in live else count for axis, count in ranks.items()})
    whole, placements = [], []
    for leaf, sliced in zip(task.local, task.sequences, strict=True):
        if sliced is None:
            whole.append(leaf)
        else:
            whole.append(resized(leaf, sliced[0], lengths[sliced[1]][1], task.mode))
        if isinstance(leaf, Tensor):
            placements.append(Replicate() if sliced is None else Shard(*sliced))
    subject = Subject(task.loss_fn, task.has_aux, task.params, task.spec, task.mode, task.axes)
    on_rank, on_one = LossRun(subject, task.local, task.mesh), LossRun(subject, whole, alone)
    real = all(full == layout.size for layout, (_, full) in lengths.items())
    _raise_errors(on_rank.error, on_one.error, task.loss_fn, real)
    split, findings = SplitContext(lengths, live), Findings()
    alignment = Alignment(on_rank.recording, on_one.recording, frozenset(live))
    proof = Proof(alignment, split, findings.note)
    of_params: list[Placement] = [Replicate()] * (on_rank.count - len(placements))
    proof.run([*of_params, *placements])
    return SequenceProof(findings.calls, _LossCheck(on_rank, proof).rows())


def resized(
    tensor: Tensor,
    dim: int,
    size: int,
    mode: FakeTensorMode,
) -> Tensor:
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    return fake(shape, tensor, mode)


def _raise_errors(
    on_rank: Exception | None,
    on_one: Exception | None,
    loss_fn: Callable,
    real: bool,
) -> None:
    """Raise what the runs raised; ``real``: one device had the lengths of the whole sequence."""
    for error in (on_rank, on_one):
        if isinstance(error, SequenceError):
            raise error
    if on_rank is not None:
        explained = explain(on_rank, loss_fn)
        if isinstance(explained, FuncpipeError) or (on_one is not None and real):
            raise explained from on_rank
    if on_one is not None and real and not isinstance(on_one, FuncpipeError):
        raise explain(on_one, loss_fn) from on_one
    error = on_rank or on_one
    if error is None:
        return
    where = (
        "on a rank, with its slice of the sequence"
        if on_rank
        else "on one device, with the whole sequence"
    )
    raise SequenceError(
        f"the loss function fails {where}{line_of(error) or ''}: {type(error).__name__}: "
        f"{error}. It has to work for every length: no table, mask or position is made for one "
        "length alone, unless it is split with the batch"
    ) from error


# ---- what the loss function returned


class _LossCheck:
    """Checks what the loss function returned on a rank."""

    def __init__(self, run: LossRun, proof: Proof) -> None:
        self.run, self.proof, self.split = run, proof, proof.split

    def rows(self) -> tuple[Sliced, ...]:
        """How the `Rows` of aux are split; refuses a loss that does not add up over ranks."""
        total, weight, _ = self.run.loss
        if weight is None:
            raise BatchError(SCALAR_LOSS.format(why="the sequence is split"))
        self._check_mean("Mean", total, weight)
        found: list[Sliced] = []
        for path, summary in self.run.summaries():
            if isinstance(summary, Mean):
                self._check_mean(path, summary.total, summary.weight)
            elif isinstance(summary, Rows):
                found.append(self._rows(path, summary))
        return tuple(found)

    def _placement(self, what: str, tensor: Tensor) -> Placement:
        return self.run.placement(what, tensor, self.proof.placements)

    def _check_mean(self, what: str, total: Tensor, weight: Tensor) -> None:
        self._check_sum(f"{what}.total", total)
        self._check_sum(f"{what}.weight", weight)

    def _check_sum(self, what: str, tensor: Tensor) -> None:
        placement = as_partial(self.split, self._placement(what, tensor))
        if isinstance(placement, Partial) and placement.axes == self.split.live:
            return
        if isinstance(placement, Average):
            raise SequenceError(
                f"{what} is a mean over a rank's positions: means of slices do not add up to the "
                "mean of the whole sequence. Return the sum (reduction='sum') as Mean.total, and "
                "the number of tokens as Mean.weight"
            )
        if isinstance(placement, Number) and not placement.constant:
            raise SequenceError(
                f"{what} is {placement}, made from the length of a rank's slice: over ranks that "
                "does not add up. Return the number of tokens, such as "
                "torch.tensor(float(labels.numel()))"
            )
        raise SequenceError(
            f"{what} is {self.split.text(placement)}, so that the sum over ranks would hold it "
            "once for each of them: it has to come from the split sequence, as the number of "
            "tokens in it does. What does not (a penalty on params) is multiplied by that number"
        )

    def _rows(self, what: str, rows: Rows) -> Sliced:
        placement, dim = self._placement(what, rows.x), rows.dim % rows.x.dim()
        if isinstance(placement, Shard):
            unmerged = placement.outer == placement.inner == 1
            if unmerged and placement.dim != dim:
                return placement.dim, placement.layout
        varies = self.proof.varies(self.run.recording.ref(rows.x).number)
        if replicated(placement) and not varies:
            return None
        raise SequenceError(
            f"{what}, fp.Rows along dim {dim}, is {self.split.text(placement)}: rows come whole, "
            "or have positions in a dim of their own, such as (rows, positions)"
        )
