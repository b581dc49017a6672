"""Plans: everything that is decided before a step runs, and how to read it; `pipeline.py` makes
them.

A `Plan` says which leaf goes where, and for every ``value_and_grad`` of the step the cut, the
stages, the checked schedule and a program for every place on the pipe axis.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from funcpipe._src.analysis.state import PrimitiveCall
from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.planning import plan_bytes as sizes
from funcpipe._src.planning import plan_text as reading
from funcpipe._src.planning.batch_split import BatchSplit
from funcpipe._src.planning.placement import Placement
from funcpipe._src.planning.predict import Given, Prediction, predict
from funcpipe._src.planning.remat_curve import BUDGETS, RematCurve, remat_curve
from funcpipe._src.program import Program, Usage
from funcpipe._src.schedule.actions import Schedule
from funcpipe._src.schedule.checker import Report
from funcpipe._src.schedule.timeline import Timeline
from funcpipe._src.spec.transform_spec import ResolvedStep
from funcpipe._src.viz import svg as picture
from funcpipe.errors import PlanError

Stages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class PlannedCall:
    """One ``value_and_grad`` of a step, planned.

    Args:
        call: as it was noted when the step was analysed.
        splits: of its batch.
        cuts: for every microbatch; microbatches of equal shapes share one.
        moving: for every microbatch, which leaves of its batch are tensors.
        stages: for every stage its segments.
        schedule: with sends and receives, checked.
        report: what the checker found.
        programs: for every place on the pipe axis.
        segments: for every leaf of params the segments that make its partial gradients, in the
            order of their sum.
        summed: the numbers of the heads that are summed over microbatches.
        signature: of its batch.
        rows: how heads that are `Rows` are split by positions: along which dim, and how.
        variants: by member number, the same call with the shapes of that member; this one is the
            first member's. They are all the same where positions divide evenly, or are not split,
            and no microbatches are dealt.
        ready: which ready microbatches of the batch these are; 0 where it brings none.
        casts: the leaves that are cast before units read them, and to what; their gradients are
            added up in their own dtype.
    """

    call: PrimitiveCall
    splits: BatchSplit
    cuts: tuple[Units, ...]
    moving: tuple[tuple[int, ...], ...]
    stages: Stages
    schedule: Schedule
    report: Report
    programs: tuple[Program, ...]
    segments: tuple[tuple[int, ...], ...]
    summed: frozenset[int]
    signature: tuple
    rows: Mapping[int, tuple[int, SequenceLayout]] = field(default_factory=dict)
    variants: Mapping[int, PlannedCall] = field(default_factory=dict)
    casts: Mapping[int, torch.dtype] = field(default_factory=dict)
    ready: tuple[int, ...] = (0,)

    def of_rank(self, rank: int) -> PlannedCall:
        """The call as a rank runs it."""
        return self.variants[self.splits.member(rank)]

    def place_of(self, segment: int) -> int:
        """The place on the pipe axis that holds a segment."""
        stage = next(s for s, segments in enumerate(self.stages) if segment in segments)
        return self.schedule.placement[stage]

    def hops(self, leaf: int) -> list[tuple[int, list[int]]]:
        """The places that make partial gradients of a leaf, with their numbers, in the order of the
        sum."""
        runs = itertools.groupby(
            range(len(self.segments[leaf])), lambda k: self.place_of(self.segments[leaf][k])
        )
        return [(place, list(partials)) for place, partials in runs]

    def constant(self, v: Value) -> torch.Tensor:
        """A folded constant, computed on this rank."""
        return next(c.constants[v] for c in self.cuts if v in c.constants)()


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run. ``print(plan)`` reads as text; ``plan.save("x.html")`` draws it.

    Args:
        resolved: the transforms on their mesh.
        placement: which rank holds which leaf.
        calls: every ``value_and_grad`` of the step.
        found: by place on the pipe axis, what a compiled backend was found to take there.
        graphs: by place on the pipe axis, the bytes of a rank's CUDA graphs.
    """

    resolved: ResolvedStep
    placement: Placement
    calls: tuple[PlannedCall, ...]
    found: dict[int, Usage] = field(default_factory=dict)
    graphs: dict[int, int] = field(default_factory=dict)

    @property
    def memory(self) -> list[dict[str, int]]:
        """Predicted bytes of a rank at every place on the pipe axis: ``activations`` (the peak,
        with each unit's own intermediates), ``residuals`` (the part of it held between units),
        ``gathered`` (whole leaves of sharded params, at their peak), ``gradients`` (sums and what
        is being reduced, at their peak), ``step`` (all of these at once, at their peak), ``params``
        (what the rank holds, with the copies in which `mixed_precision` computes), and ``graph``
        (what a CUDA graph that was captured has taken for them; 0 before).

        A unit's own intermediates are those of its graph; in `spmd` with a compiled backend, those
        that it was seen to make when it was compiled."""
        return [sizes.memory(self, p) for p in range(self.resolved.ranks)]

    @property
    def traffic(self) -> list[dict[Axes, int]]:
        """Bytes that a rank at every place on the pipe axis receives in a step, by the axes they
        travel along.

        Counted as rings do: ``n - 1`` of ``n`` parts for a gather, a reduce-scatter or an
        all-to-all, twice that for an all-reduce. Collectives in the loss function are counted,
        attention's exchanges among them. The loss, the norm and other single numbers are left out.
        """
        return [sizes.traffic(self, p) for p in range(self.resolved.ranks)]

    def predict(self, costs: Given = None, call: int = 0) -> Prediction:
        """Times and memory of a ``value_and_grad``: see `Prediction`.

        Args:
            costs: `fp.schedules.Costs` (`fp.profile_units` measures them), a dict ``{("F", 0):
                seconds}`` or a function of kind and segment; None for FLOPs and messages that take
                no time.
            call: which ``value_and_grad``.
        """
        if call not in range(len(self.calls)):
            raise PlanError(
                f"cannot draw value_and_grad {call}: the step has {len(self.calls)}, counted from 0"
            )
        return predict(self.calls[call], costs)

    def remat_curve(self, budgets: Sequence[float] = BUDGETS, call: int = 0) -> RematCurve:
        """What `remat` would save and compute again with these budgets, for one microbatch: see
        `RematCurve`.

        Args:
            budgets: each from 0 to 1.
            call: which ``value_and_grad``.
        """
        if call not in range(len(self.calls)):
            raise PlanError(
                f"no value_and_grad {call}: the step has {len(self.calls)}, counted from 0"
            )
        return remat_curve(self.calls[call].cuts[0], budgets)

    def timeline(self, call: int = 0) -> Timeline:
        """When every action would run if a unit took as long as its FLOPs and transfers took no
        time."""
        return self.predict(call=call).timeline

    @property
    def bubble(self) -> float:
        """The share of rank time in which nothing runs, by FLOPs (the first ``value_and_grad``)."""
        return self.timeline().bubble if self.calls else 0.0

    @functools.cached_property
    def sections(self) -> dict[str, list[str]]:
        """What ranks compare before they run: by topic, line by line."""
        return reading.sections(self)

    def digest(self) -> int:
        """A number that ranks compare: equal when they are about to run the same."""
        return int.from_bytes(hashlib.sha256(repr(self.sections).encode()).digest()[:7], "big")

    def save(self, path: str | Path, call: int = 0, costs: Given = None) -> Path:
        """Draw the timeline and memory: an ``.html`` page, an ``.svg`` picture, or a ``.json``
        trace for Perfetto."""
        picture.check_suffix(Path(path))
        found = self.predict(costs, call)
        schedule = found.timeline.schedule
        return found.save(
            path,
            f"{schedule.name}: {len(schedule.ranks)} ranks, {schedule.microbatches} microbatches",
        )

    def __str__(self) -> str:
        return "\n".join(reading.text(self))
