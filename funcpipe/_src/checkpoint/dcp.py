"""Writing through torch.distributed.checkpoint (DCP): every leaf is a flat tensor there, in
*chunks*.

DCP describes a stored tensor by its size and its chunks, boxes that tile it. A shard of funcpipe is
a range of the elements of its leaf, which is no box of the leaf's own shape; so a leaf is stored as
its elements in row-major order, one dim, and a shard is an interval of them. Chunks are at most
`CHUNK` elements, because a chunk is read whole (`pieces.py`). So a rank
needs memory for its own part of the state, and for one chunk twice: as bytes, and as a tensor.

In: parts (`leaves.py`) and their values, a directory. Out: an ordinary DCP checkpoint, and the
digest of every chunk.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultSavePlanner,
    FileSystemWriter,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from funcpipe._src.checkpoint.files import Piece, short
from funcpipe._src.checkpoint.leaves import Part
from funcpipe.errors import CheckpointError

CHUNK = 1 << 24  # elements


# ---- what a rank writes


class Saver(DefaultSavePlanner):
    """A rank's part in a save: which chunks it could write, and their data.

    Every holder of a leaf offers all chunks of its part; `DefaultSavePlanner.create_global_plan`
    gives each to one of them.
    """

    def __init__(self, held: Iterable[tuple[Part, Any]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts: dict[str, tuple[Part, Any]] = {
            part.name: (part, _bytes(part, x) if part.shape is None else x) for part, x in held
        }
        self._staged: dict[MetadataIndex, torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Every chunk of what this rank holds."""
        return SavePlan([item for part, x in self._parts.values() for item in _items(part, x)])

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The elements of a chunk, in one dim; or the bytes of what is not a tensor."""
        if write_item.index in self._staged:
            return self._staged[write_item.index]
        part, x = self._parts[write_item.index.fqn]
        if write_item.tensor_data is None:
            return x
        chunk = write_item.tensor_data.chunk
        return x.detach().reshape(-1)[chunk.offsets[0] - part.start :][: chunk.sizes[0]]

    def stage(self, plan: SavePlan) -> None:
        """Copy what this rank is to write to the CPU, and let go of the state."""
        chosen = [item for item in plan.items if item.tensor_data is not None]
        self._staged = {item.index: self.resolve_data(item).to("cpu", copy=True) for item in chosen}  # type: ignore[union-attr]
        self._parts = {
            name: (part, x) for name, (part, x) in self._parts.items() if part.shape is None
        }


def _bytes(part: Part, x: Any) -> io.BytesIO:
    """What is not a tensor, as DCP stores it; CheckpointError unless it can be read back without
    running code."""
    out = io.BytesIO()
    try:
        torch.save(x, out)
        torch.load(io.BytesIO(out.getvalue()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{part.name} is a {type(x).__name__}, which is not stored: keep tensors, numbers, "
            "text, True and False in the state"
        ) from error
    return out


def _items(part: Part, x: Any) -> list[WriteItem]:
    if part.shape is None:
        return [WriteItem(MetadataIndex(part.name), WriteItemType.BYTE_IO)]
    starts = range(part.start, part.end, CHUNK)
    if not part.numel:  # one chunk of nothing, so that DCP knows the leaf
        starts = range(1)
    return [_item(part, x.dtype, start, min(start + CHUNK, part.end)) for start in starts]


def _item(part: Part, dtype: torch.dtype, start: int, end: int) -> WriteItem:
    data = TensorWriteData(
        _chunk(start, end), TensorProperties(dtype=dtype), torch.Size([part.numel])
    )
    return WriteItem(MetadataIndex(part.name, (start,)), WriteItemType.SHARD, tensor_data=data)


def _chunk(start: int, end: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([start]), torch.Size([end - start]))


# ---- writing it


class Writer(FileSystemWriter):
    """DCP's writer. It flushes file by file, and takes the digest of every chunk as it writes.

    With copies ahead, DCP would hold several chunks of a GPU's state at once.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, per_thread_copy_ahead=0, overwrite=False)
        self.transforms = self._digests = _Digests()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save says it so where its stream raised
            raise self._digests.problem or error from None

    def pieces(self, plan: SavePlan, results: list[WriteResult]) -> list[tuple[str, Piece]]:
        """Where each chunk of a plan was written, with its digest, by the path of its leaf."""
        data = {item.index: item.tensor_data for item in plan.items}
        return [(result.index.fqn, self._piece(result, data[result.index])) for result in results]

    def _piece(self, result: WriteResult, data: TensorWriteData | None) -> Piece:
        start, end = 0, 1
        if data is not None:
            start = data.chunk.offsets[0]
            end = start + data.chunk.sizes[0]
        digest = short(self._digests.found[result.index])
        where = result.storage_data
        return Piece(start, end, where.relative_path, where.offset, where.length, digest)


class _Digests(_StorageWriterTransforms):
    """The hook through which DCP sends every item on its way to the file."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[MetadataIndex, Any] = {}
        self.problem: OSError | None = None

    def transform_save_stream(self, write_item: WriteItem, raw_stream: io.IOBase) -> Any:
        out, names = super().transform_save_stream(write_item, raw_stream)
        self.found[write_item.index] = hashlib.sha256()
        return _Digested(self, out, self.found[write_item.index]), names


class _Digested(io.IOBase):
    """A stream whose bytes also go into a digest, and whose errors are kept."""

    def __init__(self, keeper: _Digests, out: IO[bytes], digest: Any) -> None:
        self._keeper, self._out, self._digest = keeper, out, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            return self._out.write(data)
        except OSError as error:
            self._keeper.problem = error
            raise

    def close(self) -> None:
        self._out.close()
