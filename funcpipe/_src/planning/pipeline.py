"""The compiler as a row of stages: from a step and a batch to the program of every rank.

    resolve > analyse > split > prove > trace > check > partition > schedule > lower > place

Each stage is a function in a module of its own, and hands a frozen record to the next. `resolve`
(`spec/resolve.py`) runs once for a step, `analyse_step` for every batch shape; `compile_step` is
the rest. Every rank makes the same records.

In: compile inputs, the analysis of a step. Out: `Lowered`, or any error of ``funcpipe.errors`` that
can be known before a step runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from funcpipe._src.analysis.rehearsal import Rehearsal
from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis
from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.remat import check_used
from funcpipe._src.planning.batch_proof import prove_batch, split_proof
from funcpipe._src.planning.batch_split import BatchSplit, split_batch
from funcpipe._src.planning.compile_inputs import CompileInputs, CompileMemory, StageClock
from funcpipe._src.planning.local_batch import local_batch
from funcpipe._src.planning.loss_outputs import summed_outputs
from funcpipe._src.planning.loss_variant import LossVariant, compile_loss
from funcpipe._src.planning.lowered import Lowered, PlannedCall
from funcpipe._src.planning.placement import Placement, place
from funcpipe._src.planning.predict import as_costs, load_of
from funcpipe._src.planning.scheduling import (
    ChosenSchedule,
    LossCosts,
    check_schedule,
    choose_schedule,
    lay_out_schedule,
    separates_w,
)
from funcpipe._src.planning.step_analysis import with_own_fakes, with_traced_loss
from funcpipe._src.planning.weight_layout import WeightLayout, lay_out_weights
from funcpipe._src.program import (
    check_alike,
    check_same_order,
    lower,
    owners,
    partial_segments,
    stage_edges,
)

Losses = Mapping[int, tuple[LossVariant, ...]]  # by split rank, for every ready microbatch


def compile_step(
    inputs: CompileInputs,
    analysis: StepAnalysis,
    rehearsal: Rehearsal,
    placement: Placement | None,
    memory: CompileMemory,
) -> Lowered:
    """Compile every ``value_and_grad`` of a step and place its state.

    Args:
        placement: of earlier plans, if there are any.
        memory: what earlier plans left, to which this one adds.
    """
    resolved = inputs.resolved
    analysis = with_own_fakes(inputs, analysis)
    calls = tuple(
        compile_call(inputs, analysis, number, memory) for number in range(len(analysis.calls))
    )
    check_used(resolved.remats, [call.units.saved for call in calls])
    users = _users(analysis, calls)
    with memory.clock.time("place"):
        placement = place(resolved, analysis, rehearsal, users, placement)
    memory.placement = memory.placement or placement
    return Lowered(resolved, analysis, placement, calls, memory.clock.seconds)


def compile_call(
    inputs: CompileInputs, analysis: StepAnalysis, number: int, memory: CompileMemory
) -> PlannedCall:
    """Compile a ``value_and_grad`` while its loss reads from Python what it read at the call."""
    reading = analysis.calls[number].reading
    assert reading is not None
    with reading.restored(), reading.running():
        return _compile_call(inputs, analysis, number, memory)


def _compile_call(
    inputs: CompileInputs, analysis: StepAnalysis, number: int, memory: CompileMemory
) -> PlannedCall:
    resolved = inputs.resolved
    call = with_traced_loss(resolved, analysis.calls[number])
    with memory.clock.time("split"):
        split = split_batch(resolved, call.batch, call.origins)
    table = lay_out_schedule(resolved, split.count)
    losses = _compile_losses(inputs, analysis, number, call, split, separates_w(table), memory)
    first_alike = split.variants()
    computes_weight = {rank: losses[first][0].checked.weight for rank, first in first_alike.items()}
    with memory.clock.time("prove"):
        exact = prove_batch(inputs, analysis, number, call, split, computes_weight, memory)
    with memory.clock.time("schedule"):
        costs = _costs(analysis, losses[0][0].units)
        earlier = memory.schedules.get(number)
        chosen = choose_schedule(resolved, table, costs, split.count, earlier)
        memory.schedules[number] = chosen
    weights = lay_out_weights(resolved, analysis, call)
    with memory.clock.time("lower"):
        planned = {
            rank: _lower_variant(resolved.ranks, call, split, losses, rank, exact, chosen, weights)
            for rank in losses
        }
        check_same_order([variant.programs for variant in planned.values()])
    variants = {rank: planned[first] for rank, first in first_alike.items()}
    return replace(planned[0], variants=variants)


def _compile_losses(
    inputs: CompileInputs,
    analysis: StepAnalysis,
    number: int,
    call: PrimitiveCall,
    split: BatchSplit,
    separate_w: bool,
    memory: CompileMemory,
) -> Losses:
    """The loss function for every set of local shapes; what memory has is not made again."""
    values = None if call.reading is None else call.reading.values

    def compiled(ready: int, split_rank: int) -> LossVariant:
        sequence_rank = split.slice_of(split_rank)
        local = local_batch(inputs, split, call.batch, ready, sequence_rank)
        key = (number, separate_w, local.key, values)
        if key not in memory.losses:
            memory.losses[key] = compile_loss(
                inputs, analysis, call, local, separate_w, memory.clock
            )
        return memory.losses[key]

    found = {}
    for split_rank in sorted(set(split.variants().values())):
        numbers = split.ready_of(split_rank)
        found[split_rank] = tuple(compiled(ready, split_rank) for ready in numbers)
    return found


def _users(analysis: StepAnalysis, calls: Sequence[PlannedCall]) -> list[set[int]]:
    """For every param the pipeline ranks whose units read it or make gradients of it."""
    users: list[set[int]] = [set() for _ in analysis.paths]
    for planned in calls:
        schedule = planned.schedule
        for units in set(planned.microbatch_units):
            ranks_of_args = owners(units, schedule.stages, schedule.table.placement)
            for param, ranks in zip(planned.call.params, ranks_of_args, strict=True):
                users[param] |= ranks
    return users


def _costs(analysis: StepAnalysis, units: Units) -> LossCosts:
    """What scheduling may know of a loss. Ranks wait for each other behind the last backward where
    the step takes a global sum, as clipping does, or a leaf's gradient comes from several
    segments."""
    segments = range(units.segments)
    flops = [units.units["F", s].code.flops + units.units["B", s].code.flops for s in segments]
    shared = any(len(set(found)) > 1 for found in partial_segments(units))
    return LossCosts(
        flops=flops,
        load=lambda costs: load_of(units, as_costs(costs, units)),
        waits=bool(analysis.sums) or shared,
    )


def _lower_variant(
    pipeline_ranks: int,
    call: PrimitiveCall,
    split: BatchSplit,
    losses: Losses,
    split_rank: int,
    exact: bool,
    chosen: ChosenSchedule,
    weights: WeightLayout,
) -> PlannedCall:
    """A call for the ranks of one set of local shapes. Where microbatches are dealt, messages are
    the same on all ranks, so that edges are those of all variants."""
    own = losses[split_rank]
    if len(own) == 1:
        own *= split.count
    units = tuple(loss.units for loss in own)
    everyone = units
    if split.dealt:
        everyone = tuple(loss.units for some in losses.values() for loss in some)
    check_alike(everyone)
    schedule = check_schedule(chosen, stage_edges(everyone, chosen.stages))
    summed = summed_outputs(own[0].joint)
    programs = tuple(
        lower(
            units,
            schedule.stages,
            schedule.table,
            pipeline_rank,
            summed,
            weights.sharded,
            weights.grad_dtypes,
        )
        for pipeline_rank in range(pipeline_ranks)
    )
    ready = tuple(split.ready_of(split_rank))
    proof = split_proof(split, own[0].proof, exact)
    return PlannedCall(call, split, ready, proof, own, weights, schedule, programs)


def separate_units(
    inputs: CompileInputs, lowered: Lowered, number: int, memory: CompileMemory
) -> Units:
    """The units of a call's first microbatch with I and W beside B, whatever its schedule runs."""
    call = lowered.calls[number]
    local = local_batch(inputs, call.split, call.call.batch, 0, 0)
    values = None if call.call.reading is None else call.call.reading.values
    key = (number, True, local.key, values)
    if key not in memory.losses:
        analysis, clock = lowered.analysis, StageClock()
        memory.losses[key] = compile_loss(inputs, analysis, call.call, local, True, clock)
    return memory.losses[key].units
