"""Weight buckets: sharded leaves in one collective.

A leaf of ``numel`` elements has shards of ``ceil(numel / parts)`` elements; the last ones are
padded with zeros that are dropped on arrival. The shards of all leaves of a bucket, one after
another, are what one rank brings or gets.

In: a bucket, a communicator. Out: functions that start a gather or a reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from funcpipe._src.comm import Communicator, Done, Pending
from funcpipe._src.program import Bucket, BucketEntry
from funcpipe._src.program.shard_shapes import extent, shard_shape

Tensors = list[torch.Tensor]
Finish = Callable[[torch.Tensor], Tensors]  # from what a collective brings
Start = Callable[[Tensors], list[Any]]


class _Finishing:
    """A collective under way, and what becomes of its result."""

    def __init__(self, pending: Pending, finish: Finish) -> None:
        self.pending = pending
        self.finish = finish

    def wait(self) -> Tensors:
        result = self.pending.wait()
        return self.finish(result)


def gather(bucket: Bucket, comm: Communicator) -> Start:
    """From this rank's shards to unsharded leaves; what is returned is under way."""

    def finish(out: torch.Tensor) -> Tensors:
        return _unsharded(out, bucket)

    def start(shards: Tensors) -> list[Any]:
        padded = []
        for shard, entry in zip(shards, bucket.entries, strict=True):
            flat = shard.reshape(-1)
            converted = flat.to(bucket.dtype)
            padded.append(_padded(converted, entry.shard_elements))
        packed = _joined(padded, 0)
        pending = comm.start_all_gather(packed, bucket.axes)
        return [_Finishing(pending, finish)]

    return start


def _unsharded(out: torch.Tensor, bucket: Bucket) -> Tensors:
    """The leaves of ``out`` [ranks, shard elements of the bucket]."""
    leaves = []
    columns = out.split(_lengths(bucket), 1)
    for column, entry in zip(columns, bucket.entries, strict=True):
        padded = column.reshape(-1)
        flat = padded[: entry.numel]
        leaves.append(flat.view(entry.shape))
    return leaves


def _lengths(bucket: Bucket) -> list[int]:
    """Elements of the shards of a bucket."""
    return [entry.shard_elements for entry in bucket.entries]


def reduce(bucket: Bucket, comm: Communicator) -> Start:
    """From unsharded gradients to this rank's shard of their sum; what is returned is under way."""
    parts = comm.mesh.axis_size(bucket.axes)
    index = comm.mesh.index(comm.rank, bucket.axes)

    def finish(out: torch.Tensor) -> Tensors:
        shards = []
        pieces = out.split(_lengths(bucket))
        for piece, entry in zip(pieces, bucket.entries, strict=True):
            shards.append(_unpadded(piece, entry, parts, index))
        return shards

    def start(grads: Tensors) -> list[Any]:
        rows = []
        for grad, entry in zip(grads, bucket.entries, strict=True):
            flat = grad.reshape(-1)
            converted = flat.to(bucket.dtype)
            length = entry.shard_elements
            padded = _padded(converted, parts * length)
            rows.append(padded.view(parts, length))
        packed = _joined(rows, 1)
        pending = _scatter(packed, bucket, comm)
        return [_Finishing(pending, finish)]

    return start


def _scatter(
    rows: torch.Tensor,
    bucket: Bucket,
    comm: Communicator,
) -> Pending:
    """Of ``rows`` [ranks, shard elements], a rank takes its slice on axes that do not split the
    batch; over the others goes a reduce-scatter."""
    mesh = comm.mesh
    if bucket.summed != bucket.axes:
        sizes = map(mesh.axis_size, bucket.axes)
        own = [_own_slice(axis, bucket, comm) for axis in bucket.axes]
        rows = rows.view(*sizes, -1)[tuple(own)]
    if not bucket.summed:
        return Done(rows.clone())  # a view would keep all slices
    parts = mesh.axis_size(bucket.summed)
    rows = rows.reshape(parts, -1)
    return comm.start_reduce_scatter(rows, bucket.summed)


def _own_slice(
    axis: str,
    bucket: Bucket,
    comm: Communicator,
) -> slice | int:
    if axis in bucket.summed:
        return slice(None)
    return comm.mesh.index(comm.rank, axis)


def _unpadded(
    shard: torch.Tensor,
    entry: BucketEntry,
    parts: int,
    index: int,
) -> torch.Tensor:
    start, end = extent(entry.numel, parts, index)
    elements = end - start
    return shard[:elements].view(shard_shape(entry.shape, elements))


def _padded(flat: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - flat.numel()
    if not missing:
        return flat
    return F.pad(flat, (0, missing))


def _joined(tensors: Tensors, dim: int) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0].contiguous()
    return torch.cat(tensors, dim)
