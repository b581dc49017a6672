"""Compile inputs: what all plans of a step are made from, and what they keep of earlier ones.

In: a resolved step, ``init_state``, params. Out: `CompileInputs`, which never change;
`CompileMemory`, which the stages of `pipeline.py` read and fill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis
from funcpipe._src.core import pytree
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.spec.resolve import ResolvedStep

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import LossVariant
    from funcpipe._src.planning.placement import StatePlacement
    from funcpipe._src.planning.scheduling import ChosenSchedule


@dataclass(frozen=True)
class CompileInputs:
    """What all plans of a step are made from.

    Args:
        resolved: the step and its transforms on a mesh.
        init_state: makes the state of params.
        params: the full tree, of fakes of ``mode``.
        mode: of all fakes that graphs are traced with.
    """

    resolved: ResolvedStep
    init_state: Callable
    params: Any
    mode: FakeTensorMode

    def fake_like(self, leaf: Any, shape: tuple[int, ...] | None = None) -> Any:
        """A fake of a tensor, perhaps of another shape; anything else as it is."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return fake(leaf.shape if shape is None else shape, leaf, self.mode)


@dataclass(frozen=True)
class CallInputs:
    """What a ``value_and_grad`` is compiled from.

    Args:
        step: the inputs of all plans.
        analysis: of the step; its calls are as written.
        number: of the call.
        call: with the loss function that is traced.
    """

    step: CompileInputs
    analysis: StepAnalysis
    number: int
    call: PrimitiveCall

    @property
    def resolved(self) -> ResolvedStep:
        """The step and its transforms on a mesh."""
        return self.step.resolved

    @property
    def mode(self) -> FakeTensorMode:
        """The mode of all fakes that graphs are traced with."""
        return self.step.mode

    @property
    def read_values(self) -> Hashable:
        """What the loss function reads from Python."""
        reading = self.call.reading
        return None if reading is None else reading.values

    def param(self, arg: int) -> tuple[str, tuple[int, ...]]:
        """Path and shape of the param that an arg of the call is."""
        number = self.call.params[arg]
        return self.analysis.paths[number], self.analysis.shapes[number]

    def params(self, dtypes: Iterable[torch.dtype]) -> list[torch.Tensor]:
        """Fakes of the call's params."""
        like = pytree.leaves(self.step.params)
        fakes = []
        for param, dtype in zip(self.call.params, dtypes, strict=True):
            shape = self.analysis.shapes[param]
            fakes.append(fake(shape, like[param], self.mode, dtype))
        return fakes


@dataclass
class StageClock:
    """How long each stage of one plan took.

    Args:
        seconds: by stage; a stage that runs several times adds up.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count what runs inside for a stage."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took


@dataclass
class CompileMemory:
    """What later plans of a step keep of earlier ones.

    Args:
        losses: loss functions that are traced and cut, by what this depends on.
        rows_exact: by what the proof of rows depends on, whether weights are exact.
        schedules: by number of a call its schedule; stages stay as the first plan has them.
        placement: of the state, which stays as the first plan has it.
        clock: of the plan that is being made.
    """

    losses: dict[tuple, LossVariant] = field(default_factory=dict)
    rows_exact: dict[tuple, bool] = field(default_factory=dict)
    schedules: dict[int, ChosenSchedule] = field(default_factory=dict)
    placement: StatePlacement | None = None
    clock: StageClock = field(default_factory=StageClock)

    def forget_schedules(self) -> None:
        """Let the next plan choose schedules, stages and placement; what was traced is kept."""
        self.schedules.clear()
        self.placement = None


def compile_inputs(resolved: ResolvedStep, init_state: Callable, params: Any) -> CompileInputs:
    """The inputs of a step whose params have these shapes."""
    mode = FakeTensorMode()
    fakes = pytree.map_tensors(lambda leaf: fake(leaf.shape, leaf, mode), params)
    return CompileInputs(resolved, init_state, fakes, mode)
