"""Cross-entropy whose logits never exist all at once: in chunks of tokens, and with the vocabulary
over ranks.

`logit_sums.py` computes the sums over logits. Here are what users call, and its checks.

In: rows ``(..., d)``, head ``(v, d)``, labels ``(...)``. Out: the `Mean` over this rank's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.collectives import all_gather, axis_index
from funcpipe._src.collectives.axis_scope import axis_spans
from funcpipe._src.core.loss_types import Mean
from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.logit_sums import LogitSums, Sums, VocabConfig
from funcpipe.errors import TraceError

_CAST = (torch.float32, torch.float16, torch.bfloat16)  # by torch.autocast


@dataclass(frozen=True)
class Options:
    """How a cross-entropy is computed; see `cross_entropy`.

    Args:
        tokens: how many tokens every rank of the axis holds; None: all alike.
    """

    axis: str | Axes | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    chunk_tokens: int = 1024
    tokens: tuple[int, ...] | None = None


def cross_entropy(
    x: Tensor,
    head: Tensor | None,
    labels: Tensor,
    *,
    axis: str | Axes | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 1024,
) -> Mean:
    """The cross-entropy of tokens, summed, and how many tokens there are; full logits never exist.

    Args:
        x: what goes into the head, ``(..., d)``, or without a head the logits ``(..., v)``;
            floating-point.
        head: ``(v, d)``, dtype of ``x``; logits are ``x @ head.T``, in that dtype. It may be the
            embedding. None: ``x`` is the logits. For a bias, append it to ``head`` as a column, and
            a one to every row of ``x``.
        labels: ``(...)``, int64: a column, or ``ignore_index``.
        axis: one or several axes that split the batch, over whose ranks the vocabulary is spread:
            all must call it, with the same head. None, or an axis of one rank: each rank computes
            all columns for its own tokens.
        ignore_index: the label of tokens that do not count.
        label_smoothing: in [0, 1]: how much of a token's target is spread over all columns.
        chunk_tokens: how many of its own tokens a rank takes at a time; their logits, in float32,
            take ``4 * chunk_tokens * v`` bytes, with or without an axis.

    Returns:
        ``Mean(total, weight)`` of this rank's tokens, 0-d, in float32 (float64 if ``x`` is). With
        no token that counts both are 0. A label that is no column makes the total, and the
        gradients that depend on it, NaN: to raise an error, a GPU would have to wait. On an axis,
        the gradient of ``head`` is that of this rank's columns, from the tokens of all ranks, and 0
        elsewhere; its sum over ranks is the gradient, as everywhere in funcpipe.

    Raises:
        TraceError: operands or options that do not fit each other.
        AxisError: an axis that is not bound.

    >>> x, head = torch.zeros(2, 3, 5), torch.ones(8, 5)
    >>> labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> loss = cross_entropy(x, head, labels)
    >>> loss.weight, loss.total / loss.weight  # the logarithm of 8
    (tensor(4.), tensor(2.0794))
    """
    options = Options(axis, ignore_index, label_smoothing, chunk_tokens)
    if head is not None:
        x = _autocast(x)
        head = _autocast(head)
    _check(x, head, labels, options)
    asked = hook.current()
    run = compute if asked is None else asked.cross_entropy
    return Mean(*run(x, head, labels, options))


def compute(
    x: Tensor,
    head: Tensor | None,
    labels: Tensor,
    options: Options,
) -> Sums:
    """Total and weight of `cross_entropy`; no hook is asked, and operands fit each other."""
    axis = () if options.axis is None else options.axis
    spans = axis_spans(axis, "cross_entropy")
    ranks = math.prod(span.size for span in spans)
    vocab = x.shape[-1] if head is None else head.shape[0]
    held = labels.numel()
    labels = labels.flatten()
    counts = labels != options.ignore_index
    wrong = counts & ((labels < 0) | (labels >= vocab))

    padding = _padding(options, ranks, held)
    rows = x.reshape(held, x.shape[-1])
    rows = _padded(rows, padding)
    padded_labels = _padded(labels, padding)
    labels_of_all = all_gather(padded_labels, axis, tiled=False)
    place = axis_index(axis, x.device)
    without_index = tuple(replace(span, index=None) for span in spans)
    how = VocabConfig(without_index, vocab, options.label_smoothing, options.chunk_tokens)
    indices = [span.index for span in spans]
    lse, pick = LogitSums.apply(rows, head, labels_of_all, place, how, *indices)

    losses = torch.where(counts, lse[:held] - pick[:held], 0)
    ones = counts.to(losses.dtype)
    total = (losses * ones.masked_fill(wrong, torch.nan)).sum()
    return total, ones.sum()


def _padding(options: Options, ranks: int, held: int) -> int:
    """How many tokens this rank adds to its own, so that all bring equally many to the
    exchanges."""
    if options.tokens is None or ranks == 1:
        return 0
    if len(options.tokens) != ranks:
        raise TraceError(
            f"cross_entropy: axis={options.axis!r} has {ranks} ranks, but the sequence is split "
            f"over {len(options.tokens)}: name the axes that split the sequence, and no others"
        )
    assert held in options.tokens
    return max(options.tokens) - held


def _padded(tensor: Tensor, padding: int) -> Tensor:
    """With zeros behind it, along dim 0; F.pad by nothing would be a copy."""
    if not padding:
        return tensor
    before_last = (0,) * (2 * tensor.dim() - 1)
    return F.pad(tensor, (*before_last, padding))


def _autocast(operand: Tensor) -> Tensor:
    """An operand as torch.autocast hands it to a matrix product: backward, which computes logits
    again, has none."""
    kind = operand.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return operand
    if operand.dtype not in _CAST:
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


def _check(hidden: Tensor, head: Tensor | None, labels: Tensor, options: Options) -> None:
    """TraceError when operands or options do not fit each other."""
    shape = tuple(hidden.shape)
    if not hidden.is_floating_point() or hidden.dim() == 0:
        _refuse(
            f"x has shape {shape} and dtype {hidden.dtype}; it takes floating-point rows (..., d)"
        )
    if head is None and options.axis is not None:
        _refuse(
            f"axis={options.axis!r} spreads the vocabulary over ranks, but without a head x is "
            "logits of all of it already; pass hidden states and the head, or leave axis out"
        )
    if head is not None and (head.dim() != 2 or head.shape[1] != hidden.shape[-1]):
        _refuse(
            f"head has shape {tuple(head.shape)}, and x {shape}; for x (..., d) it takes "
            "(vocab, d), as in torch.nn.Linear(d, vocab).weight"
        )
    if head is not None and head.dtype != hidden.dtype:
        _refuse(
            f"head has dtype {head.dtype}, and x {hidden.dtype}; write head.to(x.dtype), or use "
            "torch.autocast"
        )
    if labels.dtype != torch.int64:
        _refuse(
            f"labels have dtype {labels.dtype}; they are the numbers of columns: write "
            "labels.long()"
        )
    if labels.shape != hidden.shape[:-1]:
        _refuse(
            f"labels have shape {tuple(labels.shape)}, and x {shape}; there is one label "
            "per row of x"
        )
    if not 0 <= options.label_smoothing <= 1:
        _refuse(f"label_smoothing={options.label_smoothing!r}; it is a number from 0 to 1")
    tokens = options.chunk_tokens
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        _refuse(f"chunk_tokens={tokens!r}; a chunk has a whole number of tokens, 1 or more")


def _refuse(text: str) -> None:
    raise TraceError(f"cross_entropy: {text}")
