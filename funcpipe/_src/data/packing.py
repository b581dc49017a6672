"""Packing: token sequences of any lengths become microbatches of few shapes.

A *row* holds documents end to end, and then padding. The padding is a document of its own, so that
every position is in some document and no attention is over nothing.

In: sequences, on the host.
Out: `Packed`: `fp.Microbatches` for ``pipelined(microbatches=None)`` or
``accumulated(microbatches=None)``, and the documents that fit nowhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import Microbatches
from funcpipe._src.data.buckets import Buckets, MicrobatchShape, Shape, check_count
from funcpipe._src.data.documents import IGNORED, Document, read_documents
from funcpipe._src.data.first_fit import fill_rows
from funcpipe.errors import BatchError

Row = list[Document]


class Packed(NamedTuple):
    """What `pack` gives.

    Args:
        batch: the microbatches. Each is a dict of ``tokens``, ``labels``, ``positions`` (int64) and
            ``weights`` (float32), all of shape ``(rows, tokens)``, and ``cu_seqlens`` (int32),
            where the documents of a row begin and the last one ends: ``(documents + 1,)``, or
            ``(rows, documents + 1)`` if ``rows`` was given.
        leftover: documents that fit nowhere, in order; pack them first next time.
        fill: the fraction of positions that hold tokens.
    """

    batch: Microbatches
    leftover: list[Document]
    fill: float


def pack(
    sequences: Iterable[Tensor | Document],
    max_tokens: int,
    microbatches: int,
    *,
    rows: int | None = None,
    buckets: Buckets | None = None,
    split: bool = False,
) -> Packed:
    """Pack token sequences of any lengths into microbatches, in rows as short as can be.

    Args:
        sequences: 1-d integer tensors, or `Document`\\ s.
        max_tokens: the most tokens of documents in a row.
        microbatches: how many.
        rows: rows in a microbatch, for `data_parallel`, which splits dim 0: a multiple of the ranks
            that split it. By default one row, and a ``cu_seqlens`` without dim of rows.
        buckets: to what rows are padded; by default all to ``max_tokens``. Pass the same object
            every time.
        split: cut documents that are longer than ``max_tokens`` into equal pieces, each a document
            of its own; the last token of a piece still has its label.

    Returns:
        a `Packed`. The same sequences always give the same batch. Longer microbatches come first.
        Padding has token 0, label -100, weight 0 and position 0. A microbatch that got no document
        is all padding.

    Raises:
        BatchError: a sequence that is no such tensor, is empty, or too long; no sequences; no
        bucket for ``max_tokens``.

    Rows are filled first-fit, longest documents first, up to the smallest capacity that suffices:
    MULTIFIT of Coffman, Garey & Johnson, 1978, https://doi.org/10.1137/0207001.

    >>> sequences = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])]
    >>> batch, leftover, fill = pack(sequences, max_tokens=4, microbatches=2)
    >>> for name, x in batch.parts[0].items():
    ...     print(name, x.tolist())
    tokens [[1, 2, 3, 0]]
    labels [[2, 3, -100, -100]]
    positions [[0, 1, 2, 0]]
    weights [[1.0, 1.0, 0.0, 0.0]]
    cu_seqlens [0, 3, 4, 4, 4]
    >>> batch.parts[1]["tokens"].tolist(), batch.parts[1]["cu_seqlens"].tolist(), leftover, fill
    ([[4, 5, 6, 0]], [0, 1, 3, 4, 4], [], 0.75)
    """
    check_count("pack", "max_tokens", max_tokens)
    check_count("pack", "microbatches", microbatches)
    if rows is not None:
        check_count("pack", "rows", rows)
    buckets = buckets or Buckets([max_tokens])
    buckets.fit(max_tokens)  # raises here, whatever the sequences are
    documents = list(read_documents(sequences, max_tokens, split))
    if not documents:
        raise BatchError("pack: there are no sequences, and a step needs at least one token")
    sizes = [len(document.tokens) for document in documents]
    rows_each = rows or 1
    filling = fill_rows(
        sizes,
        rows=microbatches * rows_each,
        max_tokens=max_tokens,
        max_documents=buckets.documents or len(sizes),
    )
    filled: list[Row] = []
    for indices in filling.rows:
        filled.append([documents[index] for index in indices])
    filled.sort(key=_tokens_in, reverse=True)
    starts = range(0, len(filled), rows_each)
    groups = [filled[start : start + rows_each] for start in starts]
    shapes = _padded_shapes(groups, buckets)
    parts = []
    for group, shape in zip(groups, shapes, strict=True):
        part = _microbatch(group, shape, device=documents[0].tokens.device)
        if rows is None:
            part["cu_seqlens"] = part["cu_seqlens"][0]
        parts.append(part)
    packed_tokens = sum(map(_tokens_in, filled))
    positions = sum(shape.rows * shape.tokens for shape in shapes)
    leftover = [documents[index] for index in filling.leftover]
    return Packed(Microbatches(parts), leftover, packed_tokens / positions)


def local_rows(
    batch: Microbatches,
    index: int,
    ranks: int,
) -> Microbatches:
    """A rank's rows of a batch packed with ``rows``, for ``spmd(batch="local")``.

    Every rank gets equally many microbatches, of the same shapes.

    Args:
        batch: as `pack` gives it in every process, from the same sequences.
        index: the rank's place on the axis that splits the batch, ``mesh.index(run.rank, "data")``.
        ranks: the size of that axis.

    Returns:
        what `data_parallel` hands that rank of the whole batch.

    Raises:
        BatchError: rows do not divide by ranks.

    >>> batch = pack([torch.arange(5), torch.arange(3)], 8, 1, rows=2).batch
    >>> [local_rows(batch, i, 2).parts[0]["cu_seqlens"].tolist() for i in (0, 1)]
    [[[0, 5, 8]], [[0, 3, 8]]]
    """

    def own_rows(leaf: Tensor) -> Tensor:
        if leaf.dim() < 2 or leaf.shape[0] % ranks:
            raise BatchError(
                f"local_rows: {describe(leaf)} has no rows that divide by {ranks} ranks; pack with "
                f"rows={ranks}, or a multiple"
            )
        return leaf.chunk(ranks)[index]

    return Microbatches([pytree.map_tensors(own_rows, part) for part in batch.parts])


# ---- microbatches


def _tokens_in(row: Row) -> int:
    return sum(len(document.tokens) for document in row)


def _padded_shapes(groups: Sequence[list[Row]], buckets: Buckets) -> Shape:
    """The padded shape of every microbatch; the buckets count it."""
    tokens = [max(map(_tokens_in, group)) for group in groups]
    documents = [max(map(len, group)) for group in groups]
    if not buckets.ragged:
        tokens = [max(tokens)] * len(groups)
        documents = [max(documents)] * len(groups)
    shapes = []
    for group, most_tokens, most_documents in zip(groups, tokens, documents, strict=True):
        length = buckets.fit(most_tokens)
        places = buckets.fit_documents(most_documents)
        shapes.append(MicrobatchShape(len(group), length, places))
    buckets.shapes[tuple(shapes)] += 1
    return tuple(shapes)


def _microbatch(
    rows: list[Row],
    shape: MicrobatchShape,
    device: torch.device,
) -> dict[str, Tensor]:
    padded = [_padded_row(row, shape, device) for row in rows]
    stacked = {}
    for name in padded[0]:
        stacked[name] = torch.stack([row[name] for row in padded])
    return stacked


def _padded_row(
    row: Row,
    shape: MicrobatchShape,
    device: torch.device,
) -> dict[str, Tensor]:
    sizes = [len(document.tokens) for document in row]
    missing = shape.tokens - sum(sizes)
    empty_documents = shape.documents - len(row)
    empty = [shape.tokens] * empty_documents
    ends = [0, *itertools.accumulate(sizes), *empty]

    def padded(tensors: Iterable[Tensor | None], padding: Tensor) -> Tensor:
        return torch.cat([*tensors, padding])  # type: ignore[list-item]

    no_tokens = torch.zeros(missing, dtype=torch.int64, device=device)
    return {
        "tokens": padded((document.tokens for document in row), no_tokens),
        "labels": padded((document.labels for document in row), no_tokens + IGNORED),
        "positions": padded((torch.arange(size, device=device) for size in sizes), no_tokens),
        "weights": padded((document.weights for document in row), no_tokens.float()),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=device),
    }
