"""Reading a checkpoint: only bytes that are those that were saved become values.

The bytes of a stored span (`files.py`) are compared with their digest before anything looks into
them; then ``torch.load(weights_only=True)`` makes a tensor of them. So no file runs code, and
damage is an error that names the file and the leaf. A rank reads the spans that overlap its shards.

In: the directory and manifest of a checkpoint, shards (`leaves.py`).
Out: their values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.checkpoint.files import (
    DAMAGED,
    INSTEAD,
    Leaf,
    Manifest,
    StoredSpan,
    digest_of,
)
from funcpipe._src.checkpoint.leaves import LeafShard
from funcpipe._src.comm.failure_watch import one_line
from funcpipe.errors import CheckpointError


class Overlap(NamedTuple):
    """The elements of a leaf, ``start`` to ``end``, that a shard takes from a stored span."""

    span: StoredSpan
    shard: LeafShard
    start: int
    end: int


def read(
    directory: Path,
    shards: Sequence[LeafShard],
    manifest: Manifest,
) -> list[Any]:
    """The values of shards, in new tensors. Reads file by file, one span after another.

    Args:
        directory: a complete checkpoint.
        shards: what is wanted.
        manifest: that of the checkpoint.

    Raises:
        CheckpointError: a file is missing, shorter than it was, or has other bytes.
    """
    values: dict[str, Any] = {}
    wanted: list[Overlap] = []
    for shard in shards:
        if shard.shape is not None:
            values[shard.name] = _empty(shard)
        wanted += overlaps(shard, manifest.pieces[shard.name])
    wanted.sort(key=lambda overlap: (overlap.span.file, overlap.span.offset))
    for name, group in groupby(wanted, key=lambda overlap: overlap.span.file):
        _read_file(directory / name, list(group), values)
    shaped = []
    for shard in shards:
        saved = manifest.leaves[shard.name]
        shaped.append(_shaped(shard, values[shard.name], saved))
    return shaped


def overlaps(shard: LeafShard, spans: Sequence[StoredSpan]) -> Iterator[Overlap]:
    """What a shard takes from the stored spans of its leaf.

    Raises:
        CheckpointError: together they do not hold all of it.
    """
    first, last = (0, 1) if shard.shape is None else (shard.start, shard.end)
    missing = last - first
    for span in spans:
        start, end = max(first, span.start), min(last, span.end)
        if start < end:
            missing -= end - start
            yield Overlap(span, shard, start, end)
    if missing:  # these elements would be whatever was in memory
        raise CheckpointError(
            f"{shard.name} is not stored completely: the checkpoint is damaged. {INSTEAD}"
        )


def _empty(shard: LeafShard) -> Tensor:
    assert shard.leaf.dtype is not None
    dtype = getattr(torch, shard.leaf.dtype)
    return torch.empty(shard.end - shard.start, dtype=dtype, device=shard.device)


def _read_file(
    path: Path,
    wanted: list[Overlap],
    values: dict[str, Any],
) -> None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        name = wanted[0].shard.name
        raise CheckpointError(f"{path} is missing, which holds {name}. {INSTEAD}") from None
    with file:
        for span, shard, start, end in wanted:
            found = _value(path, shard, _checked(file, span, shard))
            if shard.shape is None:
                values[shard.name] = found
                continue
            into = values[shard.name][start - shard.start : end - shard.start]
            into.copy_(found[start - span.start : end - span.start])


def _checked(
    file: BinaryIO,
    span: StoredSpan,
    shard: LeafShard,
) -> io.BytesIO:
    """The bytes of a span, which are those that were saved."""
    file.seek(span.offset)
    found = file.read(span.length)
    if len(found) < span.length:
        size = file.seek(0, io.SEEK_END)
        raise CheckpointError(
            f"{file.name} ends after {size} bytes, but {shard.name} lies at bytes {span.offset} to "
            f"{span.offset + span.length}: the file was cut off. {INSTEAD}"
        )
    if digest_of(found) != span.digest:
        raise CheckpointError(
            f"{file.name} {DAMAGED}: bytes {span.offset} to {span.offset + span.length}, which "
            f"hold {shard.name}, are not those that were saved. {INSTEAD}"
        )
    return io.BytesIO(found)


def _value(
    path: Path,
    shard: LeafShard,
    stored: io.BytesIO,
) -> Any:
    try:
        return torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"{shard.name} is not stored as a tensor, number or text, so it is not read"
        raise CheckpointError(f"{path}: {what} ({one_line(error)})") from error


def _shaped(
    shard: LeafShard,
    value: Any,
    saved: Leaf,
) -> Any:
    """A value in the shape that it has on its rank; an unsharded leaf with its saved strides."""
    if shard.shape is None:
        return value
    shaped = value.view(shard.shape)
    if saved.strides is None or shard.shape != saved.shape:
        return shaped
    out = torch.empty_strided(
        shard.shape,
        saved.strides,
        dtype=value.dtype,
        device=value.device,
    )
    return out.copy_(shaped)
