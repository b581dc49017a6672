"""Schedules as verified data: the library, the checker, the cost model. Public as
``funcpipe.schedules``."""

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
