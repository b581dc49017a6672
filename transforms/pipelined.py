"""`pipelined`: the loss function cut at its boundaries into stages, one rank of an axis holding one
stage or several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.mesh import as_axes
from funcpipe._src.schedule.actions import ScheduleFn
from funcpipe._src.schedule.catalogue import by_name
from funcpipe._src.schedule.library import one_f_one_b
from funcpipe._src.schedule.search import auto
from funcpipe._src.spec.requests import MicrobatchSplit, Pipeline
from funcpipe._src.spec.transform_spec import TransformSpec, require_positive, with_spec
from funcpipe.errors import ScheduleError, StackError


@dataclass(frozen=True)
class PipelinedSpec(TransformSpec):
    """What `pipelined` asks for."""

    name: str = "pipelined"
    split: MicrobatchSplit = field(kw_only=True)
    cut: Pipeline = field(kw_only=True)

    def microbatches(self) -> MicrobatchSplit:
        return self.split

    def pipeline(self) -> Pipeline:
        return self.cut


def pipelined(
    step: Callable | None = None,
    *,
    axis: str,
    microbatches: int | None = None,
    schedule: ScheduleFn | str | None = None,
    stages: str | Sequence[int] = "balanced",
    dims: Any = 0,
) -> Any:
    """Cut every ``value_and_grad`` of the step into pipeline stages along a mesh axis.

    Args:
        step: the step; without it, a transform to apply later.
        axis: the mesh axis; its ranks hold the stages.
        microbatches: into how many the batch is split; None takes them as `fp.Microbatches` brings
            them.
        schedule: one of `fp.schedules`, called or by its name ("zb_v", "1f1b"; two stages a rank,
            where that is free), or a function ``(ranks, microbatches) -> Schedule``; 1F1B by
            default. "auto" measures the units when the runner is initialised, then chooses schedule
            and stages together; ``fp.schedules.auto(...)`` chooses by costs that it is given (else
            by FLOPs), under a memory limit.
        stages: how segments (what lies between two boundaries) are grouped: "balanced" by FLOPs,
            "even" by count, or a list that says how many segments each stage gets.
        dims: a pytree prefix of the batch: the dim along which a leaf is split into microbatches
            (default 0), or None to hand the leaf to every microbatch whole.

    Returns:
        A step with the same interface and the same numbers.

    1F1B: Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters",
    section 2.2.

    >>> pipelined(axis="pipe", microbatches=8)(lambda state, batch: (state, {}))
    <step <lambda>
      pipelined(axis='pipe')>
    """
    if len(as_axes(axis)) != 1:
        raise StackError(
            f"pipelined: axis is {axis!r}; a pipeline runs along one axis, given by its name"
        )
    if microbatches is not None:
        require_positive("pipelined", "microbatches", microbatches)
    profile = schedule == "auto"
    schedule = (
        auto()
        if profile
        else _by_name(schedule)
        if isinstance(schedule, str)
        else schedule or one_f_one_b()
    )
    if not _lays_out(schedule):
        raise StackError(
            f"pipelined: schedule is {getattr(schedule, '__name__', describe(schedule))}, not a "
            "function (ranks, microbatches) -> Schedule; pass one of fp.schedules, called: "
            "fp.schedules.one_f_one_b() or fp.schedules.from_table(rows)"
        )
    if not isinstance(stages, Sequence) or (
        isinstance(stages, str) and stages not in ("balanced", "even")
    ):
        raise StackError(
            f"pipelined: stages={stages!r}; write 'balanced', 'even', or a list of segments per "
            "stage"
        )
    if not isinstance(stages, str):
        for n in stages:
            require_positive("pipelined", "each entry of stages", n)
        stages = tuple(stages)
    split, cut = MicrobatchSplit(microbatches, dims), Pipeline(schedule, stages, profile)
    return with_spec(step, PipelinedSpec(axes=as_axes(axis), split=split, cut=cut))


def _by_name(name: str) -> ScheduleFn:
    try:
        return by_name(name)
    except ScheduleError as error:
        raise StackError(f"pipelined: {error}; and 'auto', which chooses one") from None


def _lays_out(schedule: Any) -> bool:
    """Whether something can be called with a number of ranks and one of microbatches."""
    try:
        inspect.signature(schedule).bind(1, 1)
    except (TypeError, ValueError):
        return False
    return True
