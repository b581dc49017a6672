"""Simulation of a table with transfers: an order in which it can run, or where it stands still.

In: a schedule with its transfers.
Out: a ``Simulation``. Time is linear in the number of actions.

Channels block their receiver: a send never waits; messages on a channel stay in order; a receive
blocks its rank until a message is there, and the first one must be the one that it asks for. So how
far each rank gets does not depend on which rank runs first, and one simulation decides it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from functools import lru_cache

from funcpipe._src.schedule.actions import Cell, Schedule
from funcpipe._src.schedule.communication import Channel, Message, channel_of, message_of


@dataclass(frozen=True)
class Simulation:
    """How far a table gets.

    Args:
        order: the cells of the actions that ran, in an order in which they can run.
        stopped_at: for every rank the position of the receive at which it waits, or the number of
            its actions if it ended.
    """

    order: tuple[Cell, ...]
    stopped_at: tuple[int, ...]

    def ended(self, schedule: Schedule) -> bool:
        """Whether every rank of the schedule ran all its actions."""
        return self.stopped_at == tuple(map(len, schedule.ranks))


@lru_cache(maxsize=8)  # the checker, the timeline and every rank's program ask for the same one
def simulate_transfers(schedule: Schedule) -> Simulation:
    """Run the transfers of a table, every rank as far as it gets.

    >>> from funcpipe._src.schedule.tables import from_table
    >>> simulate_transfers(from_table([["0F0", "0SEND_F0>1"], ["1RECV_F0<0", "1F0"]])(2, 1))
    Simulation(order=((0, 0), (0, 1), (1, 0), (1, 1)), stopped_at=(2, 2))
    """
    ranks = schedule.ranks
    positions = [0] * len(ranks)
    order: list[Cell] = []
    channels: dict[Channel, deque[Message]] = defaultdict(deque)
    todo = deque(range(len(ranks)))
    while todo:
        rank = todo.popleft()
        actions = ranks[rank]
        while positions[rank] < len(actions):
            action = actions[positions[rank]]
            if action.peer is not None:
                message = message_of(action)
                channel = channel_of(message, schedule.placement)
                queue = channels[channel]
                if action.kind.startswith("SEND"):
                    queue.append(message)
                    todo.append(channel.target)
                elif queue and queue[0] == message:
                    queue.popleft()
                else:
                    break
            order.append((rank, positions[rank]))
            positions[rank] += 1
    return Simulation(tuple(order), tuple(positions))
