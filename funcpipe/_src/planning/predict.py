"""Predictions: when every action of a plan runs and what every rank holds meanwhile, given what
units cost.

In: a planned ``value_and_grad`` and `Costs`. Out: `Prediction`. Units, messages and waiting for
them are timed; adding up gradients, collectives of sharded weights and the rest of the step are
not. Without costs, a unit costs its FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funcpipe._src.graph.partition import Key, Unit, Units
from funcpipe._src.graph.unit_code import Value, bytes_text
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
CostOf = Callable[[str, int], float]
Given = Costs | Mapping[Any, float] | CostOf | None

# A unit without matrix products is not free: it costs this part of the mean.
_LEAST = 0.01
# By kind, where no unit has matrix products.
_EQUAL = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a step is predicted to do.

    Args:
        timeline: start and end of every action, in the unit of the costs.
        memory: for every pipeline rank (time, bytes held from then on): activations,
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
        """For every pipeline rank how long it computes."""
        return self.timeline.busy

    @cached_property
    def peak_memory(self) -> tuple[int, ...]:
        """For every pipeline rank the most bytes that it holds."""
        return tuple(map(_peak, self.memory))

    def save(self, path: str | Path, title: str = "") -> Path:
        """Draw it: an ``.html`` page, an ``.svg`` picture, or a ``.json`` trace for
        https://ui.perfetto.dev."""
        return picture.save(
            self.timeline,
            path,
            title=title,
            memory=self.memory,
            unit=self.unit,
        )

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        steady = ""
        if self.period < self.step_time:
            steady = f", {self.period:.4g}{unit} in steady state"
        lines = [f"step {self.step_time:.4g}{unit}{steady}, bubble {self.bubble:.1%}"]
        for rank, peak in enumerate(self.peak_memory):
            busy = f"{self.busy[rank]:.4g}{unit}"
            lines.append(f"  rank {rank} of the pipeline: busy {busy}, peak {bytes_text(peak)}")
        return "\n".join(lines)


def _peak(curve: Curve) -> int:
    heights = [nbytes for _, nbytes in curve]
    return max(heights, default=0)


def predict(call: PlannedCall, costs: Given = None) -> Prediction:
    """What a planned ``value_and_grad`` will do.

    Args:
        call: the planned call.
        costs: `Costs`, what they are made of (a dict or a function of kind and segment), or None
            for FLOPs.
    """
    known = as_costs(costs, call.units)
    nbytes = _message_bytes(call.programs)
    schedule = call.schedule

    def cost(action: Action) -> float:
        segments = schedule.stages[action.stage]
        if action.segment is not None:
            segments = (segments[action.segment],)
        times = [known.of(action.kind, segment) for segment in segments]
        return sum(times)

    def message(send: Action) -> float:
        return known.message(nbytes[send])

    # The transfers of a plan are settled: stages that exchange nothing get none here either.
    line = timeline(schedule.table, cost, message, edges=())
    curves = []
    for program, spans in zip(call.programs, line.spans, strict=True):
        curves.append(_curve(program, spans, known))
    return Prediction(line, tuple(curves), known.unit)


def _message_bytes(programs: Sequence[Program]) -> dict[Action, int]:
    """By its send, the bytes of every message."""
    found = {}
    for program in programs:
        for instruction in program.instructions:
            if instruction.op == SEND:
                sizes = [value.nbytes for value in instruction.values]
                found[instruction.action] = sum(sizes)
    return found


def _curve(program: Program, spans: Sequence[Span], costs: Costs) -> Curve:
    """What a rank holds over time: units run one after another within their action."""
    starts = {span.action: span.start for span in spans}
    curve = [(0.0, 0)]
    now = 0.0
    doing = None
    steps = zip(program.instructions, held(program), strict=True)
    for instruction, (peak, after) in steps:
        is_timed = instruction.op in (RUN, SEND, RECV)
        if is_timed and instruction.action != doing:
            doing = instruction.action
            now = starts.get(doing, now)  # messages with sums are in no schedule
        curve.append((now, peak))
        unit = instruction.unit
        if unit is not None:
            now += costs.of(unit.kind, unit.segment)
        curve.append((now, after))
    return tuple(curve)


# ---- costs


