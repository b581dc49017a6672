"""Recordings: when every instruction of a real step began and ended, drawn over what was predicted.

Times are seconds since the recording was opened, on each rank's own clock. On a GPU the host waits
for every instruction, so that a recorded step is slower than others. In `simulate` one rank runs at
a time: what units take is real, when they start is not.

In: a runner, and one step that runs while the recording is open. Out: `Recording`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.backends.bind import BoundProgram
from funcpipe._src.comm import Communicator
from funcpipe._src.graph.partition import Key
from funcpipe._src.planning.predict import Prediction, predict
from funcpipe._src.program import RECV, RUN, SEND, Instruction, Program
from funcpipe._src.runtime.interpreter import Slots, run_instructions
from funcpipe._src.schedule.actions import Action
from funcpipe._src.schedule.costs import Costs
from funcpipe._src.schedule.timeline import Span, Timeline
from funcpipe._src.viz import perfetto
from funcpipe._src.viz import svg as picture
from funcpipe.errors import PlanError

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.planning.plan import Plan
    from funcpipe._src.runtime.rank import Rank
    from funcpipe._src.runtime.runner import Runner

Interval = tuple[float, float]  # start and end of an instruction
Times = list[list[Interval]]  # of the instructions of every value_and_grad
Observer = Callable[[BoundProgram, Slots, Communicator], None]


class Recording:
    """A step that is recorded: ``with run.record() as recording: run(state, batch)``. Read it after
    the ``with``.

    Of a mesh with more than a pipeline, the ranks are drawn that share rank 0's coordinates on
    every other axis.
    """

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._plan: Plan | None = None
        self._times: dict[int, Times] = {}

    def __enter__(self) -> Recording:
        self._run._recording = self
        self._times.clear()
        self._run._collect({})  # ranks start their clocks together
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._run._recording = None
        if kind is None:
            self._times = self._run._collect(self._times)

    def observer(self, rank: Rank) -> Observer:
        """What runs a rank's programs while the recording is open."""
        self._plan = rank.plan
        times: Times = [[] for _ in rank.calls]
        self._times[rank.comm.rank] = times
        bound = [call.bound for call in rank.calls]

        def run(program: BoundProgram, slots: Slots, comm: Communicator) -> None:
            call = next(number for number, other in enumerate(bound) if other is program)
            times[call].clear()
            for instruction in program.instructions:
                start = self._now(comm.device)
                run_instructions([instruction], slots, comm)
                end = self._now(comm.device)
                times[call].append((start, end))

        return run

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - self._start

    def _call(self, call: int) -> tuple[PlannedCall, Times]:
        """A planned call, and the times of every pipeline rank."""
        plan = self._plan
        if plan is None or not self._times:
            raise PlanError(
                "nothing was recorded; call the runner once inside `with run.record() as "
                "recording:`"
            )
        if call not in range(len(plan.calls)):
            raise PlanError(
                f"cannot read value_and_grad {call}: the step has {len(plan.calls)}, counted from 0"
            )
        ranks: Sequence[int] = (0,)
        axis = plan.resolved.pipe_axis
        if axis is not None:
            ranks = plan.resolved.mesh.group(0, (axis,))
        times = [self._times[rank][call] for rank in ranks]
        return plan.calls[call], times

    def timeline(self, call: int = 0) -> Timeline:
        """When every action began and ended, in seconds since the first began."""
        planned, times = self._call(call)
        first = min(map(_start, times), default=0.0)
        ranks = []
        for pipeline_rank, actions in enumerate(planned.schedule.table.ranks):
            program = planned.programs[pipeline_rank]
            found = _by_action(program, times[pipeline_rank])
            spans = []
            for action in actions:
                if action in found:
                    start, end = found[action]
                    spans.append(Span(action, start - first, end - first))
            ranks.append(tuple(spans))
        return Timeline(planned.schedule.table, tuple(ranks))

    def costs(self, call: int = 0) -> Costs:
        """What units took: the median over microbatches. Kinds that the schedule does not run are
        missing."""
        planned, times = self._call(call)
        found: dict[Key, list[float]] = defaultdict(list)
        for program, intervals in zip(planned.programs, times, strict=True):
            for instruction, (start, end) in _timed(program, intervals):
                unit = instruction.unit
                if instruction.op == RUN and unit is not None:
                    key = unit.kind, unit.segment
                    found[key].append(end - start)
        medians = {key: statistics.median(some) for key, some in found.items()}
        return Costs(medians)

    def prediction(
        self,
        costs: Costs | None = None,
        call: int = 0,
    ) -> Prediction:
        """What would be predicted: from given costs, or from what units took in the recording
        itself."""
        planned, _ = self._call(call)
        return predict(planned, costs or self.costs(call))

    def save(
        self,
        path: str | Path,
        costs: Costs | None = None,
        call: int = 0,
    ) -> Path:
        """Draw what was recorded over what was predicted: ``.html``, ``.svg``, or a ``.json`` trace
        for Perfetto."""
        path = Path(path)
        picture.check_suffix(path)
        recorded = self.timeline(call)
        predicted = self.prediction(costs, call)
        if path.suffix == ".json":
            text = json.dumps(_perfetto_trace(recorded, predicted))
        else:
            lines = {
                "recorded": recorded.scaled(1e3),
                "predicted": predicted.timeline.scaled(1e3),
            }
            is_page = path.suffix == ".html"
            text = picture.pair(lines, is_page, unit="ms")
        path.write_text(text, encoding="utf-8")
        return path


def _start(intervals: list[Interval]) -> float:
    """When the first of the instructions of a pipeline rank began."""
    return min((start for start, _ in intervals), default=math.inf)


def _timed(program: Program, intervals: list[Interval]) -> Iterator[tuple[Instruction, Interval]]:
    """The instructions of a program with their intervals."""
    return zip(program.instructions, intervals, strict=True)


def _by_action(program: Program, intervals: list[Interval]) -> dict[Action, Interval]:
    """From when to when the instructions of every action ran."""
    found: dict[Action, Interval] = {}
    for instruction, interval in _timed(program, intervals):
        if instruction.op in (RUN, SEND, RECV):
            action = instruction.action
            before = found.get(action, interval)
            start = min(before[0], interval[0])
            end = max(before[1], interval[1])
            found[action] = start, end
    return found


def _perfetto_trace(recorded: Timeline, predicted: Prediction) -> dict[str, Any]:
    """Both timelines as one trace, the predicted ranks below the recorded ones."""
    real = perfetto.trace(recorded, label="recorded ")
    expected = perfetto.trace(
        predicted.timeline,
        predicted.memory,
        1e6,
        label="predicted ",
        first=len(recorded.spans),
    )
    events = [*real["traceEvents"], *expected["traceEvents"]]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
