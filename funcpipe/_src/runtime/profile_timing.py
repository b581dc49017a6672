"""Timing of pieces: one after another on the host's clock, or in CUDA graphs on the GPU's.

In: for every piece functions that run it, each on tensors of its own. Out: its time in seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch.cuda import CUDAGraph, Event

_REPEATS = 9  # of a piece in one graph, so that it is timed as it runs among others
_WARM = 1.0  # seconds of work before a GPU's clock is that of a step in the midst of others

Run = Callable[[], None]
Pieces = list[list[Run]]  # for every piece, functions that run it


def median_times(pieces: Pieces, device: torch.device, rounds: int) -> list[float]:
    """The medians of some rounds, after one that is not timed."""
    return [_median_of(run, device, rounds) for run, *_ in pieces]


def _median_of(run: Run, device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def replayed_times(pieces: Pieces, device: torch.device, rounds: int) -> list[float]:
    """The times of pieces in CUDA graphs, which the host does not slow down.

    They run in turn and without a break, as in a step: a GPU that has been idle, or that does the
    same thing all the time, has another clock.
    """
    pool = torch.cuda.graph_pool_handle()  # shared: what a piece makes is gone when the next runs
    graphs = [_captured(runs, device, pool) for runs in pieces]
    times: list[list[float]] = [[] for _ in pieces]
    warm = time.perf_counter() + _WARM
    while len(times[0]) < rounds:
        events = [Event(enable_timing=True)]
        events[0].record()
        for graph in graphs:
            graph.replay()
            events.append(Event(enable_timing=True))
            events[-1].record()
        _finish(device)
        if time.perf_counter() <= warm:
            continue
        for piece, found in enumerate(times):
            milliseconds = events[piece].elapsed_time(events[piece + 1])
            found.append(milliseconds / 1e3 / _REPEATS)
    for graph in graphs:
        graph.reset()
    return list(map(statistics.median, times))


def _captured(runs: list[Run], device: torch.device, pool: Any) -> CUDAGraph:
    """Some repeats of a piece as a graph, on its sets of tensors in turn."""
    runs[0]()  # compiles kernels, makes workspaces
    _finish(device)
    graph = CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        for run in islice(cycle(runs), _REPEATS):
            run()
    return graph


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
