"""Predictions: when every action of a plan runs and what every rank holds meanwhile, given what
units cost.

In: a planned ``value_and_grad`` and `Costs`. Out: `Prediction`. Units, messages and waiting for
them are timed; adding up gradients, collectives of sharded weights and the rest of the step are
not. Without costs, a unit costs its FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funcpipe._src.graph.partition import Unit, Units
from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.program import RECV, RUN, SEND, Program
from funcpipe._src.program.memory import held
from funcpipe._src.schedule.actions import Action
from funcpipe._src.schedule.costs import Costs, Flow, Load
from funcpipe._src.schedule.timeline import Span, Timeline, timeline
from funcpipe._src.viz import svg as picture
from funcpipe.errors import PlanError

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall

Curve = tuple[tuple[float, int], ...]
Given = Costs | Mapping[Any, float] | Callable[[str, int], float] | None

# A unit without matrix products is not free: it costs this part of the mean.
_LEAST = 0.01


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a step is predicted to do.

    Args:
        timeline: start and end of every action, in the unit of the costs.
        memory: for every place on the pipe axis (time, bytes held from then on): activations,
            residuals, and what units take for themselves while they run.
        unit: of time: ``"s"``, or ``""`` for FLOPs made relative.
    """

    timeline: Timeline
    memory: tuple[Curve, ...]
    unit: str

    @property
    def step_time(self) -> float:
        """From the first action to the end of the last."""
        return self.timeline.makespan

    @property
    def period(self) -> float:
        """What a step takes in steady state, where ranks do not wait for each other between steps:
        see `Timeline.period`. Captured steps do not; where the step body sums over the pipe axis,
        as clipping does, and on CPUs they do."""
        return self.timeline.period

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they do not compute."""
        return self.timeline.bubble

    @property
    def busy(self) -> tuple[float, ...]:
        """For every place on the pipe axis how long it computes."""
        return self.timeline.busy

    @cached_property
    def peak_memory(self) -> tuple[int, ...]:
        """For every place on the pipe axis the most bytes that it holds."""
        return tuple(max((nbytes for _, nbytes in curve), default=0) for curve in self.memory)

    def save(self, path: str | Path, title: str = "") -> Path:
        """Draw it: an ``.html`` page, an ``.svg`` picture, or a ``.json`` trace for
        https://ui.perfetto.dev."""
        return picture.save(self.timeline, path, title=title, memory=self.memory, unit=self.unit)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        steady = (
            f", {self.period:.4g}{unit} in steady state" if self.period < self.step_time else ""
        )
        out = [f"step {self.step_time:.4g}{unit}{steady}, bubble {self.bubble:.1%}"]
        for place, (busy, peak) in enumerate(zip(self.busy, self.peak_memory, strict=True)):
            out.append(
                f"  rank {place} of the pipeline: busy {busy:.4g}{unit}, peak {bytes_text(peak)}"
            )
        return "\n".join(out)


def predict(c: PlannedCall, costs: Given = None) -> Prediction:
    """What a planned ``value_and_grad`` will do.

    Args:
        c: the planned call.
        costs: `Costs`, what they are made of (a dict or a function of kind and segment), or None
            for FLOPs.
    """
    costs = as_costs(costs, c.units)
    nbytes = {
        i.action: sum(v.nbytes for v in i.values)
        for p in c.programs
        for i in p.instructions
        if i.op == SEND
    }

    def cost(action: Action) -> float:
        segments = c.schedule.stages[action.stage]
        some = segments if action.segment is None else [segments[action.segment]]
        return sum(costs.of(action.kind, s) for s in some)

    # The transfers of a plan are settled: stages that exchange nothing get none here either.
    line = timeline(c.schedule.table, cost, lambda send: costs.message(nbytes[send]), edges=())
    curves = (_curve(p, spans, costs) for p, spans in zip(c.programs, line.spans, strict=True))
    return Prediction(line, tuple(curves), costs.unit)


