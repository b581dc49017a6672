"""The schedules that people pipeline with, each a short function that returns a table.

Terms. A schedule of the library is asked for with its options, ``interleaved_1f1b(v=2)``, and laid
out when
the number of ranks P and of microbatches M are known: ``interleaved_1f1b(v=2)(P, M)``. Any P >= 1,
M >= 1 and v >= 1 will do; v is the number of stages that a rank holds.

A row is what one rank does, in order. Rows name no transfers (`communication.py` puts them in) and
no times. The weight gradients of a stage always come in microbatch order, so that sums are the same
for all schedules.

Formulas in the docstrings are for F = I = W, transfers that cost nothing, and M a multiple of P, no
smaller than 2P. A *bubble* is the part of all ranks' time in which they do not compute. *Live* is
what a rank has to
hold: the most (stage, microbatch) whose F is done and whose backward is not; a stage is 1/v of a
rank's layers. `building_blocks.py` has the pieces that the rows are made of.
"""

from __future__ import annotations

from collections.abc import Callable

from funcpipe._src.schedule.actions import ScheduleFn
from funcpipe._src.schedule.building_blocks import (
    Row,
    alternate,
    by_rank,
    in_turn,
    loop,
    named,
    run,
    spread,
    turns,
    vee,
    written,
)


def gpipe() -> ScheduleFn:
    """All forwards, then all backwards.

    Bubble (P-1)/(M+P-1); live M on every rank. Huang et al. 2019, https://arxiv.org/abs/1811.06965.

    >>> print(gpipe()(2, 3))
    rank 0: 0F0 0F1 0F2 0B0 0B1 0B2
    rank 1: 1F0 1F1 1F2 1B0 1B1 1B2
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        return run("F", rank, microbatches) + run("B", rank, microbatches)

    return by_rank("gpipe", row, loop())


def one_f_one_b() -> ScheduleFn:
    """As few forwards as fill the pipeline, then one forward and one backward in turn.

    Bubble (P-1)/(M+P-1); live P-r on rank r. PipeDream-Flush, Narayanan et al. 2021,
    https://arxiv.org/abs/2006.09503.

    >>> print(one_f_one_b()(2, 3))
    rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
    rank 1: 1F0 1B0 1F1 1B1 1F2 1B2
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        return alternate(
            run("F", rank, microbatches), run("B", rank, microbatches), ranks - rank - 1
        )

    return by_rank("one_f_one_b", row, loop())


def interleaved_1f1b(v: int) -> ScheduleFn:
    """1F1B over v stages a rank, which take turns of about P microbatches: a bubble v times
    smaller.

    Bubble (P-1)/(vM+P-1); live (v+1)P-1 on rank 0, two less on each next rank, for v > 1. Narayanan
    et al. 2021, https://arxiv.org/abs/2104.04473. Where M is no multiple of P the turns get longer,
    not shorter: the bubble is that of the formula for every M >= P, and memory is somewhat larger.

    >>> print(interleaved_1f1b(2)(2, 2))
    rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    rank 1: 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        stages = range(rank, v * ranks, ranks)
        rounds = turns(microbatches, ranks)
        warmup = (v - 1) * len(rounds[0]) + 2 * (ranks - rank - 1)
        return alternate(in_turn("F", stages, rounds), in_turn("B", stages[::-1], rounds), warmup)

    name = f"interleaved_1f1b(v={v})"
    return named(name, one_f_one_b()) if v == 1 else by_rank(name, row, loop(v))


def looped_bfs(v: int) -> ScheduleFn:
    """All microbatches through a rank's first stage, then through its second, and back: breadth
    first.

    Weights of a stage are needed once forward and once backward only, which suits sharded ones.
    Bubble (P-1)/(vM+P-1); live vM on every rank. Lamy-Poirier 2022,
    https://arxiv.org/abs/2211.05953.

    >>> print(looped_bfs(2)(2, 2))
    rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    rank 1: 1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        stages = range(rank, v * ranks, ranks)
        one = [range(microbatches)]
        return in_turn("F", stages, one) + in_turn("B", stages[::-1], one)

    return by_rank(f"looped_bfs(v={v})", row, loop(v))


