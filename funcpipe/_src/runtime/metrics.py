"""Metrics of single leaves: a rank that lacks a leaf is told its metrics by one that holds it.

In: the metrics that a rank's step returned, with None where it lacks them. Out: all of them, the
same on every rank.
"""

from __future__ import annotations

from typing import Any

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.planning.placement import LeafMetric, StatePlacement


def complete(metrics: Any, placement: StatePlacement, comm: Communicator) -> Any:
    """The metrics with those that some ranks lack."""
    if not placement.leaf_metrics:
        return metrics
    leaves = tree.leaves_or_none(placement.metrics_spec, metrics)
    tensors = []
    for metric in placement.leaf_metrics:
        if isinstance(metric.like, torch.Tensor):
            tensors.append(metric)
        else:
            leaves[metric.number] = metric.like
    for wide in dict.fromkeys(_wide(metric.like.dtype) for metric in tensors):
        alike = [metric for metric in tensors if _wide(metric.like.dtype) == wide]
        for metric, x in zip(alike, _told(alike, leaves, wide, placement, comm), strict=True):
            leaves[metric.number] = x.view(metric.like.shape).to(metric.like.dtype)
    return tree.unflatten(placement.metrics_spec, leaves)


def _told(
    metrics: list[LeafMetric],
    leaves: list[Any],
    dtype: torch.dtype,
    placement: StatePlacement,
    comm: Communicator,
) -> tuple[torch.Tensor, ...]:
    """What the lowest rank that has a metric tells of it: the others add zeros."""
    parts = []
    for metric in metrics:
        mine = placement.tells(comm.rank, metric.pipeline_rank)
        x = leaves[metric.number] if mine else torch.zeros(metric.like.shape, device=comm.device)
        parts.append(x.to(dtype).reshape(-1))
    packed = comm.all_reduce(torch.cat(parts), tuple(comm.mesh.axes))
    return packed.split([len(x) for x in parts])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this one travel unchanged."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else torch.int64
