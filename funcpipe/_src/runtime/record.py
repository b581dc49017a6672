"""Recordings: when every instruction of a real step began and ended, drawn over what was predicted.

In: a runner, and one step that runs while the recording is open. Out: `Recording`. Times are
seconds since the recording was opened, on each rank's own clock; on a GPU every instruction is
waited for, so that a recorded step is slower than others.
In `simulate` one rank runs at a time: what units take is real, when they start is not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.planning.predict import Prediction, predict
from funcpipe._src.program import RECV, RUN, SEND
from funcpipe._src.runtime.interpreter import Bound, Slots, execute
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

# Start and end of every instruction of every value_and_grad.
Times = list[list[tuple[float, float]]]


class Recording:
    """A step that is recorded: ``with run.record() as recording: run(state, batch)``. Read it after
    the ``with``.

    Of a mesh with more than a pipeline the ranks are drawn that share rank 0's place on every other
    axis.
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

    def observer(self, rank: Rank) -> Callable[[list[Bound], Slots, Communicator], None]:
        """What runs a rank's programs while the recording is open."""
        self._plan = rank.plan
        times: Times = [[] for _ in rank.calls]
        self._times[rank.comm.rank] = times
        bound = [call.bound for call in rank.calls]

        def run(program: list[Bound], slots: Slots, comm: Communicator) -> None:
            mine = times[next(k for k, other in enumerate(bound) if other is program)]
            mine.clear()
            for instruction in program:
                start = self._now(comm.device)
                execute([instruction], slots, comm)
                mine.append((start, self._now(comm.device)))

        return run

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - self._start

    def _call(self, call: int) -> tuple[PlannedCall, list[list[tuple[float, float]]]]:
        """A planned call, and the times of every place on the pipe axis."""
        if self._plan is None or not self._times:
            raise PlanError(
                "nothing was recorded; call the runner once inside `with run.record() as "
                "recording:`"
            )
        if call not in range(len(self._plan.calls)):
            raise PlanError(
                f"cannot read value_and_grad {call}: the step has {len(self._plan.calls)}, counted "
                "from 0"
            )
        axis = self._plan.resolved.pipe_axis
        ranks = self._plan.resolved.mesh.group(0, (axis,)) if axis else (0,)
        return self._plan.calls[call], [self._times[rank][call] for rank in ranks]

    def timeline(self, call: int = 0) -> Timeline:
        """When every action began and ended, in seconds since the first began."""
        planned, times = self._call(call)
        starts = []
        for row in times:
            starts += [start for start, _ in row]
        first = min(starts, default=0.0)
        rows = []
        table = planned.schedule.table
        by_rank = zip(planned.programs, table.ranks, times, strict=True)
        for program, actions, row in by_rank:
            ends: dict[Any, list[float]] = defaultdict(list)
            for i, span in zip(program.instructions, row, strict=True):
                if i.op in (RUN, SEND, RECV):
                    ends[i.action] += span
            rows.append(
                tuple(
                    Span(a, min(ends[a]) - first, max(ends[a]) - first)
                    for a in actions
                    if a in ends
                )
            )
        return Timeline(table, tuple(rows))

    def costs(self, call: int = 0) -> Costs:
        """What units took: the median over microbatches. Kinds that the schedule does not run are
        missing."""
        planned, times = self._call(call)
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        for program, row in zip(planned.programs, times, strict=True):
            for i, (start, end) in zip(program.instructions, row, strict=True):
                if i.op == RUN and i.unit is not None:
                    found[i.unit.kind, i.unit.segment].append(end - start)
        return Costs({key: statistics.median(some) for key, some in found.items()})

    def prediction(self, costs: Costs | None = None, call: int = 0) -> Prediction:
        """What would be predicted: from given costs, or from what units took in the recording
        itself."""
        return predict(self._call(call)[0], costs or self.costs(call))

    def save(self, path: str | Path, costs: Costs | None = None, call: int = 0) -> Path:
        """Draw what was recorded over what was predicted: ``.html``, ``.svg``, or a ``.json`` trace
        for Perfetto."""
        path = Path(path)
        picture.check_suffix(path)
        real, expected = self.timeline(call), self.prediction(costs, call)
        if path.suffix == ".json":
            count = len(real.spans)
            traces = (
                perfetto.trace(real, label="recorded "),
                perfetto.trace(expected.timeline, expected.memory, 1e6, "predicted ", count),
            )
            events = [event for trace in traces for event in trace["traceEvents"]]
            path.write_text(
                json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8"
            )
            return path
        lines = {"recorded": real.scaled(1e3), "predicted": expected.timeline.scaled(1e3)}
        path.write_text(picture.pair(lines, path.suffix == ".html", unit="ms"), encoding="utf-8")
        return path
