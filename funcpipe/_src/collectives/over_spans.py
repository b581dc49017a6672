"""Collectives of one tensor over several spans: one span after another, the first major.

In: a tensor, and the spans of an axis (`axis_scope.py`).
Out: a tensor, or an AxisError where the tensor or the pairs of a ppermute do not fit.
"""

from __future__ import annotations

import math
from itertools import chain

import torch

from funcpipe._src.collectives import batching_rules as rules
from funcpipe._src.collectives import ops
from funcpipe._src.collectives.axis_scope import AxisSpan
from funcpipe.errors import AxisError

Spans = tuple[AxisSpan, ...]


def axes_of_spans(spans: Spans) -> list[str]:
    return list(chain.from_iterable(span.axes for span in spans))


def sizes(spans: Spans) -> list[int]:
    """The sizes of dims for spans; one dim of size 1 where there are none."""
    return [span.size for span in spans] or [1]


def ranks_on(spans: Spans) -> int:
    return math.prod(span.size for span in spans)


def counted(tensor: torch.Tensor) -> torch.Tensor:
    """Bools as numbers, to be added."""
    return tensor.to(torch.int64) if tensor.dtype == torch.bool else tensor


def psum(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
    tensor = counted(tensor)
    for span in reversed(spans):
        tensor = rules.linear("psum", tensor, span)
    return tensor


def all_gather(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
    """What all ranks hold: ``(n, *s)``."""
    for span in reversed(spans):
        tensor = rules.linear("all_gather", tensor, span)
    return tensor.flatten(0, len(spans) - 1) if spans else tensor.unsqueeze(0)


def all_to_all(shards: torch.Tensor, spans: Spans) -> torch.Tensor:
    """All-to-all of ``(n, *s)`` over several spans: one after another, each along its own dim."""
    shards = shards.unflatten(0, sizes(spans))
    for dim, span in enumerate(spans):
        first = shards.movedim(dim, 0)
        shards = rules.linear("all_to_all", first, span).movedim(0, dim)
    return shards.flatten(0, len(spans) - 1) if spans else shards


def axis_index(spans: Spans, device: torch.device) -> torch.Tensor:
    index: torch.Tensor | None = None
    for span in spans:
        own = span.index
        own = ops.axis_index(span.axes, device) if own is None else own.to(device)
        index = own if index is None else index * span.size + own
    if index is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    return index


def permute(
    tensor: torch.Tensor,
    spans: Spans,
    pairs: rules.Pairs,
) -> torch.Tensor:
    """A permutation over several spans, which none of them can do alone.

    Every rank sends shards to all ranks, of which at most one is not zero.
    """
    index = axis_index(spans, tensor.device)
    zero = torch.zeros_like(tensor)
    shards = [zero] * ranks_on(spans)
    for source, destination in sorted(pairs, key=lambda pair: pair[1]):
        shards[destination] = torch.where(index == source, tensor, zero)
    received = all_to_all(torch.stack(shards), spans)
    result = zero
    for source, destination in pairs:
        result = torch.where(index == destination, received[source], result)
    return result


def shards_of(
    caller: str,
    tensor: torch.Tensor,
    dim: int,
    spans: Spans,
    tiled: bool,
) -> torch.Tensor:
    """The shards of a dim: ``(n, *s)``."""
    ranks = ranks_on(spans)
    size = tensor.shape[dim]
    if tiled:
        fits = size % ranks == 0
        fault, cure = "is no multiple of", "pad it, or name another dim"
    else:
        fits = size == ranks
        fault, cure = "is not", "use tiled=True to cut it into shards"
    if not fits:
        names = ", ".join(map(repr, axes_of_spans(spans))) or "the axis"
        raise AxisError(
            f"{caller}: dim {dim} of a tensor of shape {tuple(tensor.shape)} {fault} {ranks}, the "
            f"number of ranks on {names}; {cure}"
        )
    if tiled:
        tensor = tensor.unflatten(dim, (ranks, size // ranks))
    return tensor.movedim(dim, 0)


def joined(shards: torch.Tensor, dim: int) -> torch.Tensor:
    """From ``(n, *s)`` to the shards one after another along a dim of ``s``."""
    return shards.movedim(0, dim).flatten(dim, dim + 1)


def dim_of(
    caller: str,
    tensor: torch.Tensor,
    dim: int,
    extra: bool = False,
) -> int:
    """The dim, counted from 0; ``extra``: the result has one dim more."""
    dims = tensor.dim() + extra
    if not -dims <= dim < dims:
        raise AxisError(f"{caller}: a tensor of shape {tuple(tensor.shape)} has no dim {dim}")
    return dim % dims


def check_pairs(pairs: rules.Pairs, ranks: int | None) -> None:
    """Refuse pairs that name an index twice, or one that the axis does not have.

    ``ranks`` is None where no axis is bound, so that any index will do.
    """
    for nth, end in enumerate(("source", "destination")):
        indices = [pair[nth] for pair in pairs]
        for index in indices:
            if ranks is not None and not 0 <= index < ranks:
                raise AxisError(
                    f"ppermute: {end} {index} is not on an axis of {ranks} ranks: 0 to {ranks - 1}"
                )
        if len(set(indices)) < len(indices):
            raise AxisError(
                f"ppermute: {list(pairs)} names a {end} twice; use all_gather to send to several "
                "ranks"
            )
