"""Plan: what will run, with what it is predicted to cost.

In: a `Lowered` step. Out: `Plan`, which predicts time, memory and traffic, and reads as text.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from funcpipe._src.core.mesh import Axes
from funcpipe._src.planning import plan_bytes as sizes
from funcpipe._src.planning import plan_text as reading
from funcpipe._src.planning.lowered import Lowered, PlannedCall
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.planning.predict import Given, Prediction, predict
from funcpipe._src.planning.remat_curve import BUDGETS, RematCurve, remat_curve
from funcpipe._src.program import Usage
from funcpipe._src.schedule.timeline import Timeline
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe._src.viz import svg as picture
from funcpipe.errors import PlanError


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run. ``print(plan)`` reads as text; ``plan.save("x.html")`` draws it.

    Args:
        lowered: the records of all stages.
        found: by pipeline rank, what a compiled backend was found to take there.
        graphs: by pipeline rank, the bytes of a rank's CUDA graphs.
    """

    lowered: Lowered
    found: dict[int, Usage] = field(default_factory=dict)
    graphs: dict[int, int] = field(default_factory=dict)

    @property
    def resolved(self) -> ResolvedStep:
        """The transforms on their mesh."""
        return self.lowered.resolved

    @property
    def placement(self) -> StatePlacement:
        """Which rank holds which leaf."""
        return self.lowered.placement

    @property
    def calls(self) -> tuple[PlannedCall, ...]:
        """Every ``value_and_grad`` of the step."""
        return self.lowered.calls

    @property
    def memory(self) -> list[dict[str, int]]:
        """Predicted bytes of a rank with every pipeline rank: ``activations`` (the peak,
        with each unit's own intermediates), ``residuals`` (the part of it held between units),
        ``gathered`` (whole leaves of sharded params, at their peak), ``gradients`` (sums and what
        is being reduced, at their peak), ``step`` (all of these at once, at their peak), ``params``
        (what the rank holds, with the copies in which `mixed_precision` computes), and ``graph``
        (what a CUDA graph that was captured has taken for them; 0 before).

        A unit's own intermediates are those of its graph; in `spmd` with a compiled backend, those
        that it was seen to make when it was compiled."""
        return [sizes.memory(self, rank) for rank in range(self.resolved.ranks)]

    @property
    def traffic(self) -> list[dict[Axes, int]]:
        """Bytes that a rank with every pipeline rank receives in a step, by the axes they
        travel along.

        Counted as rings do: ``n - 1`` of ``n`` parts for a gather, a reduce-scatter or an
        all-to-all, twice that for an all-reduce. Collectives in the loss function are counted,
        attention's exchanges among them. The loss, the norm and other single numbers are left out.
        """
        return [sizes.traffic(self, rank) for rank in range(self.resolved.ranks)]

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
        return remat_curve(self.calls[call].units, budgets)

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
        text = repr(self.sections)
        found = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(found[:7], "big")

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
