"""Two GPUs: our steps beside PyTorch's on the same model and data, in the same run. On one GPU:
what one GPU can run.

python tests/benchmarks/gpu.py [--models small medium] [--all] [--only TEXT ...] [--rounds 10]
[--json gpu.json] [--profile]

A step is forward, backward and AdamW over all microbatches. Contenders are built one after another
and stay (with --all, those of "medium" are more than a GPU holds: name some); then rounds of four
steps go through all of them in turn, and the median of rounds counts. Pipelines compute in
bfloat16, with bfloat16 params; sharded steps with float32 shards, bfloat16 weights and float32
reductions. *Bound*: half of the best time of one GPU with our own
units in one CUDA graph: no bubble, no transfers. MFU: the model's FLOPs over what this GPU makes of
a large matrix product in a sustained run. What is predicted is forward and backward alone, in
steady state. Peak memory is what a contender allocates beyond what is there before it is built.
Host: how long a call of a step takes, the median one in those rows of four; and one after host and
GPU have done nothing. Parts of it are that ranks tell each other what they are about to run, and
the launch of a graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import gpu_peers as peers
import torch
import torch.distributed as dist
from funcpipe.transforms import remat
from gpu_model import SIZES, Size, data, init, init_state, step, step_by_halves
from gpu_profile import breakdown
from rich.console import Console
from rich.table import Table

import funcpipe as fp
from funcpipe._src.runtime.cuda_graph import MIXING

# Gradients are added up in bfloat16, as those of the peers' params are.
GRAPH: dict[str, Any] = {
    "backend": "inductor",
    "cuda_graph": True,
    "accumulate_dtype": torch.bfloat16,
}
STEPS = 4  # that are timed together: ranks may be in different ones
Go = Callable[[], Any]


# ---- ours


class Ours:
    """A runner of this library, and its state."""

    def __init__(
        self, size: Size, transformed: Callable, mesh: fp.Mesh, dtype: torch.dtype, options: dict
    ) -> None:
        self.run, self.batch = fp.spmd(transformed, mesh, **options), data(size)
        self.state = self.run.init(init_state, init(size, dtype), self.batch)
        self.predicted: float | None = None  # seconds, where costs were measured
        self.costs: fp.Costs | None = None

    def __call__(self) -> Any:
        self.state, metrics = self.run(self.state, self.batch)
        return metrics["loss"]


def piped(
    size: Size, schedule: Any, step: Callable = step, budget: float | None = None, **options: Any
) -> Ours:
    """``budget``: the part of residuals that may be saved; the rest is computed again."""
    transformed = fp.pipelined(step, axis="pipe", microbatches=size.microbatches, schedule=schedule)
    if budget is not None:
        transformed = remat(transformed, budget=budget)
    return Ours(
        size, transformed, fp.Mesh(pipe=dist.get_world_size()), torch.bfloat16, options or GRAPH
    )


def sharded(size: Size, budget: float, microbatches: int = 4, **options: Any) -> Ours:
    """Buckets are small enough that every matrix travels alone, and is not copied out of one."""
    options = {"regather": "step", "reduce_dtype": torch.float32} | options
    stack = [
        fp.accumulated(microbatches=microbatches),
        fp.data_parallel(axis="data"),
        fp.sharded_weights(
            axis="data", param_dtype=torch.bfloat16, bucket_bytes=1 << 20, **options
        ),
        remat(budget=budget),
    ]
    return Ours(
        size, fp.compose(*stack)(step), fp.Mesh(data=dist.get_world_size()), torch.float32, GRAPH
    )


def one_gpu(size: Size) -> Ours:
    return Ours(
        size, fp.accumulated(step, microbatches=size.microbatches), fp.Mesh(), torch.bfloat16, GRAPH
    )


# ---- contenders


def alone(size: Size, everything: bool, peaks: dict[str, float]) -> dict[str, Callable[[], Go]]:
    """One GPU."""
    out: dict[str, Callable[[], Go]] = {"funcpipe, one GPU, one graph": lambda: one_gpu(size)}
    if everything:
        out |= {
            "torch, one GPU": lambda: peers.one_gpu(size),
            "torch, one GPU, compiled blocks": lambda: peers.one_gpu(size, compiled=True),
            "torch, one GPU, compiled blocks, one graph": lambda: peers.one_gpu(
                size, compiled=True, graph=True
            ),
        }
    return out


def together(size: Size, everything: bool, peaks: dict[str, float]) -> dict[str, Callable[[], Go]]:
    """Two GPUs; ``peaks`` are those of the contenders that were built before."""
    found: dict[str, Any] = {}

    def searched(limit: bool, step: Callable = step) -> Go:
        """A schedule for measured costs. What units cost does not depend on the schedule that they
        are measured under."""
        if step not in found:
            ours = piped(size, fp.schedules.one_f_one_b(), step)
            found[step] = fp.profile_units(ours.run, ours.state, ours.batch), room(ours)
            ours.run.close()
        costs, most = found[step]
        ours = piped(size, fp.schedules.auto(most if limit else None, costs), step)
        ours.predicted = ours.run.plan(ours.state, ours.batch).predict(costs).period
        ours.costs = costs
        return ours

    def room(ours: Ours) -> float:
        """Bytes of activations within 1.25 times the peak of torch's 1F1B: params, moments and sums
        lie beside them."""
        memory = ours.run.plan(ours.state, ours.batch).memory
        return 1.25 * peaks["torch 1F1B, compiled blocks"] * 2**30 - max(
            3 * m["params"] + m["gradients"] for m in memory
        )

    out: dict[str, Callable[[], Go]] = {
        "torch 1F1B, compiled blocks": lambda: peers.pipeline(size, "Schedule1F1B", True),
        "funcpipe 1F1B, one graph": lambda: piped(size, fp.schedules.one_f_one_b()),
        # No matrix product is computed again, as in torch's compiled blocks.
        "funcpipe 1F1B, elementwise ops computed again, one graph": lambda: piped(
            size, fp.schedules.one_f_one_b(), budget=0.85
        ),
        "funcpipe ZB-H1, one graph": lambda: piped(size, fp.schedules.zb_h1()),
        "funcpipe ZB-V, one graph": lambda: piped(size, fp.schedules.zb_v()),
        "funcpipe auto, one graph": lambda: searched(limit=False),
        "funcpipe auto, 1.25 x memory, one graph": lambda: searched(limit=True),
        "funcpipe auto by half blocks, one graph": lambda: searched(
            limit=False, step=step_by_halves
        ),
        "funcpipe auto by half blocks, 1.25 x memory, one graph": lambda: searched(
            limit=True, step=step_by_halves
        ),
        "FSDP2, compiled blocks, 4 microbatches": lambda: peers.fsdp(size, 4, True),
        "FSDP2, compiled blocks, 4 microbatches, bf16 reductions": lambda: peers.fsdp(
            size, 4, True, torch.bfloat16
        ),
        "funcpipe sharded, one graph": lambda: sharded(size, 0.5),
        "funcpipe sharded, bf16 reductions, one graph": lambda: sharded(
            size, 0.5, reduce_dtype=torch.bfloat16
        ),
        "funcpipe sharded, bf16 sums, one graph": lambda: sharded(
            size, 0.5, reduce="last", reduce_dtype=torch.bfloat16
        ),
        "funcpipe sharded, bf16 sums, nothing large recomputed, one graph": lambda: sharded(
            size, 0.58, reduce="last", reduce_dtype=torch.bfloat16
        ),
    }
    if everything:
        out |= {
            "torch 1F1B": lambda: peers.pipeline(size, "Schedule1F1B", False),
            "torch interleaved, compiled blocks": lambda: peers.pipeline(
                size, "ScheduleInterleaved1F1B", True
            ),
            "torch ZB-V": lambda: peers.pipeline(size, "ScheduleZBVZeroBubble", False),
            "torch ZB-V, compiled blocks": lambda: peers.pipeline(
                size, "ScheduleZBVZeroBubble", True
            ),
            "FSDP2, 4 microbatches": lambda: peers.fsdp(size, 4, False),
            "FSDP2, 1 microbatch": lambda: peers.fsdp(size, 1, False),
            "FSDP2, compiled blocks, 1 microbatch": lambda: peers.fsdp(size, 1, True),
            "FSDP2, compiled blocks, 1 microbatch, bf16 reductions": lambda: peers.fsdp(
                size, 1, True, torch.bfloat16
            ),
            "funcpipe sharded, gathered for each unit, one graph": lambda: sharded(
                size, 0.75, regather="microbatch"
            ),
            "funcpipe sharded, summed whole, one graph": lambda: sharded(size, 0.5, reduce="last"),
            "funcpipe sharded, 1 microbatch, one graph": lambda: sharded(size, 0.5, 1),
            "funcpipe sharded, 1 microbatch, bf16 reductions, nothing recomputed, one graph": lambda: (
                sharded(size, 1.0, 1, reduce_dtype=torch.bfloat16)
            ),
            "funcpipe sharded, 1 microbatch, bf16 reductions, elementwise ops computed again, one "
            "graph": lambda: sharded(size, 0.85, 1, reduce_dtype=torch.bfloat16),
            "funcpipe 1F1B, eager": lambda: piped(
                size, fp.schedules.one_f_one_b(), backend="eager"
            ),
        }
    return out


# ---- measuring


def peak(go: Go, before: int) -> float:
    """GiB that the first steps take beyond what was there before, on the rank that takes most."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        go()
    torch.cuda.synchronize()
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (torch.cuda.max_memory_allocated() - before) / 2**30)
    return max(found)


