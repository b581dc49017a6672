"""Checks between actions: the order on one rank, and the two ends of each message.

In: a schedule in which every action makes sense and runs once, and the edges between its stages.
Out: nothing, or a ScheduleError for the first violation. Whether ranks wait for each other in a
circle is `check_deadlock.py`'s to find.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from funcpipe._src.schedule.actions import COMMUNICATE, Action, Cell, Edge, Schedule
from funcpipe._src.schedule.communication import (
    Channel,
    Links,
    Message,
    Unit,
    channel_of,
    message_of,
    readers,
    receive_of,
    send_of,
    sources,
    unit_of,
)
from funcpipe._src.schedule.rejection_text import at, maker, rejection, text_at
from funcpipe.errors import ScheduleError

# On its own stage, the half whose values an action of a kind reads.
_OWN_SOURCE = {"B": "F", "I": "F", "W": "B"}


def needs(action: Action, sources_of: Links) -> list[Unit]:
    """The units that an action reads: of its own stage, and those of other stages by the edges.

    >>> needs(Action("I", 1, 5), {("B", 1): [("B", 2)]})
    [('F', 1, 5), ('B', 2, 5)]
    """
    if action.kind.startswith("SEND"):
        return [message_of(action).unit]
    units: list[Unit] = []
    if action.kind in _OWN_SOURCE:
        units.append((_OWN_SOURCE[action.kind], action.stage, action.microbatch))
    unit = unit_of(action)
    if unit is not None:
        for kind, stage in sources_of.get(unit[:2], ()):
            units.append((kind, stage, action.microbatch))
    return units


def check_pairing(schedule: Schedule, edges: Iterable[Edge]) -> None:
    """Every send has its receive and every receive its send, in the same order, with a reader.

    Raises:
        ScheduleError: one of them does not.
    """
    sends: dict[Message, Cell] = {}
    receives: dict[Message, Cell] = {}
    for cell, action in schedule.cells():
        if action.kind in COMMUNICATE:
            ends = sends if action.kind.startswith("SEND") else receives
            ends[message_of(action)] = cell
    _check_readers(schedule, sends, readers(edges))
    for message, cell in sends.items():
        if message not in receives:
            raise _never_received(schedule, message, cell)
    for message, cell in receives.items():
        if message not in sends:
            raise _never_sent(schedule, message, cell)
    _check_same_order(schedule, sends, receives)


def _check_readers(schedule: Schedule, sends: dict[Message, Cell], read_by: Links) -> None:
    """Refuse a message that its target does not read, or that reaches a rank twice."""
    made = {unit_of(action) for _, action in schedule.cells()}
    sent_to: dict[tuple[Unit, int], Cell] = {}
    for message, cell in sends.items():
        unit, target = message
        if not any(reader in made for reader in _readers_at(target, unit, read_by)):
            text = text_at(schedule, cell)
            raise rejection(
                schedule,
                f"{at(cell)}: {text} sends what stage {target} does not read",
                cell,
                why="by the edges between the stages, no action of its target reads what is sent",
                instead="leave out the send and its receive, or send to a stage that reads it",
            )
        rank = schedule.placement[target]
        first = sent_to.setdefault((unit, rank), cell)
        if first != cell:
            text, before = text_at(schedule, cell), text_at(schedule, first)
            raise rejection(
                schedule,
                f"{at(cell)}: {text} sends rank {rank} what {before} at position {first[1]} sent "
                "already",
                first,
                cell,
                why="one message is enough for all stages of a rank",
                instead="leave out the second send and its receive",
            )


def _readers_at(target: int, unit: Unit, read_by: Links) -> list[Unit]:
    """The units of a stage that read a unit."""
    microbatch = unit[2]
    found = read_by.get(unit[:2], ())
    return [(kind, stage, microbatch) for kind, stage in found if stage == target]


def _never_received(schedule: Schedule, message: Message, cell: Cell) -> ScheduleError:
    rank = schedule.placement[message.target]
    fault = f"is sent to rank {rank}, which never receives it"
    instead = f"write {receive_of(message)} on rank {rank} before what reads it"
    return _unpaired(schedule, cell, fault, instead)


def _never_sent(schedule: Schedule, message: Message, cell: Cell) -> ScheduleError:
    rank = schedule.placement[message.unit[1]]
    fault = f"waits for rank {rank}, which never sends it"
    instead = f"write {send_of(message)} on rank {rank} behind what makes it"
    return _unpaired(schedule, cell, fault, instead)


def _unpaired(schedule: Schedule, cell: Cell, fault: str, instead: str) -> ScheduleError:
    fault = f"{at(cell)}: {text_at(schedule, cell)} {fault}"
    why = "every send needs one receive, and every receive one send"
    return rejection(schedule, fault, cell, why=why, instead=instead)


def _check_same_order(
    schedule: Schedule,
    sends: dict[Message, Cell],
    receives: dict[Message, Cell],
) -> None:
    channels: dict[Channel, list[Message]] = defaultdict(list)
    for message in sorted(sends, key=sends.__getitem__):
        channels[channel_of(message, schedule.placement)].append(message)
    for channel, sent in channels.items():
        received = sorted(sent, key=receives.__getitem__)
        for first, other in zip(sent, received, strict=True):
            if first == other:
                continue
            early, late = receives[other], receives[first]
            early_text, late_text = text_at(schedule, early), text_at(schedule, late)
            raise rejection(
                schedule,
                f"rank {channel.target} receives {early_text} (position {early[1]}) before "
                f"{late_text} (position {late[1]}), but rank {channel.source} sends them the other "
                "way round",
                early,
                late,
                sends[first],
                sends[other],
                why="what one rank sends another arrives in the order in which it was sent",
                instead=f"receive {late_text} first, or swap the two sends",
            )


def check_order(schedule: Schedule, edges: Iterable[Edge]) -> None:
    """On its rank every action comes after what it needs, be it computed there or received.

    A table without transfers only has to order what the rank itself computes: `communication.py`
    will insert each receive in time.

    Raises:
        ScheduleError: an action comes too early.
    """
    sources_of = sources(edges)
    receives = schedule.communicates
    available: list[set[Unit]] = [set() for _ in schedule.ranks]
    for cell, action in schedule.cells():
        rank = cell[0]
        for unit in needs(action, sources_of):
            local = schedule.placement[unit[1]] == rank
            if unit not in available[rank] and (local or receives):
                raise _too_early(schedule, cell, unit)
        unit_made = _made_available(action)
        if unit_made is not None:
            available[rank].add(unit_made)


def _made_available(action: Action) -> Unit | None:
    """The unit that a rank has once the action is over."""
    if action.kind.startswith("RECV"):
        return message_of(action).unit
    return unit_of(action)


def _too_early(schedule: Schedule, cell: Cell, unit: Unit) -> ScheduleError:
    """The error for an action that reads a unit which its rank does not have yet."""
    rank = cell[0]
    action = schedule.ranks[rank][cell[1]]
    stage = unit[1]
    wanted = maker(schedule, unit)
    why = f"{action} reads what {wanted} makes"
    local = schedule.placement[stage] == rank
    later = _later(schedule.ranks[rank], unit, local)
    shown = [cell]
    if later is not None:
        shown.append((rank, later))
        wanted = text_at(schedule, (rank, later))
        fault = f"comes before {wanted} (position {later}), which it needs"
        instead = f"write {wanted} before {action}"
    elif local:
        fault = f"needs {wanted}, which no rank runs"
        instead = f"leave out {action}"
    else:
        source = schedule.placement[stage]
        message = Message(unit, action.stage)
        fault = f"needs {wanted} of rank {source}, and rank {rank} never receives it"
        instead = f"write {receive_of(message)} before {action}, and {send_of(message)} on rank "
        instead += f"{source}"
    return rejection(schedule, f"{at(cell)}: {action} {fault}", *shown, why=why, instead=instead)


def _later(actions: tuple[Action, ...], unit: Unit, local: bool) -> int | None:
    """The position at which a rank computes, or receives, a unit; None if it never does."""
    for position, action in enumerate(actions):
        receives = action.kind.startswith("RECV")
        if receives != local and _made_available(action) == unit:
            return position
    return None
