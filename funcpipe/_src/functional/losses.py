"""Cross-entropy whose logits never exist all at once: in chunks of tokens, and with the vocabulary
over ranks.

Terms. A *token* has a row of ``x`` and a label; it *counts* if its label is not ``ignore_index``.
Its *lse* is the log-sum-exp of its logits, its *pick* what the loss subtracts from that: the logit
of its label (with label smoothing, a mean of that and all logits). The loss of a token is ``lse -
pick``. With an *axis*, rank ``i`` computes the logits of every rank's tokens for its own *share* of
the vocabulary only, the ``i``-th of ``n`` runs of columns (Shoeybi et al. 2019, "Megatron-LM",
section 3). Megatron reduces over ranks three times; here one all-to-all brings a token's sums from
all shares to the rank that holds the token. Without an axis, ``n`` is 1, the share is everything,
and no collective runs.

Forward keeps lse and no logits. Backward computes a chunk's logits again, and from them the chunk's
share of all gradients (Hsu et al. 2024, "Liger Kernel", does this in forward). With ``v`` columns,
no tensor is larger than ``x``, ``head``, a chunk's logits (``chunk_tokens * v``) and a few numbers
for every token of all ranks.

In: rows ``(..., d)``, head ``(v, d)``, labels ``(...)``. Out: the `Mean` over this rank's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from funcpipe._src.collectives import all_gather, axis_index, over_spans
from funcpipe._src.collectives import batching_rules as rules
from funcpipe._src.collectives.axis_scope import AxisSpan, axis_spans
from funcpipe._src.core.loss_types import Mean
from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional import dispatch as hook
from funcpipe.errors import TraceError

Sums = tuple[torch.Tensor, torch.Tensor]
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
    x: torch.Tensor,
    head: torch.Tensor | None,
    labels: torch.Tensor,
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

    >>> x, head, labels = torch.zeros(2, 3, 5), torch.ones(8, 5), torch.tensor([[1, 2, 3], [4, -100, -100]])
    >>> loss = cross_entropy(x, head, labels)
    >>> loss.weight, loss.total / loss.weight  # the logarithm of 8
    (tensor(4.), tensor(2.0794))
    """
    options = Options(axis, ignore_index, label_smoothing, chunk_tokens)
    if head is not None:
        x, head = _autocast(x), _autocast(head)
    _check(x, head, labels, options)
    asked = hook.current()
    run = compute if asked is None else asked.cross_entropy
    return Mean(*run(x, head, labels, options))


def compute(
    x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Options
) -> Sums:
    """Total and weight of `cross_entropy`; no hook is asked, and operands fit each other."""
    axis = () if options.axis is None else options.axis
    found = axis_spans(axis, "cross_entropy")
    ranks = math.prod(run.size for run in found)
    vocab, held = x.shape[-1] if head is None else head.shape[0], labels.numel()
    labels = labels.flatten()
    counts = labels != options.ignore_index
    wrong = counts & ((labels < 0) | (labels >= vocab))

    pad = _padding(options, ranks, held)
    rows = _padded(x.reshape(held, x.shape[-1]), pad)
    everyone, place = (
        all_gather(_padded(labels, pad), axis, tiled=False),
        axis_index(axis, x.device),
    )
    how = _How(
        tuple(replace(run, index=None) for run in found),
        vocab,
        options.label_smoothing,
        options.chunk_tokens,
    )
    lse, pick = _Sums.apply(rows, head, everyone, place, how, *(run.index for run in found))

    losses = torch.where(counts, lse[:held] - pick[:held], 0)
    ones = counts.to(losses.dtype)
    return (losses * ones.masked_fill(wrong, torch.nan)).sum(), ones.sum()


