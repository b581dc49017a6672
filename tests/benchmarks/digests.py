"""What it takes ranks to agree before a step: every one tells all others a number, beside gloo's
sum of vectors in which each has a place.

python tests/benchmarks/digests.py [--ranks 2 4] [--rounds 100]

*Rest*: after 20 ms in which no rank did anything, as when the host waits for every step. *Row*: the
median one of four in a row after that, with 0.3 ms of other work before each, as when it is ahead.
*Hot*: one after another. Meanwhile, in the first two, a rank makes something for 40 us, as the next
state. Medians on rank 0, us.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import funcpipe as fp
from funcpipe._src.comm.process_group import ProcessGroupCommunicator

Tell = Callable[[int, Callable[[], object]], list[int]]


def by_sum(group: dist.ProcessGroup) -> Tell:
    def tell(n: int, meanwhile: Callable[[], object]) -> list[int]:
        out = torch.zeros(group.size(), dtype=torch.int64)
        out[group.rank()] = n
        work = dist.all_reduce(out, group=group, async_op=True)
        meanwhile()
        work.wait()
        return out.tolist()

    return tell


def busy(us: float) -> None:
    end = time.perf_counter() + us / 1e6
    while time.perf_counter() < end:
        pass


def seconds(tell: Tell, us: float) -> float:
    start = time.perf_counter()
    tell(1, lambda: busy(us))
    return time.perf_counter() - start


def worker(rounds: int) -> list[list[float]]:
    """For ours and for the sum, us from rest, in a row, hot."""
    torch.set_num_threads(1)
    comm = ProcessGroupCommunicator(fp.Mesh(data=int(os.environ["WORLD_SIZE"])), "cpu")
    tells = (comm.exchange_digest, by_sum(dist.new_group(backend="gloo")))
    found: list[list[list[float]]] = [[[], [], []] for _ in tells]
    for _ in range(rounds):
        for tell, (rest, row, hot) in zip(tells, found, strict=True):
            dist.barrier()
            time.sleep(0.02)
            rest.append(seconds(tell, 40))
            for _ in range(4):
                busy(300)
                row.append(seconds(tell, 40))
            hot += [seconds(tell, 0) for _ in range(10)]
    comm.close()
    return [[1e6 * statistics.median(x) for x in times] for times in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    table = Table("ranks", "who", "rest", "row", "hot")
    for ranks in options.ranks:
        found = fp.launch(worker, ranks, options.rounds)[0]
        for who, times in zip(("funcpipe", "gloo's sum"), found, strict=True):
            table.add_row(str(ranks), who, *(f"{x:.0f}" for x in times))
    Console().print(table)


if __name__ == "__main__":
    main()
