"""Metrics of single leaves: a rank that lacks a leaf gets its metrics from one that holds it.

In: the metrics that a rank's step returned, with None where it lacks them. Out: all of them, the
same on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.planning.placement import LeafMetric, StatePlacement


def complete(metrics: Any, placement: StatePlacement, comm: Communicator) -> Any:
    """The metrics with those that some ranks lack; all ranks call it alike."""
    if not placement.leaf_metrics:
        return metrics
    leaves = tree.leaves_or_none(placement.metrics_spec, metrics)
    by_dtype: dict[torch.dtype, list[LeafMetric]] = defaultdict(list)
    for metric in placement.leaf_metrics:
        if isinstance(metric.like, torch.Tensor):
            by_dtype[_exchanged_as(metric.like.dtype)].append(metric)
        else:
            leaves[metric.number] = metric.like
    for dtype, alike in by_dtype.items():
        arrived = _exchange(alike, leaves, dtype, placement, comm)
        for metric, flat in zip(alike, arrived, strict=True):
            like = metric.like
            leaves[metric.number] = flat.view(like.shape).to(like.dtype)
    return tree.unflatten(placement.metrics_spec, leaves)


def _exchange(
    metrics: list[LeafMetric],
    leaves: list[Any],
    dtype: torch.dtype,
    placement: StatePlacement,
    comm: Communicator,
) -> tuple[torch.Tensor, ...]:
    """Every metric, flat, from the lowest rank that has it; the other ranks add zeros."""
    parts = []
    for metric in metrics:
        if placement.tells(comm.rank, metric.pipeline_rank):
            part = leaves[metric.number]
        else:
            part = torch.zeros(metric.like.shape, device=comm.device)
        parts.append(part.to(dtype).reshape(-1))
    axes = tuple(comm.mesh.axes)
    packed = comm.all_reduce(torch.cat(parts), axes)
    lengths = list(map(len, parts))
    return packed.split(lengths)


def _exchanged_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this one travel unchanged."""
    if dtype.is_complex:
        return torch.complex128
    if dtype.is_floating_point:
        return torch.float64
    return torch.int64
