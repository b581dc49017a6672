"""Rehearsal: the step runs once more on fakes, as on a rank that lacks leaves or holds shards of
them, and has to compute the same expressions.

In: what the run on all leaves computed (`Seen`), and which leaves a rank holds. Out: the state of
that rank, and which metrics it lacks; or a StateError.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from funcpipe._src.analysis.expressions import Numbers, Seen
from funcpipe._src.analysis.held_leaves import is_predictable, predicted_state
from funcpipe._src.analysis.state import AnalysisContext, StepAnalysis, run_on_fakes
from funcpipe._src.analysis.tags import Tags, every_param
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import Join
from funcpipe._src.core.reductions import join_shown
from funcpipe._src.core.source_lines import line_of, user_line
from funcpipe.errors import FuncpipeError, StateError

_LISTS = (
    "A list of leaves is shorter there (tree_leaves, len, zip, stack): go over leaves with "
    "optree.tree_map, which skips None. The norm of each leaf is in "
    "fp.optim.statistics(tree).norm, a tree that goes with params through tree_map; that of all "
    "leaves is fp.global_norm(tree)"
)
_SIZES = (
    "A shape or number of elements is another there: take sizes from the full params, before the "
    "step, and look them up by path (optree.tree_map_with_path)"
)


@dataclass(frozen=True)
class Other:
    """How a rank differs from one device.

    Args:
        where: the rank, for messages, with "than on one device".
        remedy: what to write instead.
        held: whether it holds a parameter.
        apart: the global sums whose trees have entries for held leaves alone.
    """

    where: str
    remedy: str
    held: Callable[[int], bool]
    apart: Collection[int] = ()


@dataclass(frozen=True)
class Held:
    """What a rank that holds some leaves has: its state, as fakes, and the numbers of the metrics
    that it lacks."""

    state: Any
    lacks: frozenset[int] = frozenset()


class Rehearsal:
    """Runs of a step as ranks run it, each compared with the first run, on all leaves.

    ``everywhere``: whether a plan is to be made of runs as every rank, and not of what follows from
    the first run.
    """

    everywhere = False

    def __init__(
        self,
        step: Callable,
        init_state: Callable,
        batch: Any,
        context: AnalysisContext,
        analysis: StepAnalysis,
        first: Seen,
    ) -> None:
        self.step, self.init_state, self.batch = step, init_state, batch
        self.context, self.tags, self.analysis, self.first = context, context.tags, analysis, first

    def __call__(self, held: Callable[[int], bool]) -> Any:
        """The state of a rank that holds some leaves; see `of_rank`."""
        return self.of_rank(held).state

    @property
    def predictable(self) -> bool:
        """Whether it follows from the first run what ranks have: see `held_leaves.py`."""
        if self.everywhere or self.separable:
            return False
        first, params = self.first, self.tags.params()
        return is_predictable(self.analysis, params, first.init_state, first.metrics)

    def predicted(self, held: Callable[[int], bool]) -> Held:
        """What a rank has that holds some leaves, if it is `predictable`."""
        leaves = tree.leaves(self.first.init_state)
        return Held(predicted_state(self.analysis, leaves, held))

    @property
    def separable(self) -> frozenset[int]:
        """The global sums of which each entry may be where its leaf is, and only there: no op joins
        several."""
        return frozenset(self.first.expressions.entered - self.first.expressions.joined.keys())

    def of_rank(self, held: Callable[[int], bool], apart: Collection[int] = ()) -> Held:
        """What a rank has that holds some leaves.

        Args:
            held: whether the rank holds a parameter.
            apart: the global sums whose trees have entries for held leaves alone.

        Raises:
            StateError: ``init_state`` or the step fails there, or computes something else than on
            all leaves.
        """
        params = range(len(self.tags.leaves))
        missing = next(itertools.filterfalse(held, params), None)
        if missing is None:
            return Held(self.first.init_state)
        name = self.tags.name(missing)
        other = Other(
            f"on a rank that does not hold {name} than on one device", _LISTS, held, apart
        )
        context = RehearsalContext(self.context, self.tags, self.analysis, self.first, other)
        try:
            seen = run_on_fakes(
                self.step, self.init_state, self.batch, context, held, self.analysis.state_spec
            )
        except Exception as error:
            if isinstance(error, FuncpipeError) and not isinstance(error, ValueError):
                raise
            raise StateError(
                f"{context.running} fails on a rank that does not hold all leaves ({name} is None "
                f"there){line_of(error) or ''}: {type(error).__name__}: {error}. Go over leaves "
                f"with optree.tree_map, which skips None{self._note()}"
            ) from error
        return Held(seen.init_state, self._compare(seen, context))

    def resized(self, sharded: Collection[int]) -> None:
        """Refuse a step that computes with sizes of sharded leaves: a rank has others.

        Raises:
            StateError: it does.
        """
        if not sharded:
            return
        tags = self.tags.resized(frozenset(sharded))
        other = Other(
            f"on a rank that holds a shard of {self.tags.name(min(sharded))} than on one device",
            _SIZES,
            every_param,
        )
        context = RehearsalContext(self.context, tags, self.analysis, self.first, other)
        seen = run_on_fakes(
            self.step, self.init_state, self.batch, context, other.held, self.analysis.state_spec
        )
        self._compare(seen, context)

    def _note(self) -> str:
        """What to do about statistics that a step both joins and takes leaf by leaf."""
        joined = self.first.expressions.joined
        if not joined:
            return ""
        line = next(iter(joined.values()))
        return (
            f". Entries of fp.optim.statistics, of several leaves, are joined{line or ''}: its "
            "trees are then whole on every rank, and do not go with params through tree_map. Call "
            "it twice, once for each use"
        )

    def _compare(self, seen: Seen, context: RehearsalContext) -> frozenset[int]:
        """The metrics that a rank lacks; StateError where it computes something else."""
        if seen.init is None:
            return frozenset()  # another structure: refused where the state is placed
        context.check_counts()
        first, paths, where = self.first, self.analysis.state_paths, context.other.where
        for path, was, now in zip(paths, first.init or (), seen.init, strict=True):
            if now is not None and now != was:
                context.refuse(f"init_state makes another state{path} {where}")
        new = context.up_to(self.analysis.state_spec, seen.state, "the state that the step returns")
        states = zip(
            paths, seen.init, self._numbers(first.state), context.numbers(new), strict=True
        )
        for path, before, was, now in states:
            if (before is None) != (now is None):
                what = "drops" if now is None else "adds"
                context.refuse(f"the step {what} state{path}: its state has other leaves {where}")
            if now is not None and now != was:
                context.refuse(f"the step computes another state{path} {where}")
        spec = tree.flatten(first.metrics)[1]
        metrics = context.numbers(context.metrics(spec, seen.metrics))
        for path, was, now in zip(
            tree.paths(first.metrics), self._numbers(first.metrics), metrics, strict=True
        ):
            if now is not None and now != was:
                context.refuse(f"the step computes another metrics{path} {where}")
        return frozenset(number for number, now in enumerate(metrics) if now is None)

    def _numbers(self, leaves: Any) -> list[int]:
        return list(map(self.first.expressions.of, tree.leaves(leaves)))


class RehearsalContext(AnalysisContext):
    """The context of a run on what one rank holds: results are those of the first run, and what it
    is given is compared."""

    def __init__(
        self,
        context: AnalysisContext,
        tags: Tags,
        analysis: StepAnalysis,
        first: Seen,
        other: Other,
    ) -> None:
        super().__init__(
            tags, context.seen, context.row_ranks, context.exact, first.expressions.table
        )
        self.known, self.analysis, self.first, self.other = context.results, analysis, first, other
        self.calls_made = self.sums_made = 0

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
        number = self.calls_made
        who = f"value_and_grad {number}"
        self.calls_made += 1
        if number >= len(self.analysis.calls):
            self.refuse(
                f"the step calls value_and_grad{user_line() or ''} more often {self.other.where}"
            )
        call, given = self.analysis.calls[number], self.first.calls[number]
        leaves = self.up_to(call.params_spec, params, who)
        names = [f"params{self.analysis.paths[param]}" for param in call.params]
        held = list(map(self.other.held, call.params))
        self._check(who, names, held, leaves, given.params)
        beside = tree.leaves(batch)
        self._check(
            who,
            [f"batch{path}" for path in tree.paths(batch)],
            [True] * len(beside),
            beside,
            given.batch,
        )
        present = [leaf for leaf in leaves if leaf is not None]
        spec = tree.flatten(params)[1]
        return self.returned(number, present, spec, self.known[number], has_aux)

    def reduce(self, leaves: Any, local: Callable, op: str) -> tuple[Join, torch.Tensor]:
        number, who = self.sums_made, "a global norm or sum"
        self.sums_made += 1
        if number >= len(self.analysis.reductions):
            self.refuse(f"the step takes {who}{user_line() or ''} more often {self.other.where}")
        planned = self.analysis.reductions[number]
        flat = self.up_to(planned.spec, leaves, who)
        held = []
        names = []
        for param in planned.params:
            held.append(param is None or self.other.held(param))
            names.append("its leaf" if param is None else self.tags.name(param))
        self._check(who, names, held, flat, self.first.reductions[number])
        whole = []
        for leaf, param in zip(flat, planned.params, strict=True):
            whole.append(None if leaf is None else self._unsharded(leaf, param))
        out = local(whole).to(planned.dtype)
        self.expressions.name(out, ("sum", number))
        shown = held if number in self.other.apart else [True] * len(held)
        return functools.partial(join_shown, planned.spec, shown), out

    def check_counts(self) -> None:
        """StateError when fewer calls or sums were made than on one device."""
        made, planned = (
            (self.calls_made, self.sums_made),
            (len(self.analysis.calls), len(self.analysis.reductions)),
        )
        if made != planned:
            self.refuse(
                f"the step calls value_and_grad and global norms and sums less often ({made[0]} "
                f"and {made[1]} times, not {planned[0]} and {planned[1]}) {self.other.where}"
            )

    def up_to(self, spec: Any, leaves: Any, who: str) -> list[Any]:
        """The leaves of a tree, with None for those that are not held."""
        try:
            return tree.leaves_up_to(spec, leaves)
        except ValueError:
            self.refuse(f"{who}{user_line() or ''} has other leaves {self.other.where}")

    def metrics(self, spec: Any, metrics: Any) -> list[Any]:
        """Every metric, with None for those that are not computed."""
        try:
            return tree.leaves_or_none(spec, metrics)
        except ValueError:
            self.refuse(f"the metrics have another structure {self.other.where}")

    def refuse(self, what: str) -> NoReturn:
        """StateError: what differs, and what to write instead."""
        raise StateError(f"{what}. {self.other.remedy}")

    def _check(
        self, who: str, names: list[str], held: list[bool], mine: list[Any], first: Numbers
    ) -> None:
        if len(mine) != len(first):
            self.refuse(
                f"{who}{user_line() or ''} gets other leaves ({len(mine)}, not {len(first)}) "
                f"{self.other.where}"
            )
        for name, here, now, was in zip(names, held, self.numbers(mine), first, strict=True):
            if now != (was if here else None):
                self.refuse(
                    f"{who}{user_line() or ''} gets another value for {name} {self.other.where}"
                )
