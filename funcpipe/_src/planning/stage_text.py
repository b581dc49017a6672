"""Stage text: one line for every stage of a lowered step.

In: `Lowered`. Out: lines; without seconds, they are the same in every process and run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.planning.placement import StatePlacement

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import Lowered, PlannedCall


Row = tuple[str, object, str]  # the stage, its record, one line


def stage_lines(lowered: Lowered, seconds: bool = True) -> list[str]:
    """One line per stage: its name, what it made, counts and bytes, and how long it took.

    Args:
        seconds: whether to say how long stages took. A stage that runs once per call or per
            microbatch is timed as a whole, in the lines of the first call.
    """
    out = []
    timed = dict(lowered.seconds) if seconds else {}
    for stage, record, text in _rows(lowered):
        took = f"  {timed.pop(stage):.3f} s" if stage in timed else ""
        out.append(f"{stage:<9} {type(record).__name__:<15} {text}{took}")
    return out


def _rows(lowered: Lowered) -> Iterator[Row]:
    resolved, analysis = lowered.resolved, lowered.analysis
    yield "resolve", resolved, _first_line(resolved)
    yield "analyse", analysis, _first_line(analysis)
    for number, call in enumerate(lowered.calls):
        yield from _of_call(number, call)
    placement = lowered.placement
    yield "place", placement, placement_line(placement)


def _of_call(number: int, call: PlannedCall) -> Iterator[Row]:
    programs = call.programs
    instructions, slots = 0, 0
    for program in programs:
        instructions += len(program.instructions)
        slots = max(slots, program.slots)
    variants = {id(variant) for variant in call.variants.values()}
    yield "split", call.split, f"value_and_grad {number}: {call.split.counts}"
    yield "prove", call.proof, f"{_first_line(call.proof)}; sets of local shapes: {len(variants)}"
    yield "trace", call.joint, _first_line(call.joint)
    yield "check", call.checked, str(call.checked)
    yield "partition", call.units, units_line(call.units)
    yield "schedule", call.schedule, _first_line(call.schedule)
    text = f"programs: {len(programs)}, instructions: {instructions}, slots: at most {slots}"
    yield "lower", programs[0], text


def _first_line(record: object) -> str:
    return str(record).splitlines()[0]


def units_line(units: Units) -> str:
    """Counts and bytes of units."""
    every = units.units.values()
    codes = {unit.code.key for unit in every}
    saved = 0
    for segment in units.saved:
        saved += segment.outcome.nbytes
    return (
        f"segments: {units.segments}, units: {len(units.units)}, distinct: {len(codes)}, "
        f"saved for the backward half: {bytes_text(saved)} a microbatch"
    )


def placement_line(placement: StatePlacement) -> str:
    """How many leaves lie where."""
    held = map(sum, placement.present)
    leaves = ", ".join(map(str, held))
    sharded = 0
    for layout in placement.layouts:
        sharded += bool(layout.axes)
    return f"leaves of the state, by pipeline rank: {leaves}; sharded params: {sharded}"
