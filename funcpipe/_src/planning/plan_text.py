"""Plans to read: for people, and for ranks that compare what they are about to run.

In: a `Plan`. Out: lines of text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.planning import remat_curve as tradeoff
from funcpipe._src.planning.scheduling import span
from funcpipe._src.program import GATHER, RECV, REDUCE, RUN, SEND, Program

if TYPE_CHECKING:
    from funcpipe._src.planning.lowered import PlannedCall
    from funcpipe._src.planning.plan import Plan


def sections(plan: Plan) -> dict[str, list[str]]:
    """Everything that has to be the same on all ranks, by topic."""
    analysis = plan.placement.analysis
    out = {
        "the mesh": [repr(plan.resolved.mesh)],
        "the transforms": [
            f"{r.text}{' of local batches' * plan.resolved.local}" for r in plan.resolved.specs
        ],
        "where params lie": [
            f"params{p}: {x}" for p, x in zip(analysis.paths, plan.placement.layouts, strict=True)
        ],
        "what the state holds": [
            f"state{p}: {'replicated' if i is None else f'of params{analysis.paths[i]}'}"
            for p, i in zip(analysis.state_paths, analysis.state, strict=True)
        ],
        "the global sums": [
            f"{s.params} {s.dtype} {k in plan.placement.apart}" for k, s in enumerate(analysis.sums)
        ],
        "the precision of products": [precision()],
    }
    for k, c in enumerate(plan.calls):
        name = f"value_and_grad {k}"
        out[f"the stages of {name}"] = [str(s) for s in c.schedule.stages]
        out[f"the schedule of {name}"] = [" ".join(map(str, row)) for row in c.schedule.table.ranks]
        out[f"the splits of the batch of {name}"] = [
            str(leaf) for part in c.split.cuts for leaf in part
        ]
        cuts = c.distinct_units
        out[f"the units of {name}"] = [f"{u} {u.code.key}" for m in cuts for u in m.units.values()]
        folded = [x for m in cuts for x in m.constants.values()]
        out[f"the constants of {name}"] = [x.key for x in folded]
        for p, program in enumerate(c.programs):
            out[f"the program of {name} on rank {p} of the pipeline"] = [
                i.text for i in program.instructions
            ]
    return out


def values(plan: Plan) -> dict[str, list[str]]:
    """What losses read from Python, by loss: why plans of two ranks differ. (Where they are equal
    it does not matter: a setting may name the rank.)"""
    found = [c.call.reading for c in plan.calls if c.call.reading is not None]
    return {
        f"what {x.name} (value_and_grad {k}) reads from Python": x.lines()
        for k, x in enumerate(found)
    }


def precision() -> str:
    """How this process computes products: the caller's settings of PyTorch, which funcpipe leaves
    alone.

    >>> precision()
    "products of float32: 'none' on GPUs, 'none' in cuDNN, 'none' on CPUs ('none': PyTorch's
    default); partial sums in half: bfloat16 True, float16 True"
    """
    b: Any = torch.backends
    matmul = b.cuda.matmul
    return (
        f"products of float32: {matmul.fp32_precision!r} on GPUs, {b.cudnn.fp32_precision!r} in "
        f"cuDNN, {b.mkldnn.matmul.fp32_precision!r} on CPUs ('none': PyTorch's default); partial "
        f"sums in half: bfloat16 {matmul.allow_bf16_reduced_precision_reduction}, float16 "
        f"{matmul.allow_fp16_reduced_precision_reduction}"
    )


def text(plan: Plan) -> list[str]:
    """A plan as text, line by line."""
    r = plan.resolved
    out, memory = [f"{r.mesh!r}", precision()], plan.memory
    moved = [f"{bytes_text(n)} along {', '.join(axes)}" for axes, n in plan.traffic[0].items()]
    out += [f"a rank of the first stage receives {', '.join(moved)} per step"] if moved else []
    for k, c in enumerate(plan.calls):
        s = c.schedule.table
        out.append(
            f"value_and_grad {k}: {c.units.segments} segments in {len(c.schedule.stages)} stages, "
            f"{s.microbatches} microbatches, {s.name}, bubble {plan.timeline(k).bubble:.1%} by "
            f"FLOPs, {len(_codes(c))} distinct units"
        )
        out += tradeoff.lines(c.units.saved)
        for place, program in enumerate(c.programs):
            held = ", ".join(f"{name} {bytes_text(n)}" for name, n in memory[place].items())
            stages = ", ".join(
                f"stage {i} = segments {span(c.schedule.stages[i])}"
                for i, p in enumerate(s.placement)
                if p == place
            )
            out.append(f"  rank {place} of the pipeline: {stages}; {held}; {program.slots} slots")
            out += _program_text(c, program)
    return out


def _codes(c: PlannedCall) -> set[str]:
    return {u.code.key for m in set(c.microbatch_units) for u in m.units.values()}


def _program_text(c: PlannedCall, program: Program) -> list[str]:
    out = []
    for i in program.instructions:
        if i.op == RUN:
            assert i.unit is not None
            made = ", ".join(map(str, i.unit.outputs[:3])) + (
                ", …" if len(i.unit.outputs) > 3 else ""
            )
            size = bytes_text(sum(v.nbytes for v in i.unit.outputs))
            if i.unit.kind == "F":
                kept = c.microbatch_units[i.action.microbatch].saved[i.unit.segment].outcome.nbytes
                size += f", {bytes_text(kept)} saved"
            out.append(
                f"    {i.action!s:<10} {i.unit!s:<5} -> {len(i.unit.outputs)} values, {size}: "
                f"{made}"
            )
        elif i.op in (GATHER, REDUCE):
            assert i.bucket is not None
            out.append(
                f"    {i.action!s:<10} {i.op} {i.bucket}, {bytes_text(i.bucket.nbytes)} a rank"
            )
        elif i.op in (SEND, RECV):
            size = bytes_text(sum(v.nbytes for v in i.values))
            way = "to" if i.op == SEND else "from"
            names = ", ".join(map(str, i.values)) or "nothing"
            out.append(f"    {i.action!s:<10} {i.op} {way} rank {i.peer}, {size}: {names}")
    return out