def as_costs(costs: Given, units: Units) -> Costs:
    """Costs as they were given; FLOPs if they were not."""
    if isinstance(costs, Costs):
        return costs
    if costs is None:
        return flop_costs(units)
    if callable(costs) or isinstance(costs, Mapping):
        return Costs(costs)
    raise PlanError(
        f"costs are {type(costs).__name__}; give fp.schedules.Costs, a dict such as {{('F', "
        f"0): 1e-3}}, or a function of kind and segment"
    )


def flop_costs(units: Units) -> Costs:
    """Costs that are FLOPs, scaled so that F of a segment costs 1 on average; F = I = W = 1 where
    nothing has any."""
    forward = 0.0
    for unit in units.units.values():
        if unit.kind == "F":
            forward += unit.code.flops
    mean = forward / units.segments
    if not mean:
        return Costs(_EQUAL, unit="")
    scaled = {}
    for key, unit in units.units.items():
        part = unit.code.flops / mean
        scaled[key] = max(part, _LEAST)
    return Costs(scaled, unit="")


# ---- what a search may know


def load_of(units: Units, costs: Costs) -> Load:
    """A loss as a search sees it. Bytes that two segments share are counted in both, so that memory
    limits are kept."""
    loads = _Loads(units)
    segments = range(units.segments)

    def times(kind: str) -> tuple[float, ...]:
        return tuple(costs.of(kind, segment) for segment in segments)

    def read_by(kind: str, makers: str) -> tuple[float, ...]:
        return tuple(loads.read_by((kind, segment), makers) for segment in segments)

    return Load(
        F=times("F"),
        B=times("B"),
        I=times("I"),
        W=times("W"),
        held=read_by("B", "F"),
        waiting=read_by("W", "FI"),
        work=tuple(map(loads.work, segments)),
        flows=loads.flows(),
        link=costs.message,
    )


class _Loads:
    """Bytes between the units of a loss.

    Attributes:
        maker: for every value the unit that makes it.
        later: what backward halves read.
        sums: bytes of numbers that no unit reads, such as the loss: they are added up over
            microbatches.
    """

    def __init__(self, units: Units) -> None:
        self.units = units.units
        self.maker: dict[Value, Unit] = {}
        self.later: set[Value] = set()
        read: set[Value] = set()
        for unit in self.units.values():
            self.maker |= dict.fromkeys(unit.outputs, unit)
            read.update(unit.inputs)
            if unit.kind != "F":
                self.later.update(unit.inputs)
        self.sums = 0
        for value, unit in self.maker.items():
            is_number = unit.kind == "F" and not value.shape
            if is_number and value not in read:
                self.sums += value.nbytes

    def read_by(self, key: Key, kinds: str) -> float:
        """Bytes of what a unit reads that units of these kinds made."""
        unit = self.units.get(key)
        if unit is None:
            return 0.0
        found = []
        for value in unit.inputs:
            maker = self.maker.get(value)
            if maker is not None and maker.kind in kinds:
                found.append(value)
        return _memory(found)

    def work(self, segment: int) -> float:
        """The most that a unit of a segment takes beside what is counted as held."""
        keys = [(kind, segment) for kind in "FBIW"]
        units = [self.units[key] for key in keys if key in self.units]
        return max(map(self._own, units))

    def _own(self, unit: Unit) -> float:
        """What a unit takes for itself, and what other segments have just handed it."""
        kept: list[Value] = []
        if unit.kind == "F":
            kept.extend(value for value in unit.outputs if value in self.later)
        arrived = []
        for value in unit.inputs:
            maker = self.maker.get(value)
            if maker is None or maker.segment == unit.segment:
                continue
            if maker.kind != "F" or value not in self.later:
                arrived.append(value)
        beside = _memory(arrived) + self.sums
        return unit.code.peak - _memory(kept) + beside

    def flows(self) -> dict[Flow, float]:
        """Bytes between segments."""
        read: dict[Flow, dict[str, int]] = {}
        for unit in self.units.values():
            for value in unit.inputs:
                maker = self.maker.get(value)
                if maker is None or maker.segment == unit.segment:
                    continue
                flow = _end(maker), _end(unit)
                sizes = read.setdefault(flow, {})
                sizes[value.name] = value.nbytes
        found = {}
        for flow, sizes in read.items():
            found[flow] = float(sum(sizes.values()))
        return found


def _memory(values: Iterable[Value]) -> float:
    """Bytes of values; memory that some share is counted once."""
    sizes = {value.storage: value.nbytes for value in values}
    return float(sum(sizes.values()))


def _end(unit: Unit) -> tuple[str, int]:
    half = "F" if unit.kind == "F" else "B"
    return half, unit.segment
