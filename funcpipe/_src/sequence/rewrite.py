"""The hook of the trace: what a rank does for the calls that funcpipe knows.

In: findings, and a member of the ranks that share the graph. Out: ops of a rank. While an attention
is made no hook is bound, so that what is inside is torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from funcpipe._src.core.mesh import Axes, as_axes
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional import losses, random
from funcpipe._src.functional.attention import Intercept, whole
from funcpipe._src.functional.dispatch import Spec
from funcpipe._src.functional.positions import member_positions, plain
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.verify import Findings
from funcpipe._src.sequence.ulysses import split_attention
from funcpipe.errors import SequenceError, TraceError


@contextlib.contextmanager
def rewriting(findings: Findings | None, member: int, split: bool) -> Iterator[None]:
    """Run a loss function as a member does; without findings, on all positions. ``split``: the
    batch is."""
    if findings is not None:
        with hook.bound(Rewriting(findings, member)), Intercept():
            yield
    elif split:
        with hook.bound(Unsplit()):
            yield
    else:
        yield


class Unsplit:
    """The `Hook` of a part of the batch that has all positions: known calls compute what they
    say."""

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec
    ) -> torch.Tensor:
        return whole(q, k, v, spec)

    def positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return plain(x, dim)

    def cross_entropy(
        self, x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return losses.compute(x, head, labels, options)

    def dropout(self, x: torch.Tensor, rate: float, key: torch.Tensor) -> torch.Tensor:
        if key.dim() == 0:
            raise TraceError(
                f"dropout of a tensor of shape {tuple(x.shape)} with one key for all: the batch is "
                "split, and every part would drop the same places. Give every row a key: a leaf "
                "fp.random.keys(key, rows) of the batch"
            )
        return random.dropped(x, rate, key, {})


class Rewriting(Unsplit):
    """The `Hook` of a slice; ``member`` stands for all ranks that run the same graph, so it is
    asked for lengths only."""

    def __init__(self, findings: Findings, member: int) -> None:
        self.findings, self.member = findings, member

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec
    ) -> torch.Tensor:
        held = self.findings.attention(q, k, v, spec)
        with hook.bound(None):
            return split_attention(q, k, v, spec, held, self.member)

    def positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        part = self.findings.positions(x, dim)
        return plain(x, dim) if part is None else member_positions(part, self.member, x.device)

    def cross_entropy(
        self, x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.findings.cross_entropy(x, head, labels, options)
        if part is not None and options.axis is not None and not part.even:
            options = replace(options, tokens=self._tokens(as_axes(options.axis), part, labels))
        return losses.compute(x, head, labels, options)

    def _tokens(
        self, axes: Axes, part: SequenceLayout, labels: torch.Tensor
    ) -> tuple[int, ...] | None:
        """How many tokens each rank of some axes holds; None: all as many as this one."""
        if not set(axes) & set(part.axes):
            return None
        if axes != part.axes:
            raise SequenceError(
                f"losses.cross_entropy over {axes}: the sequence of {part.size} positions is split "
                f"unevenly over {part.axes}, so name those axes, all of them and in this order, or "
                "others alone"
            )
        rows = labels.numel() // max(part.length(self.member), 1)
        return tuple(rows * part.length(m) for m in range(part.members))

    def dropout(self, x: torch.Tensor, rate: float, key: torch.Tensor) -> torch.Tensor:
        sliced = self.findings.dropout(x, rate, key)
        if sliced is None:
            return super().dropout(x, rate, key)
        dim, part = sliced
        return random.dropped(x, rate, key, {dim: member_positions(part, self.member, x.device)})
