"""Host cost of the runtime per action, with empty units, beside torch.distributed.pipelining's 1F1B
in the same run.

python tests/benchmarks/host.py [--microbatches 64] [--rounds 15]

An *action* is a forward, a backward, a send or a receive. Units are empty on both sides: ours
return ready tensors, torch's stages are identities. *Host* is the CPU time of the thread that runs
the step: what the runtime itself costs. *Bare gloo* is the host time of the same sends and
receives, in the same order, with nothing around them: what no runtime over gloo can save. *Itself*
is the rest. *Wall* has waiting for the other rank in it, most of which is the wire: with empty
units, ranks run in lockstep.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import funcpipe as fp
from funcpipe._src.runtime.bound_call import BoundCall

ROWS, WIDTH = 1, 8


def loss_fn(params: list[torch.Tensor], batch: torch.Tensor) -> fp.Mean:
    x = batch
    for p in params:
        x = fp.stage_boundary(torch.sin(x) * p)
    return fp.Mean(x.sum(), torch.tensor(float(x.shape[0])))


def step(state: list[torch.Tensor], batch: torch.Tensor) -> tuple:
    loss, _ = fp.value_and_grad(loss_fn)(state, batch)
    return state, {"loss": loss}


def emptied(call: BoundCall) -> None:
    """Units that compute nothing, so that only the runtime is left."""
    emptied = []
    for written, bound in zip(call.program.instructions, call.bound.instructions, strict=True):
        if written.unit is not None:
            ready = tuple(torch.zeros(v.shape, dtype=v.dtype) for v in written.unit.outputs)
            bound = bound._replace(run=lambda args, ready=ready: (args.clear(), ready)[1])
        emptied.append(bound)
    call.bound = dataclasses.replace(call.bound, instructions=tuple(emptied))


def ours(run, ranks: int, microbatches: int) -> tuple[Callable[[], object], int]:
    params, batch = (
        [torch.zeros(WIDTH) for _ in range(ranks)],
        torch.zeros(ROWS * microbatches, WIDTH),
    )
    state = run.init(lambda p: p, params, batch)
    run(state, batch)
    bound = run._bound.values()  # type: ignore[attr-defined]
    for rank in [r for some in bound for r in (some if isinstance(some, list) else [some])]:
        for call in rank.calls:
            emptied(call)
    row = run.plan(state, batch).calls[0].schedule.table.ranks[0]
    return lambda: run(state, batch), len(row)


def pipeline(ranks: int, microbatches: int):
    return fp.pipelined(
        step, axis="pipe", microbatches=microbatches, stages=[1] * (ranks - 1) + [2]
    )


def torchs(ranks: int, microbatches: int) -> Callable[[], object]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank = dist.get_rank()
    module = torch.nn.Identity()
    stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, microbatches, loss_fn=lambda out, target: out.square().sum())
    x = torch.zeros(ROWS * microbatches, WIDTH, requires_grad=True)

    def run() -> None:
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(**({"target": x.detach()} if rank == ranks - 1 else {}))

    return run


def bare(row: list[fp.schedules.Action]) -> Callable[[], object]:
    """The messages of a rank's actions, straight to torch's process group."""
    group, peer = dist.distributed_c10d._get_default_group(), 1 - dist.get_rank()
    moves = [a for a in row if a.kind.startswith(("SEND", "RECV"))]

    def run() -> None:
        works = []
        for a in moves:
            tag, x = 2 * a.microbatch + a.kind.endswith("B"), torch.empty(ROWS, WIDTH)
            if a.kind.startswith("SEND"):
                works.append(group.send([x], peer, tag))
            else:
                group.recv([x], peer, tag).wait()
        for work in works:
            work.wait()

    return run


def seconds(fn: Callable[[], object]) -> tuple[float, float]:
    """Host and wall time."""
    host, wall = time.thread_time(), time.perf_counter()
    fn()
    return time.thread_time() - host, time.perf_counter() - wall


def per_action(times: list[tuple[float, float]], actions: int) -> tuple[float, float]:
    """Medians in microseconds per action."""
    host, wall = (1e6 * statistics.median(t) / actions for t in zip(*times, strict=True))
    return host, wall


def worker(microbatches: int, rounds: int) -> tuple[list[list], int]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    mesh = fp.Mesh(pipe=ranks)
    run = fp.spmd(pipeline(ranks, microbatches), mesh)
    mine, actions = ours(run, ranks, microbatches)
    theirs = torchs(ranks, microbatches)
    row = (
        run.plan(None, torch.zeros(ROWS * microbatches, WIDTH))
        .calls[0]
        .schedule.table.ranks[run.rank]
    )
    wire = bare(list(row))
    for fn in (mine, theirs, wire) * 2:
        fn()
    times = [(seconds(mine), seconds(theirs), seconds(wire)) for _ in range(rounds)]
    run.close()
    return [list(t) for t in zip(*times, strict=True)], actions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    m, rounds = options.microbatches, options.rounds
    torch.set_num_threads(1)
    table = Table("where", "who", "actions", "host µs/action", "itself", "wall")
    for ranks in (1, 4):
        run = fp.simulate(pipeline(ranks, m), fp.Mesh(pipe=ranks))
        fn, _ = ours(run, ranks, m)
        times = [seconds(fn) for _ in range(rounds)]
        row = run.plan(None, torch.zeros(ROWS * m, WIDTH)).calls[0].schedule.table.ranks
        _, wall = per_action(
            times, sum(map(len, row))
        )  # ranks are threads: their host time is the wall time
        cells = [str(sum(map(len, row))), *[f"{wall:.1f}"] * 3]
        table.add_row(f"simulated, ranks: {ranks}", "funcpipe", *cells)
    times, actions = fp.launch(worker, 2, m, rounds)[0]
    (host, wall), (their_host, their_wall), (wire, wire_wall) = (
        per_action(t, actions) for t in times
    )
    for who, a, b in (
        ("funcpipe", host, wall),
        ("torch 1F1B", their_host, their_wall),
        ("bare gloo", wire, wire_wall),
    ):
        table.add_row(
            "gloo, 2 processes", who, str(actions), f"{a:.1f}", f"{a - wire:.1f}", f"{b:.1f}"
        )
    Console().print(table)
    ratios = (
        f"host time {host / their_host:.2f}, of the runtime itself "
        f"{(host - wire) / (their_host - wire):.2f}"
    )
    print(f"funcpipe / torch over gloo: {ratios}")


if __name__ == "__main__":
    main()
