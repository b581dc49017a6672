"""`seq_all_to_all` and `seq_ring` beside a hand-written Ulysses and torch's context_parallel: step
time, one sequence split.

    python tests/benchmarks/sequence.py [--ranks 4] [--length 2048] [--steps 12]        gloo, one thread a process
    python tests/benchmarks/sequence.py --ranks 2 --cuda --length 32768 --width 2048    NCCL, one GPU a process

All run the same transformer on the same batch: forward, backward, gradients summed over ranks, SGD;
in turns, in the same processes. Printed are medians of rank 0 and their ratio, ours over theirs.
torch's context_parallel (an experimental ring attention) knows kernels of GPUs only, so it stands
on GPUs alone. With ``--cuda`` weights are bfloat16, and ours runs as one CUDA graph beside eagerly,
theirs eagerly and with compiled blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import optree
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import funcpipe as fp

RATE = 1e-3
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def init(args: argparse.Namespace) -> Any:
    g = torch.Generator().manual_seed(0)
    w = args.width
    dtype = torch.bfloat16 if args.cuda else torch.float32

    def rand(*shape):
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(args.device, dtype)

    def block():
        return {
            "qkv": rand(3 * w, w),
            "out": rand(w, w),
            "up": rand(4 * w, w),
            "down": rand(w, 4 * w),
        }

    return {"embed": rand(args.vocabulary, w), "blocks": [block() for _ in range(args.blocks)]}


def block(p: Any, x: torch.Tensor, heads: int, attention: Attention) -> torch.Tensor:
    qkv = F.linear(F.rms_norm(x, x.shape[-1:]), p["qkv"]).unflatten(-1, (3, heads, -1))
    y = attention(*(y.transpose(1, 2) for y in qkv.unbind(2))).transpose(1, 2).flatten(-2)
    x = x + F.linear(y, p["out"])
    return x + F.linear(F.gelu(F.linear(F.rms_norm(x, x.shape[-1:]), p["up"])), p["down"])


def total_loss(
    p: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    heads: int,
    attention: Attention,
    layer: Any = block,
) -> Any:
    x = F.embedding(ids, p["embed"])
    for some in p["blocks"]:
        x = fp.stage_boundary(layer(some, x, heads, attention))
    return F.cross_entropy(
        F.linear(x, p["embed"]).flatten(0, 1).float(), labels.flatten(), reduction="sum"
    )


# ---- by hand


class Exchange(torch.autograd.Function):
    """DeepSpeed-Ulysses' all-to-all: (batch, heads, slice, d) to (batch, some heads, all, d), or
    back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: int, join: int) -> torch.Tensor:
        ctx.dims = split, join
        n = dist.get_world_size()
        pieces = torch.stack(x.chunk(n, split))
        out = torch.empty_like(pieces)
        dist.all_to_all_single(out, pieces)
        return torch.cat(list(out), join)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        split, join = ctx.dims
        return Exchange.apply(g.contiguous(), join, split), None, None


def ulysses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (Exchange.apply(x, 1, 2) for x in (q, k, v))
    return Exchange.apply(attend(q, k, v), 2, 1)


def theirs(
    args: argparse.Namespace, attention: Attention, compiled: bool, context: Callable
) -> Callable[[Any], float]:
    params = init(args)
    leaves = optree.tree_leaves(params)
    layer = torch.compile(block) if compiled else block

    def step(batch: Any) -> float:
        for p in leaves:
            p.requires_grad_(True)
        n, r = dist.get_world_size(), dist.get_rank()
        ids, labels = (x.clone() for x in (batch["ids"], batch["labels"]))
        with context([ids, labels]):
            if context is alone:
                ids, labels = (x.chunk(n, 1)[r].contiguous() for x in (ids, labels))
            total = total_loss(params, ids, labels, args.heads, attention, layer)
            grads = torch.autograd.grad(total, leaves)
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        total = total.detach()
        dist.all_reduce(total)
        with torch.no_grad():
            pieces = (flat / batch["ids"].numel()).split([p.numel() for p in leaves])
            updates = [u.view_as(p) for u, p in zip(pieces, leaves, strict=True)]
            torch._foreach_add_(leaves, updates, alpha=-RATE)
        return float(total / batch["ids"].numel())

    return step


