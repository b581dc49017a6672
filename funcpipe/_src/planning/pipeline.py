"""The compiler as a row of stages: from a step and a batch to the program of every rank.

    resolve > analyse > split > prove > trace > check > partition > schedule > lower > place

Each stage is a function in a module of its own, and hands a frozen record to the next. `resolve`
(`spec/resolve.py`) runs once for a step, `analyse_step` for every batch shape; `compile_step` is
the rest. Every rank makes the same records.

In: compile inputs, the analysis of a step. Out: `Lowered`, or any error of ``funcpipe.errors`` that
can be known before a step runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.fx import GraphModule

from funcpipe._src.analysis.rehearsal import Rehearsal
from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.remat import check_used
from funcpipe._src.planning.batch_proof import prove_batch, split_proof
from funcpipe._src.planning.batch_split import BatchSplit, split_batch
from funcpipe._src.planning.compile_inputs import CallInputs, CompileInputs, CompileMemory
from funcpipe._src.planning.local_batch import local_batch
from funcpipe._src.planning.loss_outputs import summed_outputs
from funcpipe._src.planning.loss_variant import LossVariant, compile_loss
from funcpipe._src.planning.lowered import Lowered, PlannedCall
from funcpipe._src.planning.place_state import place
from funcpipe._src.planning.placement import StatePlacement
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
from funcpipe._src.planning.weight_layout import lay_out_weights
from funcpipe._src.program import (
    check_alike,
    check_same_order,
    lower_rank,
    owners,
    partial_segments,
    stage_edges,
)

Losses = Mapping[int, tuple[LossVariant, ...]]  # by split rank, for every ready microbatch


def compile_step(
    inputs: CompileInputs,
    analysis: StepAnalysis,
    rehearsal: Rehearsal,
    placement: StatePlacement | None,
    memory: CompileMemory,
) -> Lowered:
    """Compile every ``value_and_grad`` of a step and place its state.

    Args:
        placement: of earlier plans, if there are any.
        memory: what earlier plans left, to which this one adds.
    """
    resolved, clock = inputs.resolved, memory.clock
    analysis = with_own_fakes(inputs, analysis)
    calls = []
    for number, call in enumerate(analysis.calls):
        traced = with_traced_loss(resolved, call)
        calls.append(compile_call(CallInputs(inputs, analysis, number, traced), memory))
    check_used(resolved.remats, [call.units.saved for call in calls])
    with clock.time("place"):
        users = _users(analysis, calls)
        placement = place(resolved, analysis, rehearsal, users, placement)
    memory.placement = memory.placement or placement
    return Lowered(resolved, analysis, placement, tuple(calls), clock.seconds)


def compile_call(inputs: CallInputs, memory: CompileMemory) -> PlannedCall:
    """Compile a ``value_and_grad`` while its loss reads from Python what it read at the call."""
    reading = inputs.call.reading
    assert reading is not None
    with reading.restored(), reading.running():
        return _compile_call(inputs, memory)


def _compile_call(inputs: CallInputs, memory: CompileMemory) -> PlannedCall:
    resolved, clock = inputs.resolved, memory.clock
    with clock.time("split"):
        split = split_batch(resolved, inputs.call.batch, inputs.call.origins)
    table = lay_out_schedule(resolved, split.microbatches)
    losses = _compile_losses(inputs, split, separates_w(table), memory)
    with clock.time("prove"):
        exact = prove_batch(inputs, split, _weights(split, losses), memory)
    with clock.time("schedule"):
        costs = _costs(inputs.analysis, losses[0][0].units)
        earlier = memory.schedules.get(inputs.number)
        chosen = choose_schedule(resolved, table, costs, split.microbatches, earlier)
        memory.schedules[inputs.number] = chosen
    with clock.time("lower"):
        planned = {
            rank: _lower_variant(inputs, split, losses, rank, exact, chosen) for rank in losses
        }
        check_same_order([variant.programs for variant in planned.values()])
    variants = {rank: planned[first] for rank, first in split.variant_of.items()}
    return replace(planned[0], variants=variants)


def _compile_losses(
    inputs: CallInputs, split: BatchSplit, separate_w: bool, memory: CompileMemory
) -> Losses:
    """The loss function for every set of local shapes: prove, trace, check and partition."""
    found = {}
    for split_rank in sorted(set(split.variant_of.values())):
        sequence_rank = split.sequence_rank(split_rank)
        found[split_rank] = tuple(
            _compile_loss(inputs, split, ready, sequence_rank, separate_w, memory)
            for ready in split.ready_of(split_rank)
        )
    return found


def _compile_loss(
    inputs: CallInputs,
    split: BatchSplit,
    ready: int,
    sequence_rank: int,
    separate_w: bool,
    memory: CompileMemory,
) -> LossVariant:
    """What memory has is not made again."""
    local = local_batch(inputs, split, ready, sequence_rank)
    key = (inputs.number, separate_w, local.key, inputs.read_values)
    if key not in memory.losses:
        memory.losses[key] = compile_loss(inputs, local, separate_w, memory.clock)
    return memory.losses[key]


def _weights(split: BatchSplit, losses: Losses) -> dict[int, GraphModule | None]:
    """By split rank, what computes the weight of a microbatch."""
    found = {}
    for split_rank, first_alike in split.variant_of.items():
        loss = losses[first_alike][0]
        found[split_rank] = loss.checked.weight
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
    flops = []
    for segment in range(units.segments):
        forward, backward = units.units["F", segment], units.units["B", segment]
        flops.append(forward.code.flops + backward.code.flops)
    shared = any(len(set(found)) > 1 for found in partial_segments(units))
    return LossCosts(
        flops=flops,
        load=lambda costs: load_of(units, as_costs(costs, units)),
        waits=bool(analysis.reductions) or shared,
    )


def _lower_variant(
    inputs: CallInputs,
    split: BatchSplit,
    losses: Losses,
    split_rank: int,
    exact: bool,
    chosen: ChosenSchedule,
) -> PlannedCall:
    """A call for the ranks of one set of local shapes. Where microbatches are dealt, messages are
    the same on all ranks, so that edges are those of all variants."""
    own = losses[split_rank]
    everyone = list(itertools.chain.from_iterable(losses.values())) if split.dealt else own
    if len(own) == 1:
        own *= split.microbatches
    all_units = [loss.units for loss in everyone]
    check_alike(all_units)
    schedule = check_schedule(chosen, stage_edges(all_units, chosen.stages))
    weights = lay_out_weights(inputs)
    programs = []
    for pipeline_rank in range(inputs.resolved.ranks):
        program = lower_rank(
            [loss.units for loss in own],
            schedule.stages,
            schedule.table,
            pipeline_rank,
            summed_outputs(own[0].joint),
            weights.sharded,
            weights.grad_dtypes,
        )
        programs.append(program)
    return PlannedCall(
        call=inputs.call,
        split=split,
        ready=tuple(split.ready_of(split_rank)),
        proof=split_proof(split, own[0].proof, exact),
        losses=own,
        weights=weights,
        schedule=schedule,
        programs=tuple(programs),
    )


def separate_units(
    inputs: CompileInputs, lowered: Lowered, number: int, memory: CompileMemory
) -> Units:
    """The units of a call's first microbatch with I and W beside B, whatever its schedule runs."""
    planned = lowered.calls[number]
    call_inputs = CallInputs(inputs, lowered.analysis, number, planned.call)
    return _compile_loss(call_inputs, planned.split, 0, 0, True, memory).units
