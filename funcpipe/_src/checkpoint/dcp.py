"""Writing through torch.distributed.checkpoint (DCP): every leaf is a flat tensor there.

DCP describes a stored tensor by its size and its *chunks*, boxes that tile it. A shard of funcpipe
is a range of the elements of its leaf, which is no box of the leaf's own shape. So a leaf is stored
as its elements in row-major order, one dim, and a shard is an interval of them. A chunk has at most
`CHUNK` elements, because it is read in one go (`reading.py`): a rank then needs memory for its own
shards, and for one chunk twice, as bytes and as a tensor.

In: shards (`leaves.py`) and their values, a directory.
Out: an ordinary DCP checkpoint, and the digest of every chunk.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
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

from funcpipe._src.checkpoint.files import StoredSpan, short
from funcpipe._src.checkpoint.leaves import LeafShard
from funcpipe.errors import CheckpointError

CHUNK = 1 << 24  # elements


# ---- what a rank writes


class Saver(DefaultSavePlanner):
    """Which chunks a rank could write, and their data.

    Every holder of a leaf offers all chunks of its shard; `DefaultSavePlanner.create_global_plan`
    gives each chunk to one of them.
    """

    def __init__(self, held: Iterable[tuple[LeafShard, Any]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards: dict[str, LeafShard] = {}
        self._values: dict[str, Any] = {}
        for shard, value in held:
            self._shards[shard.name] = shard
            self._values[shard.name] = _bytes(shard, value) if shard.shape is None else value
        self._staged: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Every chunk of what this rank holds."""
        items = []
        for name, shard in self._shards.items():
            items += _items(shard, self._values[name])
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The elements of a chunk, in one dim; or the bytes of what is not a tensor."""
        if write_item.index in self._staged:
            return self._staged[write_item.index]
        name = write_item.index.fqn
        if write_item.tensor_data is None:
            return self._values[name]
        start, end = _interval(write_item.tensor_data)
        first = self._shards[name].start
        return self._values[name].detach().reshape(-1)[start - first : end - first]

    def stage(self, plan: SavePlan) -> None:
        """Copy what this rank is to write to the CPU, and let go of the state."""
        for item in plan.items:
            if item.tensor_data is not None:
                data = self.resolve_data(item)
                self._staged[item.index] = data.to("cpu", copy=True)  # type: ignore[union-attr]
        for name, shard in self._shards.items():
            if shard.shape is not None:
                del self._values[name]


def _bytes(shard: LeafShard, value: Any) -> io.BytesIO:
    """What is not a tensor, as DCP stores it.

    Raises:
        CheckpointError: it could not be read back without running code.
    """
    out = io.BytesIO()
    try:
        torch.save(value, out)
        torch.load(io.BytesIO(out.getvalue()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{shard.name} is a {type(value).__name__}, which is not stored: keep tensors, "
            "numbers, text, True and False in the state"
        ) from error
    return out


def _items(shard: LeafShard, value: Any) -> list[WriteItem]:
    if shard.shape is None:
        return [WriteItem(MetadataIndex(shard.name), WriteItemType.BYTE_IO)]
    starts = range(shard.start, shard.end, CHUNK)
    if not shard.numel:  # one chunk of nothing, so that DCP knows the leaf
        starts = range(1)
    return [_item(shard, value.dtype, start) for start in starts]


def _item(
    shard: LeafShard,
    dtype: torch.dtype,
    start: int,
) -> WriteItem:
    length = min(start + CHUNK, shard.end) - start
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size([start]), torch.Size([length])),
        TensorProperties(dtype=dtype),
        torch.Size([shard.numel]),
    )
    index = MetadataIndex(shard.name, (start,))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _interval(data: TensorWriteData) -> tuple[int, int]:
    """The elements of a chunk."""
    (start,), (length,) = data.chunk.offsets, data.chunk.sizes
    return start, start + length


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

    def spans(self, plan: SavePlan, results: list[WriteResult]) -> list[tuple[str, StoredSpan]]:
        """Where each chunk of a plan was written, with its digest, by the path of its leaf."""
        data = {item.index: item.tensor_data for item in plan.items}
        spans = []
        for result in results:
            span = self._span(result, data[result.index])
            spans.append((result.index.fqn, span))
        return spans

    def _span(self, result: WriteResult, data: TensorWriteData | None) -> StoredSpan:
        start, end = (0, 1) if data is None else _interval(data)
        digest = self._digests.found[result.index]
        where = result.storage_data
        return StoredSpan(
            start,
            end,
            file=where.relative_path,
            offset=where.offset,
            length=where.length,
            digest=short(digest),
        )


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

    def __init__(
        self,
        keeper: _Digests,
        out: IO[bytes],
        digest: Any,
    ) -> None:
        self._keeper = keeper
        self._out = out
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            return self._out.write(data)
        except OSError as error:
            self._keeper.problem = error
            raise

    def close(self) -> None:
        self._out.close()
