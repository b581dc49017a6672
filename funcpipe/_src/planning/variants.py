"""Variants: the plans of a step for batches of one shape, one for every set of Python values that
its losses read (`analysis/host_values.py`).

Losses are known only while a step runs, plans are chosen before. So a plan is chosen by what was
read
the last time: where losses reach the same, and the step no other flag, it is taken. Each call then
compares what its loss really reads, before it runs; `StaleValues` says that another plan is needed.

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
PLANS, GRAPHS = "makes a new plan", "makes another CUDA graph"
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
        self._step, self._written = step, written
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
        return self._of_step.values(self._step), tuple(f.reached() for f in self._followers)

    def known(self) -> Plan | None:
        """The plan for what is read now, as far as it can be known before the step runs."""
        read = self.read()
        if read == self._now[0]:
            return self._now[1]
        plan = self._remembered.get(read)
        if plan is None and read[1] in self._by_losses:
            then, plan = self._by_losses[read[1]]
            if any(is_flag(a) or is_flag(b) for a, b in differences(then, read[0]).values()):
                plan = None
        self._now = read, plan
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
            _, old = self._plans.popitem(last=False)
            self._remembered = OrderedDict(
                (k, p) for k, p in self._remembered.items() if p is not old
            )
            self._by_losses = {k: (v, p) for k, (v, p) in self._by_losses.items() if p is not old}

    def remember(self, of_step: Pair, plan: Plan) -> None:
        """A plan is that for what the step read before it was looked at, and its losses read
        now."""
        read = of_step, tuple(f.reached() for f in self._followers)
        self._remembered[read] = plan
        self._by_losses[read[1]] = of_step, plan
        self._now = read, plan
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    def forget(self) -> None:
        """What was chosen for what is read now was wrong."""
        read = self.read()
        self._remembered.pop(read, None)
        self._by_losses.pop(read[1], None)
        self._now = (None, None)

    def is_news(self, everything: bool) -> bool:
        """Whether ranks have not yet agreed on the plan that is known; or on ``everything`` that
        was read."""
        read, plan = self._now
        return (
            plan is None or plan is not self._agreed[1] or (everything and read != self._agreed[0])
        )

    def agree(self, graphs: bool) -> int:
        """Ranks agree on what was read last; returns a number of its own for it.

        Args:
            graphs: whether steps are captured; then warn where the same value makes a graph time
                and again.
        """
        before, self._agreed = self._agreed, self._now
        read, plan = self._now
        if graphs and before[1] is plan and before[0] is not None:
            for path in differences(before[0][0], read[0]):
                self._count(GRAPHS, "the step", path)
        self._numbers.setdefault(read, next(self._next))
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
            was, reading = old.call.reading, new.call.reading
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
    found = differences(reading.values, values)
    told = [
        f"`{path}` ({_told(a)} when it was planned, {_told(b)} now)"
        for path, (a, b) in found.items()
    ]
    return StaleValues(
        f"{reading.name} reads from Python {' and '.join(told[:3]) or 'other values'}"
    )


def _told(x: Any) -> str:
    return "nothing" if x is None else str(x)
