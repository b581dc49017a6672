"""Sums over logits that never exist all at once: chunk by chunk of tokens, and with the vocabulary
spread over ranks.

A *token* has a row of ``x`` and a label; it *counts* if its label is not ``ignore_index``. Its
*lse* is the log-sum-exp of its logits, its *pick* what the loss subtracts from that: the logit of
its label (with label smoothing, a mean of that and all logits). The loss of a token is ``lse -
pick``. With an *axis*, rank ``i`` computes the logits of every rank's tokens for its own *share* of
the vocabulary only, the ``i``-th of ``n`` spans of columns (Shoeybi et al. 2019, "Megatron-LM",
section 3). Megatron reduces over ranks three times; here one all-to-all brings a token's sums from
all shares to the rank that holds the token. Without an axis, ``n`` is 1, the share is everything,
and no collective runs.

Forward keeps lse and no logits. Backward computes a chunk's logits again, and from them the chunk's
share of all gradients (Hsu et al. 2024, "Liger Kernel", does this in forward). With ``v`` columns,
no tensor is larger than ``x``, ``head``, a chunk's logits (``chunk_tokens * v``) and a few numbers
for every token of all ranks.

In: rows, a head, labels. Out: lse and pick of this rank's tokens, and their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.collectives import batching_rules as rules
from funcpipe._src.collectives import over_spans
from funcpipe._src.collectives.axis_scope import AxisSpan

Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class VocabConfig:
    """What `LogitSums` is told beside tensors. The spans are those of the axis where the loss is
    called."""

    spans: tuple[AxisSpan, ...]
    vocab: int
    smoothing: float
    chunk: int

    @property
    def ranks(self) -> int:
        sizes = [span.size for span in self.spans]
        return math.prod(sizes)

    @property
    def columns(self) -> int:
        """How many columns a share has; the last ones may lie behind the vocabulary."""
        return -(-self.vocab // self.ranks)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Which tokens are taken together; of no tokens, one empty chunk."""
        at_least_one = max(tokens, 1)
        for start in range(0, at_least_one, self.chunk):
            yield slice(start, start + self.chunk)


