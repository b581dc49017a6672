"""The hook of the trace: what a rank does for attention and the other intercepted calls.

In: the proof of a split, and a sequence rank that stands for all with the same graph.
Out: ops of a rank. While an attention is made no hook is bound, so that what is inside is torch's
own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from funcpipe._src.core.mesh import Axes, as_axes
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional import losses, random
from funcpipe._src.functional.attention import whole
from funcpipe._src.functional.dispatch import Spec
from funcpipe._src.functional.intercept import Intercept
from funcpipe._src.functional.positions import member_positions, plain
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.sequence_proof import SequenceProof
from funcpipe._src.sequence.ulysses import split_attention
from funcpipe.errors import SequenceError, TraceError


@contextlib.contextmanager
def rewriting(findings: SequenceProof | None, sequence_rank: int, split: bool) -> Iterator[None]:
    """Run a loss function as a rank does.

    Args:
        findings: how operands are split along positions; None: every rank has all positions.
        sequence_rank: any one of the ranks that run the same graph; only its lengths are used.
        split: whether the batch is split in any way.
    """
    if findings is not None:
        with hook.bound(Rewriting(findings, sequence_rank)), Intercept():
            yield
    elif split:
        with hook.bound(Unsplit()):
            yield
    else:
        yield


class Unsplit:
    """The `Hook` of a rank that has all positions: intercepted calls compute what they say."""

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: Spec,
    ) -> Tensor:
        return whole(query, key, value, spec)

    def positions(self, tensor: Tensor, dim: int) -> Tensor:
        return plain(tensor, dim)

    def cross_entropy(
        self,
        tensor: Tensor,
        head: Tensor | None,
        labels: Tensor,
        options: Any,
    ) -> tuple[Tensor, Tensor]:
        return losses.compute(tensor, head, labels, options)

    def dropout(self, tensor: Tensor, rate: float, key: Tensor) -> Tensor:
        if key.dim() == 0:
            raise TraceError(
                f"dropout of a tensor of shape {tuple(tensor.shape)} with one key for all: the "
                "batch is split, and every part would drop the same places. Give every row a key: "
                "a leaf fp.random.keys(key, rows) of the batch"
            )
        return random.dropped(tensor, rate, key, {})


class Rewriting(Unsplit):
    """The `Hook` of a rank with its local positions, for all ranks that run the same graph."""

    def __init__(self, findings: SequenceProof, sequence_rank: int) -> None:
        self.findings = findings
        self.sequence_rank = sequence_rank  # only its lengths are used

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: Spec,
    ) -> Tensor:
        layouts = self.findings.attention(query, key, value, spec)
        with hook.bound(None):
            return split_attention(query, key, value, spec, layouts, self.sequence_rank)

    def positions(self, tensor: Tensor, dim: int) -> Tensor:
        layout = self.findings.positions(tensor, dim)
        if layout is None:
            return plain(tensor, dim)
        return member_positions(layout, self.sequence_rank, tensor.device)

    def cross_entropy(
        self,
        tensor: Tensor,
        head: Tensor | None,
        labels: Tensor,
        options: Any,
    ) -> tuple[Tensor, Tensor]:
        layout = self.findings.cross_entropy(tensor, head, labels, options)
        if layout is not None and options.axis is not None and not layout.even:
            tokens = self._tokens_of_ranks(as_axes(options.axis), layout, labels)
            options = replace(options, tokens=tokens)
        return losses.compute(tensor, head, labels, options)

    def _tokens_of_ranks(
        self,
        axes: Axes,
        layout: SequenceLayout,
        labels: Tensor,
    ) -> tuple[int, ...] | None:
        """How many tokens each rank of some axes holds; None: all as many as this one."""
        if not set(axes) & set(layout.axes):
            return None
        if axes != layout.axes:
            raise SequenceError(
                f"losses.cross_entropy over {axes}: the sequence of {layout.size} positions is "
                f"split unevenly over {layout.axes}, so name those axes, all of them and in this "
                "order, or others alone"
            )
        rows = labels.numel() // max(layout.length(self.sequence_rank), 1)
        lengths = map(layout.length, range(layout.members))
        return tuple(rows * length for length in lengths)

    def dropout(self, tensor: Tensor, rate: float, key: Tensor) -> Tensor:
        split = self.findings.dropout(tensor, rate, key)
        if split is None:
            return super().dropout(tensor, rate, key)
        dim, layout = split
        own_positions = member_positions(layout, self.sequence_rank, tensor.device)
        return random.dropped(tensor, rate, key, {dim: own_positions})
