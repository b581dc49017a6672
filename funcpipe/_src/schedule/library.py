"""The schedules that people pipeline with: one short function each, with its formulas.

In: the options of a schedule, as in ``interleaved_1f1b(v=2)``, then the number of ranks P and of
microbatches M. Any P >= 1, M >= 1 and v >= 1 will do; v is the number of stages that a rank holds.
Out: a table without transfers, which `communication.py` inserts, and without times. The weight
gradients of a stage come in microbatch order, so that sums are the same for all schedules.

Formulas in the docstrings hold for F = I = W, transfers that cost nothing, and M a multiple of P of
at least 2P. *Bubble*: the part of all ranks' time in which they do not compute. *Live*: the most
(stage, microbatch) of a rank whose F is done and whose backward is not; a stage is 1/v of a rank's
layers. `building_blocks.py` has the pieces.
"""

from __future__ import annotations

from collections.abc import Callable

from funcpipe._src.schedule.actions import Schedule, ScheduleFn
from funcpipe._src.schedule.building_blocks import (
    Actions,
    alternate,
    by_rank,
    each_microbatch,
    from_phases,
    in_turn,
    loop,
    named,
    rounds_of,
    vee,
    with_delayed_w,
)


def gpipe() -> ScheduleFn:
    """All forwards, then all backwards.

    Bubble (P-1)/(M+P-1); live M on every rank. Huang et al. 2019, https://arxiv.org/abs/1811.06965.

    >>> print(gpipe()(2, 3))
    rank 0: 0F0 0F1 0F2 0B0 0B1 0B2
    rank 1: 1F0 1F1 1F2 1B0 1B1 1B2
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        forwards = each_microbatch("F", rank, microbatches)
        backwards = each_microbatch("B", rank, microbatches)
        return forwards + backwards

    return by_rank("gpipe", actions_of, loop())


def one_f_one_b() -> ScheduleFn:
    """As few forwards as fill the pipeline, then one forward and one backward in turn.

    Bubble (P-1)/(M+P-1); live P-r on rank r. PipeDream-Flush, Narayanan et al. 2021,
    https://arxiv.org/abs/2006.09503.

    >>> print(one_f_one_b()(2, 3))
    rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
    rank 1: 1F0 1B0 1F1 1B1 1F2 1B2
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        forwards = each_microbatch("F", rank, microbatches)
        backwards = each_microbatch("B", rank, microbatches)
        return alternate(forwards, backwards, warmup=ranks - rank - 1)

    return by_rank("one_f_one_b", actions_of, loop())


def interleaved_1f1b(v: int) -> ScheduleFn:
    """1F1B over v stages a rank, in rounds of about P microbatches: a bubble v times smaller.

    Bubble (P-1)/(vM+P-1); live (v+1)P-1 on rank 0, two less on each next rank, for v > 1. Narayanan
    et al. 2021, https://arxiv.org/abs/2104.04473. Where M is no multiple of P, rounds get longer,
    not shorter: the bubble is that of the formula for every M >= P, and memory is somewhat larger.

    >>> print(interleaved_1f1b(2)(2, 2))
    rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    rank 1: 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        stages = _looped(v, rank, ranks)
        rounds = rounds_of(microbatches, ranks)
        forwards = in_turn("F", stages, rounds)
        backwards = in_turn("B", stages[::-1], rounds)
        ranks_behind = ranks - rank - 1
        warmup = (v - 1) * len(rounds[0]) + 2 * ranks_behind
        return alternate(forwards, backwards, warmup)

    name = f"interleaved_1f1b(v={v})"
    if v == 1:
        return named(name, one_f_one_b())
    return by_rank(name, actions_of, loop(v))


def looped_bfs(v: int) -> ScheduleFn:
    """Breadth first: all microbatches through a rank's first stage, then its second, and back.

    The weights of a stage are gathered only once forward and once backward, which suits sharding.
    Bubble (P-1)/(vM+P-1); live vM on every rank. Lamy-Poirier 2022,
    https://arxiv.org/abs/2211.05953.

    >>> print(looped_bfs(2)(2, 2))
    rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    rank 1: 1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        stages = _looped(v, rank, ranks)
        one_round = [range(microbatches)]
        forwards = in_turn("F", stages, one_round)
        backwards = in_turn("B", stages[::-1], one_round)
        return forwards + backwards

    return by_rank(f"looped_bfs(v={v})", actions_of, loop(v))


