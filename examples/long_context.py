"""A sequence too long for one rank: four ranks hold a quarter of its positions each.

    python examples/long_context.py                      on four GPUs, or else in four processes
    python examples/long_context.py --simulate           the same four ranks inside this process
    python examples/long_context.py --mesh ring=2,seq=2  a ring, and exchanges of heads in it (USP)

The step is written for one device: a small Llama (`lm.py`) and a loss that never makes all logits
at once. The transforms split the sequence of the batch, and rewrite attention; no line of the model
changes. A rank has a memory budget that the whole sequence exceeds, by its plan. The table shows
what a rank needs for every size of the axis.
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
    params = optree.tree_map(lambda param, grad: param - 0.1 * grad, params, grads)
    return params, {"loss": loss, "norm": norm}


def parallel(mesh: fp.Mesh) -> Callable:
    split: Callable = step
    if "seq" in mesh.axes:
        split = fp.seq_all_to_all(split, axis="seq")
    if "ring" in mesh.axes:
        split = fp.seq_ring(split, axis="ring")
    return split


def make_batch(length: int, number: int) -> dict[str, torch.Tensor]:
    """One long text: numbers that count up, with a start and a pace of their own."""
    generator = torch.Generator().manual_seed(number)
    start, pace = torch.randint(1, 200, (2,), generator=generator).tolist()
    text = (start + pace * torch.arange(length + 1)) // 7 % 256
    return {"tokens": text[None, :-1].contiguous(), "labels": text[None, 1:].contiguous()}


def unchanged(params: Any) -> Any:
    return params


def planned_memory(length: int, mesh: fp.Mesh) -> int:
    """Bytes of activations that a rank needs, by its plan; nothing is run."""
    run = fp.simulate(parallel(mesh), mesh)
    batch = make_batch(length, 0)
    state = run.init(unchanged, init_params(SIZES), batch)
    return run.plan(state, batch).memory[0]["activations"]


def print_memory(args: argparse.Namespace, console: Console) -> None:
    """What a rank needs, for one, two and four ranks on the first axis."""
    table = Table(
        "ranks on the sequence", "activations of a rank", "of one device", "within the budget"
    )
    one_device = planned_memory(args.length, fp.Mesh())
    budget = one_device / 2
    axis = next(iter(args.mesh.axes))
    for ranks in (1, 2, 4):
        needed = planned_memory(args.length, fp.Mesh(**{axis: ranks}))
        table.add_row(
            str(ranks),
            f"{needed / 2**20:.1f} MiB",
            f"{needed / one_device:.2f}",
            "yes" if needed <= budget else "no",
        )
    console.print(
        f"one sequence of {args.length} tokens, a budget of {budget / 2**20:.1f} MiB a rank"
    )
    console.print(table)


def train(run: Any, args: argparse.Namespace, console: Console) -> None:
    batch = {name: leaf.to(run.device) for name, leaf in make_batch(args.length, 0).items()}
    params = optree.tree_map(lambda param: param.to(run.device), init_params(SIZES))
    state = run.init(unchanged, params, batch)
    losses = []
    for number in range(args.steps):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
        console.print(
            f"step {number}  loss {losses[-1]:.4f}  gradient norm {metrics['norm']:.3f}",
            highlight=False,
        )
    if not console.quiet:
        compare(losses[0], args, console)


def compare(first_loss: float, args: argparse.Namespace, console: Console) -> None:
    """The first loss against that of one device."""
    _, metrics = step(init_params(SIZES), make_batch(args.length, 0))
    wanted = float(metrics["loss"])
    error = abs(first_loss - wanted) / wanted
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
        print_memory(args, console)
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
    if options.simulate or "RANK" in os.environ:
        work(options)  # in the second case torchrun has started this process, and the others
    else:
        fp.launch(work, options.mesh.size, options)
