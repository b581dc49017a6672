"""Variants: the plans of a step for batches of one shape, one for every set of Python values that
its losses read (`analysis/host_values.py`).

Losses are known only while a step runs, plans are chosen before. So a plan is chosen by what was
read the last time: where losses reach the same, and the step no other flag, it is taken. Each call
then compares what its loss really reads, before it runs; `StaleValues` says that another plan is
needed.

In: a step, its readings and plans. Out: the plan for what is read now, or None: look again.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from funcpipe._src.analysis.host_shell import Values, is_flag
from funcpipe._src.analysis.host_values import Follower, Reading, differences
from funcpipe._src.core.source_lines import user_depth
from funcpipe._src.planning.plan import Plan

MOST = 16  # plans that are kept for one shape of batch
_REMEMBERED = 64  # sets of values whose plan is remembered
_OFTEN = 5
PLANS = "makes a new plan"
GRAPHS = "makes another CUDA graph"
OFTEN = (
    "{who} reads `{path}` from Python, which has changed {times} times, and each value {what}. "
    "Pass it as a tensor in the batch or state"
)

Pair = tuple[Values, Values]


class StaleValues(Exception):
    """A loss reads other values than when its plan was made; says which, ready for a sentence."""

    @property
    def again(self) -> str:
        """What is said where it comes up again."""
        return (
            f"{self}: it is another each time that the step runs, so that no plan holds. Pass it "
            "as a tensor in the batch or state"
        )

    @property
    def midway(self) -> str:
        """What is said where the step has done something already."""
        return (
            f"{self}, in the middle of a step that has updated its state in place. Pass it as a "
            "tensor in the batch or state"
        )


class Variants:
    """The plans for batches of one shape."""

    def __init__(self, step: Callable, written: set[str]) -> None:
        self._step = step
        self._written = written
        self._of_step = Follower(written, tensors=False)
        self._followers: list[Follower] = []
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._remembered: OrderedDict[Hashable, Plan] = OrderedDict()
        self._by_losses: dict[Hashable, tuple[Pair, Plan]] = {}
        self._now: tuple[Any, Plan | None] = (None, None)
        self._agreed: tuple[Any, Plan | None] = (None, None)
        self._numbers: OrderedDict[Any, int] = OrderedDict()  # of what was read when ranks agreed
        self._next = itertools.count()
        self.version: tuple[int, ...] = ()  # the numbers of all ranks
        self._changes: Counter[tuple[str, str]] = Counter()
        self._newest: Plan | None = None

    def follower(self, call: int) -> Follower:
        """What reads the loss of a call."""
        while len(self._followers) <= call:
            self._followers.append(Follower(self._written))
        return self._followers[call]

    def read(self) -> tuple[Pair, tuple[Values, ...]]:
        """What the step and its losses read now."""
        of_step = self._of_step.values(self._step)
        return of_step, self._of_losses()

    def _of_losses(self) -> tuple[Values, ...]:
        return tuple(follower.reached() for follower in self._followers)

    def known(self) -> Plan | None:
        """The plan for what is read now, as far as it can be known before the step runs."""
        read = self.read()
        before, plan = self._now
        if read == before:
            return plan
        plan = self._remembered.get(read)
        if plan is None:
            plan = self._of_same_flags(*read)
        self._now = read, plan
        return plan

    def _of_same_flags(self, of_step: Pair, of_losses: tuple[Values, ...]) -> Plan | None:
        """The plan for the same losses, where no flag of the step is another."""
        if of_losses not in self._by_losses:
            return None
        before, plan = self._by_losses[of_losses]
        changes = differences(before, of_step)
        for was, is_now in changes.values():
            if is_flag(was) or is_flag(is_now):
                return None
        return plan

    @property
    def chosen(self) -> Plan | None:
        """The plan that was known, or made, last."""
        return self._now[1]

    def of_calls(self, key: Hashable) -> Plan | None:
        """A plan that was made, by what every call reads."""
        return self._plans.get(key)

    def keep(self, key: Hashable, plan: Plan) -> None:
        """Keep a new plan; warn where the same value makes one time and again."""
        if self._newest is not None:
            self._compare(self._newest, plan)
        self._newest = plan
        self._plans[key] = plan
        while len(self._plans) > MOST:
            _, oldest = self._plans.popitem(last=False)
            self._drop(oldest)

    def _drop(self, old: Plan) -> None:
        """No set of values leads to a plan any more."""
        kept = {read: plan for read, plan in self._remembered.items() if plan is not old}
        self._remembered = OrderedDict(kept)
        self._by_losses = {
            of_losses: (of_step, plan)
            for of_losses, (of_step, plan) in self._by_losses.items()
            if plan is not old
        }

    def remember(self, of_step: Pair, plan: Plan) -> None:
        """A plan is that for what the step read before it was looked at, and its losses read
        now."""
        of_losses = self._of_losses()
        read = of_step, of_losses
        self._remembered[read] = plan
        self._by_losses[of_losses] = of_step, plan
        self._now = read, plan
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    def forget(self) -> None:
        """What was chosen for what is read now was wrong."""
        read = self.read()
        _, of_losses = read
        self._remembered.pop(read, None)
        self._by_losses.pop(of_losses, None)
        self._now = (None, None)

    def is_news(self, everything: bool) -> bool:
        """Whether ranks have not yet agreed on the plan that is known; or on ``everything`` that
        was read."""
        read, plan = self._now
        agreed_read, agreed_plan = self._agreed
        if plan is None or plan is not agreed_plan:
            return True
        return everything and read != agreed_read

    def agree(self, graphs: bool) -> int:
        """Ranks agree on what was read last; returns a number of its own for it.

        Args:
            graphs: whether steps are captured; then warn where the same value makes a graph time
                and again.
        """
        before, plan_before = self._agreed
        read, plan = self._now
        self._agreed = self._now
        if graphs and plan_before is plan and before is not None:
            of_step_before, _ = before
            of_step, _ = read
            for path in differences(of_step_before, of_step):
                self._count(GRAPHS, "the step", path)
        number = next(self._next)
        self._numbers.setdefault(read, number)
        self._numbers.move_to_end(read)
        while len(self._numbers) > _REMEMBERED:
            self._numbers.popitem(last=False)
        return self._numbers[read]

    @property
    def plans(self) -> Sequence[Plan]:
        """Those that are kept."""
        return list(self._plans.values())

    def _compare(self, before: Plan, plan: Plan) -> None:
        for old, new in zip(before.calls, plan.calls, strict=False):
            was = old.call.reading
            reading = new.call.reading
            if was is None or reading is None:
                continue
            for path in differences(was.values, reading.values):
                self._count(PLANS, reading.name, path)

    def _count(self, what: str, who: str, path: str) -> None:
        self._changes[what, path] += 1
        if self._changes[what, path] == _OFTEN:
            text = OFTEN.format(who=who, path=path, times=_OFTEN, what=what)
            warnings.warn(text, stacklevel=user_depth())


def stale(reading: Reading, values: Pair) -> StaleValues:
    """That a loss reads other values than those of its plan."""
    changes = differences(reading.values, values)
    texts = []
    for path, (was, is_now) in changes.items():
        texts.append(f"`{path}` ({_text(was)} when it was planned, {_text(is_now)} now)")
    what = " and ".join(texts[:3]) or "other values"
    return StaleValues(f"{reading.name} reads from Python {what}")


def _text(value: Any) -> str:
    return "nothing" if value is None else str(value)