def _curve(program: Program, spans: Sequence[Span], costs: Costs) -> Curve:
    """What a rank holds over time: units run one after another within their action."""
    starts = {span.action: span.start for span in spans}
    out: list[tuple[float, int]] = [(0.0, 0)]
    now, doing = 0.0, None
    for i, (peak, after) in zip(program.instructions, held(program), strict=True):
        if i.op in (RUN, SEND, RECV) and i.action != doing:
            doing, now = (
                i.action,
                starts.get(i.action, now),
            )  # messages with sums are in no schedule
        out.append((now, peak))
        if i.unit is not None:
            now += costs.of(i.unit.kind, i.unit.segment)
        out.append((now, after))
    return tuple(out)


def as_costs(costs: Given, cut: Units) -> Costs:
    """Costs as they were given; FLOPs if they were not."""
    if isinstance(costs, Costs):
        return costs
    if costs is None:
        return flop_costs(cut)
    if not (callable(costs) or isinstance(costs, Mapping)):
        raise PlanError(
            f"costs are {type(costs).__name__}; give fp.schedules.Costs, a dict such as {{('F', "
            f"0): 1e-3}}, or a function of kind and segment"
        )
    return Costs(costs)


def flop_costs(cut: Units) -> Costs:
    """Costs that are FLOPs, scaled so that F of a segment costs 1 on average; F = I = W = 1 where
    nothing has any."""
    flops = {key: float(unit.code.flops) for key, unit in cut.units.items()}
    forward = sum(n for (kind, _), n in flops.items() if kind == "F") / cut.segments
    if not forward:
        return Costs({"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}, unit="")
    return Costs({key: max(n / forward, _LEAST) for key, n in flops.items()}, unit="")


def load_of(cut: Units, costs: Costs) -> Load:
    """A cut as a search sees it. Bytes that two segments share are counted in both, so that caps
    are kept."""
    made = {v: u for u in cut.units.values() for v in u.outputs}
    segments = range(cut.segments)

    def kept(unit: Unit | None, kinds: str) -> float:
        """Bytes of what a unit reads that units of these kinds made."""
        read = [v for v in (unit.inputs if unit else ()) if v in made and made[v].kind in kinds]
        return float(sum({v.storage: v.nbytes for v in read}.values()))

    def work(kind: str, s: int) -> float:
        """What a unit takes beside what is counted as held: for itself, and what other segments
        have just handed it."""
        unit = cut.units[kind, s]
        out = {v.storage: v.nbytes for v in unit.outputs if kind == "F" and v in later}
        strange = (v for v in unit.inputs if v in made and made[v].segment != s)
        arrived = {v.storage: v.nbytes for v in strange if made[v].kind != "F" or v not in later}
        return float(unit.code.peak - sum(out.values()) + sum(arrived.values()) + sums)

    read = {v for u in cut.units.values() for v in u.inputs}
    # Of numbers that no unit reads, such as the loss: they are added up over microbatches.
    sums = sum(v.nbytes for v in made if made[v].kind == "F" and not v.shape and v not in read)
    later = {v for u in cut.units.values() if u.kind != "F" for v in u.inputs}
    times = {k: tuple(costs.of(k, s) for s in segments) for k in "FBIW"}
    return Load(
        **times,
        held=tuple(kept(cut.units["B", s], "F") for s in segments),
        waiting=tuple(kept(cut.units.get(("W", s)), "FI") for s in segments),
        work=tuple(max(work(k, s) for k in "FBIW" if (k, s) in cut.units) for s in segments),
        flows=_flows(cut, made),
        link=costs.message,
    )


def _flows(cut: Units, made: dict[Any, Unit]) -> dict[Flow, float]:
    read: dict[Flow, dict[str, int]] = {}
    for u in cut.units.values():
        for v in u.inputs:
            maker = made.get(v)
            if maker is not None and maker.segment != u.segment:
                ends = (("F" if x.kind == "F" else "B", x.segment) for x in (maker, u))
                read.setdefault(tuple(ends), {})[v.name] = v.nbytes  # type: ignore[arg-type]
    return {flow: float(sum(sizes.values())) for flow, sizes in read.items()}
