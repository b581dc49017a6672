"""The schedules that people pipeline with, each a short function that returns a table.

Terms. A schedule of the library is asked for with its options, ``interleaved_1f1b(v=2)``, and laid out when
the number of ranks P and of microbatches M are known: ``interleaved_1f1b(v=2)(P, M)``. Any P >= 1 and M >= 1
will do.

A row is what one rank does, in order. Rows name no transfers (`communication.py` puts them in) and no times.
Formulas in the docstrings are for F = I = W and transfers that cost nothing. *Live* microbatches are those
whose F is done and whose backward is not: what a rank has to hold, counted in activations of one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain as concatenate

from funcpipe.errors import ScheduleError
from funcpipe.schedule.actions import Action, Schedule, ScheduleFn

# (rank, ranks, microbatches) -> what that rank does
RowFn = Callable[[int, int, int], Iterable[Action]]


def gpipe() -> ScheduleFn:
    """All forwards, then all backwards, in microbatch order.

    Bubble (P-1)/(M+P-1); M live microbatches on every rank. Huang et al. 2019,
    https://arxiv.org/abs/1811.06965.

    >>> show(gpipe()(2, 3))
    0F0 0F1 0F2 0B0 0B1 0B2
    1F0 1F1 1F2 1B0 1B1 1B2
    """

    def row(rank: int, ranks: int, microbatches: int) -> list[Action]:
        return run("F", rank, microbatches) + run("B", rank, microbatches)

    return by_rank("gpipe", row)


def one_f_one_b() -> ScheduleFn:
    """As few forwards as fill the pipeline, then one forward and one backward in turn.

    Bubble (P-1)/(M+P-1); at most P-r live microbatches on rank r. PipeDream-Flush, Narayanan et al. 2021,
    https://arxiv.org/abs/2006.09503.

    >>> show(one_f_one_b()(2, 3))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """

    def row(rank: int, ranks: int, microbatches: int) -> list[Action]:
        return alternate(run("F", rank, microbatches), run("B", rank, microbatches), ranks - rank - 1)

    return by_rank("one_f_one_b", row)


def by_rank(name: str, row: RowFn, stages_per_rank: int = 1) -> ScheduleFn:
    """The schedule whose rank r does ``row(r, ranks, microbatches)``; stages go round the ranks in a loop."""

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        if ranks < 1 or microbatches < 1:
            raise ScheduleError(
                f"{name}: needs at least 1 rank and 1 microbatch, got {ranks} and {microbatches}"
            )
        rows = tuple(tuple(row(rank, ranks, microbatches)) for rank in range(ranks))
        return Schedule(name, rows, loop(ranks, stages_per_rank), microbatches)

    lay_out.__name__ = lay_out.__qualname__ = name
    return lay_out


def loop(ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Stages go round the ranks: stage s on rank s mod P.

    >>> loop(2, 2)
    (0, 1, 0, 1)
    """
    return tuple(stage % ranks for stage in range(ranks * stages_per_rank))


def run(kind: str, stage: int, microbatches: int) -> list[Action]:
    """One kind of action of one stage for all microbatches in order."""
    return [Action(kind, stage, microbatch) for microbatch in range(microbatches)]


def alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """``warmup`` forwards, then forward and backward in turn, then the backwards that are left."""
    pairs = concatenate.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return [*forwards[:warmup], *pairs, *backwards[max(len(forwards) - warmup, 0) :]]


def show(schedule: Schedule) -> None:
    """Print a table, a line a rank."""
    for actions in schedule.ranks:
        print(*actions)
