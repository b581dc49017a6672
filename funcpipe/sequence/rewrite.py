"""The hook of the trace: what a rank does for the calls that funcpipe knows.

In: findings, and a member of the ranks that share the graph. Out: ops of a rank. While they are made no hook is bound, so
that an attention inside one is torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from funcpipe.sequence import hook, losses
from funcpipe.sequence.attention import Intercept
from funcpipe.sequence.examine import Findings
from funcpipe.sequence.heads import split_attention
from funcpipe.sequence.hook import Spec
from funcpipe.sequence.positions import member_positions, plain


@contextlib.contextmanager
def rewriting(findings: Findings | None, member: int) -> Iterator[None]:
    """Run a loss function as a member does; without findings, as it is."""
    if findings is None:
        yield
        return
    with hook.bound(Rewriting(findings, member)), Intercept():
        yield


class Rewriting:
    """A `Hook`; ``member`` stands for all ranks that run the same graph, so it is asked for lengths only."""

    def __init__(self, findings: Findings, member: int) -> None:
        self.findings, self.member = findings, member

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec) -> torch.Tensor:
        held = self.findings.attention(q, k, v, spec)
        with hook.bound(None):
            return split_attention(q, k, v, spec, held, self.member)

    def positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        part = self.findings.positions(x, dim)
        with hook.bound(None):
            return plain(x, dim) if part is None else member_positions(part, self.member, x.device)

    def cross_entropy(
        self, x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.findings.cross_entropy(x, head, labels, options)
        if part is not None and options.axis is not None and not part.even:
            rows = labels.numel() // max(part.length(self.member), 1)
            options = replace(options, tokens=tuple(rows * part.length(m) for m in range(part.members)))
        with hook.bound(None):
            return losses.compute(x, head, labels, options)
