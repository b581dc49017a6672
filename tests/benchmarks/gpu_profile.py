"""Where the time of a step goes on each rank, by kind of kernel.

In: a function that runs a step. Out: for every rank, ms of a step by kind, when nothing ran, and at
which clock and power.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

KINDS = (
    ("nccl", ("nccl",)),
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa")),
    ("matrix product", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    ("optimizer", ("adam",)),
    (
        "table",
        ("embedding", "sort", "radix", "indexing", "index_put", "krn_partial", "compute_grad"),
    ),
    ("triton", ("triton",)),
    ("softmax", ("softmax", "nll")),
    ("norm", ("norm", "gammabeta", "cucompute")),
    ("copy", ("memcpy", "memset", "copy_", "copykernel")),
)
_STEPS = 2
_LONG = 30.0  # us: longer than between two kernels of a graph
_BUSY = 1.5  # seconds of steps, during which clock and power are read


def breakdown(go: Callable[[], Any]) -> list[dict[str, float]]:
    """By rank and kind, ms of a step; the longest others by name."""
    from torch.profiler import ProfilerActivity, profile

    clock = _clock(go)  # first: kernels are then profiled as they are after some steps
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(_STEPS):
            go()
        torch.cuda.synchronize()
    ms: Counter[str] = Counter()
    others: Counter[str] = Counter()
    spans = []
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next(
                (kind for kind, parts in KINDS if any(x in event.name.lower() for x in parts)),
                "other",
            )
            took = event.time_range.elapsed_us() / 1e3 / _STEPS
            ms[kind] += took
            others[event.name[:80]] += took if kind in ("other", "triton", "copy") else 0.0
            if kind != "nccl":
                spans.append((event.time_range.start, event.time_range.end))
    mine: dict[str, Any] = {kind: round(x, 2) for kind, x in ms.most_common()} | clock
    gaps = _gaps(spans)
    mine["idle or waiting for messages"] = round(
        sum(length for _, length in gaps) / 1e3 / _STEPS, 2
    )
    longest = sorted((x for x in gaps if x[1] > _LONG), key=lambda gap: -gap[1])[: 10 * _STEPS]
    mine["longest gaps: us at ms"] = [
        (round(length), round(at / 1e3, 1)) for at, length in sorted(longest)
    ]
    mine["longest others"] = {name: round(x, 2) for name, x in others.most_common(6)}
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _clock(go: Callable[[], Any]) -> dict[str, float]:
    """MHz and W of this GPU while steps run, medians; nothing where ``nvidia-smi`` does not
    tell."""
    start = time.perf_counter()
    go()
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix(
        "GPU-"
    )
    what = [
        "--query-gpu=clocks.sm,power.draw.instant",
        "--format=csv,noheader,nounits",
        "--loop-ms=50",
    ]
    try:
        asked = subprocess.Popen(
            ["nvidia-smi", f"--id=GPU-{uuid}", *what], stdout=subprocess.PIPE, text=True
        )
        asked.stdout.readline()  # it takes a while to start
    except OSError:
        asked = None
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, took)
    for _ in range(int(_BUSY / max(found)) + 1):
        go()
    torch.cuda.synchronize()
    if asked is None:
        return {}
    asked.terminate()
    told = [line.split(",") for line in asked.communicate()[0].splitlines()]
    try:
        columns = zip(*[map(float, x) for x in told if len(x) == 2], strict=True)
        return dict(zip(("MHz", "W"), map(statistics.median, columns), strict=True))
    except ValueError:
        return {}


def _gaps(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where, counted from the first start, no span lies, and for how long."""
    out: list[tuple[float, float]] = []
    ordered = sorted(spans)
    first = until = ordered[0][0]
    for start, end in ordered:
        if start > until:
            out.append((until - first, start - until))
        until = max(until, end)
    return out
