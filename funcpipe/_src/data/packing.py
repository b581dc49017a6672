"""Packing: token sequences of any lengths become microbatches of few shapes.

Terms. A *document* is a token sequence with labels and weights. A *row* holds documents laid end to
end, and then padding,
which is a document of its own: every position is in some document, so that no attention leaves one
undefined. A *bucket* is a length to which rows are padded. Plans, compiled units and captured
graphs are kept by shape, so few buckets are few of those.

In: sequences, on the host. Out: `Packed`: `fp.Microbatches` for ``pipelined(microbatches=None)`` or
``accumulated(microbatches=None)``, and what fit nowhere.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import Microbatches
from funcpipe.errors import BatchError

IGNORED = -100  # the label of a position without one, as in torch.nn.functional.cross_entropy
Shape = tuple[tuple[int, int, int], ...]  # rows, tokens and documents of every microbatch


class Document(NamedTuple):
    """A token sequence.

    Args:
        tokens: integer, shape ``(n,)``, 1 or more.
        labels: integer, ``(n,)``: what is to be predicted at every position, -100 for nothing; by
            default the next token.
        weights: ``(n,)``: how much each label counts; by default 1.
    """

    tokens: torch.Tensor
    labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None


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


@dataclass
class Buckets:
    """To which shapes microbatches are padded, and how often each has come.

    Args:
        lengths: the lengths that a row may have, or
        multiple_of: a number of which all lengths are multiples.
        documents: the most documents in a row; rows of ``cu_seqlens`` then have the same length
            always. By default any number, padded (with documents of length zero) to the next power
            of two.
        ragged: whether microbatches of one batch may differ. A plan is for one sequence of shapes,
            so that few lengths can make many plans; by default all microbatches get the length of
            the longest.

    ``shapes`` counts the batches of every shape; a *miss* was the first of its shape, for which a
    plan was made, a *hit* any other.

    >>> buckets = Buckets([256, 1024])
    >>> buckets.fit(100), buckets.fit(257), Buckets(multiple_of=128).fit(257)
    (256, 1024, 384)
    """

    lengths: Sequence[int] = ()
    multiple_of: int = 0
    documents: int | None = None
    ragged: bool = False
    shapes: Counter[Shape] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if bool(self.lengths) == bool(self.multiple_of):
            raise BatchError("Buckets takes one of lengths=[...] and multiple_of=...")
        for name, value in [("lengths", n) for n in self.lengths] + [
            ("multiple_of", self.multiple_of or 1),
            ("documents", 1 if self.documents is None else self.documents),
        ]:
            _check_count("Buckets", name, value)

    @property
    def misses(self) -> int:
        """How many shapes there were."""
        return len(self.shapes)

    @property
    def hits(self) -> int:
        """How many batches had a shape that was known."""
        return sum(self.shapes.values()) - self.misses

    def fit(self, tokens: int) -> int:
        """The length of a row that holds so many tokens.

        Raises:
            BatchError: no bucket is that long.
        """
        if self.multiple_of:
            return max(-(-tokens // self.multiple_of), 1) * self.multiple_of
        fits = [n for n in self.lengths if n >= tokens]
        if not fits:
            raise BatchError(
                f"Buckets: {tokens} tokens are more than the longest of {sorted(self.lengths)}; "
                "add a longer one"
            )
        return min(fits)

    def fit_documents(self, count: int) -> int:
        """How many documents ``cu_seqlens`` of a row has room for, that of the padding included."""
        return 1 << count.bit_length() if self.documents is None else self.documents + 1


def pack(
    sequences: Iterable[torch.Tensor | Document],
    max_tokens: int,
    microbatches: int,
    *,
    rows: int | None = None,
    buckets: Buckets | None = None,
    split: bool = False,
) -> Packed:
    """Pack token sequences of any lengths into microbatches, so that the longest row is as short as
    can be.

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

    >>> batch, leftover, fill = pack([torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])], 4, 2)
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
    for name, value in (
        ("max_tokens", max_tokens),
        ("microbatches", microbatches),
        ("rows", 1 if rows is None else rows),
    ):
        _check_count("pack", name, value)
    buckets = buckets or Buckets([max_tokens])
    buckets.fit(max_tokens)
    documents = [
        piece
        for k, x in enumerate(sequences)
        for piece in _pieces(k, _read(k, x), max_tokens, split)
    ]
    if not documents:
        raise BatchError("pack: there are no sequences, and a step needs at least one token")
    sizes = [len(d.tokens) for d in documents]
    each = rows or 1
    found, left = _fill(sizes, microbatches * each, max_tokens, buckets.documents or len(sizes))
    filled = sorted(found, key=lambda row: -sum(sizes[i] for i in row))
    laid = [[documents[i] for i in row] for row in filled]
    groups = [laid[k : k + each] for k in range(0, len(laid), each)]
    shapes = _shapes(groups, buckets)
    parts = [
        _microbatch(group, shape, documents[0]) for group, shape in zip(groups, shapes, strict=True)
    ]
    if rows is None:
        parts = [part | {"cu_seqlens": part["cu_seqlens"][0]} for part in parts]
    held = sum(sizes) - sum(sizes[i] for i in left)
    return Packed(
        Microbatches(parts), [documents[i] for i in left], held / sum(r * t for r, t, _ in shapes)
    )


