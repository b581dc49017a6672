"""Where the time of a step goes on each rank, by kind of kernel.

In: a function that runs a step. Out: for every rank, ms of a step by kind, when nothing ran, and at which clock and power.
"""

from __future__ import annotations

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
    ("table", ("embedding", "sort", "radix", "indexing", "index_put", "krn_partial", "compute_grad")),
    ("triton", ("triton",)),
    ("softmax", ("softmax", "nll")),
    ("norm", ("norm", "gammabeta", "cucompute")),
    ("copy", ("memcpy", "memset", "copy_", "copykernel")),
)
_STEPS = 2
_LONG = 30.0  # us: longer than between two kernels of a graph
_BUSY = 1.5  # seconds of steps, in the midst of which clock and power are read


def breakdown(go: Callable[[], Any]) -> list[dict[str, float]]:
    """By rank and kind, ms of a step; the longest others by name."""
    from torch.profiler import ProfilerActivity, profile

    go()
    torch.cuda.synchronize()
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
            kind = next((kind for kind, parts in KINDS if any(x in event.name.lower() for x in parts)), "other")
            took = event.time_range.elapsed_us() / 1e3 / _STEPS
            ms[kind] += took
            others[event.name[:80]] += took if kind in ("other", "triton", "copy") else 0.0
            if kind != "nccl":
                spans.append((event.time_range.start, event.time_range.end))
    mine: dict[str, Any] = {kind: round(x, 2) for kind, x in ms.most_common()} | _clock(go)
    gaps = _gaps(spans)
    mine["idle or waiting for messages"] = round(sum(length for _, length in gaps) / 1e3 / _STEPS, 2)
    longest = sorted((x for x in gaps if x[1] > _LONG), key=lambda gap: -gap[1])[: 10 * _STEPS]
    mine["longest gaps: us at ms"] = [(round(length), round(at / 1e3, 1)) for at, length in sorted(longest)]
    mine["longest others"] = {name: round(x, 2) for name, x in others.most_common(6)}
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _clock(go: Callable[[], Any]) -> dict[str, float]:
    """MHz and W of this GPU while steps run; nothing where ``nvidia-smi`` is missing."""
    start = time.perf_counter()
    go()
    torch.cuda.synchronize()
    took: list = [None] * dist.get_world_size()
    dist.all_gather_object(took, time.perf_counter() - start)
    for _ in range(int(_BUSY / max(took)) + 1):
        go()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix("GPU-")
    where = f"--id=GPU-{uuid}"
    ask = ["nvidia-smi", where, "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]
    time.sleep(_BUSY / 3)
    try:
        told = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=10).stdout.split(",")
        found = dict(zip(("MHz", "W"), map(float, told), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        found = {}
    torch.cuda.synchronize()
    return found


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
