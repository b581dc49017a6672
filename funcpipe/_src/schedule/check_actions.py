"""The rules that hold for each action by itself: it makes sense where it stands, and it runs once.

In: a schedule. Out: nothing; a ScheduleError at the first violation, with what to write instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from funcpipe._src.schedule.actions import COMMUNICATE, KINDS, Action, Schedule
from funcpipe._src.schedule.rejection_text import Place, at, refusal
from funcpipe.errors import ScheduleError


def shape(schedule: Schedule) -> None:
    """Every stage lies on a rank, every rank holds one, and every action makes sense where it
    stands."""
    name, placement, ranks = schedule.name, schedule.placement, len(schedule.ranks)
    for stage, rank in enumerate(placement):
        if not 0 <= rank < ranks:
            raise ScheduleError(
                f"{name}: stage {stage} is placed on rank {rank}, but the table has ranks 0 to "
                f"{ranks - 1}"
            )
    if idle := sorted(set(range(ranks)) - set(placement)):
        raise ScheduleError(
            f"{name}: rank {idle[0]} holds no stage; use fewer ranks or place a stage there"
        )
    for rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            if wrong := _senseless(action, rank, schedule):
                what, instead = wrong
                place = (rank, position)
                raise refusal(
                    schedule,
                    f"{at(place)}: {action} {what}",
                    place,
                    why=_WHY_SHAPE,
                    instead=instead,
                )


_WHY_SHAPE = (
    "an action names a stage that its rank holds, a microbatch of the step, and a transfer its peer"
)


def _senseless(action: Action, rank: int, schedule: Schedule) -> tuple[str, str] | None:
    """What is wrong with an action by itself, and what to write instead; None if nothing."""
    stages, microbatches, placement = schedule.stages, schedule.microbatches, schedule.placement
    if action.kind not in KINDS:
        return f"is of unknown kind {action.kind!r}", f"one of {', '.join(KINDS)}"
    if not 0 <= action.stage < stages:
        return f"names stage {action.stage} of {stages}", f"a stage from 0 to {stages - 1}"
    if not 0 <= action.microbatch < microbatches:
        return (
            f"names microbatch {action.microbatch} of {microbatches}",
            f"one from 0 to {microbatches - 1}",
        )
    if placement[action.stage] != rank:
        holder = placement[action.stage]
        return f"is of stage {action.stage}, which rank {holder} holds", f"move it to rank {holder}"
    if action.segment is not None and action.kind != "W":
        return "names a segment", "only W is scheduled by segment; leave the segment out"
    if action.kind not in COMMUNICATE:
        return (
            None
            if action.peer is None
            else ("names a peer", "only transfers have a peer; leave it out")
        )
    if action.peer is None or not 0 <= action.peer < stages:
        return (
            f"goes to stage {action.peer}",
            f"name the stage at its other end, from 0 to {stages - 1}",
        )
    if placement[action.peer] == rank:
        return (
            f"goes to stage {action.peer} on the same rank",
            "leave it out: a rank needs no message for what it has",
        )
    return None


def units(schedule: Schedule, segments: Sequence[int] | None = None) -> None:
    """Every stage runs F of every microbatch once, and then either B once, or I once and W once.

    A table without any B, I and W is forward only. W may be whole or by segment; without
    ``segments`` a stage is taken to have as many as its actions name.
    """
    place: dict[Action, Place] = {}
    for rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            if (first := place.setdefault(action, (rank, position))) != (rank, position):
                raise refusal(
                    schedule,
                    f"rank {rank} has {action} twice, at positions {first[1]} and {position}",
                    first,
                    (rank, position),
                    why="every action of a microbatch runs once",
                    instead=f"leave one out{_not_yet(action, place, schedule)}",
                )
    kinds = {action.kind for action in place}
    counts = [0] * schedule.stages if segments is None else list(segments)
    for action in place:
        if action.segment is not None:
            if segments is not None and action.segment >= counts[action.stage]:
                raise _extra_segment(schedule, action, place[action], counts[action.stage])
            counts[action.stage] = max(counts[action.stage], action.segment + 1)
    for stage in range(schedule.stages):
        for microbatch in range(schedule.microbatches):
            _complete(
                schedule, place, stage, microbatch, counts[stage], bool(kinds & {"B", "I", "W"})
            )


def _not_yet(action: Action, place: dict[Action, Place], schedule: Schedule) -> str:
    """If the same action of another microbatch is absent, it is probably the one that was meant."""
    row = set(schedule.ranks[place[action][0]])
    for microbatch in range(schedule.microbatches):
        if (other := action._replace(microbatch=microbatch)) not in row:
            return f", or make it {other}, which is nowhere in the list"
    return ""


def _extra_segment(schedule: Schedule, action: Action, place: Place, count: int) -> ScheduleError:
    return refusal(
        schedule,
        f"{at(place)}: {action} names segment {action.segment} of {count}",
        place,
        why=f"stage {action.stage} has {count} segment{'s' * (count != 1)}",
        instead=f"a segment from 0 to {count - 1}, or W of the whole stage",
    )


def _complete(
    schedule: Schedule,
    place: dict[Action, Place],
    stage: int,
    microbatch: int,
    segments: int,
    backward: bool,
) -> None:
    """Refuse a stage that leaves a part of a microbatch out, or does a part both ways."""
    f, b, i, w = (Action(kind, stage, microbatch) for kind in "FBIW")
    parts = [w._replace(segment=number) for number in range(segments)]
    some = [part for part in parts if part in place]
    weights = [w] if w in place else some
    rank = schedule.placement[stage]

    def lacks(what: str, why: str, *there: Action) -> ScheduleError:
        instead = f"write {what} behind {there[-1]}" if there else f"write {what} on rank {rank}"
        places = [place[action] for action in there]
        return refusal(
            schedule, f"rank {rank} never runs {what}", *places, why=why, instead=instead
        )

    def both(one: Action, other: Action, why: str) -> ScheduleError:
        places = (place[one], place[other])
        what = f"rank {rank} has both {one} and {other}"
        return refusal(schedule, what, *places, why=why, instead="leave one out")

    if f not in place:
        raise lacks(f"{f}", "every stage runs F of every microbatch once")
    if not backward:
        return
    if b in place:
        if others := [action for action in (i, *weights) if action in place]:
            raise both(b, others[0], "B is I and W in one")
        return
    if i not in place:
        what = f"{i}" if weights else f"{b} (or {i} and {w})"
        raise lacks(
            what, "some action in the table is a backward, so every microbatch needs its own", f
        )
    if w in place and some:
        raise both(w, some[0], "W without a segment is W of all segments")
    if w not in place and len(some) < max(segments, 1):
        absent = next((part for part in parts if part not in place), w) if some else w
        raise lacks(f"{absent}", "I leaves the weight gradients to W", i, *some)
