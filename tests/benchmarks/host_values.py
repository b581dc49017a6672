"""Host cost of following Python values: reading a hundred of them, and their share in a call of a
runner.

python tests/benchmarks/host_values.py [--values 100] [--rounds 60]

*Read* is one reading of what a loss reads, where nothing has changed; a call of a runner takes two
of them. *Call* is the CPU time of the thread that calls a runner of one rank, with all of that in
it.
"""

from __future__ import annotations

import argparse
import os
import time
import timeit
import types
from collections.abc import Callable
from typing import Any

import torch

import funcpipe as fp
from funcpipe._src.analysis.host_values import Follower


def loss_of(settings: types.SimpleNamespace) -> Callable:
    """A loss that names every field of its settings."""
    terms = " + ".join(f"settings.{name}" for name in vars(settings))
    code = f"lambda w, x: fp.Mean(({terms}) * (x @ w).square().sum(), torch.tensor(float(len(x))))"
    return eval(code, {"fp": fp, "torch": torch, "settings": settings})


def least(run: Callable[[], object], rounds: int, number: int = 100) -> float:
    """Microseconds, the least of some rounds."""
    times = timeit.repeat(run, number=number, repeat=rounds, timer=time.thread_time)
    return min(times) / number * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loss_fn = loss_of(types.SimpleNamespace(**{f"v{k}": float(k) for k in range(args.values)}))
    follower = Follower(set())
    print(
        f"read {args.values} values: {least(lambda: follower.values(loss_fn), args.rounds):.1f} us"
    )

    def step(w: torch.Tensor, x: torch.Tensor) -> Any:
        loss, grad = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.0 * grad, {"loss": loss}

    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29613",
    }
    run = fp.spmd(fp.accumulated(step, microbatches=2), fp.Mesh(), device="cpu")
    x = torch.randn(8, 4)
    held = [run.init(lambda w: w, torch.randn(4), x)]

    def call() -> None:
        held[0], _ = run(held[0], x)

    print(f"call: {least(call, args.rounds):.0f} us")
    run.close()


if __name__ == "__main__":
    main()
