"""The rules of a table that hold between actions: on one rank, and between the two ends of a
message.

``order``: on its rank every action comes after what it needs. ``pairing``: what one rank sends
another receives, in the same order, and somebody reads it. Whether ranks wait for each other in a
circle is `check_deadlock.py`'s to find.

In: a schedule in which every action makes sense and runs once. Out: nothing; a ScheduleError at the
first violation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from funcpipe._src.schedule.actions import COMMUNICATE, Action, Edge, Schedule
from funcpipe._src.schedule.communication import (
    Channel,
    Message,
    Unit,
    channel_of,
    message_of,
    readers,
    sources,
    unit_of,
)
from funcpipe._src.schedule.rejection_text import Place, at, maker, refusal
from funcpipe.errors import ScheduleError

# (kind, stage) -> the (kind, stage) of other stages that it reads
Sources = dict[tuple[str, int], list[tuple[str, int]]]


def needs(action: Action, sources_of: Sources) -> list[Unit]:
    """The units that an action reads: of its own stage, and those of other stages by the edges.

    >>> needs(Action("I", 1, 5), {("B", 1): [("B", 2)]})
    [('F', 1, 5), ('B', 2, 5)]
    """
    if action.kind.startswith("SEND"):
        return [message_of(action).unit]
    own = {"B": "F", "I": "F", "W": "B"}.get(action.kind)
    unit = unit_of(action)
    others = sources_of.get(unit[:2], ()) if unit else ()
    mine = [(own, action.stage, action.microbatch)] if own else []
    return mine + [(kind, stage, action.microbatch) for kind, stage in others]


def pairing(schedule: Schedule, edges: Iterable[Edge]) -> None:
    """Every send has its receive, every receive its send, in the same order, and somebody reads
    it."""
    edges = frozenset(edges)
    sends: dict[Message, Place] = {}
    receives: dict[Message, Place] = {}
    for rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            if action.kind in COMMUNICATE:
                ends = sends if action.kind.startswith("SEND") else receives
                ends[message_of(action)] = (rank, position)
    _wanted(schedule, sends, readers(edges))
    for message, place in sends.items():
        if message not in receives:
            raise _unpaired(schedule, message, place)
    for message, place in receives.items():
        if message not in sends:
            raise _unpaired(schedule, message, place)
    _same_order(schedule, sends, receives)


def _wanted(schedule: Schedule, sends: dict[Message, Place], read_by: Sources) -> None:
    """Refuse a message that its target does not read, or that reaches a rank twice."""
    there = {unit_of(action) for actions in schedule.ranks for action in actions}
    arrived: dict[tuple[Unit, int], Place] = {}
    for message, place in sends.items():
        unit, rank = message.unit, schedule.placement[message.target]
        target = [(k, s) for k, s in read_by.get(unit[:2], ()) if s == message.target]
        if not any((kind, stage, unit[2]) in there for kind, stage in target):
            raise refusal(
                schedule,
                f"{at(place)}: {_text(schedule, place)} sends what stage {message.target} does not "
                "read",
                place,
                why="by the edges between the stages, no action of its target reads what is sent",
                instead="leave out the send and its receive, or send to a stage that reads it",
            )
        if (first := arrived.setdefault((unit, rank), place)) != place:
            raise refusal(
                schedule,
                f"{at(place)}: {_text(schedule, place)} sends rank {rank} what "
                f"{_text(schedule, first)} at position {first[1]} sent already",
                first,
                place,
                why="one message is enough for all stages of a rank",
                instead="leave out the second send and its receive",
            )


def _unpaired(schedule: Schedule, message: Message, place: Place) -> ScheduleError:
    (kind, stage, microbatch), target = message
    send, receive = (
        Action(f"SEND_{kind}", stage, microbatch, peer=target),
        Action(f"RECV_{kind}", target, microbatch, peer=stage),
    )
    source_rank, target_rank = schedule.placement[stage], schedule.placement[target]
    if _text(schedule, place) == str(send):
        what = f"is sent to rank {target_rank}, which never receives it"
        instead = f"write {receive} on rank {target_rank} before what reads it"
    else:
        what = f"waits for rank {source_rank}, which never sends it"
        instead = f"write {send} on rank {source_rank} behind what makes it"
    why = "every send needs one receive, and every receive one send"
    return refusal(
        schedule, f"{at(place)}: {_text(schedule, place)} {what}", place, why=why, instead=instead
    )


def _same_order(
    schedule: Schedule, sends: dict[Message, Place], receives: dict[Message, Place]
) -> None:
    channels: dict[Channel, list[Message]] = defaultdict(list)
    for message in sorted(sends, key=sends.__getitem__):
        channels[channel_of(message, schedule.placement)].append(message)
    for channel, sent in channels.items():
        received = sorted(sent, key=receives.__getitem__)
        for first, other in zip(sent, received, strict=True):
            if first != other:
                early, late = receives[other], receives[first]
                raise refusal(
                    schedule,
                    f"rank {channel.target} receives {_text(schedule, early)} (position "
                    f"{early[1]}) before {_text(schedule, late)} (position {late[1]}), but rank "
                    f"{channel.source} sends them the other way round",
                    early,
                    late,
                    sends[first],
                    sends[other],
                    why="what one rank sends another arrives in the order in which it was sent",
                    instead=f"receive {_text(schedule, late)} first, or swap the two sends",
                )


def order(schedule: Schedule, edges: Iterable[Edge]) -> None:
    """On its rank every action comes after what it needs, be it computed there or received.

    In a table without transfers only what the rank itself computes is asked for; the rest will be
    received in time.
    """
    sources_of, received = sources(edges), schedule.communicates
    for rank, actions in enumerate(schedule.ranks):
        have: set[Unit] = set()
        for position, action in enumerate(actions):
            for unit in needs(action, sources_of):
                remote = schedule.placement[unit[1]] != rank
                if unit not in have and (received or not remote):
                    raise _too_early(schedule, (rank, position), unit)
            made = message_of(action).unit if action.kind.startswith("RECV") else unit_of(action)
            if made is not None:
                have.add(made)


def _too_early(schedule: Schedule, place: Place, unit: Unit) -> ScheduleError:
    """The error for an action that reads a unit which its rank does not have yet."""
    rank, position = place
    action, row = schedule.ranks[rank][position], schedule.ranks[rank]
    kind, stage, microbatch = unit
    local = schedule.placement[stage] == rank
    wanted, why = maker(schedule, unit), f"{action} reads what {maker(schedule, unit)} makes"
    later = [
        (rank, p)
        for p, other in enumerate(row)
        if (
            unit_of(other) == unit
            if local
            else other.kind.startswith("RECV") and message_of(other).unit == unit
        )
    ]
    if later:
        wanted = _text(schedule, later[0])
        what = f"comes before {wanted} (position {later[0][1]}), which it needs"
        instead = f"write {wanted} before {action}"
    elif local:
        what, instead = f"needs {wanted}, which nobody runs", f"leave out {action}"
    else:
        source = schedule.placement[stage]
        receive = Action(f"RECV_{kind}", action.stage, microbatch, peer=stage)
        send = Action(f"SEND_{kind}", stage, microbatch, peer=action.stage)
        what = f"needs {wanted} of rank {source}, and rank {rank} never receives it"
        instead = f"write {receive} before {action}, and {send} on rank {source}"
    return refusal(
        schedule, f"{at(place)}: {action} {what}", place, *later[:1], why=why, instead=instead
    )


def _text(schedule: Schedule, place: Place) -> str:
    rank, position = place
    return str(schedule.ranks[rank][position])