@contextlib.contextmanager
def alone(buffers: Any) -> Any:
    yield


def torch_context(mesh: Any) -> Callable:
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    @contextlib.contextmanager
    def context(buffers: Any) -> Any:
        with (
            sdpa_kernel(SDPBackend.FLASH_ATTENTION),
            context_parallel(
                mesh,
                buffers=buffers,
                buffer_seq_dims=[1] * len(buffers),
                no_restore_buffers=set(buffers),
            ),
        ):
            yield

    return context


# ---- ours


def ours(
    args: argparse.Namespace, transform: Callable, axis: str, **options: Any
) -> Callable[[Any], float]:
    def loss_fn(p: Any, b: Any) -> fp.Mean:
        return fp.Mean(
            total_loss(p, b["ids"], b["labels"], args.heads, attend),
            torch.ones_like(b["ids"]).sum(),
        )

    def step(state: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(loss_fn)(state, batch)
        leaves, spec = optree.tree_flatten(state)
        torch._foreach_add_(leaves, optree.tree_leaves(grads), alpha=-RATE)
        return optree.tree_unflatten(spec, leaves), {"loss": out}

    run = fp.spmd(
        transform(axis=axis)(step), fp.Mesh(**{axis: args.ranks}), device=args.device, **options
    )
    state = [run.init(lambda p: p, init(args), batches(args)[0])]

    def go(batch: Any) -> float:
        state[0], metrics = run(state[0], batch)
        return float(metrics["loss"])

    return go


# ---- side by side


def batches(args: argparse.Namespace) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    out = torch.randint(args.vocabulary, (args.steps, 2, 1, args.length), generator=g).to(
        args.device
    )
    return [{"ids": ids, "labels": labels} for ids, labels in out]


def contestants(args: argparse.Namespace) -> dict[str, Callable[[Any], float]]:
    out = {
        "ours, heads": ours(args, fp.seq_all_to_all, "seq"),
        "ours, ring": ours(args, fp.seq_ring, "ring"),
        "by hand, heads": theirs(args, ulysses, False, alone),
    }
    if args.cuda:
        out["ours, heads, graph"] = ours(
            args, fp.seq_all_to_all, "seq", backend="inductor", cuda_graph=True
        )
        if args.all:  # its units take a minute to compile
            out["ours, ring, graph"] = ours(
                args, fp.seq_ring, "ring", backend="inductor", cuda_graph=True
            )
        out["by hand, heads, compiled"] = theirs(args, ulysses, True, alone)
        context = torch_context(init_device_mesh("cuda", (args.ranks,)))
        out["torch context_parallel"] = theirs(args, attend, False, context)
    return out


def work(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.device = torch.device("cpu")
    if args.cuda:
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(args.device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if args.cuda else "gloo", device_id=args.device if args.cuda else None
        )
    some, data = contestants(args), batches(args)
    times: dict[str, list[float]] = {name: [] for name in some}
    for k, batch in enumerate(data):
        losses = {}
        for name, step in list(some.items())[:: 1 if k % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            losses[name] = step(batch)
            times[name].append(time.perf_counter() - start)
            if k == 0 and dist.get_rank() == 0:
                print(
                    f"  {name}: first step after {times[name][0]:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
        first = losses["by hand, heads"]
        assert all(
            abs(x - first) < (2e-2 if args.cuda else 1e-4) * first for x in losses.values()
        ), losses
    if dist.get_rank() == 0:
        medians = {name: statistics.median(x[2:]) * 1e3 for name, x in times.items()}
        theirs_best = min(t for name, t in medians.items() if not name.startswith("ours"))
        print(
            f"{args.ranks} ranks, {args.length} tokens, width {args.width}, {args.blocks} blocks, "
            f"{args.heads} heads"
        )
        for name, t in medians.items():
            print(
                f"  {name:26} {t:8.1f} ms, over the best of theirs {t / theirs_best:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("ranks", 4), ("steps", 12), ("width", 256), ("blocks", 4), ("heads", 8), ("length", 2048), ("vocabulary", 512)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    fp.launch(work, options.ranks, options)
