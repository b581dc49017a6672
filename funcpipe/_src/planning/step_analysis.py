"""Step analysis: runs a step on tagged fakes under its transforms.

In: compile inputs, a batch. Out: the `StepAnalysis` that every later stage reads, and the
`Rehearsal` that runs the step again as a rank does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from funcpipe._src.analysis.host_values import Follower
from funcpipe._src.analysis.rehearsal import Rehearsal
from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis, analyse
from funcpipe._src.analysis.tags import Tags
from funcpipe._src.core import pytree
from funcpipe._src.core.inference_mode import without_inference
from funcpipe._src.planning.batch_split import split_batch
from funcpipe._src.planning.compile_inputs import CompileInputs
from funcpipe._src.planning.weight_layout import loss_dtypes
from funcpipe._src.spec.resolve import ResolvedStep


def analyse_step(
    inputs: CompileInputs, batch: Any, follower: Callable[[int], Follower] | None = None
) -> tuple[StepAnalysis, Rehearsal]:
    """Run ``init_state`` and the step once on tagged fakes.

    The fakes have a mode of their own: a loss function that closes over what the step sees is
    refused when it is traced.

    Args:
        follower: reads what the loss of a call reads from Python.
    """
    resolved = inputs.resolved
    own_rows_of = resolved.row_axes if resolved.local else ()

    def as_traced(call: PrimitiveCall, tags: Tags) -> PrimitiveCall:
        """A call as one device would trace it, on the rows that come with a batch."""
        split = split_batch(resolved, call.batch, call.origins)
        dtypes = loss_dtypes(resolved, tags, call)
        own_rows = split.own_rows(call.batch)
        traced = with_traced_loss(resolved, call)
        return replace(traced, dtypes=dtypes, batch=own_rows)

    return analyse(
        resolved.step,
        inputs.init_state,
        inputs.params,
        without_inference(batch),
        FakeTensorMode(),
        as_traced,
        resolved.mesh.axis_size(own_rows_of),
        follower,
        resolved.mesh.size,
    )


def with_traced_loss(resolved: ResolvedStep, call: PrimitiveCall) -> PrimitiveCall:
    """A call with the loss function that is traced: under `mixed_precision` it casts its batch."""
    loss_fn = resolved.loss(call.loss_fn, call.has_aux)
    return replace(call, loss_fn=loss_fn)


def with_own_fakes(inputs: CompileInputs, analysis: StepAnalysis) -> StepAnalysis:
    """The analysis with the compiler's fakes in the batches of calls, in place of its own."""

    def own(leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor):
            return inputs.fake_like(leaf)
        return leaf

    calls = []
    for call in analysis.calls:
        batch = pytree.map(own, call.batch)
        calls.append(replace(call, batch=batch))
    return replace(analysis, calls=tuple(calls))