def seconds(go: Go) -> tuple[float, float]:
    """Of a step in a row of some, and of the median call in that row."""
    torch.cuda.synchronize()
    dist.barrier()
    times = [time.perf_counter()]
    for _ in range(STEPS):
        go()
        times.append(time.perf_counter())
    torch.cuda.synchronize()
    dist.barrier()
    return (time.perf_counter() - times[0]) / STEPS, statistics.median(
        b - a for a, b in pairwise(times)
    )


def matrix_rate() -> float:
    """FLOPs a second of a large bfloat16 product, over about a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for n in (20, 500):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            a @ b
        torch.cuda.synchronize()
    return n * 2 * 8192**3 / (time.perf_counter() - start)


def build(name: str, make: Callable[[], Go]) -> tuple[dict, Go]:
    torch.cuda.empty_cache()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    try:
        go = make()
        row = {"name": name, "peak": peak(go, before)}
    except Exception as error:  # other ranks may wait for this one for ever
        raise RuntimeError(f"{name} failed: leave it out by --only. {error!r}"[:600]) from error
    row["losses"] = [whole(x) for x in (go(), go())]
    if isinstance(go, Ours):
        row["graph"], row["predicted"] = (
            go.run.graph_memory / 2**30,
            go.predicted and 1e3 * go.predicted,
        )
        if go.costs is not None:  # ms of a microbatch, all segments together
            units = {key: 1e3 * t for key, t in go.costs.units.items()}
            row["costs"] = {
                kind: sum(t for key, t in units.items() if key[0] == kind) for kind in "FBIW"
            }
        row["plan"] = [
            {k: v / 2**30 for k, v in m.items()} for m in go.run.plan(go.state, go.batch).memory
        ]
    return row | {"ready": time.perf_counter() - start}, go


def whole(loss: Any) -> float | None:
    """A loss that some rank knows; the mean of those that all know in part."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if loss is None else float(loss))
    known = [x for x in found if x is not None]
    return round(sum(known) / len(known), 4)


