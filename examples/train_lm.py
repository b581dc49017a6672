"""Train a language model on the source of Python's standard library, over a pipeline.

    python examples/train_lm.py                       on four GPUs, or else in four processes
    python examples/train_lm.py --simulate            the same mesh inside this one process
    python examples/train_lm.py --check --steps 20    first compare the step with one device
    python examples/train_lm.py --mesh pipe=2,data=2 --shard data --schedule gpipe --tied
    python examples/train_lm.py --save DIR            checkpoints on the way
    python examples/train_lm.py --resume DIR          go on from the newest one, on any mesh
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
    schedule = SCHEDULES[args.schedule]()
    step = fp.pipelined(step, axis="pipe", microbatches=args.microbatches, schedule=schedule)
    for axis in args.mesh.axes:
        if axis != "pipe":
            step = fp.data_parallel(step, axis=axis)
    if args.shard:
        step = fp.sharded_weights(step, axis=args.shard)
    return step


# ---- the text


def read_corpus() -> torch.Tensor:
    """The standard library's top-level modules in alphabetical order, as bytes: about 5 MB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(
    args: argparse.Namespace, device: torch.device
) -> Callable[[int], dict[str, torch.Tensor]]:
    """From the number of a step to its batch: random rows of the text, the same on every rank."""
    corpus = read_corpus()

    def batch(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(corpus) - args.length, (args.rows, 1), generator=generator)
        rows = corpus[starts + torch.arange(args.length + 1)].long().to(device)
        # Labels are shifted here and not in the loss, which may see only a part of a row.
        return {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}

    return batch


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What batches and learning rates follow from, beside the number of a step.

    They must be the same after a resume.
    """
    return {"steps": args.steps, "rows": args.rows, "length": args.length, "lr": args.lr}


def resume(run: Any, args: argparse.Namespace) -> tuple[TrainState, int]:
    """The newest state in ``--resume``, and how many steps it has made."""
    state, info = checkpoint.load(args.resume, run)
    if info.extra != settings(args):
        raise fp.errors.CheckpointError(
            f"{info.path} was saved with {info.extra}, this run has {settings(args)}"
        )
    return state, info.step


# ---- one rank's work


class Result(NamedTuple):
    losses: list[float]  # of the steps of this run
    build: float = 0.0  # seconds until the end of the first step: planning, tracing, compiling
    seconds: float = 0.0  # from there to the end of the last


def work(args: argparse.Namespace) -> Result:
    """What every process does; in a simulation, what the one process does."""
    torch.set_num_threads(1)  # the ranks share the cores
    start = time.perf_counter()
    console = Console(quiet=rank() != 0)
    console.print("planning: trace, cut, schedule, check", style="dim")
    sizes, optimizer, step = build(args)
    run, device = make_runner(parallel(step, args), args)
    batch = batches(args, device)
    params = optree.tree_map(lambda param: param.to(device), init_params(sizes))
    state = run.init(lambda p: TrainState(p, optimizer.init(p)), params, batch(0))
    first = 0
    if args.resume:
        del state  # one state at a time
        state, first = resume(run, args)
    if first == args.steps:
        # A job that is restarted, as by torchrun --max-restarts, may have been done.
        console.print(f"the run is complete: {args.resume} has all {args.steps} steps")
        result = Result(losses=[])
    else:
        if first:
            console.print(f"going on after step {first}")
        state, result = train(run, state, first, batch, args, console, start)
        params = optree.tree_map(torch.Tensor.cpu, run.unplace(state).params)
        if not console.quiet:
            report(console, run.plan(state, batch(0)), params, result, args)
            print_sample(console, params, sizes)
    if not args.simulate:
        run.close()
    return result


def make_runner(step: Callable, args: argparse.Namespace) -> tuple[Any, torch.device]:
    """A runner, and the device of this process."""
    if args.simulate:
        return fp.simulate(step, args.mesh), torch.device("cpu")
    run = fp.spmd(step, args.mesh, device=None if enough_gpus(args) else torch.device("cpu"))
    return run, run.device


def train(
    run: Any,
    state: Any,
    first: int,
    batch: Callable[[int], Any],
    args: argparse.Namespace,
    console: Console,
    start: float,
) -> tuple[Any, Result]:
    """The steps from ``first`` on. ``start`` is when this process began."""
    losses: list[float] = []
    build_seconds = 0.0
    saving: checkpoint.Saving | None = None
    with progress_bar(console) as bar:
        task = bar.add_task("steps", total=args.steps, completed=first, loss=float("nan"), rate=0.0)
        for number in range(first, args.steps):
            state, metrics = run(state, batch(number))
            losses.append(float(metrics["loss"]))
            if number == first:
                build_seconds = time.perf_counter() - start
                start = time.perf_counter()
            tokens = (number - first) * args.rows * args.length
            rate = tokens / max(time.perf_counter() - start, 1e-9)
            bar.update(task, advance=1, loss=losses[-1], rate=rate)
            done = number + 1
            if bar.disable and is_told(number, args):
                pace = f"{rate:8,.0f} tokens/s" if losses[1:] else f"after {build_seconds:.1f} s"
                console.print(f"step {done:4}  loss {losses[-1]:.3f}  {pace}", highlight=False)
            if args.save and (done % args.save_every == 0 or done == args.steps):
                if saving is not None:
                    saving.wait()  # one at a time; until then training went on
                saving = checkpoint.save_async(
                    args.save, run, state, step=done, extra=settings(args), keep=2
                )
    if saving is not None:
        saving.wait()
    return state, Result(losses, build_seconds, time.perf_counter() - start)


def is_told(number: int, args: argparse.Namespace) -> bool:
    """Whether a step is one of about ten that are printed."""
    return number % max(args.steps // 10, 1) == 0 or number == args.steps - 1


def progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


# ---- what is printed at the end


def report(
    console: Console,
    plan: Any,
    params: Any,
    result: Result,
    args: argparse.Namespace,
) -> None:
    count, last = len(result.losses), result.losses[-10:]
    tokens = (count - 1) * args.rows * args.length
    parameters = sum(param.numel() for param in optree.tree_leaves(params))
    table = Table("training", "")
    table.add_row("loss, first step", f"{result.losses[0]:.3f}")
    table.add_row(f"loss, mean of last {len(last)}", f"{sum(last) / len(last):.3f}")
    table.add_row("steps", f"{count} of {args.rows} x {args.length} tokens")
    table.add_row("time of first step, with planning", f"{result.build:.1f} s")
    table.add_row("time of all others", f"{result.seconds:.1f} s")
    table.add_row("rate", f"{tokens / max(result.seconds, 1e-9):,.0f} tokens/s")
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("bubble, by FLOPs", f"{plan.bubble:.1%}")
    console.print(table)

    call = plan.calls[0]
    table = Table("rank on pipe", "stages", "segments", "peak activations", "parameters")
    for pipeline_rank, memory in enumerate(plan.memory):
        placed = enumerate(call.schedule.table.placement)
        stages = [stage for stage, on_rank in placed if on_rank == pipeline_rank]
        segments = [str(segment) for stage in stages for segment in call.schedule.stages[stage]]
        table.add_row(
            str(pipeline_rank),
            ", ".join(map(str, stages)),
            ", ".join(segments),
            f"{memory['activations'] / 2**20:.1f} MiB",
            f"{memory['params'] / 2**20:.1f} MiB",
        )
    console.print(table)
    console.print(f"The timeline of a step is drawn in {plan.save(args.picture)}")


def print_sample(console: Console, params: Any, sizes: Sizes) -> None:
    console.print("\n[bold]What it writes now:[/]")
    sample = continue_text(params, sizes, b"def ", 160).decode("ascii", errors="replace")
    console.print(printable(sample), markup=False, highlight=False)


def printable(text: str) -> str:
    return "".join(char for char in text if char.isprintable() or char == "\n")


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
    """The parallel step against the plain one, in float64, on the batches of the first steps."""
    sizes, optimizer, step = build(args)
    batch = batches(args, torch.device("cpu"))
    start = time.perf_counter()
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
    seconds = time.perf_counter() - start
    print(
        f"check: two steps equal one device, largest error {found.error:.0e} at {found.where} "
        f"({seconds:.1f} s)"
    )


COUNTS = (
    ("microbatches", 8, "parts of a batch that go through the pipeline one after another"),
    ("steps", 100, "training steps"),
    ("save-every", 25, "steps from one checkpoint to the next"),
    ("rows", 32, "rows of text in a batch"),
    ("length", 128, "bytes in a row"),
    ("blocks", 8, "transformer blocks"),
    ("width", 128, "model width, a multiple of 32: each attention head has 32"),
)
FLAGS = (
    ("simulate", "run all ranks of the mesh in this process"),
    ("check", "first compare with a single device, in float64"),
    ("tied", "read the logits off the embedding: one leaf, used by two stages"),
    ("short", "a small model and few steps: some seconds in all"),
)
SAVE = "save checkpoints there, also after the last step; the newest two stay"
RESUME = "go on from the newest checkpoint there, with the same data and learning rates"
MESH = "pipe, and other axes to split the batch over (pipe=4)"


def parse(argv: list[str]) -> argparse.Namespace:
    text, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--mesh", type=mesh, default=fp.Mesh(pipe=4), help=MESH)
    add("--schedule", choices=SCHEDULES, default="1f1b", help="(1f1b)")
    add("--lr", type=float, default=4e-3, help="peak learning rate (4e-3)")
    add("--shard", metavar="AXIS", help="split weights and optimizer state over this axis")
    add("--save", metavar="DIR", help=SAVE)
    add("--resume", metavar="DIR", help=RESUME)
    add("--picture", default="train_lm.html", metavar="FILE", help="the timeline: .html or .svg")
    for name, default, meaning in COUNTS:
        help = f"{meaning} ({default})"
        add(f"--{name}", type=positive, default=default, metavar="N", help=help)
    for name, meaning in FLAGS:
        add(f"--{name}", action="store_true", help=meaning)
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
        devices = "GPUs" if enough_gpus(args) else "processes, over gloo"
        print(f"{args.mesh!r}: {args.mesh.size} {devices}", flush=True)
        fp.launch(work, args.mesh.size, args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except fp.errors.FuncpipeError as error:
        sys.exit(f"train_lm: {error}")
