"""A sequence too long for one rank: its positions split over four, by exchanges of heads, a ring,
or both.

    python examples/long_context.py                      in four processes, over gloo; on GPUs if there are four
    python examples/long_context.py --simulate           the same four ranks inside this process
    python examples/long_context.py --mesh ring=2,seq=2  heads exchanged over "seq", a ring over "ring" (USP)

The step is written for one device: a small Llama (`lm.py`) and a loss that never makes all logits
at once. The transform splits the sequence of the batch, and rewrites attention; no line of the
model changes. A rank is given a budget of memory that the whole sequence exceeds, by its plan; the
table shows what a rank needs for every size of the axis.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import optree
import torch
from lm import Sizes, head, hidden, init_params
from rich.console import Console
from rich.table import Table

import funcpipe as fp

SIZES = Sizes(blocks=2, width=64, heads=4)
RANKS = 4
TOLERANCE = 1e-5  # float32, sums over ranks in another order


def loss_fn(params: Any, batch: dict[str, torch.Tensor]) -> fp.Mean:
    x = hidden(params, batch["tokens"], SIZES)
    return fp.losses.cross_entropy(x, head(params, SIZES), batch["labels"])


def step(params: Any, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    loss, grads = fp.value_and_grad(loss_fn)(params, batch)
    grads, norm = fp.clip_by_global_norm(grads, 1.0)
    return optree.tree_map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss, "norm": norm}


def parallel(mesh: fp.Mesh) -> Callable:
    out: Callable = step
    if "seq" in mesh.axes:
        out = fp.seq_all_to_all(out, axis="seq")
    if "ring" in mesh.axes:
        out = fp.seq_ring(out, axis="ring")
    return out


def make_batch(length: int, number: int) -> dict[str, torch.Tensor]:
    """One long text: numbers that count up, with a start and a pace of their own."""
    start, pace = torch.randint(
        1, 200, (2,), generator=torch.Generator().manual_seed(number)
    ).tolist()
    text = (start + pace * torch.arange(length + 1)) // 7 % 256
    return {"tokens": text[None, :-1].contiguous(), "labels": text[None, 1:].contiguous()}


def planned_memory(length: int, mesh: fp.Mesh) -> int:
    """Bytes of activations that a rank needs, by its plan; nothing is run."""
    run, params, batch = (
        fp.simulate(parallel(mesh), mesh),
        init_params(SIZES),
        make_batch(length, 0),
    )
    return run.plan(run.init(lambda p: p, params, batch), batch).memory[0]["activations"]


def tell(args: argparse.Namespace, console: Console) -> None:
    table = Table(
        "ranks on the sequence", "activations of a rank", "of one device", "within the budget"
    )
    alone = planned_memory(args.length, fp.Mesh())
    budget = alone / 2
    for n in (1, 2, 4):
        name = next(iter(args.mesh.axes))
        need = planned_memory(args.length, fp.Mesh(**{name: n}))
        table.add_row(
            str(n),
            f"{need / 2**20:.1f} MiB",
            f"{need / alone:.2f}",
            "yes" if need <= budget else "no",
        )
    console.print(
        f"one sequence of {args.length} tokens, a budget of {budget / 2**20:.1f} MiB a rank"
    )
    console.print(table)


def train(run: Any, args: argparse.Namespace, console: Console) -> None:
    batch = {k: x.to(run.device) for k, x in make_batch(args.length, 0).items()}
    state = run.init(
        lambda p: p, optree.tree_map(lambda p: p.to(run.device), init_params(SIZES)), batch
    )
    first = None
    for i in range(args.steps):
        state, metrics = run(state, batch)
        first = metrics["loss"] if first is None else first
        console.print(
            f"step {i}  loss {metrics['loss']:.4f}  gradient norm {metrics['norm']:.3f}",
            highlight=False,
        )
    if not console.quiet:
        _, alone = step(init_params(SIZES), make_batch(args.length, 0))
        error = abs(float(first) - float(alone["loss"])) / float(alone["loss"])
        console.print(
            f"the first loss equals that of one device: relative error {error:.0e}", highlight=False
        )
        if not error <= TOLERANCE:
            sys.exit("long_context: the split step computes something else")


def work(args: argparse.Namespace) -> None:
    """What every process runs."""
    torch.set_num_threads(1)
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    if not console.quiet:
        tell(args, console)
    if args.simulate:
        train(fp.simulate(parallel(args.mesh), args.mesh), args, console)
        return
    enough = torch.cuda.device_count() >= args.mesh.size
    run = fp.spmd(parallel(args.mesh), args.mesh, device=None if enough else "cpu")
    train(run, args, console)
    run.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mesh", type=fp.Mesh.parse, default=fp.Mesh(seq=RANKS), help='axes "seq" and "ring"'
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--simulate", action="store_true")
    options = parser.parse_args()
    if (
        options.simulate or "RANK" in os.environ
    ):  # torchrun has started this process, and the others
        work(options)
    else:
        fp.launch(work, options.mesh.size, options)
