"""Command line: what a schedule looks like, and how all of them compare.

In: a schedule's name and sizes. Out: tables in the terminal, and a picture where one is asked for.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from funcpipe._src.schedule import (
    Report,
    Schedule,
    ScheduleFn,
    Timeline,
    check,
    one_f_one_b,
    timeline,
    to_csv,
    unit_costs,
)
from funcpipe._src.schedule.catalogue import NAMES, by_name, training
from funcpipe._src.viz import svg as picture
from funcpipe.errors import FuncpipeError

_EXAMPLES = """examples:
  python -m funcpipe schedule zb_v --pipe 8 --microbatches 32
  python -m funcpipe schedule interleaved_1f1b --v 4 --pipe 8 --microbatches 32 --save out.svg
  python -m funcpipe compare --pipe 8 --microbatches 32
  python -m funcpipe compare --pipe 4 --microbatches 16 --costs 1 1.2 0.9 --transfer 0.1

schedules: """ + ", ".join(NAMES)

_STYLES = {
    "F": "bold white on blue",
    "B": "bold white on red",
    "I": "black on yellow",
    "W": "black on green",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        options.run(options, console)
    except FuncpipeError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m funcpipe",
        description="Look at pipeline schedules.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="{schedule,compare}")
    one = commands.add_parser(
        "schedule", help="draw one schedule", epilog=_EXAMPLES, formatter_class=raw
    )
    one.add_argument("name", help="such as zb_v; the names are listed below")
    one.add_argument("--v", type=int, help="stages a rank, for schedules that take a number")
    one.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="draw it, as .svg, .html, .json (Perfetto), or .csv",
    )
    one.set_defaults(run=_schedule)
    many = commands.add_parser(
        "compare", help="all schedules side by side", epilog=_EXAMPLES, formatter_class=raw
    )
    many.add_argument(
        "--v", type=int, nargs="+", default=[2, 4], help="stages a rank to try (2 and 4)"
    )
    many.set_defaults(run=_compare)
    for command in (one, many):
        command.add_argument(
            "--pipe", type=int, required=True, metavar="P", help="ranks on the pipe axis"
        )
        command.add_argument(
            "--microbatches", type=int, required=True, metavar="M", help="microbatches a step"
        )
        command.add_argument(
            "--costs",
            type=float,
            nargs=3,
            default=[1.0, 1.0, 1.0],
            metavar=("F", "I", "W"),
            help="time of a rank's whole forward, input gradient and weight gradient of a "
            "microbatch (1 1 1)",
        )
        command.add_argument(
            "--transfer", type=float, default=0.0, metavar="T", help="time of a message (0)"
        )
    return parser


def _lay_out(
    schedule_fn: ScheduleFn, options: argparse.Namespace
) -> tuple[Schedule, Report, Timeline]:
    schedule = schedule_fn(options.pipe, options.microbatches)
    report = check(schedule)
    share = options.pipe / schedule.stages  # costs are given for a rank; a stage is a part of it
    costs = unit_costs(*(cost * share for cost in options.costs))
    return schedule, report, timeline(schedule, costs, options.transfer)


def _schedule(options: argparse.Namespace, console: Console) -> None:
    schedule, report, line = _lay_out(by_name(options.name, options.v), options)
    console.print(_rows(line, console.width), no_wrap=True, crop=True, highlight=False)
    table = Table(
        title=f"{schedule.name}: {options.pipe} ranks, {options.microbatches} microbatches"
    )
    for name in ("rank", "stages", "busy", "most live (stage, microbatch)", "most waiting for W"):
        table.add_column(name, justify="right")
    for rank in range(options.pipe):
        stages = [stage for stage, holder in enumerate(schedule.placement) if holder == rank]
        busy = line.busy[rank] / line.makespan if line.makespan else 0.0
        live, waiting = report.peak_live[rank], report.peak_waiting[rank]
        names = ", ".join(map(str, stages))
        table.add_row(str(rank), names, f"{busy:.1%}", str(live), str(waiting))
    console.print(table)
    steady = f", {line.period:g} in steady state" if line.period < line.makespan else ""
    console.print(
        f"step {line.makespan:g}{steady}, bubble {line.bubble:.1%}, memory "
        f"{_memory(schedule, report):.2f} of 1F1B's, {report.messages} messages"
    )
    if options.save:
        if options.save.suffix == ".csv":
            to_csv(schedule, options.save)
        else:
            picture.save(line, options.save)
        console.print(f"saved {options.save}", highlight=False)


def _rows(line: Timeline, width: int) -> Text:
    text = Text(picture.timeline_text(line, max(width - 1, 20)))
    for found in re.finditer(r"[FBIW]\d*-*", text.plain):
        text.stylize(_STYLES[found[0][0]], *found.span())
    return text


def _compare(options: argparse.Namespace, console: Console) -> None:
    title = f"{options.pipe} ranks, {options.microbatches} microbatches, F I W = {_costs(options)}"
    table = Table(title=title, pad_edge=False)
    table.add_column("schedule", no_wrap=True)
    for name in ("stages a rank", "step", "steady state", "bubble", "memory", "messages"):
        table.add_column(name, justify="right")
    for schedule_fn in training(tuple(options.v)):
        schedule, report, line = _lay_out(schedule_fn, options)
        times = f"{line.makespan:.4g}", f"{line.period:.4g}", f"{line.bubble:.1%}"
        numbers = (*times, f"{_memory(schedule, report):.2f}")
        table.add_row(
            schedule.name, str(schedule.stages // options.pipe), *numbers, str(report.messages)
        )
    console.print(table)
    console.print(
        "steady state: time of a step where ranks go from one step to the next without waiting"
    )
    console.print(
        "memory: what the fullest rank holds between forward and backward, relative to 1F1B"
    )


def _memory(schedule: Schedule, report: Report) -> float:
    """What the fullest rank holds, relative to the first rank of 1F1B."""
    ranks, microbatches = len(schedule.ranks), schedule.microbatches
    most = max(check(one_f_one_b()(ranks, microbatches)).peak_live)
    return max(report.peak_live) * ranks / schedule.stages / most


def _costs(options: argparse.Namespace) -> str:
    transfer = f", transfer {options.transfer:g}" if options.transfer else ""
    return " ".join(f"{cost:g}" for cost in options.costs) + transfer


if __name__ == "__main__":
    sys.exit(main())