class _VocabShare:
    """A rank's share of the vocabulary.

    Args:
        head: of all columns; None: the rows are the logits.
        place: of this rank on the axis, 0-d.
    """

    def __init__(
        self,
        head: Tensor | None,
        place: Tensor,
        how: VocabConfig,
    ) -> None:
        self.place = place
        self.how = how
        first = place * how.columns
        own = torch.arange(how.columns, device=place.device)
        self.columns = first + own
        self.real = self.columns < how.vocab
        # all columns are real, on every rank
        self.whole = how.ranks * how.columns == how.vocab
        self.head = head
        if head is not None and how.ranks > 1:
            columns = self.columns.clamp(max=how.vocab - 1)
            self.head = head.index_select(0, columns)

    def logits(self, rows: Tensor) -> Tensor:
        """``(tokens, columns)``, at least float32; -inf behind the vocabulary."""
        logits = rows if self.head is None else rows @ self.head.T
        logits = logits.to(_wide(rows))
        if self.whole:
            return logits
        return logits.masked_fill(~self.real, -torch.inf)

    def sums(self, rows: Tensor, labels: Tensor) -> Tensor:
        """lse and pick of tokens over these columns: ``(2, tokens)``."""
        logits = self.logits(rows)
        count, smoothing = self.how.columns, self.how.smoothing
        local = labels - self.columns[0]
        inside = (local >= 0) & (local < count)
        columns = local.clamp(0, count - 1)
        own = logits.gather(1, columns[:, None])
        own = own[:, 0]
        pick = torch.where(inside, own, 0)
        if smoothing:
            every = logits
            if not self.whole:
                every = torch.where(self.real, logits, 0)
            pick = (1 - smoothing) * pick
            each = smoothing / self.how.vocab
            pick = pick + each * every.sum(1)
        lse = logits.logsumexp(1)
        return torch.stack((lse, pick))

    def slope(self, rows: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """The gradient of the logits, in the dtype of the rows; seeds ``(3, tokens)``: lse, and the
        gradients of lse and pick."""
        lse, g_lse, g_pick = seeds[:, :, None]
        smoothing = self.how.smoothing
        logits = self.logits(rows)
        probabilities = (logits - lse).exp()
        slope = probabilities * g_lse
        is_own = labels[:, None] == self.columns
        of_own = (1 - smoothing) * g_pick
        slope = slope + torch.where(is_own, of_own, 0)
        if smoothing:
            every = smoothing / self.how.vocab * g_pick
            if not self.whole:
                every = torch.where(self.real, every, 0)
            slope = slope + every
        return slope.to(rows.dtype)

    def pulled(self, slope: Tensor) -> Tensor:
        """From the gradient of the logits to that of the rows."""
        if self.head is None:
            return slope
        return slope @ self.head

    def spread(self, grad: Tensor) -> Tensor:
        """From the gradient of these columns of the head to that of all, 0 in the others."""
        if self.how.ranks == 1:
            return grad
        places = torch.arange(self.how.ranks, device=grad.device)
        is_own = self.place == places[:, None, None]
        of_all = torch.where(is_own, grad, 0)
        of_all = of_all.flatten(0, 1)
        return of_all[: self.how.vocab]


class LogitSums(torch.autograd.Function):
    """lse and pick of this rank's tokens, both ``(t,)``, at least float32.

    ``rows`` ``(t, d)``; ``labels`` ``(n, t)``, those of all ranks; ``place`` of this rank on the
    axis. Both results are differentiable, so that the gradient is, too: it reads lse. Backward may
    run where no axis is bound any more, so spans are not looked up again. The index of a mapped one
    is an operand, for vmap hands on operands only.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        rows: Any,
        head: Any,
        labels: Any,
        place: Any,
        how: VocabConfig,
        *indices: Any,
    ) -> Sums:
        share = _VocabShare(head, place, how)
        ranks = _RankExchange(how, indices)
        found = []
        for chunk in how.chunks(len(rows)):
            of_all = ranks.gather(rows[chunk]).flatten(0, 1)
            labels_of_all = labels[:, chunk].flatten()
            sums = share.sums(of_all, labels_of_all)
            sums = sums.unflatten(1, (how.ranks, -1))
            found.append(sums)
        # Before the exchange: what this share says of every rank's tokens. After it: what every
        # share says of this rank's.
        sums_of_all = torch.cat(found, 2).transpose(0, 1)
        of_all_shares = ranks.exchange(sums_of_all)
        lse, pick = of_all_shares.unbind(1)
        lse = lse.logsumexp(0)
        return lse, pick.sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        rows, head, labels, place, ctx.how, *indices = inputs
        lse, _ = output
        ctx.save_for_backward(rows, head, labels, place, lse, *indices)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        g_lse: Tensor,
        g_pick: Tensor,
    ) -> Any:
        rows, head, labels, place, lse, *indices = ctx.saved_tensors
        how = ctx.how
        share = _VocabShare(head, place, how)
        ranks = _RankExchange(how, indices)
        seeds = torch.stack((lse, g_lse, g_pick))
        seeds = ranks.gather(seeds)
        wants_rows, wants_head = ctx.needs_input_grad[:2]
        grads = []
        grad_head = None
        for chunk in how.chunks(len(rows)):
            of_all = ranks.gather(rows[chunk]).flatten(0, 1)
            labels_of_all = labels[:, chunk].flatten()
            seeds_of_all = seeds[:, :, chunk].transpose(0, 1)
            seeds_of_all = seeds_of_all.flatten(1)
            slope = share.slope(of_all, labels_of_all, seeds_of_all)
            if wants_rows:
                pulled = share.pulled(slope)
                pulled = pulled.unflatten(0, (how.ranks, -1))
                grads.append(ranks.scatter(pulled))
            if wants_head:
                summand = slope.T @ of_all
                summand = summand.to(_wide(slope))
                grad_head = summand if grad_head is None else grad_head.add_(summand)
        if grad_head is not None:
            grad_head = share.spread(grad_head)
            grad_head = grad_head.to(head.dtype)
        grad_rows = torch.cat(grads) if grads else None
        no_others = [None] * (3 + len(indices))
        return (grad_rows, grad_head, *no_others)


class _RankExchange:
    """The collectives of `LogitSums`; ``(n, *s)`` is a piece from, or for, every rank."""

    def __init__(self, how: VocabConfig, indices: Sequence[Tensor | None]) -> None:
        found = []
        for span, index in zip(how.spans, indices, strict=True):
            found.append(replace(span, index=index))
        self.spans = tuple(found)

    def gather(self, tensor: Tensor) -> Tensor:
        """From ``s`` to ``(n, *s)``."""
        return over_spans.all_gather(tensor, self.spans)

    def exchange(self, tensor: Tensor) -> Tensor:
        """From ``(n, *s)`` to ``(n, *s)``."""
        return over_spans.all_to_all(tensor, self.spans)

    def scatter(self, tensor: Tensor) -> Tensor:
        """From ``(n, *s)`` to ``s``: this rank's piece of the sum."""
        sizes = [span.size for span in self.spans]
        tensor = tensor.unflatten(0, sizes or [1])
        for span in self.spans:
            tensor = rules.linear("psum_scatter", tensor, span)
        return tensor if self.spans else tensor[0]


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums are taken."""
    return torch.promote_types(tensor.dtype, torch.float32)