@dataclass(frozen=True)
class _How:
    """What `_Sums` is told beside tensors; the runs are those of the axis where the loss is
    called."""

    runs: tuple[AxisSpan, ...]
    vocab: int
    smoothing: float
    chunk: int

    @property
    def ranks(self) -> int:
        return math.prod(run.size for run in self.runs)

    @property
    def columns(self) -> int:
        """How many columns a share has; the last ones may lie behind the vocabulary."""
        return -(-self.vocab // self.ranks)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Which tokens are taken together; of no tokens, one empty chunk."""
        return (slice(a, a + self.chunk) for a in range(0, max(tokens, 1), self.chunk))


class _Share:
    """A rank's share of the vocabulary.

    Args:
        head: of all columns; None: ``x`` is the logits.
        place: of this rank on the axis, 0-d.
    """

    def __init__(self, head: torch.Tensor | None, place: torch.Tensor, how: _How) -> None:
        self.place, self.how = place, how
        self.columns = place * how.columns + torch.arange(how.columns, device=place.device)
        self.real = self.columns < how.vocab
        self.whole = how.ranks * how.columns == how.vocab  # all columns are real, on every rank
        self.head = head
        if head is not None and how.ranks > 1:
            self.head = head.index_select(0, self.columns.clamp(max=how.vocab - 1))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, columns)``, at least float32; -inf behind the vocabulary."""
        out = (x if self.head is None else x @ self.head.T).to(_wide(x))
        return out if self.whole else out.masked_fill(~self.real, -torch.inf)

    def sums(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """lse and pick of tokens over these columns: ``(2, tokens)``."""
        logits, local = self.logits(x), labels - self.columns[0]
        inside = (local >= 0) & (local < self.how.columns)
        own = logits.gather(1, local.clamp(0, self.how.columns - 1)[:, None])[:, 0]
        pick = torch.where(inside, own, 0)
        if self.how.smoothing:
            every = logits if self.whole else torch.where(self.real, logits, 0)
            pick = (
                1 - self.how.smoothing
            ) * pick + self.how.smoothing / self.how.vocab * every.sum(1)
        return torch.stack((logits.logsumexp(1), pick))

    def slope(self, x: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits, in the dtype of ``x``; seeds ``(3, tokens)``: lse, and the
        gradients of lse and pick."""
        lse, g_lse, g_pick = seeds[:, :, None]
        out = (self.logits(x) - lse).exp() * g_lse
        out = out + torch.where(
            labels[:, None] == self.columns, (1 - self.how.smoothing) * g_pick, 0
        )
        if self.how.smoothing:
            every = self.how.smoothing / self.how.vocab * g_pick
            out = out + (every if self.whole else torch.where(self.real, every, 0))
        return out.to(x.dtype)

    def pulled(self, slope: torch.Tensor) -> torch.Tensor:
        """From the gradient of the logits to that of the rows of ``x``."""
        return slope if self.head is None else slope @ self.head

    def spread(self, grad: torch.Tensor) -> torch.Tensor:
        """From the gradient of these columns of the head to that of all, 0 in the others."""
        if self.how.ranks == 1:
            return grad
        places = torch.arange(self.how.ranks, device=grad.device)[:, None, None]
        return torch.where(self.place == places, grad, 0).flatten(0, 1)[: self.how.vocab]


