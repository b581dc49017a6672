"""Shards on the wire: a bucket of leaves in one collective.

Whole leaf -> ``n`` chunks of ``ceil(numel / n)`` elements, the last ones padded with zeros that
nobody ever sees; chunk ``i`` of every leaf, one after another, is what rank ``i`` of the group has
in a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from funcpipe._src.comm import Communicator, Done, Pending
from funcpipe._src.planning.placement import extent, shard_shape
from funcpipe._src.program import Bucket, Piece

Whole = list[torch.Tensor]


class _Finishing:
    """A collective under way, and what becomes of its result."""

    def __init__(self, pending: Pending, finish: Callable[[torch.Tensor], Whole]) -> None:
        self.pending, self.finish = pending, finish

    def wait(self) -> Whole:
        return self.finish(self.pending.wait())


def gather(bucket: Bucket, comm: Communicator) -> Callable[[list[torch.Tensor]], list[Any]]:
    """From this rank's shards to whole leaves; what is returned is under way."""

    def run(shards: list[torch.Tensor]) -> list[Any]:
        flat = [
            _padded(s.reshape(-1).to(bucket.dtype), p.chunk)
            for s, p in zip(shards, bucket.pieces, strict=True)
        ]
        return [
            _Finishing(
                comm.start_all_gather(_joined(flat, 0), bucket.axes),
                lambda out: _whole(out, bucket),
            )
        ]

    return run


def _whole(out: torch.Tensor, bucket: Bucket) -> Whole:
    columns = out.split([p.chunk for p in bucket.pieces], 1)
    return [
        c.reshape(-1)[: p.numel].view(p.shape) for c, p in zip(columns, bucket.pieces, strict=True)
    ]


def reduce(bucket: Bucket, comm: Communicator) -> Callable[[Whole], list[Any]]:
    """From whole gradients to this rank's shard of their sum; what is returned is under way."""
    parts = comm.mesh.axis_size(bucket.axes)
    index = comm.mesh.index(comm.rank, bucket.axes)

    def finish(out: torch.Tensor) -> Whole:
        chunks = out.split([p.chunk for p in bucket.pieces])
        return [_own(c, p, parts, index) for c, p in zip(chunks, bucket.pieces, strict=True)]

    def run(grads: Whole) -> list[Any]:
        rows = [
            _padded(g.reshape(-1).to(bucket.dtype), p.chunk * parts).view(parts, p.chunk)
            for g, p in zip(grads, bucket.pieces, strict=True)
        ]
        return [_Finishing(_scatter(_joined(rows, 1), bucket, comm), finish)]

    return run


def _scatter(x: torch.Tensor, bucket: Bucket, comm: Communicator) -> Pending:
    """On axes that do not split the batch a rank takes its slice; over the others a
    reduce-scatter."""
    if bucket.summed != bucket.axes:
        x = x.view(*(comm.mesh.axis_size(a) for a in bucket.axes), -1)
        x = x[
            tuple(
                slice(None) if a in bucket.summed else comm.mesh.index(comm.rank, a)
                for a in bucket.axes
            )
        ]
    if not bucket.summed:
        return Done(x.clone())  # a view would keep all slices
    return comm.start_reduce_scatter(
        x.reshape(comm.mesh.axis_size(bucket.summed), -1), bucket.summed
    )


def _own(chunk: torch.Tensor, piece: Piece, parts: int, index: int) -> torch.Tensor:
    start, end = extent(piece.numel, parts, index)
    return chunk[: end - start].view(shard_shape(piece.shape, end - start))


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    return x if x.numel() == length else F.pad(x, (0, length - x.numel()))


def _joined(xs: list[torch.Tensor], dim: int) -> torch.Tensor:
    return xs[0].contiguous() if len(xs) == 1 else torch.cat(xs, dim)
