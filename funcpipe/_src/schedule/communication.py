"""Communication: from a table of F, B, I and W to one that says who sends what to whom, and when.

In: a schedule without transfers, and the edges between its stages.
Out: the schedule with each ``SEND`` right after the action that makes the values, and each ``RECV``
right before the action that first reads them. A receive posted earlier would cost time on a GPU,
since the waiting kernel holds processors; it stands earlier only where the order of its channel
asks for it.

An action makes a *unit*, which other stages read. A *message* carries one unit to one other rank;
if several stages of that rank read it, there is one message for all. A *channel* is everything of
one kind that one rank sends another; messages on it arrive in the order in which they were sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from funcpipe._src.schedule.actions import Action, Cell, Edge, HalfStage, Schedule

# (kind, stage, microbatch): what an action computes for others. Kind "F" is made by F, kind "B" by
# B or I. A W makes nothing that another stage reads.
Unit = tuple[str, int, int]
_UNIT_KINDS = {"F": "F", "B": "B", "I": "B"}

# For the half of a stage that comes first: the halves of other stages that it reads, or that read
# it, sorted.
Links = dict[HalfStage, list[HalfStage]]


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
    """The unit that a compute action makes; None for a ``W`` and for transfers.

    >>> unit_of(Action("I", 2, 5)), unit_of(Action("W", 2, 5))
    (('B', 2, 5), None)
    """
    kind = _UNIT_KINDS.get(action.kind)
    if kind is None:
        return None
    return kind, action.stage, action.microbatch


def message_of(action: Action) -> Message:
    """The message of a transfer: the same one for its sending and its receiving end.

    >>> message_of(Action("SEND_F", 0, 3, peer=1)) == message_of(Action("RECV_F", 1, 3, peer=0))
    True
    """
    source, target = action.stage, action.peer
    assert target is not None  # the checker refuses a transfer without a peer before
    if action.kind.startswith("RECV"):
        source, target = target, source
    unit = (action.kind[-1], source, action.microbatch)
    return Message(unit, target)


def send_of(message: Message) -> Action:
    """The action that sends a message.

    >>> str(send_of(Message(("F", 0, 3), target=1)))
    '0SEND_F3>1'
    """
    kind, stage, microbatch = message.unit
    return Action(f"SEND_{kind}", stage, microbatch, peer=message.target)


def receive_of(message: Message) -> Action:
    """The action that receives a message.

    >>> str(receive_of(Message(("F", 0, 3), target=1)))
    '1RECV_F3<0'
    """
    kind, stage, microbatch = message.unit
    return Action(f"RECV_{kind}", message.target, microbatch, peer=stage)


def channel_of(message: Message, placement: Sequence[int]) -> Channel:
    """The channel that a message takes.

    >>> channel_of(Message(("B", 3, 0), 2), placement=(0, 1, 0, 1))
    Channel(source=1, target=0, kind='B')
    """
    kind, stage, _ = message.unit
    source = placement[stage]
    target = placement[message.target]
    return Channel(source, target, kind)


def readers(edges: Iterable[Edge]) -> Links:
    """For every (kind, stage) the (kind, stage) of other stages that read it, sorted.

    >>> readers({(("F", 0), ("F", 1)), (("F", 0), ("B", 2))})
    {('F', 0): [('B', 2), ('F', 1)]}
    """
    links = defaultdict(list)
    for maker, reader in sorted(edges):
        links[maker].append(reader)
    return dict(links)


def sources(edges: Iterable[Edge]) -> Links:
    """For every (kind, stage) the (kind, stage) of other stages that it reads, sorted.

    >>> sources({(("F", 0), ("B", 2)), (("F", 1), ("B", 2))})
    {('B', 2): [('F', 0), ('F', 1)]}
    """
    links = defaultdict(list)
    for maker, reader in sorted(edges):
        links[reader].append(maker)
    return dict(links)


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
    computed_at: dict[Unit, Cell] = {}
    for cell, action in schedule.cells():
        unit = unit_of(action)
        if unit is not None:
            computed_at[unit] = cell
    transfers = _transfers(schedule, readers(edges), computed_at)
    receives = _receives(schedule, transfers)
    ranks: list[list[Action]] = [[] for _ in schedule.ranks]
    for cell, action in schedule.cells():
        actions = ranks[cell[0]]
        actions += receives.get(cell, ())
        actions.append(action)
        for transfer in transfers.get(cell, ()):
            actions.append(send_of(transfer.message))
    return replace(schedule, ranks=tuple(map(tuple, ranks)))


def arrivals(schedule: Schedule, rank: int) -> dict[Action, tuple[Action, ...]]:
    """For every receive of a rank, the sends of that rank which the receive proves to have arrived.

    The other end had received them before it sent. What they sent need not be kept any longer. Each
    send is listed once, at the first receive that proves it.

    >>> from funcpipe._src.schedule.actions import chain
    >>> from funcpipe._src.schedule.library import one_f_one_b
    >>> table = insert_communication(one_f_one_b()(2, 3), chain(2))
    >>> for receive, sends in arrivals(table, 0).items():
    ...     print(receive, *sends)
    0RECV_B0<1 0SEND_F0>1
    0RECV_B1<1 0SEND_F1>1
    0RECV_B2<1 0SEND_F2>1
    """
    received: dict[int, list[Message]] = defaultdict(list)  # by another rank from this, in order
    count_at: dict[Message, int] = {}  # of those, how many it had when it sent a message here
    for (other, _), action in schedule.cells():
        if action.peer is None or other == rank:
            continue
        if schedule.placement[action.peer] != rank:
            continue
        message = message_of(action)
        received_so_far = received[other]
        if action.kind.startswith("RECV"):
            received_so_far.append(message)
        else:
            count_at[message] = len(received_so_far)
    arrived: dict[int, int] = defaultdict(int)  # how many a receive before has proven
    proven: dict[Action, tuple[Action, ...]] = {}
    for action in schedule.ranks[rank]:
        if not action.kind.startswith("RECV"):
            continue
        message = message_of(action)
        source_stage = message.unit[1]
        other = schedule.placement[source_stage]
        count = count_at[message]
        newly = received[other][arrived[other] : count]
        sends = map(send_of, newly)
        proven[action] = tuple(sends)
        arrived[other] = max(arrived[other], count)
    return proven


class _Transfer(NamedTuple):
    """A message, and the cell on its target rank that reads it first."""

    message: Message
    reader: Cell


def _transfers(
    schedule: Schedule,
    read_by: Links,
    computed_at: dict[Unit, Cell],
) -> dict[Cell, list[_Transfer]]:
    """The transfers, by the cell that makes their values."""
    transfers: dict[Cell, list[_Transfer]] = {}
    for cell, action in schedule.cells():
        unit = unit_of(action)
        if unit is None:
            continue
        kind, stage, microbatch = unit
        first: dict[int, tuple[Cell, int]] = {}  # rank -> its first reader's cell and stage
        for reader_kind, reader_stage in read_by.get((kind, stage), ()):
            reader = computed_at.get((reader_kind, reader_stage, microbatch))
            if reader is None or reader[0] == cell[0]:
                continue
            target = reader[0]
            candidate = (reader, reader_stage)
            first[target] = min(first.get(target, candidate), candidate)
        if first:
            transfers[cell] = [
                _Transfer(Message(unit, target_stage), reader)
                for _, (reader, target_stage) in sorted(first.items())
            ]
    return transfers


def _receives(
    schedule: Schedule,
    transfers: dict[Cell, list[_Transfer]],
) -> dict[Cell, list[Action]]:
    """The receives, by the cell that they stand right before."""
    channels: dict[Channel, list[_Transfer]] = defaultdict(list)
    for _, sent in sorted(transfers.items()):
        for transfer in sent:
            channel = channel_of(transfer.message, schedule.placement)
            channels[channel].append(transfer)
    receives: dict[Cell, list[Action]] = defaultdict(list)
    for channel, queue in sorted(channels.items()):
        # A message is received when it, or any message behind it on its channel, is first read.
        position = len(schedule.ranks[channel.target])
        posts = []
        for message, (_, needed) in reversed(queue):
            position = min(position, needed)
            posts.append((position, receive_of(message)))
        for position, action in reversed(posts):
            receives[channel.target, position].append(action)
    return receives