class _Sums(torch.autograd.Function):
    """lse and pick of this rank's tokens, both ``(t,)``, at least float32.

    ``x`` ``(t, d)``; ``labels`` ``(n, t)``, those of all ranks; ``place`` of this rank on the axis.
    Both results are
    differentiable, so that the gradient is, too: it reads lse. Backward may run where no axis is
    bound any more, so runs are not looked up again; the index of a mapped one is an operand, for
    vmap hands on operands only.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any, head: Any, labels: Any, place: Any, how: _How, *indices: Any) -> Sums:  # type: ignore[override]
        share, ranks, found = _Share(head, place, how), _Ranks(how, indices), []
        for some in how.chunks(len(x)):
            sums = share.sums(ranks.gather(x[some]).flatten(0, 1), labels[:, some].flatten())
            found.append(sums.unflatten(1, (how.ranks, -1)))
        # Before, what this share says of every rank's tokens; after, what every share says of this
        # rank's.
        lse, pick = ranks.exchange(torch.cat(found, 2).transpose(0, 1)).unbind(1)
        return lse.logsumexp(0), pick.sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, head, labels, place, ctx.how, *indices = inputs
        ctx.save_for_backward(x, head, labels, place, output[0], *indices)

    @staticmethod
    def backward(ctx: Any, g_lse: torch.Tensor, g_pick: torch.Tensor) -> Any:  # type: ignore[override]
        x, head, labels, place, lse, *indices = ctx.saved_tensors
        share, ranks = _Share(head, place, ctx.how), _Ranks(ctx.how, indices)
        seeds = ranks.gather(torch.stack((lse, g_lse, g_pick)))
        grads, grad_head = [], None
        for some in ctx.how.chunks(len(x)):
            rows = ranks.gather(x[some]).flatten(0, 1)
            slope = share.slope(
                rows, labels[:, some].flatten(), seeds[:, :, some].transpose(0, 1).flatten(1)
            )
            if ctx.needs_input_grad[0]:
                grads.append(ranks.scatter(share.pulled(slope).unflatten(0, (ctx.how.ranks, -1))))
            if ctx.needs_input_grad[1]:
                part = (slope.T @ rows).to(_wide(slope))
                grad_head = part if grad_head is None else grad_head.add_(part)
        grad_head = None if grad_head is None else share.spread(grad_head).to(head.dtype)
        return (
            torch.cat(grads) if grads else None,
            grad_head,
            None,
            None,
            None,
            *(None for _ in indices),
        )


class _Ranks:
    """The collectives of `_Sums`; ``(n, *s)`` is a piece from, or for, every rank."""

    def __init__(self, how: _How, indices: Sequence[torch.Tensor | None]) -> None:
        self.runs = tuple(
            replace(run, index=index) for run, index in zip(how.runs, indices, strict=True)
        )

    def gather(self, t: torch.Tensor) -> torch.Tensor:
        """From ``s`` to ``(n, *s)``."""
        return over_spans.all_gather(t, self.runs)

    def exchange(self, t: torch.Tensor) -> torch.Tensor:
        """From ``(n, *s)`` to ``(n, *s)``."""
        return over_spans.all_to_all(t, self.runs)

    def scatter(self, t: torch.Tensor) -> torch.Tensor:
        """From ``(n, *s)`` to ``s``: this rank's piece of the sum."""
        t = t.unflatten(0, [run.size for run in self.runs] or [1])
        for run in self.runs:
            t = rules.linear("psum_scatter", t, run)
        return t if self.runs else t[0]


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype in which sums are taken."""
    return torch.promote_types(x.dtype, torch.float32)


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


def _padded(x: torch.Tensor, pad: int) -> torch.Tensor:
    """``x`` with zeros behind it, along dim 0; F.pad by nothing would be a copy."""
    return F.pad(x, (0,) * (2 * x.dim() - 1) + (pad,)) if pad else x


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """An operand as torch.autocast hands it to a matrix product: backward, which computes logits
    again, has none."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind)) if x.dtype in _CAST else x


def _check(
    x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Options
) -> None:
    """TraceError when operands or options do not fit each other."""
    if not x.is_floating_point() or x.dim() == 0:
        _refuse(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it takes floating-point rows (..., "
            "d)"
        )
    if head is None and options.axis is not None:
        _refuse(
            f"axis={options.axis!r} spreads the vocabulary over ranks, but without a head x is "
            "logits of all of it already; pass hidden states and the head, or leave axis out"
        )
    if head is not None and (head.dim() != 2 or head.shape[1] != x.shape[-1]):
        _refuse(
            f"head has shape {tuple(head.shape)}, and x {tuple(x.shape)}; for x (..., d) it takes "
            "(vocab, d), as in torch.nn.Linear(d, vocab).weight"
        )
    if head is not None and head.dtype != x.dtype:
        _refuse(
            f"head has dtype {head.dtype}, and x {x.dtype}; write head.to(x.dtype), or use "
            "torch.autocast"
        )
    if labels.dtype != torch.int64:
        _refuse(
            f"labels have dtype {labels.dtype}; they are the numbers of columns: write "
            "labels.long()"
        )
    if labels.shape != x.shape[:-1]:
        _refuse(
            f"labels have shape {tuple(labels.shape)}, and x {tuple(x.shape)}; there is one label "
            "per row of x"
        )
    if not 0 <= options.label_smoothing <= 1:
        _refuse(f"label_smoothing={options.label_smoothing!r}; it is a number from 0 to 1")
    if (
        isinstance(options.chunk_tokens, bool)
        or not isinstance(options.chunk_tokens, int)
        or options.chunk_tokens < 1
    ):
        _refuse(
            f"chunk_tokens={options.chunk_tokens!r}; a chunk has a whole number of tokens, 1 or "
            "more"
        )


def _refuse(text: str) -> None:
    raise TraceError(f"cross_entropy: {text}")
