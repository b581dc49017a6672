"""Which leaf of a state is which parameter, and what the step does to leaves outside
``value_and_grad``.

A rank holds some leaves of the params, or parts of them; so outside ``value_and_grad`` a step may
touch leaves only elementwise, or through `global_norm` and its kin. Both questions are answered by
running ``init_state`` and the step once on *tagged* fakes and the real batch. Every leaf of params
gets a first dim of a size that nothing else has, its tag. Moments, masters and averages have it
too, and an op that is not elementwise is refused as it runs (`elementwise.py`). `rehearsal.py` runs
both again as ranks do.

In: the step, ``init_state``, params and batch. Out: `StepAnalysis`: for every leaf of the state the
parameter that it belongs to (None: replicated), and every ``value_and_grad`` and global sum that
the step makes, in order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode

from funcpipe._src.analysis.analysis_text import analysis_text
from funcpipe._src.analysis.call_results import loss_and_aux, origin
from funcpipe._src.analysis.elementwise import ElementwiseOnly
from funcpipe._src.analysis.expressions import Expressions, Given, Numbers, Seen, Table
from funcpipe._src.analysis.host_values import Follower, Reading
from funcpipe._src.analysis.outside_ops import Op, Outside
from funcpipe._src.analysis.same_on_ranks import check_draws, check_own_rows
from funcpipe._src.analysis.step_results import check_results
from funcpipe._src.analysis.tags import Tags, every_param
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import DonationAnalysis
from funcpipe._src.core.containers import check_containers
from funcpipe._src.core.context import Join, PlainContext, bind_context
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.gradients import check_params
from funcpipe._src.core.source_lines import line_of
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.trace_errors import BY_VALUE
from funcpipe.errors import StateError

if TYPE_CHECKING:
    from funcpipe._src.analysis.rehearsal import Rehearsal


@dataclass(frozen=True)
class PrimitiveCall:
    """One ``value_and_grad`` of a step.

    Args:
        loss_fn, has_aux: what it was made with.
        params: for every leaf the number of the parameter it is.
        params_spec: the structure of its params.
        dtypes: of those leaves (they may differ from the parameter's: a cast before the call).
        batch: its batch, real; what was computed from results of earlier calls is fake.
        origins: for every leaf of the batch an `Origin`, in a tree like it.
        reading: what the loss function read from Python at the call.
    """

    loss_fn: Callable
    has_aux: bool
    params: tuple[int, ...]
    params_spec: Any
    dtypes: tuple[torch.dtype, ...]
    batch: Any
    origins: Any
    reading: Reading | None = None


@dataclass(frozen=True)
class Reduction:
    """One global sum of a step: the structure of its tree, the parameter of every leaf (None:
    replicated), its dtype."""

    spec: Any
    params: tuple[int | None, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StepAnalysis:
    """The result of running the step once on tagged fakes.

    Args:
        params_spec: the structure of the full params.
        paths, shapes, dtypes: of every parameter.
        state_spec: the structure of the full state.
        state_paths, state: for every leaf of the state its path and its parameter, or None.
        calls: every ``value_and_grad``.
        reductions: every global sum.
        overwritable: the leaves of the state that an optimizer replaces, and that nobody reads
            after that.
        outside: every op that ``init_state`` and the step call outside ``value_and_grad``.
    """

    params_spec: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    state_spec: Any
    state_paths: tuple[str, ...]
    state: tuple[int | None, ...]
    calls: tuple[PrimitiveCall, ...]
    reductions: tuple[Reduction, ...]
    overwritable: frozenset[int]
    outside: tuple[Op, ...] = ()

    __str__ = analysis_text


class _Feeds(BaseException):
    """A step uses results in a later batch: it is run again, with losses whose dtype is known."""


class AnalysisContext(PlainContext):
    """The context of a run on tagged fakes: notes calls, and hands back fakes.

    Args:
        seen: makes of a call the one that is traced.
        row_ranks: how many ranks have rows of their own that are not in the batch.
        exact: whether losses have their dtype, which takes a run of the loss function.
        table: where expressions are numbered.
        follower: reads what the loss of a call reads from Python.
    """

    def __init__(
        self,
        tags: Tags,
        seen: Callable[[PrimitiveCall, Tags], PrimitiveCall],
        row_ranks: int,
        exact: bool,
        table: Table,
        follower: Callable[[int], Follower] | None = None,
    ) -> None:
        self.follower = follower
        self.tags, self.seen, self.row_ranks, self.exact = tags, seen, row_ranks, exact
        self.expressions = Expressions(table, tags.shape_of, tags.of)
        self.calls: list[PrimitiveCall] = []
        self.reductions: list[Reduction] = []
        self.results: list[tuple[torch.Tensor, Any]] = []  # loss and aux of every call
        self.given: list[Given] = []
        self.summed: list[Numbers] = []
        self.donation: DonationAnalysis = DonationAnalysis([])
        self.running = "init_state"
        self.outside: Outside | None = None  # of the run on all leaves

    def _param(self, path: str, leaf: torch.Tensor) -> int:
        """The parameter that a leaf of a call's params is."""
        param = self.tags.of(leaf)
        if param is None:
            raise StateError(
                f"value_and_grad: its params{path} is no parameter of the state, so it is not "
                "known where it is held; pass parameters (or what follows from them "
                "elementwise) here and everything else through batch"
            )
        return param

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
        leaves, spec = check_params(params)
        self.donation.read(leaves)
        numbers = [
            self._param(path, leaf) for path, leaf in zip(tree.paths(params), leaves, strict=True)
        ]
        for path, leaf in zip(tree.paths(batch), tree.leaves(batch), strict=True):
            param = self.tags.of(leaf)
            if param is not None:
                raise StateError(
                    f"value_and_grad: batch{path} is {self.tags.name(param)}, which a rank may not "
                    "hold; pass it through params (detach it in the loss if it should stay as it "
                    "is)"
                )
        if (
            self.calls
            and not self.exact
            and any(isinstance(leaf, FakeTensor) for leaf in tree.leaves(batch))
        ):
            raise _Feeds
        reading = (
            None if self.follower is None else Reading(loss_fn, self.follower(len(self.calls)))
        )
        dtypes = tuple(leaf.dtype for leaf in leaves)
        origins = tree.map(origin, batch)
        self.calls.append(
            PrimitiveCall(loss_fn, has_aux, tuple(numbers), spec, dtypes, batch, origins, reading)
        )
        self.given.append(Given(self.numbers(leaves), self.numbers(tree.leaves(batch))))
        for leaf in tree.leaves(batch):
            self.expressions.whole(leaf)
        with contextlib.nullcontext() if reading is None else reading.running():
            self.results.append(self._loss_and_aux(self.calls[-1], leaves))
        return self.returned(len(self.results) - 1, leaves, spec, self.results[-1], has_aux)

    def numbers(self, leaves: Sequence[Any]) -> Numbers:
        """The numbers of leaves."""
        return [None if leaf is None else self.expressions.of(leaf) for leaf in leaves]

    def returned(
        self,
        call: int,
        leaves: list[torch.Tensor],
        spec: Any,
        result: tuple[torch.Tensor, Any],
        has_aux: bool,
    ) -> Any:
        """What a call returns, for the leaves that are held."""
        grads = list(map(torch.empty_like, leaves))
        name = self.expressions.name
        for number, value in enumerate(tree.leaves(result)):
            name(value, ("result", call, number))
        for leaf, grad in zip(leaves, grads, strict=True):
            name(grad, ("gradient", call, self.expressions.of(leaf)))
        return (result if has_aux else result[0]), tree.unflatten(spec, grads)

    def _loss_and_aux(
        self, call: PrimitiveCall, given: list[torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        """What the call gives beside gradients, as fakes: the step may compute with it."""
        leaves, mode = self.tags.leaves, self.tags.mode
        if not (self.exact or call.has_aux):
            with mode:
                return torch.zeros((), device=given[0].device if given else None), None
        call = self.seen(call, self.tags)
        true = []
        for param, dtype in zip(call.params, call.dtypes, strict=True):
            leaf = leaves[param]
            true.append(fake(leaf.shape, leaf, mode, dtype))
        params = tree.unflatten(call.params_spec, true)
        return loss_and_aux(call.loss_fn, call.has_aux, params, call.batch, mode, self.row_ranks)

    def reduce(self, leaves: Any, local: Callable, op: str) -> tuple[Join, torch.Tensor]:
        flat, spec = tree.flatten(leaves)
        self.donation.read(flat)
        params = tuple(map(self.tags.of, flat))
        whole = list(map(self._unsharded, flat, params))
        out = local(whole)
        for leaf in flat:
            self.expressions.whole(leaf)
        self.expressions.name(out, ("sum", len(self.reductions)))
        self.summed.append(self.numbers(flat))
        self.reductions.append(Reduction(spec, params, out.dtype))
        return functools.partial(self._join, len(self.reductions) - 1), out

    def _unsharded(self, leaf: torch.Tensor, param: int | None) -> torch.Tensor:
        """A leaf with the shape of the parameter that it belongs to."""
        if param is None:
            return leaf
        return fake(self.tags.leaves[param].shape, leaf, self.tags.mode)

    def _join(self, number: int, values: Sequence[Any]) -> Any:
        reduction = self.reductions[number]
        for value, param in zip(values, reduction.params, strict=True):
            if param is not None:
                self.expressions.entry(value, (number, param))
        return tree.unflatten(reduction.spec, values)


def run_on_fakes(
    step: Callable,
    init_state: Callable,
    batch: Any,
    context: AnalysisContext,
    held: Callable[[int], bool],
    spec: Any = None,
) -> Seen:
    """Run ``init_state`` and the step once on the fakes of the leaves that are held.

    Args:
        spec: the structure of the full state; by default what this run makes. A state that does not
            fit it is not stepped.
    """
    tags, name = context.tags, context.expressions.name
    with torch.no_grad(), bind_context(context), ElementwiseOnly(context):
        params = tags.params(held)
        present = filter(held, range(len(tags.leaves)))
        for param, leaf in zip(present, tree.leaves(params), strict=True):
            name(leaf, ("parameter", param))
        state = init_state(params)
        check_containers("state", state)
        try:
            leaves = tree.leaves_up_to(tree.flatten(state)[1] if spec is None else spec, state)
        except ValueError:
            return Seen(context.expressions, state)
        init = context.numbers(leaves)
        for number, leaf in enumerate(leaves):
            name(leaf, ("state", number))
        context.running, context.donation = "the step", DonationAnalysis(tree.leaves(state))
        if context.outside is not None:
            context.outside.in_step = True
        with context.donation.watch():
            new_state, metrics = _returned(step(state, batch))
            context.donation.read((new_state, metrics))
        return Seen(
            context.expressions, state, init, new_state, metrics, context.given, context.summed
        )


def analyse(
    step: Callable,
    init_state: Callable,
    params: Any,
    batch: Any,
    mode: FakeTensorMode,
    seen: Callable[[PrimitiveCall, Tags], PrimitiveCall] = lambda call, tags: call,
    row_ranks: int = 1,
    follower: Callable[[int], Follower] | None = None,
    ranks: int = 1,
) -> tuple[StepAnalysis, Rehearsal]:
    """Run ``init_state`` and the step once on tagged fakes.

    Args:
        seen: makes of a call the one that is traced, which says the shapes and dtypes of its
            results.
        row_ranks: how many ranks have rows of their own that are not in the batch.
        follower: reads what the loss of a call reads from Python.
        ranks: of the mesh.

    Returns:
        what it told, and what runs the step again as a rank that holds some leaves.

    Raises:
        StateError: params, state or metrics have a container that trees do not look into; a leaf is
            touched other than elementwise; the step returns a state of another structure than it
            takes; a metric is a parameter; the step decides by the value of a tensor.
    """
    check_containers("params", params)
    tags = Tags(params, batch, mode)
    try:
        return _look(
            step,
            init_state,
            batch,
            AnalysisContext(tags, seen, row_ranks, False, Table(), follower),
            ranks,
        )
    except _Feeds:
        return _look(
            step,
            init_state,
            batch,
            AnalysisContext(tags, seen, row_ranks, True, Table(), follower),
            ranks,
        )


def _look(
    step: Callable, init_state: Callable, batch: Any, context: AnalysisContext, ranks: int
) -> tuple[StepAnalysis, Rehearsal]:
    from funcpipe._src.analysis.rehearsal import Rehearsal

    tags = context.tags
    context.outside = Outside(batch, tags.name_of)
    try:
        seen = run_on_fakes(step, init_state, batch, context, every_param)
    except (*BY_VALUE, DynamicOutputShapeException) as error:
        raise StateError(
            "the step decides by the value of a tensor outside "
            f"value_and_grad{line_of(error) or ''} (an if, .item(), float(), or a mask as index): "
            "every rank runs the same step without looking. Use torch.where, or read the value "
            "from the metrics"
        ) from error
    batches = [call.batch for call in context.calls]
    if ranks > 1:
        check_draws(context.outside, seen.state, seen.metrics, batches)
    if context.row_ranks > 1:
        check_own_rows(context.outside, seen.state, seen.metrics)
    spec, numbers = check_results(seen, tags)
    leaves = tree.leaves((seen.init_state, seen.state, seen.metrics))
    analysis = StepAnalysis(
        params_spec=tags.spec,
        paths=tags.paths,
        shapes=tags.shapes,
        dtypes=tuple(leaf.dtype for leaf in tags.leaves),
        state_spec=spec,
        state_paths=tuple(tree.paths(seen.init_state)),
        state=numbers,
        calls=tuple(context.calls),
        reductions=tuple(context.reductions),
        overwritable=frozenset(context.donation.overwritable),
        outside=context.outside.ops(leaves),
    )
    return analysis, Rehearsal(step, init_state, batch, context, analysis, seen)


def _returned(out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise StateError(f"a step returns (state, metrics); this one returned {describe(out)}")
    return out
