"""Dependencies: what stages and params of a loss need of one another, read off its units.

In: units, the segments of every stage. Out: edges between stages, the pipeline ranks that need a
param, and errors where microbatches or ranks would not fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from funcpipe._src.collectives import collectives_of
from funcpipe._src.graph.partition import Unit, Units
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program.instructions import GATHER, REDUCE, RUN, Program
from funcpipe._src.schedule.actions import Edge
from funcpipe.errors import CutError

Stages = Sequence[Sequence[int]]  # for every stage its segments


def stage_of_segments(stages: Stages) -> dict[int, int]:
    """The stage of every segment."""
    found = {}
    for stage, segments in enumerate(stages):
        found.update(dict.fromkeys(segments, stage))
    return found


def makers_of(units: Units) -> dict[Value, Unit]:
    """The unit that makes a value."""
    found: dict[Value, Unit] = {}
    for unit in units.units.values():
        found.update(dict.fromkeys(unit.outputs, unit))
    return found


def half_of(unit: Unit) -> str:
    """F for the forward pass, B for the backward pass."""
    return "F" if unit.kind == "F" else "B"


def stage_edges(cuts: Sequence[Units], stages: Stages) -> frozenset[Edge]:
    """What depends on what between stages, read off the values that units exchange."""
    stage_of = stage_of_segments(stages)
    edges: set[Edge] = set()
    for units in set(cuts):
        makers = makers_of(units)
        for reader in units.units.values():
            here = (half_of(reader), stage_of[reader.segment])
            for value in reader.inputs:
                maker = makers.get(value)
                if maker is not None and stage_of[maker.segment] != here[1]:
                    edges.add(((half_of(maker), stage_of[maker.segment]), here))
    return frozenset(edges)


def owners(
    units: Units,
    stages: Stages,
    placement: Sequence[int],
) -> list[set[int]]:
    """For every arg the pipeline ranks whose units read it or make a partial gradient of it."""
    stage_of = stage_of_segments(stages)
    found: list[set[int]] = [set() for _ in units.grads]
    last_arg: dict[Value, int] = {}  # one value may be the gradient of several args
    for arg, partials in enumerate(units.grads):
        last_arg.update(dict.fromkeys(partials, arg))
    for unit in units.units.values():
        rank = placement[stage_of[unit.segment]]
        for value in unit.inputs:
            if value.kind == "param":
                found[value.index].add(rank)
        for value in unit.outputs:
            if value in last_arg:
                found[last_arg[value]].add(rank)
    for arg, partials in enumerate(units.grads):
        for value in partials:
            found[arg] |= found[last_arg[value]]
    return found


def partial_segments(units: Units) -> tuple[tuple[int, ...], ...]:
    """For every arg the segments that make its partial gradients."""
    makers = makers_of(units)
    found = []
    for partials in units.grads:
        found.append(tuple(makers[value].segment for value in partials))
    return tuple(found)


def check_alike(cuts: Sequence[Units]) -> None:
    """Microbatches of different shapes must have the same segments, partial gradients and aux.

    Raises:
        CutError: they do not.
    """
    first = cuts[0]
    for microbatch, units in enumerate(cuts):
        same = units.segments == first.segments and len(units.heads) == len(first.heads)
        if not same or partial_segments(units) != partial_segments(first):
            raise CutError(
                f"microbatch {microbatch} takes another way through the loss function than "
                f"microbatch 0: it has {units.segments} segments instead of {first.segments}, or "
                "its segments use other params. Shapes may differ between microbatches, the path "
                "may not"
            )


def check_same_order(programs: Sequence[Sequence[Program]]) -> None:
    """Ranks whose local sequences differ in length communicate in the same order, so that none
    waits for another.

    Args:
        programs: for every such length, for every pipeline rank.

    Raises:
        CutError: they do not.
    """
    first, *others = programs
    for other in others:
        for rank, both in enumerate(zip(first, other, strict=True)):
            steps = map(_communication, both)
            for here, there in zip_longest(*steps, fillvalue="nothing more"):
                if here != there:
                    raise CutError(
                        "ranks whose slices of the sequence differ in length take other ways "
                        f"through the loss function: on rank {rank} of the pipeline one does "
                        f"{here!r} where another does {there!r}. What the loss function does must "
                        "not depend on the number of positions"
                    )


def _communication(program: Program) -> list[str]:
    """What a program communicates, collectives of the loss included."""
    found = []
    for instruction in program.instructions:
        if instruction.op == RUN:
            assert instruction.unit is not None
            for collective in collectives_of(instruction.unit.code.module.graph):
                found.append(f"{instruction.action} {collective}")
        elif instruction.op in (GATHER, REDUCE):
            found.append(f"{instruction.action} {instruction.op} {instruction.bucket}")
    return found
