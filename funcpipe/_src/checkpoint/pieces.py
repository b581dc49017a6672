"""Reading the pieces of a checkpoint: only bytes that are those that were saved become values.

The bytes of a piece (`files.py`) are compared with their digest before anything looks into them;
then ``torch.load(weights_only=True)`` makes a tensor of them. So no file runs code, and damage
is an error that names the file and the leaf. A rank reads the pieces that overlap its own parts.

In: the directory and manifest of a checkpoint, parts (`leaves.py`). Out: their values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from funcpipe._src.checkpoint.files import DAMAGED, INSTEAD, Leaf, Manifest, Piece, digest_of
from funcpipe._src.checkpoint.leaves import Part
from funcpipe._src.comm.failure_watch import one_line
from funcpipe.errors import CheckpointError


class Wanted(NamedTuple):
    """The elements of a leaf, ``start`` to ``end``, that a part takes from a piece."""

    piece: Piece
    part: Part
    start: int
    end: int


def read(directory: Path, parts: Sequence[Part], manifest: Manifest) -> list[Any]:
    """The values of parts, in new tensors. Reads file by file, one piece after another.

    Args:
        directory: a complete checkpoint.
        parts: what is wanted.
        manifest: that of the checkpoint.

    Raises:
        CheckpointError: a file is missing, shorter than it was, or has other bytes.
    """
    values = {part.name: _empty(part) for part in parts if part.shape is not None}
    wanted = [found for part in parts for found in overlaps(part, manifest.pieces[part.name])]
    wanted.sort(key=lambda found: (found.piece.file, found.piece.offset))
    for name, group in groupby(wanted, key=lambda found: found.piece.file):
        _read_file(directory / name, list(group), values)
    return [_shaped(part, values[part.name], manifest.leaves[part.name]) for part in parts]


def overlaps(part: Part, pieces: Sequence[Piece]) -> Iterator[Wanted]:
    """What a part takes from the pieces of its leaf.

    Raises:
        CheckpointError: together they do not hold all of it.
    """
    first, last = (0, 1) if part.shape is None else (part.start, part.end)
    missing = last - first
    for piece in pieces:
        start, end = max(first, piece.start), min(last, piece.end)
        if start < end:
            missing -= end - start
            yield Wanted(piece, part, start, end)
    if missing:  # these elements would be whatever was in memory
        raise CheckpointError(f"{part.name} is not stored whole: the checkpoint is damaged")


def _empty(part: Part) -> torch.Tensor:
    assert part.leaf.dtype is not None
    dtype = getattr(torch, part.leaf.dtype)
    return torch.empty(part.end - part.start, dtype=dtype, device=part.device)


def _read_file(path: Path, wanted: list[Wanted], values: dict[str, Any]) -> None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        name = wanted[0].part.name
        raise CheckpointError(f"{path} is missing, which holds {name}. {INSTEAD}") from None
    with file:
        for piece, part, start, end in wanted:
            found = _value(path, part, _checked(file, piece, part))
            if part.shape is None:
                values[part.name] = found
                continue
            to = values[part.name][start - part.start : end - part.start]
            to.copy_(found[start - piece.start : end - piece.start])


def _checked(file: BinaryIO, piece: Piece, part: Part) -> io.BytesIO:
    """The bytes of a piece, which are those that were saved."""
    file.seek(piece.offset)
    found = file.read(piece.length)
    if len(found) < piece.length:
        size = file.seek(0, io.SEEK_END)
        raise CheckpointError(
            f"{file.name} ends after {size} bytes, but {part.name} lies at bytes {piece.offset} to "
            f"{piece.offset + piece.length}: the file was cut off. {INSTEAD}"
        )
    if digest_of(found) != piece.digest:
        raise CheckpointError(
            f"{file.name} {DAMAGED}: bytes {piece.offset} to {piece.offset + piece.length}, which "
            f"hold {part.name}, are not those that were saved. {INSTEAD}"
        )
    return io.BytesIO(found)


def _value(path: Path, part: Part, stored: io.BytesIO) -> Any:
    try:
        return torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"{part.name} is not stored as a tensor, number or text, so it is not read"
        raise CheckpointError(f"{path}: {what} ({one_line(error)})") from error


def _shaped(part: Part, x: Any, saved: Leaf) -> Any:
    """A value in the shape that it has on its rank; a whole leaf with the strides that it had."""
    if part.shape is None:
        return x
    if saved.strides is None or part.shape != saved.shape:
        return x.view(part.shape)
    out = torch.empty_strided(part.shape, saved.strides, dtype=x.dtype, device=x.device)
    return out.copy_(x.view(part.shape))
