"""Equivalence: a transformed step computes what the step computes on one device.

The *reference* is the step as written, run on one batch after another. The *relative error* of a
leaf is ``norm(got - want) / norm(want)``. Optimizers and clipping hide a gradient of a wrong scale,
so losses and gradients are compared themselves, as every ``value_and_grad`` returned them on every
rank, and not only the state that follows.

In: a step, the same step with transforms on it, a mesh, and what the step is run on.
Out: a `Report`, or an AssertionError that says which step, what, where in the pytree, on which
rank, how far off, and what was allowed.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcpipe._src.core import pytree
from funcpipe._src.core.context import tap
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.runtime.rank import RunContext
from funcpipe._src.runtime.simulate import simulate
from funcpipe._src.testing.comparison import Call, Comparison, same_bits
from funcpipe._src.testing.narrowing import rounded_inside


@dataclass(frozen=True)
class Report:
    """What `assert_equivalent` found.

    Args:
        error: the largest relative error of a leaf.
        where: that leaf.
        compared: how many leaves were compared.
    """

    error: float
    where: str
    compared: int


@dataclass(frozen=True)
class _StepResult:
    """What one step gave.

    Args:
        calls: by rank (0 for the reference), what every ``value_and_grad`` returned.
        metrics: of the step.
        state: the full state.
    """

    calls: dict[int, list[Call]]
    metrics: Any
    state: Any


def assert_equivalent(
    step: Callable,
    transformed: Callable,
    mesh: Mesh,
    init_state: Callable[[Any], Any],
    params: Any,
    batches: Sequence[Any],
    rtol: float = 1e-12,
    bitwise: bool = False,
    runner: Callable[[Callable, Mesh], Any] | None = None,
) -> Report:
    """Run a step and its transformed self on the same batches, and compare all that they compute.

    Args:
        step: the reference, a step without transforms (those on it do nothing here).
        transformed: the step to test.
        mesh: for the runner.
        init_state: ``params -> state``.
        params: the full params.
        batches: global batches; one step each.
        rtol: the largest relative error that a leaf may have. The default is for float64.
        bitwise: whether losses and gradients must have the same bits wherever the step starts from
            a state of the same bits (the first step does). That holds if no sum is taken in another
            order: with one microbatch.
        runner: ``(step, mesh) -> runner``, `fp.simulate` by default; ``fp.spmd`` in processes, each
            of which then compares what its rank holds.

    Returns:
        the largest error and where it was.

    Raises:
        AssertionError: metrics, a loss, a gradient or a leaf of the state is not what it is on one
            device, or ranks that hold the same leaf hold different bits of it. It names the lines
            at which the loss function goes on in fewer bits than came in, where that explains the
            error. Raised after the last step, so that no rank waits for another.

    >>> import funcpipe as fp
    >>> def loss_fn(w, x):
    ...     return fp.Mean((x @ w).square().sum(), torch.tensor(float(len(x))))
    >>> def step(w, x):
    ...     loss, grad = fp.value_and_grad(loss_fn)(w, x)
    ...     return w - 0.1 * grad, {"loss": loss}
    >>> w, x = torch.ones(3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    >>> split = fp.accumulated(step, microbatches=2)
    >>> assert_equivalent(step, split, fp.Mesh(), lambda w: w, w, [x, x]).compared
    8
    >>> def wrong(w, x):
    ...     w, metrics = step(w, x)
    ...     return w, {"loss": metrics["loss"] * 2}
    >>> wrong_split = fp.accumulated(wrong, microbatches=2)
    >>> assert_equivalent(step, wrong_split, fp.Mesh(), lambda w: w, w, [x])
    Traceback (most recent call last):
    AssertionError: step 0: metrics['loss']: relative error 1.0e+00, allowed 1.0e-12
    """
    reference = list(_reference(step, init_state, params, batches))
    run = (runner or simulate)(transformed, mesh)
    results = list(_transformed(run, init_state, params, batches))
    comparison = Comparison(rtol, functools.partial(_explained, results))
    same_state = True
    for number, (want, got) in enumerate(zip(reference, results, strict=True)):
        comparison.prefix = f"step {number}: "
        comparison.calls(got.calls, want.calls[0], exact=bitwise and same_state)
        comparison.tree("metrics", got.metrics, want.metrics)
        comparison.tree("state", got.state, want.state)
        leaves = zip(pytree.leaves(got.state), pytree.leaves(want.state), strict=True)
        same_state &= all(same_bits(*pair) for pair in leaves)
    return Report(comparison.error, comparison.where, comparison.compared)


def _reference(
    step: Callable,
    init_state: Callable,
    params: Any,
    batches: Sequence[Any],
) -> Iterator[_StepResult]:
    with torch.no_grad():
        state = init_state(pytree.map_tensors(torch.clone, params))
        for batch in batches:
            with tap() as seen:
                state, metrics = step(state, batch)
            calls = [Call(*call) for call in seen]
            yield _StepResult({0: calls}, metrics, pytree.map_tensors(torch.clone, state))


def _transformed(
    run: Any,
    init_state: Callable,
    params: Any,
    batches: Sequence[Any],
) -> Iterator[_StepResult]:
    state = run.init(init_state, params, batches[0])
    for batch in batches:
        with tap() as seen:
            state, metrics = run(state, batch)
        calls = defaultdict(list)
        for call in itertools.starmap(Call, seen):
            if isinstance(call.context, RunContext):  # the others are from planning
                calls[call.context.rank.comm.rank].append(call)
        yield _StepResult(dict(calls), metrics, run.unplace(state))


def _explained(results: list[_StepResult], error: float) -> str:
    """How roundings inside the loss functions account for an error; nothing if they do not."""
    for calls in results[0].calls.values():
        plan = calls[0].context.rank.plan
        if plan.resolved.precision is not None:
            continue
        for planned in plan.calls:
            explanation = rounded_inside(planned.call, plan.placement.analysis, error)
            if explanation:
                return explanation
        return ""
    return ""
