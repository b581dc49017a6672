"""Pipelines on two GPUs: our step beside torch.distributed.pipelining on the same model and data, in the same run.

python tests/benchmarks/gpu.py [--model small|medium|tiny] [--rounds 10] [--json gpu.json]

A step is forward, backward and AdamW over all microbatches, in bf16. Ours: units compiled by inductor, the whole step in one
CUDA graph. Torch's: 1F1B with compiled blocks, its fastest on these models. *Bound*: half of the time of one GPU
with our own units in a graph, which has no bubble and no transfers. Runs alternate; times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import funcpipe as fp

VOCABULARY, HEAD = 32000, 128
SIZES = {  # width, layers, length, rows of a microbatch, microbatches
    "tiny": (256, 4, 128, 2, 4),
    "small": (1024, 16, 1024, 2, 8),
    "medium": (2048, 16, 2048, 2, 8),
}


def hidden(width: int) -> int:
    return 4 * width * 2 // 3 // 256 * 256


def init(width: int, layers: int) -> dict:
    """Params of a Llama-like model, in bf16 on this GPU."""
    torch.manual_seed(0)
    new = lambda *shape: (torch.randn(shape, device="cuda") * 0.02).bfloat16()  # noqa: E731
    one = lambda: torch.ones(width, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    f = hidden(width)
    block = lambda: {  # noqa: E731
        **{"norm1": one(), "qkv": new(3 * width, width), "out": new(width, width)},
        **{"norm2": one(), "gate": new(f, width), "up": new(f, width), "down": new(width, f)},
    }
    blocks = [block() for _ in range(layers)]
    return {"embed": new(VOCABULARY, width), "blocks": blocks, "head": new(VOCABULARY, width)}


def attention(x: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    rows, length, width = x.shape
    parts = (u.view(rows, length, width // HEAD, HEAD).transpose(1, 2) for u in F.linear(x, qkv).split(width, -1))
    mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
    return F.linear(mixed.transpose(1, 2).reshape(rows, length, width), out)


def block(p: dict, x: torch.Tensor) -> torch.Tensor:
    width = (x.shape[-1],)
    x = x + attention(F.rms_norm(x, width, p["norm1"]), p["qkv"], p["out"])
    h = F.rms_norm(x, width, p["norm2"])
    return x + F.linear(F.silu(F.linear(h, p["gate"])) * F.linear(h, p["up"]), p["down"])


def loss_fn(params: dict, batch: dict) -> fp.Mean:
    x = F.embedding(batch["tokens"], params["embed"])
    for p in params["blocks"]:
        x = fp.stage_boundary(block(p, x))
    logits = F.linear(x, params["head"]).float().flatten(0, 1)
    total = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    return fp.Mean(total, torch.full((), float(logits.shape[0]), device=logits.device))


class State(NamedTuple):
    params: Any
    opt_state: Any


OPTIMIZER = fp.optim.adamw(lr=1e-4)


def step(state: State, batch: dict) -> tuple[State, dict]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
    params, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return State(params, opt_state), {"loss": loss}


def data(size: tuple) -> dict:
    _, _, length, rows, microbatches = size
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (rows * microbatches, length + 1), generator=g).cuda()
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def ours(transformed: Callable, mesh: fp.Mesh, size: tuple, options: dict) -> tuple[Callable[[], Any], Any]:
    run = fp.spmd(transformed, mesh, **options)
    batch = data(size)
    held = [run.init(lambda p: State(p, OPTIMIZER.init(p)), init(*size[:2]), batch)]

    def go() -> Any:
        held[0], metrics = run(held[0], batch)
        return metrics["loss"]

    return go, run


class Block(nn.Module):
    def __init__(self, p: dict) -> None:
        super().__init__()
        self.p = nn.ParameterDict(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block(self.p, x)


class Chunk(nn.Module):
    """A stage of the same model for torch's pipelines."""

    def __init__(self, params: dict, stage: int, stages: int) -> None:
        super().__init__()
        n = len(params["blocks"]) // stages
        blocks = params["blocks"][stage * n : (stage + 1) * n]
        self.blocks = nn.ModuleList(Block(p) for p in blocks)
        self.embed = nn.Parameter(params["embed"]) if stage == 0 else None
        self.head = nn.Parameter(params["head"]) if stage == stages - 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.embed is None else F.embedding(x, self.embed)
        for b in self.blocks:
            x = b(x)
        return x if self.head is None else F.linear(x, self.head)


