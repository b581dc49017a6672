"""Measured against predicted: steps over gloo whose units sleep for known times, for every
schedule.

python tests/benchmarks/schedules.py [--pipe 2] [--microbatches 8] [--unit 0.02] [--names
one_f_one_b zb_v]

Units compute nothing and sleep: F, I and W of a segment for ``--unit`` seconds each, B for two of
them; so that what is measured is the order of the actions, the wire and the runtime. *Error* is
measured over predicted. *Steady state* is what each further step takes where ranks go from one to
the next without waiting for each other, as captured steps on GPUs do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import funcpipe as fp
from funcpipe._src.schedule.catalogue import NAMES, by_name

WIDTH = 64


def loss_fn(params: list[torch.Tensor], batch: torch.Tensor) -> fp.Mean:
    x = batch
    for p in params:
        x = fp.stage_boundary(torch.sin(x @ p))
    return fp.Mean(x.square().sum(), torch.tensor(float(x.shape[0])))


def step(state: list[torch.Tensor], batch: torch.Tensor) -> tuple:
    return state, {"loss": fp.value_and_grad(loss_fn)(state, batch)[0]}


def asleep(run: Any, seconds: Callable[[str], float]) -> None:
    """Units that sleep instead of computing."""
    for rank in run._bound.values():
        for call in rank.calls:
            instructions = list(call.bound.instructions)
            for n, written in enumerate(call.program.instructions):
                if written.unit is not None:
                    ready = tuple(torch.zeros(v.shape, dtype=v.dtype) for v in written.unit.outputs)
                    sleeper = _Sleeper(seconds(written.unit.kind), ready)
                    instructions[n] = instructions[n]._replace(run=sleeper)
            call.bound = dataclasses.replace(call.bound, instructions=tuple(instructions))


class _Sleeper:
    def __init__(self, seconds: float, ready: tuple) -> None:
        self.seconds, self.ready = seconds, ready

    def __call__(self, args: list) -> tuple:
        args.clear()
        time.sleep(self.seconds)
        return self.ready


def in_a_row(run: Any, state: Any, batch: Any, steps: int) -> float:
    """Seconds that the slowest rank takes for so many steps, with nothing between them that ranks
    agree on."""
    (rank,) = run._bound.values()
    rank.comm.exchange(None)
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            rank.step(state, batch)
            rank.comm.flush()
    return max(rank.comm.exchange(time.perf_counter() - start))


def worker(
    names: list[str], microbatches: int, unit: float, rounds: int
) -> list[tuple[str, float, float, float, float]]:
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    seconds = {"F": unit, "I": unit, "W": unit, "B": 2 * unit}
    out = []
    for name in names:
        found_for = fp.schedules.auto(costs=fp.schedules.Costs(seconds))
        schedule_fn = found_for if name == "auto" else by_name(name)
        run = fp.spmd(
            fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule_fn),
            fp.Mesh(pipe=ranks),
        )
        params = [torch.eye(WIDTH) for _ in range(2 * ranks - 1)]
        batch = torch.zeros(microbatches, WIDTH)
        state = run.init(lambda p: p, params, batch)
        run(state, batch)
        asleep(run, seconds.__getitem__)
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            run(state, batch)
            times.append(time.perf_counter() - start)
        predicted = run.plan(state, batch).predict(seconds)
        steady = (in_a_row(run, state, batch, 1 + rounds) - in_a_row(run, state, batch, 1)) / rounds
        laid_out = run.plan(state, batch).calls[0].schedule.table.name
        shown = f"auto, found {laid_out}" if name == "auto" else laid_out
        out.append(
            (shown, predicted.step_time, statistics.median(times[1:]), predicted.period, steady)
        )
        run.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipe", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument(
        "--unit", type=float, default=0.02, help="seconds of an F, I or W of a segment"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--names", nargs="+", default=[*(n for n in NAMES if n != "forward_only"), "auto"]
    )
    o = parser.parse_args()
    titles = ("predicted ms", "measured ms", "error")
    table = Table("schedule", *titles, "steady state: predicted", *titles[1:])
    table.title = f"{o.pipe} ranks, {o.microbatches} microbatches"
    for name, *times in fp.launch(worker, o.pipe, o.names, o.microbatches, o.unit, o.rounds)[0]:
        cells = []
        for predicted, measured in zip(times[::2], times[1::2], strict=True):
            cells += [
                f"{1e3 * predicted:.1f}",
                f"{1e3 * measured:.1f}",
                f"{measured / predicted - 1:+.1%}",
            ]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
