"""Reading and writing through torch.distributed.checkpoint (DCP): every leaf is a flat tensor there, in *chunks*.

DCP describes a stored tensor by its size and its chunks, boxes that tile it, and reads from whichever chunks overlap what
is wanted. A shard of funcpipe is a range of the elements of its leaf, which is no box of the leaf's own shape; so a leaf
is stored as its elements in row-major order, one dim, and a shard is an interval of them. Chunks are at most `CHUNK`
elements, because DCP reads a chunk whole. So a rank needs memory for its own part of the state and for one chunk.

In: parts (`leaves.py`) and their values, a directory. Out: an ordinary DCP checkpoint, and values again.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    ReadItem,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadItemType, TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from funcpipe.checkpoint.files import Leaf
from funcpipe.checkpoint.leaves import Part
from funcpipe.errors import CheckpointError

CHUNK = 1 << 24  # elements


# ---- writing


class Saver(DefaultSavePlanner):
    """A rank's part in a save: which chunks it could write, and their data.

    Every holder of a leaf offers all chunks of its part; `DefaultSavePlanner.create_global_plan` gives each to one of them.
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
        self._parts = {name: (part, x) for name, (part, x) in self._parts.items() if part.shape is None}


def _bytes(part: Part, x: Any) -> io.BytesIO:
    """What is not a tensor, as DCP stores it; CheckpointError unless it can be read back without running code."""
    out = io.BytesIO()
    try:
        torch.save(x, out)
        torch.load(io.BytesIO(out.getvalue()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{part.name} is a {type(x).__name__}, which is not stored: keep tensors, numbers, text, True and False in the state"
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
    data = TensorWriteData(_chunk(start, end), TensorProperties(dtype=dtype), torch.Size([part.numel]))
    return WriteItem(MetadataIndex(part.name, (start,)), WriteItemType.SHARD, tensor_data=data)


def _chunk(start: int, end: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([start]), torch.Size([end - start]))


# ---- reading


def read(directory: Path, parts: Sequence[Part], saved: dict[str, Leaf]) -> list[Any]:
    """The values of parts, in new tensors. Reads the chunks that they overlap, one after another.

    Args:
        directory: a complete checkpoint.
        parts: what is wanted.
        saved: what the manifest says of every leaf.
    """
    reader = FileSystemReader(directory)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, False)
    loader = _Loader(parts)
    items = [item for part in parts for item in _reads(part, metadata)]
    reader.read_data(LoadPlan(items), loader).wait()
    return [_shaped(part, loader.values[part.name], saved[part.name]) for part in parts]


class _Loader(DefaultLoadPlanner):
    """What is read, by name: flat tensors that DCP writes into, and other values."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values: dict[str, Any] = {part.name: _empty(part) for part in parts if part.shape is not None}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.values[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.values[index.fqn]


def _empty(part: Part) -> torch.Tensor:
    assert part.leaf.dtype is not None
    return torch.empty(part.end - part.start, dtype=getattr(torch, part.leaf.dtype), device=part.device)


def _reads(part: Part, metadata: Metadata) -> list[ReadItem]:
    stored = metadata.state_dict_metadata[part.name]
    if isinstance(stored, TensorStorageMetadata):
        items = create_read_items_for_chunk_list(part.name, stored, [_chunk(part.start, part.end)])
        if sum(item.lengths[0] for item in items) != part.end - part.start:  # the rest would be whatever was in memory
            raise CheckpointError(f"{part.name} is not stored whole: the checkpoint is damaged")
        return items
    index, nothing = MetadataIndex(part.name), torch.Size([0])
    return [ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)]


def _shaped(part: Part, x: Any, saved: Leaf) -> Any:
    """A value in the shape that it has on its rank; a whole leaf with the strides that it had."""
    if part.shape is None:
        return x
    if saved.strides is None or part.shape != saved.shape:
        return x.view(part.shape)
    return torch.empty_strided(part.shape, saved.strides, dtype=x.dtype, device=x.device).copy_(x.view(part.shape))
