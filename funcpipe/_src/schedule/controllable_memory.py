"""V-Half and V-Min: V-shaped schedules that hold a half or a third of what 1F1B holds.

Both repeat a building block, which says in which tick every rank runs its two F and two I of one
microbatch. F, I and W take one tick each. A rank with two stages has six actions a microbatch, so
the next microbatch's block comes six ticks later. A block works if no two of a rank's four ticks
are equal modulo six; the other two ticks are for W. A rank holds as many microbatches as a sixth of
its block's length, so steeper blocks hold less. Only the order of the ticks enters the table.

Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", https://arxiv.org/abs/2405.15362,
sections 3 and 4.
"""

from __future__ import annotations

from functools import cache
from itertools import product

from funcpipe._src.schedule.actions import Action, ScheduleFn
from funcpipe._src.schedule.building_blocks import Actions, by_rank, vee, with_delayed_w
from funcpipe.errors import ScheduleError

_PERIOD = 6

# Ticks from one rank to the next: F of the first stage, F of the second, I of the second, I of the
# first.
_Slopes = tuple[int, int, int, int]


def v_half() -> ScheduleFn:
    """Two stages a rank in a V, and half of 1F1B's memory at half of its bubble.

    Bubble (3P-4)/(6M+3P-4) for P > 2; live P+1 halves of a rank's layers for odd P and P+2 for even
    P, where 1F1B holds 2P of them on rank 0. Qi et al. 2024, https://arxiv.org/abs/2405.15362.

    >>> print(v_half()(2, 2))
    rank 0: 0F0 3F0 3I0 0F1 3W0 3F1 3I1 0I0 3W1 0I1 0W0 0W1
    rank 1: 1F0 2F0 2I0 1F1 2F1 1I0 2W0 2I1 1I1 1W0 2W1 1W1
    """

    def live(ranks: int) -> int:
        return ranks + 2 - ranks % 2

    blocks = _blocks("v_half", slopes=(2, 1, 2, 1))
    return with_delayed_w("v_half", blocks, live)


def v_min() -> ScheduleFn:
    """Two stages a rank in a V, and a third of 1F1B's memory at two thirds of its bubble.

    No V-shaped schedule holds less.

    Bubble (4P-5)/(6M+4P-5) for P > 1, or (4P-3)/(6M+4P-3) where 3 divides P; live 2P/3 halves of a
    rank's layers, rounded up to an even number, and 2 more unless P is one more than a multiple of
    3; 1F1B holds 2P of them. Qi et al. 2024, https://arxiv.org/abs/2405.15362.

    >>> print(v_min()(2, 2))
    rank 0: 0F0 3F0 3I0 0F1 3W0 0I0 0W0 3F1 3I1 3W1 0I1 0W1
    rank 1: 1F0 2F0 2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 2W1 1W1
    """

    def live(ranks: int) -> int:
        thirds = -(-ranks // 3)
        more = 0 if ranks % 3 == 1 else 2
        return 2 * thirds + more

    blocks = _blocks("v_min", slopes=(1, 1, 1, 1))
    return with_delayed_w("v_min", blocks, live)


def _blocks(name: str, slopes: _Slopes) -> ScheduleFn:
    """F and B of building blocks six ticks apart."""

    def actions_of(
        rank: int,
        ranks: int,
        microbatches: int,
    ) -> Actions:
        near = rank
        far = 2 * ranks - 1 - rank
        waits = _waits(ranks, slopes)
        ticks = _starts(rank, ranks, slopes, waits)
        stages = (near, far, far, near)
        block = list(zip(ticks, "FFBB", stages, strict=True))
        timed = []
        for microbatch in range(microbatches):
            later = _PERIOD * microbatch
            for tick, kind, stage in block:
                action = Action(kind, stage, microbatch)
                timed.append((tick + later, action))
        return [action for _, action in sorted(timed)]

    return by_rank(name, actions_of, vee())


def _starts(
    rank: int,
    ranks: int,
    slopes: _Slopes,
    waits: tuple[int, ...],
) -> tuple[int, ...]:
    """The ticks of a rank's F, F, I and I of the first microbatch.

    The block has four legs: down the ranks and up again, forward and backward. ``waits`` are the
    ticks that pass at the three turning points.

    >>> _starts(0, 2, (1, 1, 1, 1), (0, 0, 0)), _starts(1, 2, (1, 1, 1, 1), (0, 0, 0))
    ((0, 3, 4, 7), (1, 2, 5, 6))
    """
    ticks = []
    begin = 0
    for leg, slope in enumerate(slopes):
        goes_down = leg % 2 == 0
        distance = rank if goes_down else ranks - 1 - rank
        ticks.append(begin + slope * distance)
        begin += slope * (ranks - 1) + 1
        if leg < len(waits):
            begin += waits[leg]
    return tuple(ticks)


@cache
def _waits(ranks: int, slopes: _Slopes) -> tuple[int, ...]:
    """The shortest waits at the turning points with which a block works."""
    candidates = product(range(_PERIOD), repeat=3)  # in ascending order, which sorting keeps
    for waits in sorted(candidates, key=sum):
        blocks = [_starts(rank, ranks, slopes, waits) for rank in range(ranks)]
        if all(map(_repeats, blocks)):
            return waits
    raise ScheduleError(f"no building block of slopes {slopes} fits {ranks} ranks")


def _repeats(ticks: tuple[int, ...]) -> bool:
    """Whether no two ticks fall together when the block repeats."""
    phases = {tick % _PERIOD for tick in ticks}
    return len(phases) == len(ticks)
