"""Schedules: who computes what in which order, as data that is checked before anything runs.

Public as ``funcpipe.schedules``. Read in this order:

1. `actions.py`: an action, a schedule. `tables.py`: schedules written by hand, or read from a file.
2. `library.py`: the known schedules, made of `building_blocks.py`; `controllable_memory.py`: V-Half
   and V-Min; `catalogue.py`: all of them by name.
3. `communication.py`: sends and receives are inserted.
4. `checker.py`: the proof, by `check_actions.py`, `check_order.py` and `check_deadlock.py`, which
   runs `simulate_transfers.py`; `rejection_text.py` explains what is refused.
5. `costs.py`, `timeline.py`: what units cost, and when every action starts and ends.
6. `stage_assignment.py`: which segments make up each stage. `search.py`: the fastest schedule, with
   the greedy tables of `greedy.py` and `search_drafts.py`.

A new schedule: a function ``(ranks, microbatches) -> Schedule`` that a function in `library.py`
returns, with the formulas of its bubble and memory in the docstring; a line in `catalogue.py`; then
``pytest tests/schedule``, which checks it for many sizes.
"""

from funcpipe._src.schedule.actions import Action, Edge, Schedule, ScheduleFn, chain
from funcpipe._src.schedule.checker import Report, check
from funcpipe._src.schedule.communication import insert_communication
from funcpipe._src.schedule.controllable_memory import v_half, v_min
from funcpipe._src.schedule.costs import Costs, Load
from funcpipe._src.schedule.library import (
    dual_pipe_v,
    forward_only,
    gpipe,
    interleaved_1f1b,
    interleaved_zb,
    looped_bfs,
    one_f_one_b,
    zb_h1,
    zb_v,
)
from funcpipe._src.schedule.search import Auto, Fitted, auto
from funcpipe._src.schedule.tables import from_csv, from_table, to_csv
from funcpipe._src.schedule.timeline import Span, Timeline, timeline, unit_costs

__all__ = [
    "Action",
    "Auto",
    "Costs",
    "Edge",
    "Fitted",
    "Load",
    "Report",
    "Schedule",
    "ScheduleFn",
    "Span",
    "Timeline",
    "auto",
    "chain",
    "check",
    "dual_pipe_v",
    "forward_only",
    "from_csv",
    "from_table",
    "gpipe",
    "insert_communication",
    "interleaved_1f1b",
    "interleaved_zb",
    "looped_bfs",
    "one_f_one_b",
    "timeline",
    "to_csv",
    "unit_costs",
    "v_half",
    "v_min",
    "zb_h1",
    "zb_v",
]