def local_rows(batch: Microbatches, index: int, ranks: int) -> Microbatches:
    """A rank's rows of a batch packed with ``rows``, for ``spmd(batch="local")``: every rank gets
    equally many microbatches, of the same shapes.

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

    def mine(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2 or x.shape[0] % ranks:
            raise BatchError(
                f"local_rows: {describe(x)} has no rows that divide by {ranks} ranks; pack with "
                f"rows={ranks}, or a multiple"
            )
        return x.chunk(ranks)[index]

    return Microbatches([tree.map_tensors(mine, part) for part in batch.parts])


# ---- documents


def _read(number: int, sequence: torch.Tensor | Document) -> Document:
    """A sequence as a whole document: labels of its own, and no weight where there is none."""
    tokens, labels, weights = sequence if isinstance(sequence, Document) else Document(sequence)
    for name, x in (("tokens", tokens), ("labels", labels), ("weights", weights)):
        if x is None and name != "tokens":
            continue
        if not isinstance(x, torch.Tensor) or x.dim() != 1 or not len(x) or len(x) != len(tokens):
            raise BatchError(
                f"pack: the {name} of sequence {number} are {describe(x)}; write a 1-d tensor, one "
                "entry for every token, and leave empty sequences out"
            )
        if name != "weights" and (x.is_floating_point() or x.is_complex()):
            raise BatchError(
                f"pack: the {name} of sequence {number} are {describe(x)}; they have to be integers"
            )
    tokens = tokens.long()
    labels = (
        torch.cat([tokens[1:], tokens.new_full((1,), IGNORED)]) if labels is None else labels.long()
    )
    weights = torch.ones_like(tokens, dtype=torch.float32) if weights is None else weights.float()
    return Document(tokens, labels, weights.masked_fill(labels == IGNORED, 0.0))


def _pieces(number: int, document: Document, max_tokens: int, split: bool) -> list[Document]:
    n = len(document.tokens)
    if n <= max_tokens:
        return [document]
    if not split:
        raise BatchError(
            f"pack: sequence {number} has {n} tokens, more than max_tokens={max_tokens}; write "
            "split=True to cut it into pieces, or leave it out"
        )
    count = -(-n // max_tokens)
    tokens, labels, weights = document
    assert labels is not None and weights is not None
    pieces = (x.tensor_split(count) for x in (tokens, labels, weights))
    return [Document(*piece) for piece in zip(*pieces, strict=True)]


# ---- which document goes where


def _fill(
    sizes: list[int], rows: int, most_tokens: int, most_documents: int
) -> tuple[list[list[int]], list[int]]:
    """The documents of every row, and those that fit nowhere, each in order; of the smallest
    capacity that suffices."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    found, left = _first_fit(sizes, order, rows, most_tokens, most_documents)
    low, high = max(sizes[order[0]], -(-sum(sizes) // rows)), most_tokens
    while not left and low < high:
        middle = (low + high) // 2
        tried, failed = _first_fit(sizes, order, rows, middle, most_documents)
        if failed:
            low = middle + 1
        else:
            found, high = tried, middle
    return [sorted(row) for row in found], sorted(left)


def _first_fit(
    sizes: list[int], order: list[int], rows: int, capacity: int, most: int
) -> tuple[list[list[int]], list[int]]:
    room = np.full(rows, capacity)
    found: list[list[int]] = [[] for _ in range(rows)]
    left = []
    for i in order:
        fits = room >= sizes[i]
        row = int(fits.argmax())
        if not fits[row]:
            left.append(i)
            continue
        found[row].append(i)
        room[row] = room[row] - sizes[i] if len(found[row]) < most else -1
    return found, left


# ---- microbatches


def _shapes(groups: list[list[list[Document]]], buckets: Buckets) -> Shape:
    """The padded shape of every microbatch; the buckets count it."""
    tokens = [max(sum(len(d.tokens) for d in row) for row in group) for group in groups]
    counts = [max(map(len, group)) for group in groups]
    if not buckets.ragged:
        tokens, counts = [max(tokens)] * len(groups), [max(counts)] * len(groups)
    pairs = zip(groups, tokens, counts, strict=True)
    shapes = tuple((len(group), buckets.fit(n), buckets.fit_documents(c)) for group, n, c in pairs)
    buckets.shapes[shapes] += 1
    return shapes


def _microbatch(
    group: list[list[Document]], shape: tuple[int, int, int], like: Document
) -> dict[str, torch.Tensor]:
    _, length, documents = shape
    rows = [_row(row, length, documents, like) for row in group]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _row(
    row: list[Document], length: int, documents: int, like: Document
) -> dict[str, torch.Tensor]:
    sizes = [len(d.tokens) for d in row]
    device = like.tokens.device

    def padded(
        xs: list[torch.Tensor], fill: float, dtype: torch.dtype = torch.int64
    ) -> torch.Tensor:
        return torch.cat(
            [*xs, torch.full((length - sum(sizes),), fill, dtype=dtype, device=device)]
        )

    tokens, labels, weights = ([d[k] for d in row] for k in range(3))
    ends = [0, *itertools.accumulate(sizes), *[length] * (documents - len(row))]
    return {
        "tokens": padded(tokens, 0),  # type: ignore[arg-type]
        "labels": padded(labels, IGNORED),  # type: ignore[arg-type]
        "positions": padded([torch.arange(n, device=device) for n in sizes], 0),
        "weights": padded(weights, 0.0, torch.float32),  # type: ignore[arg-type]
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32, device=device),
    }


def _check_count(who: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BatchError(f"{who}: {name} is {value!r}; it has to be a whole number, 1 or more")
