"""The pieces that the library's rows are made of; a schedule of your own may be made of them too.

Terms. A *row* is what one rank does, in order. A schedule is laid out by ``by_rank``, from a
function that gives a rank's row, and a placement: ``loop(v)`` (stages go round the ranks v times)
or ``vee()`` (down the ranks and up again).

Where a row only works for a round number of microbatches, it is written for the next such number,
and what
belongs to the surplus microbatches is left out: dependencies never cross microbatches, so that a
right table without some of its microbatches is a right table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from itertools import chain as concatenate

from funcpipe._src.schedule.actions import Action, Schedule, ScheduleFn
from funcpipe.errors import ScheduleError

Row = list[Action]
# (rank, ranks, microbatches) -> what that rank does; actions of microbatches beyond the last are
# left out
RowFn = Callable[[int, int, int], Row]
# ranks -> the rank that holds each stage
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


def by_rank(name: str, row: RowFn, placement: PlacementFn) -> ScheduleFn:
    """The schedule whose rank r does ``row(r, ranks, microbatches)``.

    >>> forwards = by_rank("forwards", lambda rank, ranks, microbatches: run("F", rank, 4), loop())
    >>> forwards.__name__, str(forwards(1, 2))
    ('forwards', 'rank 0: 0F0 0F1')
    """

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        rows = (row(rank, ranks, microbatches) for rank in range(ranks))
        kept = tuple(
            tuple(action for action in row if action.microbatch < microbatches) for row in rows
        )
        return Schedule(name, kept, placement(ranks), microbatches)

    return named(name, lay_out)


def loop(v: int = 1) -> PlacementFn:
    """Stages go round the ranks v times: stage s is on rank s mod P.

    >>> loop(2)(3)
    (0, 1, 2, 0, 1, 2)
    """
    if v < 1:
        raise ScheduleError(f"a rank holds at least 1 stage, got v={v}")
    return lambda ranks: tuple(range(ranks)) * v


def vee() -> PlacementFn:
    """Stages go down the ranks and up again, so that the first and the last stage are on rank 0.

    >>> vee()(3)
    (0, 1, 2, 2, 1, 0)
    """
    return lambda ranks: (*range(ranks), *reversed(range(ranks)))


def run(kind: str, stage: int, microbatches: int) -> Row:
    """One kind of action of one stage, for all microbatches.

    >>> print(*run("F", 0, 3))
    0F0 0F1 0F2
    """
    return [Action(kind, stage, microbatch) for microbatch in range(microbatches)]


def in_turn(kind: str, stages: Iterable[int], turns: Iterable[Iterable[int]]) -> Row:
    """One kind of action of several stages, each of which in turn takes some microbatches.

    >>> print(*in_turn("F", (0, 2), turns=[[0, 1], [2, 3]]))
    0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3
    """
    return [Action(kind, s, m) for turn in turns for s in tuple(stages) for m in turn]


def turns(microbatches: int, ranks: int) -> list[list[int]]:
    """Microbatches in equally long turns, none shorter than ``ranks``: shorter ones would make
    ranks wait.

    What a turn lacks is filled up with microbatches beyond the last, which ``by_rank`` leaves out.

    >>> turns(9, 4), turns(2, 4)
    ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], [[0, 1, 2, 3]])
    """
    count = max(microbatches // ranks, 1)
    length = max(-(-microbatches // count), ranks)
    short = count * length - microbatches if count > 1 else 0  # so many turns are one shorter
    result, first = [], 0
    for turn in range(count):
        real = length - (turn >= count - short)
        surplus = range(microbatches, microbatches + length - real)
        result.append([*range(first, first + real), *surplus])
        first += real
    return result


def alternate(forwards: Row, backwards: Row, warmup: int) -> Row:
    """``warmup`` forwards, then forward and backward in turn, then the backwards that are left.

    >>> print(*alternate(run("F", 0, 3), run("B", 0, 3), warmup=1))
    0F0 0F1 0B0 0F2 0B1 0B2
    """
    warmup = min(warmup, len(forwards))
    pairs = concatenate.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return [*forwards[:warmup], *pairs, *backwards[len(forwards) - warmup :]]


def written(phases: Iterable[tuple[int, str]], stages: Sequence[int]) -> Row:
    """A row from phases: how often to repeat which words.

    A word is a kind and which of the rank's stages, such as "F0", and means that stage's next
    microbatch; "W" alone means the oldest I whose weight gradient waits.

    >>> print(*written([(2, "F1"), (2, "I1"), (2, "W")], stages=(0, 3)))
    3F0 3F1 3I0 3I1 3W0 3W1
    """
    following = {(kind, stage): 0 for kind in "FB" for stage in stages}
    waiting: deque[Action] = deque()
    row: Row = []
    for times, words in phases:
        for word in words.split() * times:
            if word == "W":
                row.append(waiting.popleft())
                continue
            stage = stages[int(word[1:])]
            turn = ("F" if word[0] == "F" else "B", stage)
            row.append(Action(word[0], stage, following[turn]))
            following[turn] += 1
            if word[0] == "I":
                waiting.append(row[-1]._replace(kind="W"))
    return row


def spread(name: str, base: ScheduleFn, live: Callable[[int], int] | None = None) -> ScheduleFn:
    """A schedule with every B as I and W, where W waits for a moment in which its rank would be
    idle.

    The order of F and B is the base's, and no rank holds more (stage, microbatch) than
    ``live(ranks)`` says, by default what the rank of the base holds that holds most; at that limit
    W comes before the next F. What is idle is found by running the table in time, with F = I = W =
    1.

    >>> base = by_rank("base", lambda rank, ranks, microbatches: run("F", 0, 2) + run("B", 0, 2), loop())
    >>> print(spread("mine", base)(1, 2))
    rank 0: 0F0 0F1 0I0 0I1 0W0 0W1
    """

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        table = base(ranks, microbatches)
        return replace(table, ranks=tuple(map(tuple, _spread(table, live(ranks) if live else 0))))

    return named(name, lay_out)


def _spread(table: Schedule, live: int = 0) -> list[Row]:
    todo = [
        deque(a._replace(kind="F" if a.kind == "F" else "I") for a in row if a.kind != "W")
        for row in table.ranks
    ]
    limit = max(live, *(max(accumulate(1 if a.kind == "F" else -1 for a in row)) for row in todo))
    waiting: list[deque[Action]] = [deque() for _ in todo]
    rows: list[Row] = [[] for _ in todo]
    held = [0] * len(todo)
    done: set[Action] = set()
    while any(todo) or any(waiting):
        now = []  # what runs in this tick; other ranks see it in the next
        for rank, ahead in enumerate(todo):
            full = bool(waiting[rank]) and held[rank] >= limit
            if (
                ahead
                and not (full and ahead[0].kind == "F")
                and _before(ahead[0], table.stages) <= done
            ):
                action = ahead.popleft()
                held[rank] += action.kind == "F"
                if action.kind == "I":
                    waiting[rank].append(action._replace(kind="W"))
            elif waiting[rank]:
                action = waiting[rank].popleft()
                held[rank] -= 1
            else:
                continue
            rows[rank].append(action)
            now.append(action)
        done.update(now)
    return rows


def _before(action: Action, stages: int) -> set[Action]:
    """What an F or I needs, in a chain of stages."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F":
        return {Action("F", stage - 1, microbatch)} if stage else set()
    later = {Action("I", stage + 1, microbatch)} if stage + 1 < stages else set()
    return {Action("F", stage, microbatch), *later}
