"""Train a language model on the source of Python's standard library, over a pipeline of four
processes.

    python examples/train_lm.py                       on four GPUs if there are four, else in four processes
    python examples/train_lm.py --simulate            the same mesh inside this one process
    python examples/train_lm.py --check --steps 20    first prove that the parallel step computes the same
    python examples/train_lm.py --mesh pipe=2,data=2 --shard data --schedule gpipe --tied
    python examples/train_lm.py --save DIR            checkpoints on the way
    python examples/train_lm.py --resume DIR          go on from the newest one, on this mesh or another
    torchrun --nproc-per-node 4 examples/train_lm.py  in processes that torchrun starts

The step is written for one device (`make_step`); `parallel` says how it is spread. Tokens are
bytes, so there is nothing to download.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
from lm import Sizes, continue_text, init_params, make_loss
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import funcpipe as fp
from funcpipe import checkpoint
from funcpipe.testing import assert_equivalent

SCHEDULES = {"1f1b": fp.schedules.one_f_one_b, "gpipe": fp.schedules.gpipe}
SHORT = {"blocks": 4, "width": 64, "length": 64, "rows": 16, "steps": 30}  # seconds, for CI


class TrainState(NamedTuple):
    params: Any
    opt_state: Any


# ---- the step, for one device, and how it is spread


def make_step(sizes: Sizes, optimizer: fp.optim.Optimizer) -> Callable:
    loss_fn = make_loss(sizes)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, torch.Tensor]]:
        loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
        grads, norm = fp.clip_by_global_norm(grads, 1.0)
        params, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(params, opt_state), {"loss": loss, "grad_norm": norm}

    return step


def parallel(step: Callable, args: argparse.Namespace) -> Callable:
    step = fp.pipelined(
        step, axis="pipe", microbatches=args.microbatches, schedule=SCHEDULES[args.schedule]()
    )
    for axis in [name for name in args.mesh.axes if name != "pipe"]:
        step = fp.data_parallel(step, axis=axis)
    return fp.sharded_weights(step, axis=args.shard) if args.shard else step


# ---- the text


def read_corpus() -> torch.Tensor:
    """The standard library's top-level modules in alphabetical order, as bytes: about 5 MB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batches(
    args: argparse.Namespace, device: torch.device
) -> Callable[[int], dict[str, torch.Tensor]]:
    """From the number of a step to its batch: random pieces of the text, the same on every rank."""
    corpus = read_corpus()

    def batch(step: int) -> dict[str, torch.Tensor]:
        gen = torch.Generator().manual_seed(step)
        starts = torch.randint(len(corpus) - args.length, (args.rows, 1), generator=gen)
        pieces = corpus[starts + torch.arange(args.length + 1)].long().to(device)
        # Labels are shifted here and not in the loss, which may see only a part of a piece.
        return {"tokens": pieces[:, :-1].contiguous(), "labels": pieces[:, 1:].contiguous()}

    return batch


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What batches and learning rates follow from, beside the number of a step: the same again
    after a resume."""
    return {name: getattr(args, name) for name in ("steps", "rows", "length", "lr")}


def resume(run: Any, args: argparse.Namespace) -> tuple[TrainState, int]:
    """The newest state in ``--resume``, and the number of the step to go on with."""
    state, info = checkpoint.load(args.resume, run)
    if info.extra != settings(args):
        raise fp.errors.CheckpointError(
            f"{info.path} was saved with {info.extra}, this run has {settings(args)}"
        )
    if info.step == args.steps:
        raise fp.errors.CheckpointError(
            f"{info.path} is of the last step: there is nothing to go on with"
        )
    return state, info.step


# ---- one rank's work


class Result(NamedTuple):
    losses: list[float]
    build: float  # seconds until the end of the first step: planning, tracing, compiling
    seconds: float  # from there to the end of the last


def work(args: argparse.Namespace) -> Result:
    """What every process does; in a simulation, what the one process does."""
    torch.set_num_threads(1)  # the ranks share the cores
    console, start = Console(quiet=rank() != 0), time.perf_counter()
    console.print("planning: trace, cut, schedule, check", style="dim")
    sizes, optimizer, step = build(args)
    device = torch.device("cpu")
    if args.simulate:
        run = fp.simulate(parallel(step, args), args.mesh)
    else:
        run = fp.spmd(parallel(step, args), args.mesh, device=None if enough_gpus(args) else device)
        device = run.device

    batch = batches(args, device)
    params = optree.tree_map(lambda p: p.to(device), init_params(sizes))
    state = run.init(lambda p: TrainState(p, optimizer.init(p)), params, batch(0))
    first = 0
    if args.resume:
        del state  # one state at a time
        state, first = resume(run, args)
        console.print(f"going on after step {first}")
    state, result = train(run, state, first, batch, args, console, start)
    params = optree.tree_map(torch.Tensor.cpu, run.unplace(state).params)
    if not console.quiet:
        report(console, run.plan(state, batch(0)), params, result, args)
        console.print("\n[bold]What it writes now:[/]")
        sample = continue_text(params, sizes, b"def ", 160).decode("ascii", errors="replace")
        console.print(
            "".join(c for c in sample if c.isprintable() or c == "\n"),
            markup=False,
            highlight=False,
        )
    if not args.simulate:
        run.close()
    return result


def train(
    run: Any,
    state: Any,
    first: int,
    batch: Callable[[int], Any],
    args: argparse.Namespace,
    console: Console,
    start: float,
) -> tuple[Any, Result]:
    texts = ("loss {task.fields[loss]:.3f}", "{task.fields[rate]:,.0f} tokens/s")
    columns = (BarColumn(), MofNCompleteColumn(), *map(TextColumn, texts), TimeRemainingColumn())
    losses: list[float] = []
    saving: checkpoint.Saving | None = None
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("steps", total=args.steps, completed=first, loss=float("nan"), rate=0.0)
        for i in range(first, args.steps):
            state, metrics = run(state, batch(i))
            losses.append(float(metrics["loss"]))
            if i == first:
                built, start = time.perf_counter() - start, time.perf_counter()
            rate = (i - first) * args.rows * args.length / max(time.perf_counter() - start, 1e-9)
            bar.update(task, advance=1, loss=losses[-1], rate=rate)
            if bar.disable and (i % max(args.steps // 10, 1) == 0 or i == args.steps - 1):
                pace = f"{rate:8,.0f} tokens/s" if i > first else f"after {built:.1f} s"
                console.print(f"step {i + 1:4}  loss {losses[-1]:.3f}  {pace}", highlight=False)
            if args.save and ((i + 1) % args.save_every == 0 or i + 1 == args.steps):
                if saving is not None:
                    saving.wait()  # one at a time; until then training went on
                saving = checkpoint.save_async(
                    args.save, run, state, step=i + 1, extra=settings(args), keep=2
                )
    if saving is not None:
        saving.wait()
    return state, Result(losses, built, time.perf_counter() - start)


# ---- what is told at the end


def report(
    console: Console, plan: Any, params: Any, result: Result, args: argparse.Namespace
) -> None:
    count, last = len(result.losses), result.losses[-10:]
    tokens = (count - 1) * args.rows * args.length
    table = Table("training", "")
    table.add_row("loss, first step", f"{result.losses[0]:.3f}")
    table.add_row(f"loss, mean of last {len(last)}", f"{sum(last) / len(last):.3f}")
    table.add_row("steps", f"{count} of {args.rows} x {args.length} tokens")
    table.add_row("time of first step, with planning", f"{result.build:.1f} s")
    table.add_row("time of all others", f"{result.seconds:.1f} s")
    table.add_row("rate", f"{tokens / max(result.seconds, 1e-9):,.0f} tokens/s")
    table.add_row("parameters", f"{sum(p.numel() for p in optree.tree_leaves(params)):,}")
    table.add_row("bubble, by FLOPs", f"{plan.bubble:.1%}")
    console.print(table)

    call = plan.calls[0]
    table = Table("rank on pipe", "stages", "segments", "peak activations", "parameters")
    for place, memory in enumerate(plan.memory):
        stages = [s for s, at in enumerate(call.schedule.table.placement) if at == place]
        segments = [segment for s in stages for segment in call.schedule.stages[s]]
        megabytes = [f"{memory[what] / 2**20:.1f} MiB" for what in ("activations", "params")]
        table.add_row(str(place), *(", ".join(map(str, x)) for x in (stages, segments)), *megabytes)
    console.print(table)
    console.print(f"The timeline of a step is drawn in {plan.save(args.picture)}")


# ---- the command


def build(args: argparse.Namespace) -> tuple[Sizes, fp.optim.Optimizer, Callable]:
    sizes = Sizes(args.blocks, args.width, heads=args.width // 32, tied=args.tied)
    optimizer = fp.optim.adamw(fp.optim.warmup_cosine(args.lr, args.steps // 10, args.steps))
    return sizes, optimizer, make_step(sizes, optimizer)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def enough_gpus(args: argparse.Namespace) -> bool:
    return torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", args.mesh.size))


def check(args: argparse.Namespace) -> None:
    """The parallel step against the plain one, in float64, on the batches that training starts
    with."""
    sizes, optimizer, step = build(args)
    batch, start = batches(args, torch.device("cpu")), time.perf_counter()
    try:
        found = assert_equivalent(
            step,
            parallel(step, args),
            args.mesh,
            lambda p: TrainState(p, optimizer.init(p)),
            init_params(sizes, dtype=torch.float64),
            [batch(0), batch(1)],
        )
    except AssertionError as error:
        sys.exit(f"train_lm: the parallel step computes something else: {error}")
    took = time.perf_counter() - start
    print(
        f"check: two steps equal one device, largest error {found.error:.0e} at {found.where} "
        f"({took:.1f} s)"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    text, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--mesh",
        type=mesh,
        default=fp.Mesh(pipe=4),
        help="pipe, and other axes to split the batch over (pipe=4)",
    )
    add("--simulate", action="store_true", help="run all ranks of the mesh in this process")
    add("--check", action="store_true", help="first compare with a single device, in float64")
    add("--schedule", choices=SCHEDULES, default="1f1b", help="(1f1b)")
    for name, value, what in (
        ("microbatches", 8, "parts of a batch that go through the pipeline one after another"),
        ("steps", 100, "training steps"),
        ("save-every", 25, "steps from one checkpoint to the next"),
        ("rows", 32, "pieces of text in a batch"),
        ("length", 128, "bytes in a piece"),
        ("blocks", 8, "transformer blocks"),
        ("width", 128, "model width, a multiple of 32: each attention head has 32"),
    ):
        add(f"--{name}", type=positive, default=value, metavar="N", help=f"{what} ({value})")
    add("--lr", type=float, default=4e-3, help="peak learning rate (4e-3)")
    add("--shard", metavar="AXIS", help="split weights and optimizer state over this axis")
    add(
        "--tied",
        action="store_true",
        help="read the logits off the embedding: one leaf, used by two stages",
    )
    add(
        "--save",
        metavar="DIR",
        help="save checkpoints there, also after the last step; the newest two stay",
    )
    add(
        "--resume",
        metavar="DIR",
        help="go on from the newest checkpoint there, with the same data and learning rates",
    )
    add("--short", action="store_true", help="a small model and few steps: some seconds in all")
    add(
        "--picture",
        default="train_lm.html",
        metavar="FILE",
        help="where to draw the timeline: .html or .svg",
    )
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)
    if args.width % 32:
        parser.error(f"--width {args.width} is not a multiple of 32")
    if Path(args.picture).suffix not in (".html", ".svg"):
        parser.error(f"--picture {args.picture}: name a file .html or .svg")
    return args


def mesh(text: str) -> fp.Mesh:
    try:
        return fp.Mesh.parse(text)
    except fp.errors.MeshError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.check and rank() == 0:
        check(args)
    if args.simulate or "RANK" in os.environ:  # torchrun has started this process, and the others
        work(args)
    else:
        what = "GPUs" if enough_gpus(args) else "processes, over gloo"
        print(f"{args.mesh!r}: {args.mesh.size} {what}", flush=True)
        fp.launch(work, args.mesh.size, args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except fp.errors.FuncpipeError as error:
        sys.exit(f"train_lm: {error}")
