"""Documents: token sequences with a label and a weight for every token.

In: what a user passes as sequences.
Out: documents with all three tensors, none longer than a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core.describe_value import describe
from funcpipe.errors import BatchError

IGNORED = -100  # the label of a position without one, as in torch.nn.functional.cross_entropy


class Document(NamedTuple):
    """A token sequence.

    Args:
        tokens: integer, shape ``(n,)``, 1 or more.
        labels: integer, ``(n,)``: what is to be predicted at every position, -100 for nothing; by
            default the next token.
        weights: ``(n,)``: how much each label counts; by default 1.
    """

    tokens: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None


def read_documents(
    sequences: Iterable[Tensor | Document],
    max_tokens: int,
    split: bool,
) -> Iterator[Document]:
    """Every sequence with its labels and weights; a long one in several documents if ``split``.

    Raises:
        BatchError: a sequence is not what a `Document` may be, or it is too long.
    """
    for number, sequence in enumerate(sequences):
        document = _completed(number, sequence)
        length = len(document.tokens)
        if length <= max_tokens:
            yield document
        elif split:
            yield from _split(document, -(-length // max_tokens))
        else:
            raise BatchError(
                f"pack: sequence {number} has {length} tokens, more than max_tokens={max_tokens}; "
                "write split=True to cut it into pieces, or leave it out"
            )


def _completed(number: int, sequence: Tensor | Document) -> Document:
    """A sequence with labels, and with weights that are zero where there is no label."""
    document = sequence if isinstance(sequence, Document) else Document(sequence)
    _check(number, "tokens", document.tokens, document)
    if document.labels is not None:
        _check(number, "labels", document.labels, document)
    if document.weights is not None:
        _check(number, "weights", document.weights, document)
    tokens = document.tokens.long()
    if document.labels is None:
        labels = torch.cat([tokens[1:], tokens.new_full((1,), IGNORED)])
    else:
        labels = document.labels.long()
    if document.weights is None:
        weights = torch.ones_like(tokens, dtype=torch.float32)
    else:
        weights = document.weights.float()
    return Document(tokens, labels, weights.masked_fill(labels == IGNORED, 0.0))


def _check(
    number: int,
    name: str,
    tensor: Any,
    document: Document,
) -> None:
    one_dim = isinstance(tensor, Tensor) and tensor.dim() == 1
    if not one_dim or not len(tensor) or len(tensor) != len(document.tokens):
        raise BatchError(
            f"pack: the {name} of sequence {number} are {describe(tensor)}; write a 1-d tensor, "
            "one entry for every token, and leave empty sequences out"
        )
    if name != "weights" and (tensor.is_floating_point() or tensor.is_complex()):
        raise BatchError(
            f"pack: the {name} of sequence {number} are {describe(tensor)}; they have to be "
            "integers"
        )


def _split(document: Document, count: int) -> Iterator[Document]:
    tokens, labels, weights = document
    assert labels is not None
    assert weights is not None
    return map(
        Document,
        tokens.tensor_split(count),
        labels.tensor_split(count),
        weights.tensor_split(count),
    )
