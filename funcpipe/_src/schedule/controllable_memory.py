"""V-Half and V-Min: V-shaped schedules that hold a half or a third of what 1F1B holds.

Terms. Time goes in ticks: F, I and W of a stage take one each. A *building block* says at which
tick every rank runs its four F and I of one microbatch; the block of the next microbatch comes six
ticks later, since a rank with two stages has six things to do for a microbatch. A block works if no
two of a rank's four ticks are equal modulo six; the two that are left are W's. What a rank holds is
how long a block's residuals live, divided by six: steeper blocks finish sooner and hold less. In
tables only the order of a row counts, and ranks run ahead where they can.

Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", https://arxiv.org/abs/2405.15362,
sections 3 and 4.
"""

from __future__ import annotations

from functools import cache
from itertools import product

from funcpipe._src.schedule.actions import Action, ScheduleFn
from funcpipe._src.schedule.building_blocks import Row, by_rank, spread, vee
from funcpipe.errors import ScheduleError

_PERIOD = 6

# For F of the first and of the second stage, I of the second and of the first: ticks from one rank
# to the next.
_Slopes = tuple[int, int, int, int]


def v_half() -> ScheduleFn:
    """Two stages a rank in a V, and half of 1F1B's memory at half of its bubble.

    Bubble (3P-4)/(6M+3P-4) for P > 2; live P+1 halves of a rank's layers for odd P and P+2 for even
    P, where 1F1B holds 2P of them on rank 0. Qi et al. 2024, https://arxiv.org/abs/2405.15362.

    >>> print(v_half()(2, 2))
    rank 0: 0F0 3F0 3I0 0F1 3W0 3F1 3I1 0I0 3W1 0I1 0W0 0W1
    rank 1: 1F0 2F0 2I0 1F1 2F1 1I0 2W0 2I1 1I1 1W0 2W1 1W1
    """
    return spread("v_half", _blocks("v_half", (2, 1, 2, 1)), lambda ranks: ranks + 2 - ranks % 2)


def v_min() -> ScheduleFn:
    """Two stages a rank in a V, and a third of 1F1B's memory, the least that a V can do with, at
    two thirds of its bubble.

    Bubble (4P-5)/(6M+4P-5) for P > 1, or (4P-3)/(6M+4P-3) where 3 divides P; live 2P/3 halves of a
    rank's layers, rounded up to an even number, and 2 more unless P is one more than a multiple of
    3; 1F1B holds 2P of them. Qi et al. 2024, https://arxiv.org/abs/2405.15362.

    >>> print(v_min()(2, 2))
    rank 0: 0F0 3F0 3I0 0F1 3W0 0I0 0W0 3F1 3I1 3W1 0I1 0W1
    rank 1: 1F0 2F0 2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 2W1 1W1
    """
    return spread(
        "v_min",
        _blocks("v_min", (1, 1, 1, 1)),
        lambda ranks: -(-ranks // 3) * 2 + 2 * (ranks % 3 != 1),
    )


def _blocks(name: str, slopes: _Slopes) -> ScheduleFn:
    """F and B of building blocks six ticks apart."""

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        near, far = rank, 2 * ranks - 1 - rank
        starts = _starts(rank, ranks, slopes, _turns(ranks, slopes))
        block = [
            (tick, kind, stage)
            for tick, kind, stage in zip(starts, "FFBB", (near, far, far, near), strict=True)
        ]
        timed = [
            (tick + _PERIOD * m, Action(kind, s, m))
            for m in range(microbatches)
            for tick, kind, s in block
        ]
        return [action for _, action in sorted(timed)]

    return by_rank(name, row, vee())


def _starts(rank: int, ranks: int, slopes: _Slopes, turns: tuple[int, ...]) -> tuple[int, ...]:
    """The ticks of a rank's F, F, I and I of the first microbatch, which waits at its three turning
    points.

    >>> _starts(0, 2, (1, 1, 1, 1), (0, 0, 0)), _starts(1, 2, (1, 1, 1, 1), (0, 0, 0))
    ((0, 3, 4, 7), (1, 2, 5, 6))
    """
    ticks, begin = [], 0
    for leg, slope in enumerate(slopes):
        distance = rank if leg % 2 == 0 else ranks - 1 - rank
        ticks.append(begin + slope * distance)
        begin += slope * (ranks - 1) + 1 + (turns[leg] if leg < 3 else 0)
    return tuple(ticks)


@cache
def _turns(ranks: int, slopes: _Slopes) -> tuple[int, ...]:
    """The shortest waits at the turning points with which a block works."""
    for turns in sorted(product(range(_PERIOD), repeat=3), key=lambda turns: (sum(turns), turns)):
        blocks = (_starts(rank, ranks, slopes, turns) for rank in range(ranks))
        if all(len({tick % _PERIOD for tick in ticks}) == 4 for ticks in blocks):
            return turns
    raise ScheduleError(f"no building block of slopes {slopes} fits {ranks} ranks")
