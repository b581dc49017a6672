"""Planner: the plans of a step, one for every shape of batch and what its losses read from Python.

All plans have the same stages and placement. `variants.py` says which plan is taken.

In: compile inputs, then batches. Out: the `Plan` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from funcpipe._src.analysis.outside_ops import Op
from funcpipe._src.analysis.rehearsal import Rehearsal
from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.core import pytree
from funcpipe._src.graph.partition import Units
from funcpipe._src.planning.batch_split import signature
from funcpipe._src.planning.compile_inputs import CompileMemory, StageClock, compile_inputs
from funcpipe._src.planning.pipeline import compile_step, separate_units
from funcpipe._src.planning.place_state import place_again, rehearse
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.step_analysis import analyse_step
from funcpipe._src.planning.variants import Variants
from funcpipe._src.schedule.costs import Costs
from funcpipe._src.spec.resolve import ResolvedStep


class Planner:
    """Makes and keeps the plans of a step.

    Raises, while planning: every error of ``funcpipe.errors`` that can be known before a step runs.
    """

    def __init__(self, resolved: ResolvedStep, init_state: Callable, params: Any) -> None:
        self.inputs = compile_inputs(resolved, init_state, params)
        self.memory = CompileMemory()
        self.variants: dict[tuple, Variants] = {}  # by shapes of a batch
        self.ops: tuple[Op, ...] = ()  # outside the calls, when a step was analysed last
        # What a runner is to rehearse before the first step; None where it is done.
        self.rehearsal: Rehearsal | None = None
        self.everywhere = False  # whether plans are made of rehearsals as every rank
        self._written: set[str] = set()  # what losses were seen to write

    @property
    def placement(self) -> StatePlacement | None:
        """Where the state lies; None before the first plan."""
        return self.memory.placement

    @property
    def plans(self) -> list[Plan]:
        """Those that are kept."""
        found: list[Plan] = []
        for variants in self.variants.values():
            found += variants.plans
        return found

    def plan(self, batch: Any) -> Plan:
        """The plan for batches like this one, and for what the losses read from Python now."""
        variants = self.of(batch)
        variants.known()
        return self.chosen(batch, variants)

    def chosen(self, batch: Any, variants: Variants) -> Plan:
        """The plan that was known when it was asked for last; a new one where there was none."""
        return variants.chosen or self._made(batch, variants)

    def of(self, batch: Any) -> Variants:
        """The plans for batches like this one."""
        key = signature(batch)
        if key not in self.variants:
            step = self.inputs.resolved.step
            self.variants[key] = Variants(step, self._written)
        return self.variants[key]

    def outside(self, batch: Any) -> tuple[Op, ...]:
        """What the step now computes outside its calls."""
        analysis, _ = analyse_step(self.inputs, batch)
        return analysis.outside

    def retime(self, costs: Costs) -> None:
        """Choose schedule and stages again, for measured costs; what was traced is kept."""
        resolved = replace(self.inputs.resolved, measured=costs)
        self.inputs = replace(self.inputs, resolved=resolved)
        self._forget()

    def rehearse(self, pipeline_ranks: Iterable[int]) -> bool:
        """Whether the step does as some pipeline ranks what was planned; asked once, before the
        first step.

        Raises:
            StateError: it fails there, or computes something else than on one device.
        """
        rehearsal, self.rehearsal = self.rehearsal, None
        if rehearsal is None:
            return True
        assert self.memory.placement is not None
        return rehearse(rehearsal, self.memory.placement, pipeline_ranks)

    def rehearse_everywhere(self) -> None:
        """Make plans of rehearsals as every rank from now on."""
        self.everywhere = True
        self._forget()

    def _forget(self) -> None:
        """Forget plans, schedules and placement; what was traced is kept."""
        self.variants.clear()
        self.memory.forget_schedules()

    def separate_units(self, plan: Plan, call: int) -> Units:
        """The units of a call with I and W beside B, whatever its schedule runs."""
        return separate_units(self.inputs, plan.lowered, call, self.memory)

    def _made(self, batch: Any, variants: Variants) -> Plan:
        """The plan for what is read now: one that was made before, or a new one."""
        of_step, _ = variants.read()
        clock = self.memory.clock = StageClock()
        with clock.time("analyse"):
            analysis, rehearsal = analyse_step(self.inputs, batch, variants.follower)
        self.ops = analysis.outside
        placement = self.memory.placement
        is_first = placement is None
        rehearsal.everywhere = self.everywhere or not is_first
        if placement is not None:
            changed = bool(variants.plans)
            placement = place_again(placement, analysis, rehearsal, changed)
        reads = _reads(analysis, placement)
        plan = variants.of_calls(reads)
        if plan is None:
            lowered = compile_step(self.inputs, analysis, rehearsal, placement, self.memory)
            if is_first:
                self.rehearsal = rehearsal if rehearsal.predictable else None
            plan = Plan(lowered)
            reads = _reads(lowered.analysis, lowered.placement)
            variants.keep(reads, plan)
        for call in analysis.calls:
            assert call.reading is not None
            call.reading.done()
        variants.remember(of_step, plan)
        return plan


def _reads(analysis: StepAnalysis, placement: StatePlacement | None) -> tuple:
    """What makes plans for one shape of batch differ: what losses read from Python, and what the
    step does beside them."""
    calls = []
    for call in analysis.calls:
        of_call = (
            call.reading and call.reading.values,
            call.has_aux,
            call.params,
            call.dtypes,
            call.params_spec,
            signature(call.batch),
            tuple(pytree.leaves(call.origins)),
        )
        calls.append(of_call)
    if placement is None:
        return tuple(calls), None
    metrics = []
    for metric in placement.leaf_metrics:
        metrics.append((metric.number, metric.pipeline_rank))
    outside = (
        analysis.reductions,
        analysis.overwritable,
        placement.apart,
        placement.metrics_spec,
        tuple(metrics),
    )
    return tuple(calls), outside
