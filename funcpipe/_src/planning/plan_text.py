"""Plan text: a plan for people to read, and for ranks that compare what they are about to run.

In: a `Plan`. Out: lines of text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.planning import remat_curve
from funcpipe._src.planning.scheduling import span
from funcpipe._src.program import GATHER, RECV, REDUCE, RUN, SEND, Instruction, Program

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.planning.plan import Plan


# ---- what ranks compare


def sections(plan: Plan) -> dict[str, list[str]]:
    """Everything that has to be the same on all ranks, by topic."""
    out = {
        "the mesh": [repr(plan.resolved.mesh)],
        "the transforms": _transforms(plan),
        "where params lie": _params(plan),
        "what the state holds": _state(plan),
        "the global sums": _global_sums(plan),
        "the precision of products": [precision()],
    }
    for number, call in enumerate(plan.calls):
        name = f"value_and_grad {number}"
        table = call.schedule.table
        out[f"the stages of {name}"] = list(map(str, call.schedule.stages))
        out[f"the schedule of {name}"] = [" ".join(map(str, actions)) for actions in table.ranks]
        out[f"the splits of the batch of {name}"] = _cuts(call)
        out[f"the units of {name}"] = _unit_keys(call)
        out[f"the constants of {name}"] = _constant_keys(call)
        for rank, program in enumerate(call.programs):
            topic = f"the program of {name} on rank {rank} of the pipeline"
            out[topic] = list(map(str, program.instructions))
    return out


def _transforms(plan: Plan) -> list[str]:
    local = " of local batches" if plan.resolved.local else ""
    return [f"{spec.text}{local}" for spec in plan.resolved.specs]


def _params(plan: Plan) -> list[str]:
    paths, layouts = plan.placement.analysis.paths, plan.placement.layouts
    return [f"params{path}: {layout}" for path, layout in zip(paths, layouts, strict=True)]


def _state(plan: Plan) -> list[str]:
    analysis = plan.placement.analysis
    out = []
    for path, param in zip(analysis.state_paths, analysis.state, strict=True):
        what = "replicated" if param is None else f"of params{analysis.paths[param]}"
        out.append(f"state{path}: {what}")
    return out


def _global_sums(plan: Plan) -> list[str]:
    out = []
    for number, reduction in enumerate(plan.placement.analysis.reductions):
        is_apart = number in plan.placement.apart
        out.append(f"{reduction.params} {reduction.dtype} {is_apart}")
    return out


def _cuts(call: PlannedCall) -> list[str]:
    out: list[str] = []
    for of_leaves in call.split.cuts:
        out += map(str, of_leaves)
    return out


def _unit_keys(call: PlannedCall) -> list[str]:
    out = []
    for units in call.distinct_units:
        out += [f"{unit} {unit.code.key}" for unit in units.units.values()]
    return out


def _constant_keys(call: PlannedCall) -> list[str]:
    out = []
    for units in call.distinct_units:
        out += [constant.key for constant in units.constants.values()]
    return out


def values(plan: Plan) -> dict[str, list[str]]:
    """What losses read from Python, by loss: why plans of two ranks differ. (Where they are equal
    it does not matter: a setting may name the rank.)"""
    readings = [call.call.reading for call in plan.calls if call.call.reading is not None]
    out = {}
    for number, reading in enumerate(readings):
        topic = f"what {reading.name} (value_and_grad {number}) reads from Python"
        out[topic] = reading.lines()
    return out


def precision() -> str:
    """How this process computes products: the caller's settings of PyTorch, which funcpipe leaves
    alone.

    >>> precision()
    "products of float32: 'none' on GPUs, 'none' in cuDNN, 'none' on CPUs ('none': PyTorch's
    default); partial sums in half: bfloat16 True, float16 True"
    """
    backends: Any = torch.backends
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn.matmul
    return (
        f"products of float32: {matmul.fp32_precision!r} on GPUs, {cudnn.fp32_precision!r} in "
        f"cuDNN, {mkldnn.fp32_precision!r} on CPUs ('none': PyTorch's default); partial "
        f"sums in half: bfloat16 {matmul.allow_bf16_reduced_precision_reduction}, float16 "
        f"{matmul.allow_fp16_reduced_precision_reduction}"
    )


# ---- what people read


def text(plan: Plan) -> list[str]:
    """A plan as text, line by line."""
    out = [f"{plan.resolved.mesh!r}", precision()]
    received = plan.traffic[0].items()
    moved = [f"{bytes_text(count)} along {', '.join(axes)}" for axes, count in received]
    if moved:
        out.append(f"a rank of the first stage receives {', '.join(moved)} per step")
    memory = plan.memory
    for number, call in enumerate(plan.calls):
        bubble = plan.timeline(number).bubble
        out.append(f"value_and_grad {number}: {_call_text(call, bubble)}")
        out += remat_curve.lines(call.units.saved)
        for rank, program in enumerate(call.programs):
            out.append(_rank_text(call, rank, memory[rank]))
            out += _program_text(call, program)
    return out


def _call_text(call: PlannedCall, bubble: float) -> str:
    table, stages = call.schedule.table, call.schedule.stages
    codes: set[str] = set()
    for units in set(call.microbatch_units):
        codes.update(unit.code.key for unit in units.units.values())
    return (
        f"{call.units.segments} segments in {len(stages)} stages, "
        f"{table.microbatches} microbatches, {table.name}, bubble {bubble:.1%} by "
        f"FLOPs, {len(codes)} distinct units"
    )


def _rank_text(call: PlannedCall, rank: int, memory: dict[str, int]) -> str:
    held = [f"{name} {bytes_text(count)}" for name, count in memory.items()]
    stages = []
    for stage, holder in enumerate(call.schedule.table.placement):
        if holder == rank:
            stages.append(f"stage {stage} = segments {span(call.schedule.stages[stage])}")
    slots = call.programs[rank].slots
    return f"  rank {rank} of the pipeline: {', '.join(stages)}; {', '.join(held)}; {slots} slots"


def _program_text(call: PlannedCall, program: Program) -> list[str]:
    """The instructions that compute, move or reduce; waits and additions are left out."""
    out = []
    for instruction in program.instructions:
        if instruction.op == RUN:
            what = _unit_text(call, instruction)
        elif instruction.op in (GATHER, REDUCE):
            what = _bucket_text(instruction)
        elif instruction.op in (SEND, RECV):
            what = _message_text(instruction)
        else:
            continue
        out.append(f"    {instruction.action!s:<10} {what}")
    return out


def _unit_text(call: PlannedCall, instruction: Instruction) -> str:
    unit = instruction.unit
    assert unit is not None
    made = ", ".join(map(str, unit.outputs[:3]))
    if len(unit.outputs) > 3:
        made += ", …"
    size = bytes_text(sum(value.nbytes for value in unit.outputs))
    if unit.kind == "F":
        units = call.microbatch_units[instruction.action.microbatch]
        saved = units.saved[unit.segment]
        size += f", {bytes_text(saved.outcome.nbytes)} saved"
    return f"{unit!s:<5} -> {len(unit.outputs)} values, {size}: {made}"


def _bucket_text(instruction: Instruction) -> str:
    bucket = instruction.bucket
    assert bucket is not None
    return f"{instruction.op} {bucket}, {bytes_text(bucket.nbytes)} a rank"


def _message_text(instruction: Instruction) -> str:
    values = instruction.values
    size = bytes_text(sum(value.nbytes for value in values))
    way = "to" if instruction.op == SEND else "from"
    names = ", ".join(map(str, values)) or "nothing"
    return f"{instruction.op} {way} rank {instruction.peer}, {size}: {names}"