def contest(
    model: str, which: str, everything: bool, only: list[str], rounds: int, profile: bool
) -> list[dict]:
    """Build all contenders, then time them in turn."""
    warnings.simplefilter("ignore")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        os.environ.setdefault(MIXING, "0")  # as fp.spmd does where NCCL was not started before it
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    say = print if dist.get_rank() == 0 else lambda *args, **kwargs: None
    peaks: dict[str, float] = {}
    makers = {"alone": alone, "together": together}[which](SIZES[model], everything, peaks)
    rows, running = [], {}
    for name, make in makers.items():
        if only and not any(text in name for text in only):
            continue
        row, go = build(name, make)
        rows.append(row)
        running[name], peaks[name] = go, row["peak"]
        say(row, flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for k in range(rounds):
        for name, go in running.items():
            times[name].append(seconds(go))
        say(f"round {k}:", *(f"{1e3 * some[-1][0]:.1f}" for some in times.values()), flush=True)
    for row in rows:
        go = running[row["name"]]
        row["ms"], row["host"] = (
            1e3 * statistics.median(x) for x in zip(*times[row["name"]], strict=True)
        )
        row["rest"] = 1e3 * from_rest(go)
        if isinstance(go, Ours) and go.run._graphs.steps:
            row["telling"], row["launching"] = (1e3 * x for x in parts(go))
            row["launch"] = 1e3 * from_rest(next(iter(go.run._graphs.steps.values())).graph.replay)
    for row in (
        rows if profile else ()
    ):  # last: after a profile, every launch of its process takes 1 to 2 ms more
        if isinstance(running[row["name"]], Ours):
            row["kernels"] = breakdown(running[row["name"]])
            say(row["name"], f"{row['ms']:.2f}", json.dumps(row["kernels"]), flush=True)
    if which == "alone" and rows:
        rows[0]["rate"] = matrix_rate()
    for go in running.values():
        if isinstance(go, Ours):
            go.run.close()
    return rows


def from_rest(go: Go) -> float:
    """How long the host takes to start something after both have done nothing; the median of
    some."""
    taken = []
    for _ in range(7):
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        go()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)


