"""Equivalence: a transformed step computes what the step computes on one device.

Terms. The *reference* is the step as written, run on one batch after another. The *relative error*
of a leaf is ``norm(got - want) / norm(want)``. Optimizers and clipping hide a gradient of a wrong
scale, so losses and gradients are compared themselves, as every ``value_and_grad`` returned them on
every rank, and not only the state that follows.

In: a step, the same step with transforms on it, a mesh, and what the step is run on. Out: `Report`,
or an AssertionError that says which step, what, where in the pytree, on which rank, how far off,
and what was allowed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import tap
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.planning.placement import take
from funcpipe._src.runtime.rank import RunContext
from funcpipe._src.runtime.simulate import simulate
from funcpipe._src.testing.narrowing import rounded_inside

# Of the largest leaf of a tree. A gradient that cancels to zero is rounding errors, 1e-16 of what
# was added up; measured against itself it would always be wrong. So no leaf is measured against
# less than this.
SMALL = 1e-3


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


class _Call(NamedTuple):
    """What one ``value_and_grad`` returned, and the context of the rank that called it (None for
    the reference)."""

    context: Any
    loss: torch.Tensor
    grads: Any

    def part(self, number: int, leaf: int, whole: torch.Tensor) -> tuple[torch.Tensor, int]:
        """What a rank has of a gradient in call ``number``, and which of its shards that is."""
        rank = self.context.rank
        layout = rank.plan.placement.layouts[rank.plan.calls[number].call.params[leaf]]
        if not layout.axes:
            return whole, 0
        mesh, here = rank.comm.mesh, rank.comm.rank
        return take(whole, mesh, here, layout.axes), mesh.index(here, layout.axes)


@dataclass(frozen=True)
class _Ran:
    """One step of a run: by rank (0 for the reference) what every ``value_and_grad`` returned;
    metrics; full state."""

    calls: dict[int, list[_Call]]
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
    >>> assert_equivalent(step, fp.accumulated(wrong, microbatches=2), fp.Mesh(), lambda w: w, w, [x])
    Traceback (most recent call last):
    AssertionError: step 0: metrics['loss']: relative error 1.0e+00, allowed 1.0e-12
    """
    reference = list(_reference(step, init_state, params, batches))
    run = (runner or simulate)(transformed, mesh)
    ran = list(_transformed(run, init_state, params, batches))
    found = _Comparison(rtol, lambda error: _inside(ran, error))
    same_before = True
    for k, (want, got) in enumerate(zip(reference, ran, strict=True)):
        found.at = f"step {k}: "
        found.calls(got.calls, want.calls[0], exact=bitwise and same_before)
        found.tree("metrics", got.metrics, want.metrics)
        found.tree("state", got.state, want.state)
        same_before &= all(map(_same_bits, tree.leaves(got.state), tree.leaves(want.state)))
    return Report(found.error, found.where, found.compared)


def _reference(
    step: Callable, init_state: Callable, params: Any, batches: Sequence[Any]
) -> Iterator[_Ran]:
    with torch.no_grad():
        state = init_state(tree.map_tensors(torch.clone, params))
        for batch in batches:
            with tap() as seen:
                state, metrics = step(state, batch)
            yield _Ran(
                {0: [_Call(*call) for call in seen]}, metrics, tree.map_tensors(torch.clone, state)
            )


def _transformed(
    run: Any, init_state: Callable, params: Any, batches: Sequence[Any]
) -> Iterator[_Ran]:
    state = run.init(init_state, params, batches[0])
    for batch in batches:
        with tap() as seen:
            state, metrics = run(state, batch)
        calls = defaultdict(list)
        for call in itertools.starmap(_Call, seen):
            if isinstance(call.context, RunContext):  # others only looked at the step, to plan it
                calls[call.context.rank.comm.rank].append(call)
        yield _Ran(dict(calls), metrics, run.unplace(state))


def _inside(ran: list[_Ran], error: float) -> str:
    """What the loss functions themselves have to do with an error."""
    for calls in ran[0].calls.values():
        plan = calls[0].context.rank.plan
        if plan.resolved.precision is None:
            said = (
                rounded_inside(planned.call, plan.placement.analysis, error)
                for planned in plan.calls
            )
            return next(filter(None, said), "")
    return ""


