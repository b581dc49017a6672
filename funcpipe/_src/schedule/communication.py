"""From a table of F, B, I and W to one that says who sends what to whom, and when it is received.

Terms. A *unit* ``(kind, stage, microbatch)`` names what an action computes for others: kind "F" or
"B", where "B" is made by ``B`` or by ``I`` (a ``W`` makes nothing that another stage reads). A
*message* carries one unit's values from the rank that made them to one other rank; a rank that
holds several stages which read them gets one message for all. A *channel* is everything of one kind
that one rank sends another: messages on it arrive in the order they were sent.

In: a schedule without transfers, and the edges between its stages. Out: the schedule with ``SEND``
right after what makes the values and ``RECV`` right before what first reads them (a receive posted
early costs time
on a GPU: the waiting kernel holds processors), or earlier where the order of a channel asks for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from funcpipe._src.schedule.actions import Action, Edge, Schedule

# (kind, stage, microbatch): what an action computes for others, kind "F" or "B"
Unit = tuple[str, int, int]


class Channel(NamedTuple):
    """Everything of one kind that rank ``source`` sends rank ``target``."""

    source: int
    target: int
    kind: str


class Message(NamedTuple):
    """The values of ``unit`` on their way to the rank that holds stage ``target``."""

    unit: Unit
    target: int


def unit_of(action: Action) -> Unit | None:
    """The unit that a compute action makes; None for transfers, and for ``W``, which nobody else
    reads.

    >>> unit_of(Action("I", 2, 5)), unit_of(Action("W", 2, 5))
    (('B', 2, 5), None)
    """
    kind = {"F": "F", "B": "B", "I": "B"}.get(action.kind)
    return None if kind is None else (kind, action.stage, action.microbatch)


def message_of(action: Action) -> Message:
    """The message of a transfer: the same one for its sending and its receiving end.

    >>> message_of(Action("SEND_F", 0, 3, peer=1)) == message_of(Action("RECV_F", 1, 3, peer=0))
    True
    """
    ends = (
        (action.stage, action.peer)
        if action.kind.startswith("SEND")
        else (action.peer, action.stage)
    )
    source, target = ends
    assert (
        source is not None and target is not None
    )  # the checker refuses a transfer without its peer before
    return Message((action.kind[-1], source, action.microbatch), target)


def channel_of(message: Message, placement: Sequence[int]) -> Channel:
    """The channel that a message takes.

    >>> channel_of(Message(("B", 3, 0), 2), placement=(0, 1, 0, 1))
    Channel(source=1, target=0, kind='B')
    """
    kind, stage, _ = message.unit
    return Channel(placement[stage], placement[message.target], kind)


def readers(edges: Iterable[Edge]) -> dict[tuple[str, int], list[tuple[str, int]]]:
    """For every (kind, stage) the (kind, stage) that read it on other stages, sorted.

    >>> readers({(("F", 0), ("F", 1)), (("F", 0), ("B", 2))})
    {('F', 0): [('B', 2), ('F', 1)]}
    """
    table = defaultdict(list)
    for maker, reader in sorted(edges):
        table[maker].append(reader)
    return dict(table)


def sources(edges: Iterable[Edge]) -> dict[tuple[str, int], list[tuple[str, int]]]:
    """For every (kind, stage) the (kind, stage) of other stages that it reads, sorted.

    >>> sources({(("F", 0), ("B", 2)), (("F", 1), ("B", 2))})
    {('B', 2): [('F', 0), ('F', 1)]}
    """
    table = defaultdict(list)
    for maker, reader in sorted(edges):
        table[reader].append(maker)
    return dict(table)


def insert_communication(schedule: Schedule, edges: Iterable[Edge]) -> Schedule:
    """The schedule with its sends and receives.

    Args:
        schedule: a table in which every action stands once; one that has transfers already is
            returned as it is.
        edges: what depends on what between stages; ``chain(stages)`` for a plain chain. An edge
            into ("B", s) is read by ``B`` or ``I`` of stage ``s``.

    >>> from funcpipe._src.schedule.actions import chain
    >>> from funcpipe._src.schedule.library import gpipe
    >>> for actions in insert_communication(gpipe()(2, 1), chain(2)).ranks:
    ...     print(*actions)
    0F0 0SEND_F0>1 0RECV_B0<1 0B0
    1RECV_F0<0 1F0 1B0 1SEND_B0>0
    """
    if schedule.communicates:
        return schedule
    place = {
        unit: (rank, position)
        for rank, actions in enumerate(schedule.ranks)
        for position, action in enumerate(actions)
        if (unit := unit_of(action)) is not None
    }
    sends = _sends(schedule, readers(edges), place)
    receives = _receives(schedule, sends, place)
    ranks = []
    for rank, actions in enumerate(schedule.ranks):
        row: list[Action] = []
        for position, action in enumerate(actions):
            row += receives.get((rank, position), ())
            row.append(action)
            row += (_send(message) for message, _ in sends.get((rank, position), ()))
        ranks.append(tuple(row))
    return replace(schedule, ranks=tuple(ranks))


def arrivals(schedule: Schedule, rank: int) -> dict[Action, tuple[Action, ...]]:
    """For every receive of a rank, the sends of the rank that have surely arrived when it is over,
    and were not sure to have
    before: those which the other end had received when it sent. What they sent need not be kept any
        longer.

    >>> from funcpipe._src.schedule.actions import chain
    >>> from funcpipe._src.schedule.library import one_f_one_b
    >>> table = insert_communication(one_f_one_b()(2, 3), chain(2))
    >>> for receive, sends in arrivals(table, 0).items():
    ...     print(receive, *sends)
    0RECV_B0<1 0SEND_F0>1
    0RECV_B1<1 0SEND_F1>1
    0RECV_B2<1 0SEND_F2>1
    """
    got: dict[int, list[Message]] = defaultdict(list)  # by the other end, in its order
    known: dict[Message, int] = {}  # for what it sent here, how many of those it had
    for other, row in enumerate(schedule.ranks):
        for action in row:
            if action.peer is not None and schedule.placement[action.peer] == rank != other:
                if action.kind.startswith("RECV"):
                    got[other].append(message_of(action))
                else:
                    known[message_of(action)] = len(got[other])
    out: dict[Action, tuple[Action, ...]] = {}
    told: dict[int, int] = defaultdict(int)
    for action in schedule.ranks[rank]:
        if action.kind.startswith("RECV"):
            message = message_of(action)
            other = schedule.placement[message.unit[1]]
            out[action] = tuple(map(_send, got[other][told[other] : known[message]]))
            told[other] = max(told[other], known[message])
    return out


# Where an action stands: (rank, position in the rank's list).
_Place = tuple[int, int]
# By the place of what makes it: a message, and the place of what reads it first on the rank where
# it goes.
_Sends = dict[_Place, list[tuple[Message, _Place]]]


def _sends(
    schedule: Schedule,
    read_by: dict[tuple[str, int], list[tuple[str, int]]],
    place: dict[Unit, _Place],
) -> _Sends:
    sends: _Sends = {}
    for rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            unit = unit_of(action)
            if unit is None:
                continue
            first: dict[int, tuple[int, int]] = {}  # rank -> (position, stage) of its first reader
            for kind, stage in read_by.get(unit[:2], ()):
                if (found := place.get((kind, stage, unit[2]))) and found[0] != rank:
                    target, at = found
                    first[target] = min(first.get(target, (at, stage)), (at, stage))
            if first:
                sends[rank, position] = [
                    (Message(unit, stage), (target, at))
                    for target, (at, stage) in sorted(first.items())
                ]
    return sends


def _receives(
    schedule: Schedule, sends: _Sends, place: dict[Unit, _Place]
) -> dict[_Place, list[Action]]:
    channels: dict[Channel, list[tuple[Message, int]]] = defaultdict(list)
    for _, messages in sorted(sends.items()):
        for message, (_, at) in messages:
            channels[channel_of(message, schedule.placement)].append((message, at))
    receives: dict[_Place, list[Action]] = defaultdict(list)
    for channel, queue in sorted(channels.items()):
        # A message is received when it, or any message behind it on its channel, is first read.
        at, posts = len(schedule.ranks[channel.target]), []
        for message, needed in reversed(queue):
            at = min(at, needed)
            posts.append((at, _receive(message)))
        for at, action in reversed(posts):
            receives[channel.target, at].append(action)
    return receives


def _send(message: Message) -> Action:
    (kind, stage, microbatch), target = message
    return Action(f"SEND_{kind}", stage, microbatch, peer=target)


def _receive(message: Message) -> Action:
    (kind, stage, microbatch), target = message
    return Action(f"RECV_{kind}", target, microbatch, peer=stage)
