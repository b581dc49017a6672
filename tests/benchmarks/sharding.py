"""`sharded_weights` beside FSDP2 (`fully_shard`): step time and bytes moved, gloo, four processes
of one thread each.

    python tests/benchmarks/sharding.py [--steps 12] [--width 256] [--blocks 6]

Both run the same transformer-like model on the same microbatches, gradients accumulated and reduced
once for each microbatch (FSDP2's default), then SGD; in turns, in the same processes. Printed are
medians of rank 0 and their ratio, ours over
theirs, and the bytes that a rank receives in a step: for FSDP2 counted at torch.distributed, for
funcpipe both counted there and as its plan predicts. Bytes are counted as rings do: n - 1 of n
parts of a gather or reduce-scatter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import optree
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import funcpipe as fp
from funcpipe._src.comm import group_collectives as teams

RANKS, RATE = 4, 1e-3


class Block(nn.Module):
    """Attention and a gated MLP, each on a normalized copy of the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.gate, self.up = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(width, 4 * width, bias=False),
        )
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block(dict(self.named_parameters()), x, self.heads)


def block(p: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    qkv = F.linear(F.rms_norm(x, p["n1"].shape, p["n1"]), p["qkv.weight"]).unflatten(
        -1, (3, heads, -1)
    )
    q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    x = x + F.linear(y, p["out.weight"])
    h = F.rms_norm(x, p["n2"].shape, p["n2"])
    return x + F.linear(
        F.silu(F.linear(h, p["gate.weight"])) * F.linear(h, p["up.weight"]), p["down.weight"]
    )


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(args.vocabulary, args.width)
        self.blocks = nn.ModuleList(Block(args.width, args.width // 32) for _ in range(args.blocks))
        self.head = nn.Linear(args.width, args.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.blocks:
            x = layer(x)
        return self.head(x)


def cross_entropy(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum")


# ---- the two


def theirs(args: argparse.Namespace, microbatches: int) -> Callable[[Any], float]:
    model = Model(args)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.blocks:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), RATE, foreach=True)
    index = dist.get_rank()

    def step(batch: Any) -> float:
        mine = {k: x.chunk(RANKS)[index].chunk(microbatches) for k, x in batch.items()}
        total = torch.zeros(())
        for ids, labels in zip(mine["ids"], mine["labels"], strict=True):
            # FSDP2 averages gradients over ranks: the loss of a part is scaled so that the average
            # is the mean.
            loss = cross_entropy(model(ids), labels) / batch["ids"].numel() * RANKS
            loss.backward()
            total += loss.detach() / RANKS
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return float(total)

    return step


def loss_fn(heads: int) -> Callable:
    def run(p: Any, batch: Any) -> fp.Mean:
        x = F.embedding(batch["ids"], p["embed"])
        for layer in p["blocks"]:
            x = fp.stage_boundary(block(layer, x, heads))
        return fp.Mean(
            cross_entropy(F.linear(x, p["head"]), batch["labels"]),
            torch.ones_like(batch["ids"]).sum(),
        )

    return run


def ours(
    args: argparse.Namespace, microbatches: int, batch: Any
) -> tuple[Callable[[Any], float], Any]:
    model = Model(args)
    params = {
        "embed": model.embed.weight.detach(),
        "blocks": [{k: p.detach() for k, p in layer.named_parameters()} for layer in model.blocks],
        "head": model.head.weight.detach(),
    }
    loss = loss_fn(args.width // 32)

    def step(state: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(loss)(state, batch)
        leaves, spec = optree.tree_flatten(state)
        torch._foreach_add_(leaves, optree.tree_leaves(grads), alpha=-RATE)
        return optree.tree_unflatten(spec, leaves), {"loss": out}

    transforms = [
        fp.data_parallel(axis="data"),
        fp.sharded_weights(axis="data", prefetch=args.prefetch),
    ]
    transforms += [fp.accumulated(microbatches=microbatches)] if microbatches > 1 else []
    run = fp.spmd(fp.compose(*transforms)(step), fp.Mesh(data=RANKS), device="cpu")
    state = [run.init(lambda p: p, params, batch)]

    def go(batch: Any) -> float:
        state[0], metrics = run(state[0], batch)
        return float(metrics["loss"])

    return go, run.plan(state[0], batch)


# ---- counting


class Counted:
    """Bytes that torch.distributed's collectives bring to this rank, by kind, while it is in a
    ``with``."""

    NAMES = (
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
    )

    def __enter__(self) -> Counter[str]:
        self.bytes: Counter[str] = Counter()
        self.before: list[tuple[Any, str, Any]] = []
        places = [
            (dist, name) for name in (*self.NAMES, "all_to_all_single") if hasattr(dist, name)
        ]
        places += [(teams, "_gather")]
        for place, name in places:
            if hasattr(place, name):
                self.before.append((place, name, getattr(place, name)))
                setattr(place, name, self._wrapped(name, getattr(place, name)))
        return self.bytes

    def _wrapped(self, name: str, fn: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            big = max(x.nbytes for x in tensors[:2])
            kind = "reductions" if "reduce" in name or "to_all" in name else "gathers"
            self.bytes[kind] += big * (RANKS - 1) // RANKS
            return fn(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for place, name, fn in self.before:
            setattr(place, name, fn)


def batches(args: argparse.Namespace) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    out = torch.randint(args.vocabulary, (args.steps, 2, args.rows, args.length), generator=g)
    return [{"ids": ids, "labels": labels} for ids, labels in out]


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = batches(args)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for microbatches in (1, 4):
        mine, plan = ours(args, microbatches, data[0])
        other = theirs(args, microbatches)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for k, batch in enumerate(data):
            losses = {}
            for name, step in (("ours", mine), ("theirs", other))[:: 1 if k % 2 else -1]:
                dist.barrier()
                start = time.perf_counter()
                losses[name] = step(batch)
                times[name].append(time.perf_counter() - start)
            assert abs(losses["ours"] - losses["theirs"]) < 1e-4 * losses["theirs"], losses
        moved = {}
        for name, step in (("ours", mine), ("theirs", other)):
            with Counted() as counted:
                step(data[0])
            moved[name] = dict(counted)
        report(args, microbatches, times, moved, plan)


def report(args: argparse.Namespace, microbatches: int, times: Any, moved: Any, plan: Any) -> None:
    if dist.get_rank():
        return
    a, b = (statistics.median(times[name][2:]) * 1e3 for name in ("ours", "theirs"))
    print(
        f"{microbatches} microbatches: ours {a:.1f} ms, FSDP2 {b:.1f} ms, ratio {a / b:.2f}",
        flush=True,
    )
    for name, counted in moved.items():
        each = ", ".join(f"{kind} {n / 1e6:.2f} MB" for kind, n in sorted(counted.items()))
        print(f"  {name:6} {sum(counted.values()) / 1e6:.2f} MB: {each}")
    print(f"  plan   {sum(plan.traffic[0].values()) / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (
        ("steps", 12), ("width", 256), ("blocks", 6), ("rows", 16), ("length", 32), ("vocabulary", 512), ("prefetch", 1)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    fp.launch(work, RANKS, parser.parse_args())