class _Comparison:
    """Compares leaf by leaf, and keeps the largest error; ``explain`` says more of one that is too
    large."""

    def __init__(self, rtol: float, explain: Callable[[float], str]) -> None:
        self.rtol, self.explain, self.at = rtol, explain, ""
        self.error, self.where, self.compared = 0.0, "", 0

    def calls(self, got: dict[int, list[_Call]], want: list[_Call], exact: bool) -> None:
        """Every rank's losses and gradients, and that what several ranks hold is the same."""
        held: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}
        for rank, calls in sorted(got.items()):
            if len(calls) != len(want):
                self._fail(
                    f"rank {rank} called value_and_grad {len(calls)} times instead of {len(want)}"
                )
            for k, (call, true) in enumerate(zip(calls, want, strict=True)):
                name = f"of value_and_grad {k} on rank {rank}"
                self._leaf(f"loss {name}", call.loss, true.loss, 0.0, exact)
                for i, (path, x, whole) in enumerate(
                    self._pairs(f"grads {name}", call.grads, true.grads)
                ):
                    if x is None:
                        continue
                    wanted, shard = call.part(k, i, whole)
                    self._leaf(f"grads{path} {name}", x, wanted, _floor(true.grads), exact)
                    first, other = held.setdefault((k, i, shard), (rank, x))
                    if not _same_bits(x, other):
                        self._fail(f"grads{path} {name}: other bits than on rank {first}")

    def tree(self, what: str, got: Any, want: Any) -> None:
        """Two whole trees."""
        for path, x, wanted in self._pairs(what, got, want):
            self._leaf(f"{what}{path}", x, wanted, _floor(want), exact=False)

    def _pairs(self, what: str, got: Any, want: Any) -> Iterator[tuple[str, Any, Any]]:
        """Path, leaf (None if it is absent) and wanted leaf."""
        leaves, spec = tree.flatten(want)
        try:
            found = spec.flatten_up_to(got)
        except ValueError as error:
            self._fail(f"{what}: another structure than on one device: {error}")
        return zip(tree.paths(want), found, leaves, strict=True)

    def _leaf(self, name: str, got: Any, want: Any, floor: float, exact: bool) -> None:
        self.compared += 1
        if _describe(got) != _describe(want):
            self._fail(f"{name}: {_describe(got)} instead of {_describe(want)}")
        if not isinstance(want, torch.Tensor):
            return
        got = got.to(want.device)
        error = 0.0 if _same_bits(got, want) else _relative_error(got, want, floor)
        if error > self.error or not self.where:
            self.error, self.where = error, self.at + name
        if error > self.rtol:
            far = f"relative error {error:.1e}, allowed {self.rtol:.1e}{self.explain(error)}"
            self._fail(f"{name}: {far if math.isfinite(error) else _unlike(got, want)}")
        if exact and not _same_bits(got, want):
            self._fail(f"{name}: other bits than on one device (relative error {error:.1e})")

    def _fail(self, text: str) -> NoReturn:
        raise AssertionError(self.at + text)


def _floor(want: Any) -> float:
    """The least that a leaf of a tree is measured against; 0-d leaves, often counters, do not set
    it."""
    leaves = [x for x in tree.leaves(want) if isinstance(x, torch.Tensor) and x.dim()]
    return SMALL * max(map(_norm, leaves), default=0.0)


def _describe(x: Any) -> str:
    """What must be the same of two leaves, whatever was computed."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return repr(x)


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    return torch.equal(a, b) or (
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    )


def _relative_error(got: torch.Tensor, want: torch.Tensor, floor: float) -> float:
    """Infinite where one is NaN or infinite and the other is not, and where integers differ."""
    if not (want.is_floating_point() or want.is_complex()):
        return math.inf
    same = (got == want) | (got.isnan() & want.isnan())
    off = _norm(torch.where(same, 0, got.to(_wide(got)) - want.to(_wide(want))))
    scale = max(_norm(torch.where(want.isfinite(), want, 0)), floor)
    return off / scale if scale and math.isfinite(off) else math.inf


def _unlike(got: torch.Tensor, want: torch.Tensor) -> str:
    """What to say where there is no relative error: of integers, NaN and infinite numbers."""
    off = (got != want) & ~(got.isnan() & want.isnan())
    k = int(off.flatten().nonzero()[0])
    text = f"{got.flatten()[k].item()} instead of {want.flatten()[k].item()}"
    return f"{text} at {int(off.sum())} of {off.numel()} elements" if off.dim() else text


def _norm(x: torch.Tensor) -> float:
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0
    return float(torch.linalg.vector_norm(x.to(_wide(x))))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64