class Timed:
    """A function, and how long its calls took."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self.times = fn, list[float]()

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        out = self.fn(*args)
        self.times.append(time.perf_counter() - start)
        return out


def parts(ours: Ours) -> tuple[float, float]:
    """Of calls in rows, how long ranks tell each other what they are about to run, and how long the
    launch of the graph takes."""
    comm, step = ours.run._comm, next(iter(ours.run._graphs.steps.values()))
    graph = step.graph
    telling, launching = Timed(comm.exchange_digest), Timed(graph.replay)
    comm.exchange_digest, step.graph = telling, SimpleNamespace(replay=launching)
    for _ in range(3):
        seconds(ours)
    del comm.exchange_digest  # the method is there again
    step.graph = graph
    return statistics.median(telling.times), statistics.median(launching.times)


# ---- the table


def best(rows: list[dict], start: str) -> float:
    return min((r["ms"] for r in rows if r["name"].startswith(start)), default=float("nan"))


def show(model: str, rows: list[dict]) -> None:
    size, rate = SIZES[model], next((r["rate"] for r in rows if "rate" in r), float("nan"))
    bound = best(rows, "funcpipe, one GPU") / 2
    pipeline = min(best(rows, f"torch {name}") for name in ("1F1B", "interleaved", "ZB"))
    table = Table(
        title=f"{model}: {size}; bound {bound:.1f} ms; matrix products {rate / 1e12:.0f} TFLOP/s"
    )
    for column in (
        "step",
        "ms",
        "predicted",
        "torch / this",
        "bound / this",
        "k tokens/s",
        "MFU",
        "peak GiB",
        "graph GiB",
        "host ms: in a row (telling, launch), from rest (launch)",
        "ready s",
        "losses",
    ):
        table.add_column(column)
    for r in rows:
        gpus = 1 if "one GPU" in r["name"] else 2
        peer = (
            best(rows, "FSDP2, compiled blocks, 4")
            if "sharded" in r["name"] or "FSDP2" in r["name"]
            else pipeline
        )
        peer = best(rows, "torch, one GPU") if gpus == 1 else peer
        seconds_ = r["ms"] / 1e3
        table.add_row(
            r["name"],
            *(
                f"{r['ms']:.1f}",
                f"{r['predicted']:.1f}" if r.get("predicted") else "",
                f"{peer / r['ms']:.2f}",
                f"{bound / r['ms']:.2f}",
                f"{size.tokens / seconds_ / 1e3:.0f}",
            ),
            *(
                f"{size.flops / seconds_ / gpus / rate:.1%}",
                f"{r['peak']:.1f}",
                f"{r.get('graph', 0):.1f}",
            ),
            "{:.2f} ({:.2f}, {:.2f}), {:.2f} ({:.2f})".format(
                *(r.get(k, 0.0) for k in ("host", "telling", "launching", "rest", "launch"))
            ),
            *(f"{r['ready']:.0f}", str(r["losses"])),
        )
    Console(width=190).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["small", "medium"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--all", action="store_true", help="every peer; by default the fastest ones"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="contenders whose name holds one of these texts"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where the time of our steps goes, by kind of kernel"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    found = {}
    gpus = torch.cuda.device_count()
    if gpus < 2:
        print(f"{gpus} GPU: pipelines and sharded steps, which take two, are left out")
    for model in options.models:
        rest = (options.all, options.only, options.rounds, options.profile)
        found[model] = fp.launch(contest, 1, model, "alone", *rest)[0]
        if gpus > 1:
            found[model] += fp.launch(contest, 2, model, "together", *rest)[0]
        show(model, found[model])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