def torchs(name: str, size: tuple, compiled: bool) -> Callable[[], Any]:
    from torch.distributed import pipelining

    ranks, rank = dist.get_world_size(), dist.get_rank()
    cls = getattr(pipelining, name)
    per_rank = 1 if name == "Schedule1F1B" else 2
    params, stages = init(*size[:2]), ranks * per_rank
    numbers = [rank + ranks * i for i in range(per_rank)]
    chunks = [Chunk(params, s, stages).cuda() for s in numbers]
    for b in (b for c in chunks for b in c.blocks if compiled):
        b.compile()
    made = [pipelining.PipelineStage(c, s, stages, torch.device("cuda")) for c, s in zip(chunks, numbers, strict=True)]
    batch = data(size)
    loss = lambda out, labels: F.cross_entropy(out.float().flatten(0, 1), labels.flatten())  # noqa: E731
    schedule = cls(made[0] if per_rank == 1 else made, n_microbatches=size[4], loss_fn=loss)
    optimizer = torch.optim.AdamW([p for c in chunks for p in c.parameters()], lr=1e-4, weight_decay=0.1, fused=True)

    def go() -> Any:
        losses: list = []
        kwargs = {"target": batch["labels"], "losses": losses} if stages - 1 in numbers else {}
        schedule.step(*([batch["tokens"]] if 0 in numbers else []), **kwargs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean() if losses else None

    return go


def seconds(go: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(2):
        go()
    torch.cuda.synchronize()
    dist.barrier()
    return (time.perf_counter() - start) / 2


def measured(name: str, make: Callable[[], tuple], rounds: int) -> dict:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    go, run = make()
    losses = [go() for _ in range(3)]
    torch.cuda.synchronize()
    ready = time.perf_counter() - start
    times = [seconds(go) for _ in range(rounds)]
    host = time.perf_counter()
    go()
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    peak = [None] * dist.get_world_size()
    dist.all_gather_object(peak, torch.cuda.max_memory_allocated() / 2**30)
    values = [None if x is None else round(float(x), 4) for x in losses]
    if run is not None:
        run.close()
    out = {"name": name, "ms": 1e3 * statistics.median(times), "peak": max(peak), "ready": ready, "host": 1e3 * host}
    return out | {"losses": values}


def single(model: str, rounds: int) -> list[dict]:
    """One GPU: our units in a graph, every microbatch after the other."""
    return run_all(model, rounds, {"1 GPU, inductor units, one graph": lambda size: one_gpu(size)})


def one_gpu(size: tuple) -> tuple:
    transformed = fp.accumulated(step, microbatches=size[4])
    return ours(transformed, fp.Mesh(), size, {"backend": "inductor", "cuda_graph": True})


def piped(schedule: Any, **options: Any) -> Callable[[tuple], tuple]:
    def make(size: tuple) -> tuple:
        transformed = fp.pipelined(step, axis="pipe", microbatches=size[4], schedule=schedule)
        return ours(transformed, fp.Mesh(pipe=dist.get_world_size()), size, options)

    return make


def pair(model: str, rounds: int) -> list[dict]:
    graph = {"backend": "inductor", "cuda_graph": True}
    return run_all(
        model,
        rounds,
        {
            "torch 1F1B, compiled blocks": lambda size: (torchs("Schedule1F1B", size, True), None),
            "funcpipe 1F1B, eager": piped(fp.schedules.one_f_one_b()),
            "funcpipe 1F1B, one graph": piped(fp.schedules.one_f_one_b(), **graph),
            "funcpipe ZB-H1, one graph": piped(fp.schedules.zb_h1(), **graph),
            "funcpipe ZB-V, one graph": piped(fp.schedules.zb_v(), **graph),
            "funcpipe auto by FLOPs, one graph": piped(fp.schedules.auto(), **graph),
            "funcpipe auto, measured, one graph": piped("auto", **graph),
        },
    )


def run_all(model: str, rounds: int, makers: dict[str, Callable[[tuple], tuple]]) -> list[dict]:
    warnings.simplefilter("ignore")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    out = []
    for name, make in makers.items():
        try:
            out.append(measured(name, lambda make=make: make(SIZES[model]), rounds))
        except Exception as error:
            out.append({"name": name, "error": repr(error)[:600]})
        if dist.get_rank() == 0:
            print(out[-1], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json")
    options = parser.parse_args()
    rows = fp.launch(single, 1, options.model, options.rounds)[0]
    bound = rows[0].get("ms", float("nan")) / 2
    rows += fp.launch(pair, 2, options.model, options.rounds)[0]
    best = min((r["ms"] for r in rows if r["name"].startswith("torch") and "ms" in r), default=float("nan"))
    table = Table("step", "ms", "torch's best / this", "bound / this", "peak GiB", "host ms", "ready s", "losses")
    for r in rows:
        if "error" in r:
            table.add_row(r["name"], r["error"])
            continue
        cells = [f"{r['ms']:.1f}", f"{best / r['ms']:.2f}", f"{bound / r['ms']:.2f}", f"{r['peak']:.1f}"]
        table.add_row(r["name"], *cells, f"{r['host']:.2f}", f"{r['ready']:.0f}", str(r["losses"]))
    Console(width=160).print(table)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"model": options.model, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
