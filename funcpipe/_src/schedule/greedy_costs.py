"""Costs of stages as greedy scheduling needs them: looked up often, never changed.

In: a `Load`, the segments of every stage, and the rank of every stage.
Out: ``StageCosts``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from funcpipe._src.schedule.actions import Action, HalfStage
from funcpipe._src.schedule.communication import Links, sources
from funcpipe._src.schedule.costs import Load, StageLink, Stages, per_stage


class Send(NamedTuple):
    """A message that a half of a stage sends: to which rank, and how long it moves."""

    target: int
    takes: float


class Reader(NamedTuple):
    """A half of a stage that reads what another half made, ``takes`` after it was made."""

    kind: str
    stage: int
    takes: float


@dataclass(frozen=True)
class StageCosts:
    """What stages cost, and how they depend on each other.

    Args:
        stages: for every stage its segments.
        placement: for every stage its rank.
        time: of a compute action.
        held: for every stage the bytes from F to the backward.
        waiting: for every stage the bytes from I to W, and by segment in ``segment_waiting``.
        needs: what each half of a stage reads, also of its own stage; by rank, as it is received.
        readers: the halves that read each half of a stage.
        sends: the messages that each half of a stage sends.
        work: for every rank the most bytes that a unit takes for itself while it runs.
        entry: for the first stage of every rank, what the rank's other stages hold.
    """

    stages: Stages
    placement: Sequence[int]
    time: Callable[[Action], float]
    held: list[float]
    waiting: list[float]
    segment_waiting: list[list[float]]
    needs: Links
    readers: dict[HalfStage, list[Reader]]
    sends: dict[HalfStage, list[Send]]
    work: list[float]
    entry: dict[int, float]


def stage_costs(
    load: Load,
    stages: Stages,
    placement: Sequence[int],
) -> StageCosts:
    """The costs of stages.

    >>> from funcpipe._src.schedule.costs import even_load
    >>> costs = stage_costs(even_load(segments=2, ranks=2), [(0,), (1,)], (0, 1))
    >>> costs.needs["B", 0]
    [('F', 0), ('B', 1)]
    """
    sent_away = _sent_away(load, stages, placement)
    segment_waiting = []
    for segments in stages:
        segment_waiting.append([load.waiting[segment] for segment in segments])
    held = _held(load, stages, sent_away)
    needs = _needs(load, stages, placement)
    sends = _sends(load, stages, placement, needs)
    of_rank: list[list[int]] = [[] for _ in range(max(placement) + 1)]
    for stage, rank in enumerate(placement):
        of_rank[rank].append(stage)
    return StageCosts(
        stages=stages,
        placement=placement,
        time=load.cost(stages),
        held=held,
        waiting=list(map(sum, segment_waiting)),
        segment_waiting=segment_waiting,
        needs=needs,
        readers=_readers(needs, sends, placement),
        sends=sends,
        work=[_work(load, stages, mine, sent_away) for mine in of_rank],
        entry={mine[0]: sum(map(held.__getitem__, mine[1:])) for mine in of_rank},
    )


def _sent_away(
    load: Load,
    stages: Stages,
    placement: Sequence[int],
) -> dict[StageLink, float]:
    """The bytes that stages hand to stages of other ranks."""
    sent_away = {}
    for link, nbytes in load.messages(stages).items():
        _, maker, reader = link
        if placement[maker] != placement[reader]:
            sent_away[link] = nbytes
    return sent_away


def _held(
    load: Load,
    stages: Stages,
    sent_away: dict[StageLink, float],
) -> list[float]:
    """What stages hold, with what F sends: it has arrived when its gradient comes back."""
    sent = [0.0] * len(stages)
    for (kind, maker, _), nbytes in sent_away.items():
        if kind == "F":
            sent[maker] += nbytes
    kept = per_stage(load.held, stages)
    both = zip(kept, sent, strict=True)
    return list(map(sum, both))


def _needs(
    load: Load,
    stages: Stages,
    placement: Sequence[int],
) -> Links:
    reads = sources(load.edges(stages))

    def by_rank(half: HalfStage) -> tuple[int, HalfStage]:
        return placement[half[1]], half

    needs: Links = {}
    for kind in "FB":
        for stage in range(len(stages)):
            own = [("F", stage)] if kind == "B" else []
            others = reads.get((kind, stage), [])
            needs[kind, stage] = sorted(others + own, key=by_rank)
    return needs


def _readers(
    needs: Links,
    sends: dict[HalfStage, list[Send]],
    placement: Sequence[int],
) -> dict[HalfStage, list[Reader]]:
    readers: dict[HalfStage, list[Reader]] = {half: [] for half in needs}
    for (kind, stage), makers in needs.items():
        for maker in makers:
            takes = dict(sends[maker]).get(placement[stage], 0.0)
            readers[maker].append(Reader(kind, stage, takes))
    return readers


def _sends(
    load: Load,
    stages: Stages,
    placement: Sequence[int],
    needs: Links,
) -> dict[HalfStage, list[Send]]:
    transfer = load.transfer(stages, placement)
    sends: dict[HalfStage, dict[int, Send]] = {half: {} for half in needs}
    for (_, reader), makers in needs.items():
        target = placement[reader]
        for half in makers:
            kind, stage = half
            if placement[stage] != target and target not in sends[half]:
                action = Action(f"SEND_{kind}", stage, 0, peer=reader)
                sends[half][target] = Send(target, transfer(action))
    return {half: list(of_half.values()) for half, of_half in sends.items()}


def _work(
    load: Load,
    stages: Stages,
    mine: Sequence[int],
    sent_away: dict[StageLink, float],
) -> float:
    """The most that a unit of a rank's stages takes, and the largest gradient that they send."""
    units = 0.0
    for stage in mine:
        units = max(units, *map(load.work.__getitem__, stages[stage]))
    gradients = 0.0
    for (kind, maker, _), nbytes in sent_away.items():
        if kind == "B" and maker in mine:
            gradients = max(gradients, nbytes)
    return units + gradients
