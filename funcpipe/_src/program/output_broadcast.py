"""Output broadcast: sends the loss, its weight and aux values from the pipeline rank that computes
them to all others.

The messages are sent soon after the last summand. A rank receives them where a message that it
receives anyway tells that they have been sent, or else at the end of its program. So no rank waits
for another to end: one that is done goes on to its optimizer and to the next step while others
still work on this one. Where steps follow one another, the idle time at the end of one and at the
beginning of the next is then filled, unless all ranks idle there (`Timeline.period`).

Their actions, ``SEND_H`` and ``RECV_H``, stand in programs alone: no schedule has them.

In: a schedule, and which stage makes which output. Out: instructions, and where among the actions
of a rank they stand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from funcpipe._src.graph.ids import ValueId
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program.instructions import RECV, SEND, Instruction
from funcpipe._src.schedule.actions import COMPUTE, Action, Schedule
from funcpipe._src.schedule.communication import message_of
from funcpipe._src.schedule.simulate_transfers import simulate_transfers


class Output(NamedTuple):
    """The stage that makes an output, and its shape and dtype."""

    stage: int
    value: Value


Outputs = Mapping[ValueId, Output]


def broadcasts(
    schedule: Schedule,
    pipeline_rank: int,
    outputs: Outputs,
) -> dict[int, list[Instruction]]:
    """The instructions of a rank that bring every output to every rank, by the number of the action
    before which they stand.

    Args:
        schedule: with its sends and receives.
        pipeline_rank: the rank.
        outputs: sums, and rows of every microbatch; in the same order on all ranks.
    """
    made_by: dict[int, dict[ValueId, Output]] = defaultdict(dict)
    for value, output in outputs.items():
        made_by[schedule.placement[output.stage]][value] = output
    found: dict[int, list[Instruction]] = defaultdict(list)
    for maker, own in sorted(made_by.items()):
        sent_at = _ready(schedule.ranks[maker], {output.stage for output in own.values()})
        if maker != pipeline_rank:
            received_at = _told(schedule, maker, sent_at)[pipeline_rank]
            found[received_at].append(_message(RECV, schedule, pipeline_rank, maker, own))
            continue
        for other in range(len(schedule.ranks)):
            if other != maker:
                found[sent_at].append(_message(SEND, schedule, maker, other, own))
    return found


def _message(
    op: str,
    schedule: Schedule,
    here: int,
    peer: int,
    outputs: Outputs,
) -> Instruction:
    stage, peer_stage = schedule.placement.index(here), schedule.placement.index(peer)
    names = tuple(outputs)
    return Instruction(
        op,
        Action(f"{op.upper()}_H", stage, 0, peer=peer_stage),
        reads=names if op == SEND else (),
        writes=names if op == RECV else (),
        values=tuple(output.value for output in outputs.values()),
        peer=peer,
    )


def _ready(actions: Sequence[Action], stages: Set[int]) -> int:
    """Behind the action that follows the last forward of these stages: F and B of the last segment
    stay back to back, and may be one unit."""
    forwards = (
        number
        for number, action in enumerate(actions)
        if action.kind == "F" and action.stage in stages
    )
    for number in range(max(forwards) + 1, len(actions)):
        if actions[number].kind in COMPUTE:
            return number + 1
        if actions[number].kind.startswith("RECV"):
            return number
    return len(actions)


def _told(
    schedule: Schedule,
    maker: int,
    sent_at: int,
) -> list[int]:
    """For every rank the number of actions after which it knows that ``maker`` has come to its
    action ``sent_at``."""
    found = [len(actions) for actions in schedule.ranks]
    knows = [False] * len(found)
    carries = {}
    for rank, number in simulate_transfers(schedule).order:
        action = schedule.ranks[rank][number]
        if rank == maker:
            knows[rank] = number >= sent_at
        if action.kind.startswith("SEND"):
            carries[message_of(action)] = knows[rank]
        elif action.kind.startswith("RECV") and carries[message_of(action)] and not knows[rank]:
            knows[rank] = True
            found[rank] = number + 1
    return found
