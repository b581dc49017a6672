"""Step outputs: the loss, its weight and aux values, on every rank.

In: what a rank's program made of them; the ranks of this pipeline have exchanged theirs already
(`funcpipe._src.program.output_broadcast`). Out: their values on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import Mean, Microbatches, Rows, is_summary, mean
from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.trace import fill_aux
from funcpipe._src.planning.lowered import PlannedCall
from funcpipe._src.planning.plan import Plan
from funcpipe._src.runtime.grad_reduction import all_reduce_packed

Sums = dict[int, torch.Tensor]  # by the number of the output
RowsOf = Callable[[int, int], torch.Tensor]  # of an output and a microbatch


class StepOutputs:
    """The outputs of one ``value_and_grad`` on one rank.

    Args:
        plan: of the step.
        number: of the ``value_and_grad``.
        planned: as this rank runs it.
        comm: of this rank.
    """

    def __init__(
        self,
        plan: Plan,
        number: int,
        planned: PlannedCall,
        comm: Communicator,
    ) -> None:
        self.plan, self.number = plan, number
        self.planned, self.comm = planned, comm
        self.joint = planned.joint
        self.first_aux = 1 + self.joint.has_weight

    def over_ranks(self, sums: Sums) -> Sums:
        """Sums over the ranks that have other microbatches, those of one dtype together."""
        axes = self.plan.resolved.split_axes
        if not axes:
            return sums

        def dtype_of(number: int) -> torch.dtype:
            return sums[number].dtype

        found: Sums = {}
        by_dtype = sorted(sums, key=lambda number: str(dtype_of(number)))
        for _, group in groupby(by_dtype, dtype_of):
            numbers = list(group)
            own = [sums[number] for number in numbers]
            totals = all_reduce_packed(own, axes, self.comm)
            found.update(zip(numbers, totals, strict=True))
        return found

    def weight(self, sums: Sums) -> torch.Tensor | None:
        """The weight of the batch, where the loss has one."""
        return sums[1] if self.joint.has_weight else None

    def loss(self, sums: Sums) -> torch.Tensor:
        """The loss."""
        weight = self.weight(sums)
        if weight is None:
            return sums[0].clone()  # a copy: a message must not change
        return mean(sums[0], weight)

    def aux(self, sums: Sums, rows_of: RowsOf) -> Any:
        """The aux values of the loss function.

        Args:
            sums: over all ranks.
            rows_of: what this rank has of an output and a microbatch.
        """

        def value_of(aux: Any) -> Any:
            if isinstance(aux, Mean):
                total = sums[self._output(aux.total)]
                weight = sums[self._output(aux.weight)]
                return mean(total, weight)
            if isinstance(aux, Rows):
                output = self._output(aux.x)
                return self._rows(output, aux.dim, rows_of)
            return fill_aux(aux, leaf_of)

        def leaf_of(number: int) -> torch.Tensor:
            output = self._output(number)
            return self._rows(output, None, rows_of)

        return tree.map(value_of, self.joint.aux, is_leaf=is_summary)

    def _output(self, aux: Any) -> int:
        """The number of an output among all outputs, from that among aux tensors."""
        return self.first_aux + int(aux)

    def _rows(
        self,
        output: int,
        dim: int | None,
        rows_of: RowsOf,
    ) -> torch.Tensor:
        """The rows of every microbatch, shard by shard, on every rank; those of ready microbatches
        one after the other."""
        microbatches = range(len(self.planned.losses))
        pieces = [rows_of(output, microbatch) for microbatch in microbatches]
        # Copies: a message must not change.
        out = pieces[0].clone() if dim is None else torch.cat(pieces, dim)
        if output in self.planned.rows:
            positions_dim, layout = self.planned.rows[output]
            out = _all_positions(self.comm, out, positions_dim, layout)
        row_axes = self.plan.resolved.row_axes
        if not row_axes or dim is None:
            return out
        dealt = self.planned.split.dealt
        counts = self._row_counts(output, dim) if dealt else ()
        held = _gathered(self.comm, out, dim, row_axes, counts)
        ready = isinstance(self.planned.call.batch, Microbatches)
        if ready and not dealt:
            sizes = [piece.shape[dim] for piece in pieces]
            held = _by_microbatch(held, sizes, dim)
        return torch.cat(held, dim)

    def _row_counts(self, output: int, dim: int) -> list[int]:
        """How many rows of an output every rank has on the axes over which microbatches are
        dealt."""
        call = self.plan.calls[self.number]
        ranks = self.comm.mesh.group(self.comm.rank, self.plan.resolved.row_axes)
        return [call.of_rank(rank).output_size(output, dim) for rank in ranks]


def _by_microbatch(
    held: Sequence[torch.Tensor],
    sizes: list[int],
    dim: int,
) -> list[torch.Tensor]:
    """The rows of every rank in the order of one device, where every ready microbatch was cut over
    ranks: one microbatch after another."""
    by_rank = [rows.split(sizes, dim) for rows in held]
    in_order: list[torch.Tensor] = []
    for of_microbatch in zip(*by_rank, strict=True):
        in_order += of_microbatch
    return in_order


def _gathered(
    comm: Communicator,
    own: torch.Tensor,
    dim: int,
    axes: Axes,
    counts: Sequence[int],
) -> list[torch.Tensor]:
    """The rows of every rank on axes, along a dim. ``counts``: how many each has, where they
    differ."""
    if len(set(counts)) < 2:
        return list(comm.all_gather(own.contiguous(), axes))
    dim %= own.dim()
    padded = _padded(own, dim, max(counts))
    gathered = []
    for rows, count in zip(comm.all_gather(padded, axes), counts, strict=True):
        gathered.append(rows.narrow(dim, 0, count))
    return gathered


def _all_positions(
    comm: Communicator,
    own: torch.Tensor,
    dim: int,
    layout: SequenceLayout,
) -> torch.Tensor:
    """All positions, in order, of which every sequence rank holds its own along a dim."""
    longest = max(map(layout.length, range(layout.members)))
    padded = _padded(own, dim, longest)
    gathered = comm.all_gather(padded, layout.axes)
    out = own.new_empty(_shape_with(own, dim, layout.size))
    for member, held in enumerate(gathered):
        start = 0
        for first, last in layout.ranges(member):
            length = last - first
            positions = held.narrow(dim, start, length)
            out.narrow(dim, first, length).copy_(positions)
            start += length
    return out


def _padded(
    own: torch.Tensor,
    dim: int,
    length: int,
) -> torch.Tensor:
    """Zeros of a length along a dim, which begin with a tensor."""
    padded = own.new_zeros(_shape_with(own, dim, length))
    length_held = own.shape[dim]
    padded.narrow(dim, 0, length_held).copy_(own)
    return padded


def _shape_with(
    own: torch.Tensor,
    dim: int,
    length: int,
) -> tuple[int, ...]:
    shape = list(own.shape)
    shape[dim] = length
    return tuple(shape)
