"""Building blocks of the library's schedules, which a schedule of your own may use too.

In: a function that gives one rank's actions, and a placement: ``loop(v)`` (stages go round the
ranks v times) or ``vee()`` (down the ranks and up again).
Out: a ``ScheduleFn`` (``by_rank``), or one whose weight gradients wait (``with_delayed_w``).

A function whose pattern needs a round number of microbatches may write the next such number.
``by_rank`` leaves the surplus out. That is safe: dependencies never cross microbatches.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from funcpipe._src.schedule.actions import Action, Schedule, ScheduleFn
from funcpipe.errors import ScheduleError

# What one rank does, in order.
Actions = list[Action]
# (rank, ranks, microbatches) -> what that rank does.
ActionsFn = Callable[[int, int, int], Actions]
# ranks -> the rank that holds each stage.
PlacementFn = Callable[[int], tuple[int, ...]]


def named(name: str, lay_out: ScheduleFn) -> ScheduleFn:
    """The schedule with a name for messages, which refuses sizes that make no sense.

    >>> named("gpipe", lambda ranks, microbatches: ...)(0, 4)
    Traceback (most recent call last):
    funcpipe.errors.ScheduleError: gpipe: needs at least 1 rank and 1 microbatch, got 0 and 4
    """

    def sized(ranks: int, microbatches: int) -> Schedule:
        if ranks < 1 or microbatches < 1:
            got = f"{ranks} and {microbatches}"
            raise ScheduleError(f"{name}: needs at least 1 rank and 1 microbatch, got {got}")
        return replace(lay_out(ranks, microbatches), name=name)

    sized.__name__ = sized.__qualname__ = name
    return sized


def by_rank(
    name: str,
    actions_of: ActionsFn,
    placement: PlacementFn,
) -> ScheduleFn:
    """The schedule in which each rank does ``actions_of(rank, ranks, microbatches)``.

    Actions of microbatches beyond the last are left out.

    >>> def forwards(rank, ranks, microbatches):
    ...     return each_microbatch("F", rank, 4)
    >>> print(by_rank("forwards", forwards, loop())(1, 2))
    rank 0: 0F0 0F1
    """

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        kept = []
        for rank in range(ranks):
            actions = actions_of(rank, ranks, microbatches)
            real = (action for action in actions if action.microbatch < microbatches)
            kept.append(tuple(real))
        return Schedule(name, tuple(kept), placement(ranks), microbatches)

    return named(name, lay_out)


def loop(v: int = 1) -> PlacementFn:
    """Stages go round the ranks v times: stage s is on rank s mod P.

    >>> loop(2)(3)
    (0, 1, 2, 0, 1, 2)
    """
    if v < 1:
        raise ScheduleError(f"a rank holds at least 1 stage, got v={v}")

    def placement(ranks: int) -> tuple[int, ...]:
        return tuple(range(ranks)) * v

    return placement


def vee() -> PlacementFn:
    """Stages go down the ranks and up again: the first and the last stage are on rank 0.

    >>> vee()(3)
    (0, 1, 2, 2, 1, 0)
    """

    def placement(ranks: int) -> tuple[int, ...]:
        down = tuple(range(ranks))
        return down + down[::-1]

    return placement


def each_microbatch(
    kind: str,
    stage: int,
    microbatches: int,
) -> Actions:
    """One kind of action of one stage, for all microbatches.

    >>> print(*each_microbatch("F", 0, 3))
    0F0 0F1 0F2
    """
    return [Action(kind, stage, microbatch) for microbatch in range(microbatches)]


def in_turn(
    kind: str,
    stages: Iterable[int],
    rounds: Iterable[Sequence[int]],
) -> Actions:
    """One kind of action of several stages, each of which in turn takes a round of microbatches.

    >>> print(*in_turn("F", (0, 2), rounds=[[0, 1], [2, 3]]))
    0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3
    """
    stages = tuple(stages)
    actions: Actions = []
    for microbatches in rounds:
        for stage in stages:
            actions += [Action(kind, stage, microbatch) for microbatch in microbatches]
    return actions


def rounds_of(microbatches: int, ranks: int) -> list[list[int]]:
    """Microbatches in equally long rounds, none shorter than ``ranks``: ranks would have to wait.

    What a round lacks is filled with microbatches beyond the last, which ``by_rank`` leaves out.

    >>> rounds_of(9, 4), rounds_of(2, 4)
    ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[0, 1, 2, 3]])
    """
    count = max(microbatches // ranks, 1)
    length = max(-(-microbatches // count), ranks)
    short = count * length - microbatches if count > 1 else 0  # so many rounds are one shorter
    rounds = []
    first = 0
    for nth in range(count):
        real = length - 1 if nth >= count - short else length
        surplus = range(microbatches, microbatches + length - real)
        rounds.append([*range(first, first + real), *surplus])
        first += real
    return rounds


def alternate(
    forwards: Actions,
    backwards: Actions,
    warmup: int,
) -> Actions:
    """``warmup`` forwards, then forward and backward in turn, then the backwards that are left.

    >>> forwards, backwards = each_microbatch("F", 0, 3), each_microbatch("B", 0, 3)
    >>> print(*alternate(forwards, backwards, warmup=1))
    0F0 0F1 0B0 0F2 0B1 0B2
    """
    warmup = min(warmup, len(forwards))
    paired = len(forwards) - warmup
    actions = forwards[:warmup]
    for pair in zip(forwards[warmup:], backwards[:paired], strict=False):
        actions += pair
    return actions + backwards[paired:]


def from_phases(phases: Iterable[tuple[int, str]], stages: Sequence[int]) -> Actions:
    """A rank's actions from phases: how often to repeat which words.

    A word is a kind and which of the rank's stages, such as "F0". It means that stage's next
    microbatch. "W" alone means the oldest I whose weight gradient waits.

    >>> print(*from_phases([(2, "F1"), (2, "I1"), (2, "W")], stages=(0, 3)))
    3F0 3F1 3I0 3I1 3W0 3W1
    """
    following: Counter[tuple[bool, int]] = Counter()
    waiting: deque[Action] = deque()
    actions: Actions = []
    for times, words in phases:
        for word in words.split() * times:
            if word == "W":
                actions.append(waiting.popleft())
                continue
            kind = word[0]
            stage = stages[int(word[1:])]
            half = (kind == "F", stage)
            action = Action(kind, stage, following[half])
            following[half] += 1
            actions.append(action)
            if kind == "I":
                waiting.append(action._replace(kind="W"))
    return actions


def with_delayed_w(
    name: str,
    base: ScheduleFn,
    live: Callable[[int], int] | None = None,
) -> ScheduleFn:
    """A schedule with every B as I and W, where W waits for a moment in which its rank is idle.

    The order of F and B is the base's. No rank holds more (stage, microbatch) than ``live(ranks)``
    says, by default as many as any rank of the base holds; at that limit W comes before the next F.
    Idle moments are found by running the table in ticks, with F = I = W = 1.

    >>> def pairs(rank, ranks, microbatches):
    ...     return each_microbatch("F", 0, 2) + each_microbatch("B", 0, 2)
    >>> print(with_delayed_w("mine", by_rank("base", pairs, loop()))(1, 2))
    rank 0: 0F0 0F1 0I0 0I1 0W0 0W1
    """

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        table = base(ranks, microbatches)
        least_limit = live(ranks) if live else 0
        delayed = _run_in_ticks(table, least_limit)
        return replace(table, ranks=tuple(map(tuple, delayed)))

    return named(name, lay_out)


class _Rank:
    """One rank while a table runs in ticks: what is left to do, and what it has done."""

    def __init__(self, actions: Iterable[Action]) -> None:
        self.ahead = deque(_without_w(actions))
        self.waiting: deque[Action] = deque()  # the W of every I that ran
        self.held = 0  # (stage, microbatch) between F and W
        self.done: Actions = []

    def peak_live(self) -> int:
        """The most (stage, microbatch) between F and I, in the order that is ahead."""
        changes = (1 if action.kind == "F" else -1 for action in self.ahead)
        return max(accumulate(changes))

    def step(
        self,
        limit: int,
        ran: set[Action],
        stages: int,
    ) -> Action | None:
        """The action of one tick; None if the rank is idle."""
        if self._next_can_run(limit, ran, stages):
            action = self.ahead.popleft()
            if action.kind == "F":
                self.held += 1
            else:
                self.waiting.append(action._replace(kind="W"))
        elif self.waiting:
            action = self.waiting.popleft()
            self.held -= 1
        else:
            return None
        self.done.append(action)
        return action

    def _next_can_run(
        self,
        limit: int,
        ran: set[Action],
        stages: int,
    ) -> bool:
        if not self.ahead:
            return False
        action = self.ahead[0]
        full = bool(self.waiting) and self.held >= limit
        if full and action.kind == "F":
            return False
        return all(needed in ran for needed in _needs(action, stages))


def _run_in_ticks(table: Schedule, least_limit: int) -> list[Actions]:
    """What every rank does if its W wait for idle ticks."""
    ranks = [_Rank(actions) for actions in table.ranks]
    peaks = [rank.peak_live() for rank in ranks]
    limit = max(least_limit, *peaks)
    ran: set[Action] = set()
    while any(rank.ahead or rank.waiting for rank in ranks):
        # A rank sees what the others did in the ticks before, not in this one.
        tick = [rank.step(limit, ran, table.stages) for rank in ranks]
        ran.update(filter(None, tick))
    return [rank.done for rank in ranks]


def _without_w(actions: Iterable[Action]) -> Iterator[Action]:
    """The F and the backwards of a rank, each backward as I."""
    for action in actions:
        if action.kind == "F":
            yield action
        elif action.kind != "W":
            yield action._replace(kind="I")


def _needs(action: Action, stages: int) -> Iterator[Action]:
    """What an F or I needs in a chain of stages."""
    kind, stage, microbatch, *_ = action
    if kind == "F":
        if stage > 0:
            yield Action("F", stage - 1, microbatch)
        return
    yield Action("F", stage, microbatch)
    if stage + 1 < stages:
        yield Action("I", stage + 1, microbatch)
