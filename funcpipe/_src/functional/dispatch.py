"""The hook: while funcpipe plans a loss, the calls that it knows ask a hook for their result. In
plain PyTorch none is bound, and they compute it themselves.

Attention's operands here have torch's layout, ``(batch, heads, positions, head dim)``, with exactly
four dims; keys and values may have fewer heads than queries if the number of query heads is a
multiple of theirs.

In: a known call with its operands. Out: its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from funcpipe._src.functional.sequence_layout import SequenceLayout


@dataclass(frozen=True, eq=False)
class Spec:
    """What an attention computes beside its queries, keys and values.

    Args:
        causal: whether a query sees no key behind its own place (both counted from the front, as
            torch does).
        scale: of the scores; None: ``1 / sqrt(head dim)``.
        bias: 4-d, broadcastable to ``(batch, query heads, query positions, key positions)``: bool
            (True takes part), or added to the scores.
        cu_seqlens: where the documents of a packed sequence begin, and the end of the last: int,
            ``(documents + 1,)``, or ``(batch, documents + 1)``. A query sees keys of its own
            document only.
    """

    causal: bool = False
    scale: float | None = None
    bias: Tensor | None = None
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """How the operands of an attention are split over ranks.

    Args:
        queries, keys: the layouts of queries (and the result), and of keys and values, along their
            dim of positions. If both are None, the sequence is not split here and attention runs
            unchanged. If ``keys`` alone is None, every rank holds all keys and values.
        bias_query, bias_key: whether the bias is split along its dim of queries, of keys.
    """

    queries: SequenceLayout | None = None
    keys: SequenceLayout | None = None
    bias_query: bool = False
    bias_key: bool = False


class Hook(Protocol):
    """What the calls that funcpipe knows ask."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, spec: Spec, /) -> Tensor:
        """The attention; the layout of this module."""

    def positions(self, tensor: Tensor, dim: int, /) -> Tensor:
        """The global positions of a tensor along a dim: int64, 1-d."""

    def cross_entropy(
        self,
        tokens: Tensor,
        head: Tensor | None,
        labels: Tensor,
        options: Any,
        /,
    ) -> tuple[Tensor, Tensor]:
        """Total and weight, both 0-d, of `fp.losses.cross_entropy`."""

    def dropout(self, tensor: Tensor, rate: float, key: Tensor, /) -> Tensor:
        """`fp.random.dropout`, for a rate above 0."""


_hook: ContextVar[Hook | None] = ContextVar("funcpipe_sequence", default=None)


def current() -> Hook | None:
    """The hook that is bound, if one is."""
    return _hook.get()


@contextlib.contextmanager
def bound(hook: Hook | None) -> Iterator[None]:
    """Bind a hook; None: known calls compute what they say."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)
