"""Lowered: the records of all stages, from a step and a batch to the program of every rank.

In: what the stages of `pipeline.py` made. Out: `Lowered`, which prints one line per stage; each of
its records prints itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.ids import ValueId
from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.trace import Traced
from funcpipe._src.planning.batch_proof import SplitProof
from funcpipe._src.planning.batch_split import BatchSplit, signature
from funcpipe._src.planning.local_batch import ready_microbatches, tensor_leaves
from funcpipe._src.planning.loss_outputs import row_layouts, summed_outputs
from funcpipe._src.planning.loss_variant import CheckedLoss, LossVariant
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.planning.scheduling import CheckedSchedule
from funcpipe._src.planning.stage_text import stage_lines
from funcpipe._src.planning.weight_layout import WeightLayout
from funcpipe._src.program import Program, partial_segments
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import PlanError


@dataclass(frozen=True, eq=False)
class PlannedCall:
    """One ``value_and_grad`` of a step, planned for the ranks of one set of local shapes.

    Args:
        call: as the analysis saw it, with the loss function that was traced.
        split: of its batch.
        ready: which ready microbatches of the batch these ranks have; 0 where it brings none.
        proof: that the parts of the batch compute what one device does.
        losses: the loss function for every microbatch; those of equal shapes share one.
        weights: how a rank holds its params.
        schedule: stages, and actions with sends and receives.
        programs: for every pipeline rank.
        variants: by split rank, the same call with the local shapes of that rank; this one is the
            first rank's. They are all the same where positions divide evenly, or are not split,
            and no microbatches are dealt.
    """

    call: PrimitiveCall
    split: BatchSplit
    ready: tuple[int, ...]
    proof: SplitProof
    losses: tuple[LossVariant, ...]
    weights: WeightLayout
    schedule: CheckedSchedule
    programs: tuple[Program, ...]
    variants: Mapping[int, PlannedCall] = field(default_factory=dict)

    @property
    def joint(self) -> Traced:
        """The joint graph of the first microbatch."""
        return self.losses[0].joint

    @property
    def checked(self) -> CheckedLoss:
        """The checked loss of the first microbatch."""
        return self.losses[0].checked

    @property
    def units(self) -> Units:
        """The units of the first microbatch."""
        return self.losses[0].units

    @cached_property
    def microbatch_units(self) -> tuple[Units, ...]:
        """The units of every microbatch."""
        return tuple(loss.units for loss in self.losses)

    @cached_property
    def distinct_units(self) -> tuple[Units, ...]:
        """The units of all ranks, each set once."""
        found: dict[Units, None] = {}
        for variant in self.variants.values():
            found |= dict.fromkeys(variant.microbatch_units)
        return tuple(found)

    @cached_property
    def moving(self) -> tuple[tuple[int, ...], ...]:
        """For every microbatch, which leaves of its batch are tensors."""
        parts = ready_microbatches(self.call.batch)
        found = tuple(tensor_leaves(parts[number]) for number in self.ready)
        return found if len(parts) > 1 else found * self.split.microbatches

    @cached_property
    def partial_segments(self) -> tuple[tuple[int, ...], ...]:
        """For every leaf of params the segments that make its partial gradients, in the order of
        their sum."""
        return partial_segments(self.units)

    @cached_property
    def summed(self) -> frozenset[int]:
        """The outputs that are summed over microbatches."""
        return summed_outputs(self.joint)

    @cached_property
    def rows(self) -> dict[int, tuple[int, SequenceLayout]]:
        """By output, how `Rows` are split by positions: along which dim, and how."""
        return row_layouts(self.joint, self.proof.positions)

    @cached_property
    def signature(self) -> tuple:
        """The structure and shapes of its batch."""
        return signature(self.call.batch)

    def of_rank(self, rank: int) -> PlannedCall:
        """The call as a rank runs it."""
        return self.variants[self.split.split_rank(rank)]

    def output_size(self, output: int, dim: int) -> int:
        """The size of an output along a dim, over all microbatches of a rank."""
        return sum(units.heads[output].shape[dim] for units in self.microbatch_units)

    def pipeline_rank_of(self, segment: int) -> int:
        """The pipeline rank that holds a segment."""
        holds = (segment in segments for segments in self.schedule.stages)
        return self.schedule.table.placement[list(holds).index(True)]

    def hops(self, leaf: int) -> list[tuple[int, list[int]]]:
        """The pipeline ranks that make partial gradients of a leaf, with the numbers of those, in
        the order of the sum."""
        segments = self.partial_segments[leaf]
        by_rank = itertools.groupby(
            range(len(segments)), lambda number: self.pipeline_rank_of(segments[number])
        )
        return [(rank, list(numbers)) for rank, numbers in by_rank]

    def constant(self, constant: ValueId) -> torch.Tensor:
        """A folded constant, computed on this rank."""
        assert constant.microbatch is not None
        constants = self.microbatch_units[constant.microbatch].constants
        return next(run for value, run in constants.items() if value.name == constant.name)()


@dataclass(frozen=True, eq=False)
class Lowered:
    """A step as each stage of the compiler left it. ``print(lowered)`` gives one line per stage;
    printing a record gives that record.

    Args:
        resolved: the step and its transforms on a mesh.
        analysis: what the step does outside ``value_and_grad``.
        placement: which rank holds which leaf of the state.
        calls: every ``value_and_grad``, each with its ``split``, ``proof``, ``joint``,
            ``checked``, ``units``, ``schedule`` and ``programs``.
        seconds: by stage, how long it took.
    """

    resolved: ResolvedStep
    analysis: StepAnalysis
    placement: StatePlacement
    calls: tuple[PlannedCall, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def graph(self) -> Traced:
        """The joint graph of the first ``value_and_grad``."""
        return self._first.joint

    @property
    def units(self) -> Units:
        """The units of the first ``value_and_grad``."""
        return self._first.units

    @property
    def schedule(self) -> CheckedSchedule:
        """The schedule of the first ``value_and_grad``."""
        return self._first.schedule

    @property
    def program(self) -> Program:
        """The program of the first pipeline rank for the first ``value_and_grad``."""
        return self._first.programs[0]

    @property
    def _first(self) -> PlannedCall:
        if not self.calls:
            raise PlanError("the step calls no fp.value_and_grad: nothing was traced")
        return self.calls[0]

    def text(self, seconds: bool = True) -> str:
        """One line per stage, perhaps without the seconds that it took."""
        return "\n".join(stage_lines(self, seconds))

    def __str__(self) -> str:
        return self.text()