def zb_h1() -> ScheduleFn:
    """1F1B whose weight gradients wait for moments in which their rank is idle.

    Bubble (P-1)/(3M+P-1); live P on every rank. Qi et al. 2023, section 2.3,
    https://arxiv.org/abs/2401.10241.

    >>> print(zb_h1()(2, 3))
    rank 0: 0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
    rank 1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    return with_delayed_w("zb_h1", one_f_one_b())


def interleaved_zb(v: int) -> ScheduleFn:
    """Interleaved 1F1B whose weight gradients wait for moments in which their rank is idle.

    Bubble (P-1)/(3vM+P-1); live (v+1)P-1 on every rank, for v > 1, as on rank 0 of interleaved
    1F1B. Qi et al. 2023, https://arxiv.org/abs/2401.10241, on Narayanan et al. 2021,
    https://arxiv.org/abs/2104.04473.

    >>> print(interleaved_zb(2)(2, 2))
    rank 0: 0F0 0F1 2F0 2F1 2I0 2W0 2I1 0I0 0I1 2W1 0W0 0W1
    rank 1: 1F0 1F1 3F0 3I0 3F1 3I1 1I0 1I1 3W0 3W1 1W0 1W1
    """
    return with_delayed_w(f"interleaved_zb(v={v})", interleaved_1f1b(v))


def zb_v() -> ScheduleFn:
    """Two stages a rank in a V, so that the last is on the first rank: no bubble but the filling.

    Bubble (P-1)/(6M+P-1); live 2P halves of a rank's layers, which is what 1F1B holds on rank 0. Qi
    et al. 2023, section 6, https://arxiv.org/abs/2401.10241. With M < 2P-1, W waits for idle
    moments instead.

    >>> print(zb_v()(2, 3))
    rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1: 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        below = ranks - rank
        beyond = max(microbatches - 2 * ranks + 1, 0)
        phases = [
            (2 * below - 1, "F0"),
            (rank, "F1 F0"),
            (below, "F1 I1 W"),
            (beyond + rank, "F0 I0 W F1 I1 W"),
            (below - 1, "I0 W F1 I1 W"),
            (rank, "I0 I1"),
            (below, "I0 W"),
            (2 * rank, "W"),
        ]
        return from_phases(phases, _vee_stages(rank, ranks))

    table = by_rank("zb_v", actions_of, vee())
    return _or_delayed_w(table, lambda ranks: 2 * ranks - 1)


def dual_pipe_v() -> ScheduleFn:
    """DualPipe cut in half: two stages a rank in a V, each F next to a B of the other stage.

    The weight gradients of the filling and the emptying wait; the others stay within B. DualPipe
    overlaps neighbouring F and B with each other's communication. Bubble (P-1)/(6M+P-1); live 2P+1
    halves of a rank's layers. DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437 and
    https://github.com/deepseek-ai/DualPipe. With M < 2P, all W wait for idle moments.

    >>> print(dual_pipe_v()(2, 4))
    rank 0: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    rank 1: 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        below = ranks - rank - 1
        beyond = max(microbatches - 2 * ranks, 0)
        backwards = ["B1", "B0"] * (rank + 1)
        whole = backwards[: rank + 1]
        later = backwards[rank + 1 :]
        split = [word.replace("B", "I") for word in later]
        phases = [
            (2 * below, "F0"),
            (rank + 1, "F0 F1"),
            (below, "I1 W F1"),
            (beyond + rank + 1, "F0 B1 F1 B0"),
            (below, "B1 F1 B0"),
            (1, " ".join(whole + split)),
            (below, "W I0"),
            (rank + 1, "W"),
        ]
        return from_phases(phases, _vee_stages(rank, ranks))

    table = by_rank("dual_pipe_v", actions_of, vee())
    return _or_delayed_w(table, lambda ranks: 2 * ranks)


def forward_only(v: int = 1) -> ScheduleFn:
    """Forwards alone, to evaluate; v stages a rank, in rounds of about P microbatches.

    Bubble (P-1)/(vM+P-1); live 1: only what is sent outlives its F.

    >>> print(forward_only()(2, 3))
    rank 0: 0F0 0F1 0F2
    rank 1: 1F0 1F1 1F2
    """

    def actions_of(rank: int, ranks: int, microbatches: int) -> Actions:
        stages = _looped(v, rank, ranks)
        return in_turn("F", stages, rounds_of(microbatches, ranks))

    name = "forward_only" if v == 1 else f"forward_only(v={v})"
    return by_rank(name, actions_of, loop(v))


def _looped(
    v: int,
    rank: int,
    ranks: int,
) -> range:
    """The stages of a rank where v stages a rank go round the ranks."""
    return range(rank, v * ranks, ranks)


def _vee_stages(rank: int, ranks: int) -> tuple[int, int]:
    """The two stages of a rank where stages go down the ranks and up again."""
    return rank, 2 * ranks - 1 - rank


def _or_delayed_w(written: ScheduleFn, least: Callable[[int], int]) -> ScheduleFn:
    """The schedule as written from ``least(ranks)`` microbatches on; with fewer, W are delayed."""
    delayed = with_delayed_w(written.__name__, written)

    def lay_out(ranks: int, microbatches: int) -> Schedule:
        chosen = written if microbatches >= least(ranks) else delayed
        return chosen(ranks, microbatches)

    return named(written.__name__, lay_out)
