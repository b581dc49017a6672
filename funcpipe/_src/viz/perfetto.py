"""Timelines as a Chrome trace, which https://ui.perfetto.dev opens.

In: a ``Timeline``, and memory curves if there are any.
Out: what ``json.dump`` takes: a process a rank, arrows for messages, memory counters. The format is
Google's "Trace Event Format" (2016).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from funcpipe._src.schedule.actions import COMPUTE
from funcpipe._src.schedule.communication import message_of
from funcpipe._src.schedule.timeline import Timeline

_COLOURS = {"F": "rail_response", "B": "rail_load", "I": "rail_animation", "W": "rail_idle"}


def trace(
    timeline: Timeline,
    memory: Sequence[Sequence[tuple[float, float]]] | None = None,
    microseconds: float = 1e6,
    label: str = "",
    first: int = 0,
) -> dict[str, Any]:
    """The trace of a timeline.

    Args:
        timeline: when every action runs.
        memory: for every rank (time, bytes held from then on).
        microseconds: in a unit of the timeline's time.
        label: put before the ranks' names.
        first: the number of the first process, so that several timelines go into one trace.

    >>> from funcpipe._src.schedule import gpipe, timeline, unit_costs
    >>> events = trace(timeline(gpipe()(2, 1), unit_costs()))["traceEvents"]
    >>> [event["name"] for event in events if event["ph"] == "X" and event["pid"] == 1]
    ['1RECV_F0<0', '1F0', '1B0']
    """
    events: list[dict[str, Any]] = []
    for rank in range(len(timeline.spans)):
        pid = first + rank
        events.append(
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{label}rank {rank}"}}
        )
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        )
        events += _spans(timeline, rank, pid, microseconds, first)
        for time, held in memory[rank] if memory else ():
            counter = {
                "ph": "C",
                "name": "memory",
                "pid": pid,
                "ts": time * microseconds,
                "args": {"bytes": held},
            }
            events.append(counter)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _spans(
    timeline: Timeline, rank: int, pid: int, scale: float, first: int
) -> Iterator[dict[str, Any]]:
    for action, start, end in timeline.spans[rank]:
        place = {"pid": pid, "ts": start * scale}
        args = {"stage": action.stage, "microbatch": action.microbatch}
        if action.kind in COMPUTE:
            box = {
                "ph": "X",
                "name": str(action),
                "cat": action.kind,
                "dur": (end - start) * scale,
                "tid": 0,
            }
            yield {**place, **box, "cname": _COLOURS[action.kind], "args": args}
            continue
        sends = action.kind.startswith("SEND")
        flow = {
            "cat": "message",
            "name": str(message_of(action)),
            "id": f"{first}:{message_of(action)}",
            "tid": 0,
        }
        if not sends and end > start:
            yield {
                **place,
                "ph": "X",
                "name": str(action),
                "cat": "wait",
                "dur": (end - start) * scale,
                "tid": 0,
                "args": args,
            }
        yield {
            "pid": pid,
            "ts": (start if sends else end) * scale,
            "ph": "s" if sends else "f",
            "bp": "e",
            **flow,
        }