def zb_h1() -> ScheduleFn:
    """1F1B whose weight gradients wait for a moment in which their rank would be idle.

    Bubble (P-1)/(3M+P-1); live P on every rank. Qi et al. 2023, section 2.3,
    https://arxiv.org/abs/2401.10241.

    >>> print(zb_h1()(2, 3))
    rank 0: 0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
    rank 1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    return spread("zb_h1", one_f_one_b())


def interleaved_zb(v: int) -> ScheduleFn:
    """Interleaved 1F1B whose weight gradients wait for a moment in which their rank would be idle.

    Bubble (P-1)/(3vM+P-1); live (v+1)P-1 on every rank, for v > 1, as on rank 0 of interleaved
    1F1B. Qi et al. 2023, https://arxiv.org/abs/2401.10241, on Narayanan et al. 2021,
    https://arxiv.org/abs/2104.04473.

    >>> print(interleaved_zb(2)(2, 2))
    rank 0: 0F0 0F1 2F0 2F1 2I0 2W0 2I1 0I0 0I1 2W1 0W0 0W1
    rank 1: 1F0 1F1 3F0 3I0 3F1 3I1 1I0 1I1 3W0 3W1 1W0 1W1
    """
    return spread(f"interleaved_zb(v={v})", interleaved_1f1b(v))


def zb_v() -> ScheduleFn:
    """Two stages a rank in a V, so that the last is on the first rank: no bubble but the filling.

    Bubble (P-1)/(6M+P-1); live 2P halves of a rank's layers, which is what 1F1B holds on rank 0. Qi
    et al. 2023, section 6, https://arxiv.org/abs/2401.10241. With M < 2P-1, W waits for idle
    moments instead.

    >>> print(zb_v()(2, 3))
    rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1: 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        below = ranks - rank
        phases = [
            (2 * below - 1, "F0"),
            (rank, "F1 F0"),
            (below, "F1 I1 W"),
            (max(microbatches, 2 * ranks - 1) - 2 * ranks + rank + 1, "F0 I0 W F1 I1 W"),
            (below - 1, "I0 W F1 I1 W"),
            (rank, "I0 I1"),
            (below, "I0 W"),
            (2 * rank, "W"),
        ]
        return written(phases, (rank, 2 * ranks - 1 - rank))

    return _or_spread(by_rank("zb_v", row, vee()), lambda ranks: 2 * ranks - 1)


def dual_pipe_v() -> ScheduleFn:
    """DualPipe cut in half: two stages a rank in a V, each F next to a B of the other stage.

    The weight gradients of the filling and the emptying wait; the others stay within B. The
    neighbours F and B are what DualPipe overlaps with each other's communication. Bubble
    (P-1)/(6M+P-1); live 2P+1 halves of a rank's layers. DeepSeek-AI 2024,
    https://arxiv.org/abs/2412.19437 and https://github.com/deepseek-ai/DualPipe. With M < 2P, all W
    wait for idle moments.

    >>> print(dual_pipe_v()(2, 4))
    rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    rank 1: 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        below = ranks - rank - 1
        back = ["1", "0"] * (rank + 1)  # the stage whose turn it is to go back
        phases = [
            (2 * below, "F0"),
            (rank + 1, "F0 F1"),
            (below, "I1 W F1"),
            (max(microbatches, 2 * ranks) - 2 * ranks + rank + 1, "F0 B1 F1 B0"),
            (below, "B1 F1 B0"),
            (1, " ".join(f"{'B' if i <= rank else 'I'}{stage}" for i, stage in enumerate(back))),
            (below, "W I0"),
            (rank + 1, "W"),
        ]
        return written(phases, (rank, 2 * ranks - 1 - rank))

    return _or_spread(by_rank("dual_pipe_v", row, vee()), lambda ranks: 2 * ranks)


def forward_only(v: int = 1) -> ScheduleFn:
    """Forwards alone, to evaluate; v stages a rank take turns of about P microbatches.

    Bubble (P-1)/(vM+P-1); live 1: nothing outlives its F but what is sent.

    >>> print(forward_only()(2, 3))
    rank 0: 0F0 0F1 0F2
    rank 1: 1F0 1F1 1F2
    """

    def row(rank: int, ranks: int, microbatches: int) -> Row:
        return in_turn("F", range(rank, v * ranks, ranks), turns(microbatches, ranks))

    return by_rank("forward_only" if v == 1 else f"forward_only(v={v})", row, loop(v))


def _or_spread(many: ScheduleFn, least: Callable[[int], int]) -> ScheduleFn:
    """A table that is written for ``least(ranks)`` microbatches or more; with fewer, its W are
    spread."""
    few = spread(many.__name__, many)
    return named(many.__name__, lambda ranks, m: (many if m >= least(ranks) else few)(ranks, m))
