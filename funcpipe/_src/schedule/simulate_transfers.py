"""One walk over a table with transfers: an order in which it can run, or where it stands still.

The rule is that of blocking channels: a send never blocks; messages on a channel stay in order; a
receive blocks its rank until the message at the head of its channel is there, and that must be the
one it asks for. Under this rule how far every rank gets does not depend on which rank runs first,
so that one walk decides it. Time is linear in the actions.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache

from funcpipe._src.schedule.actions import Schedule
from funcpipe._src.schedule.communication import Channel, Message, channel_of, message_of


@dataclass(frozen=True)
class Walk:
    """How far a table gets.

    Args:
        order: (rank, position) of every action that ran, in an order in which they can run.
        stands: for every rank the position of the receive it waits at, or the length of its list if
            it ended.
    """

    order: tuple[tuple[int, int], ...]
    stands: tuple[int, ...]


@lru_cache(maxsize=8)  # the checker, the timeline and every place's program ask for the same one
def walk(schedule: Schedule) -> Walk:
    """Run the transfers of a table, every rank as far as it gets.

    >>> from funcpipe._src.schedule.tables import from_table
    >>> walk(from_table([["0F0", "0SEND_F0>1"], ["1RECV_F0<0", "1F0"]])(2, 1))
    Walk(order=((0, 0), (0, 1), (1, 0), (1, 1)), stands=(2, 2))
    """
    ranks = schedule.ranks
    stands = [0] * len(ranks)
    order: list[tuple[int, int]] = []
    channels: dict[Channel, deque[Message]] = defaultdict(deque)
    todo = deque(range(len(ranks)))
    while todo:
        rank = todo.popleft()
        actions = ranks[rank]
        while stands[rank] < len(actions):
            action = actions[stands[rank]]
            if action.peer is not None:
                message = message_of(action)
                channel = channel_of(message, schedule.placement)
                if action.kind.startswith("SEND"):
                    channels[channel].append(message)
                    todo.append(channel.target)
                elif channels[channel] and channels[channel][0] == message:
                    channels[channel].popleft()
                else:
                    break
            order.append((rank, stands[rank]))
            stands[rank] += 1
    return Walk(tuple(order), tuple(stands))
