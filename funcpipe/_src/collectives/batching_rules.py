"""Batching rules: how a collective over one span is differentiated and mapped.

In: an operand of a rank (or of all elements of a mapped axis) and a span.
Out: the result.

A linear collective is its own derivative, and its transpose is linear, too. Every rank seeds 1 on
its local loss, so a gradient is that of the sum of all ranks' losses: the transpose of psum is
psum.

=============  ===============  ===========================  ==================================
kind           operand          result                       transpose
=============  ===============  ===========================  ==================================
psum           ``s``            ``s``                        psum
all_gather     ``s``            ``(n, *s)``                  psum_scatter
psum_scatter   ``(n, *s)``      ``s``                        all_gather
all_to_all     ``(n, *s)``      ``(n, *s)``                  all_to_all
ppermute       ``s``            ``s``                        ppermute, every pair turned around
pmax           ``s``            ``s``                        (not linear)
=============  ===============  ===========================  ==================================

Under vmap over the span's own axis a collective is ordinary tensor code, which autograd and every
outer transform understand. Under another vmap it moves the foreign dim out of the way. On a mesh it
is a pair of ops (`ops.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from funcpipe._src.collectives import ops
from funcpipe._src.collectives.axis_scope import AxisSpan
from funcpipe._src.core.mesh import Axes
from funcpipe.errors import AxisError

_TRANSPOSES = {
    "psum": "psum",
    "all_gather": "psum_scatter",
    "psum_scatter": "all_gather",
    "all_to_all": "all_to_all",
}
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Collective:
    """A collective.

    Args:
        kind: as in the table above.
        axes, size: of its span.
        pairs: of a ppermute: (source, destination).
    """

    kind: str
    axes: Axes
    size: int
    pairs: Pairs = ()

    def transposed(self) -> _Collective:
        if self.kind == "ppermute":
            turned = tuple((destination, source) for source, destination in self.pairs)
            return replace(self, pairs=turned)
        return replace(self, kind=_TRANSPOSES[self.kind])

    def result_shape(self, operand: torch.Tensor) -> tuple[int, ...]:
        if self.kind == "all_gather":
            return (self.size, *operand.shape)
        if self.kind == "psum_scatter":
            return operand.shape[1:]
        return operand.shape

    def run(self, operand: torch.Tensor) -> torch.Tensor:
        """Run it on a mesh."""
        perm = None
        if self.kind == "ppermute":
            perm = list(chain.from_iterable(self.pairs))
        shape = self.result_shape(operand)
        return ops.collective(self.kind, operand, self.axes, shape, perm)


def linear(
    kind: str,
    operand: torch.Tensor,
    span: AxisSpan,
    pairs: Pairs = (),
) -> torch.Tensor:
    """A linear collective over one span; see the table above."""
    collective = _Collective(kind, span.axes, span.size, pairs)
    return _Linear.apply(operand, span.index, collective)


def pmax(operand: torch.Tensor, span: AxisSpan) -> torch.Tensor:
    """The maximum over one span.

    Ranks that hold it share its gradient equally, as in ``torch.amax``.
    """
    collective = _Collective("pmax", span.axes, span.size)
    return _Max.apply(operand, span.index, collective)


class _Linear(torch.autograd.Function):
    """A linear collective.

    ``index`` is the span's own index, an operand so that vmap over the span's axis always calls the
    rule below.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        operand: torch.Tensor,
        index: torch.Tensor | None,
        collective: _Collective,
    ) -> torch.Tensor:
        _refuse_escaped(index, collective)
        return collective.run(operand)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, index, ctx.collective = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        transposed = ctx.collective.transposed()
        return _Linear.apply(grad, index, transposed), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return _Linear.apply(tangent, index, ctx.collective)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple,
        operand: torch.Tensor,
        index: Any,
        collective: _Collective,
    ) -> tuple[torch.Tensor, int | None]:
        mapped, index_mapped, _ = in_dims
        if index_mapped is not None:
            together = _elements_first(operand, mapped, collective.size)
            return _in_one_tensor(collective, together)
        # The foreign dim stays behind dim 0 where that has one entry for each rank.
        before = 1 if collective.kind in ("psum_scatter", "all_to_all") else 0
        after = 1 if collective.kind in ("all_gather", "all_to_all") else 0
        result = _Linear.apply(operand.movedim(mapped, before), index, collective)
        return result.movedim(after, 0), 0


class _Max(torch.autograd.Function):
    """The maximum, and as its derivative the mean over the ranks that hold it."""

    @staticmethod
    def forward(  # type: ignore[override]
        operand: torch.Tensor,
        index: torch.Tensor | None,
        collective: _Collective,
    ) -> torch.Tensor:
        _refuse_escaped(index, collective)
        return collective.run(operand)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        operand, index, ctx.collective = inputs
        ctx.save_for_backward(operand, index, output)
        ctx.save_for_forward(operand, index, output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        holds, holders, psum = _holders(ctx, grad)
        share = psum(grad) / holders
        return torch.where(holds, share, 0), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:  # type: ignore[override]
        holds, holders, psum = _holders(ctx, tangent)
        held = torch.where(holds, tangent, 0)
        return psum(held) / holders

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple,
        operand: torch.Tensor,
        index: Any,
        collective: _Collective,
    ) -> tuple[torch.Tensor, int | None]:
        mapped, index_mapped, _ = in_dims
        if index_mapped is not None:
            together = _elements_first(operand, mapped, collective.size)
            return together.amax(0), None
        return _Max.apply(operand.movedim(mapped, 0), index, collective), 0


def _holders(
    ctx: Any,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Whether this rank holds the maximum, how many ranks do, and the psum over them."""
    operand, index, maximum = ctx.saved_tensors
    collective = replace(ctx.collective, kind="psum")

    def psum(tensor: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(tensor, index, collective)

    holds = operand == maximum
    return holds, psum(holds.to(like.dtype)), psum


def _elements_first(operand: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """The operands of all elements of a mapped axis, along dim 0."""
    if dim is None:
        return operand.expand(size, *operand.shape)
    return operand.movedim(dim, 0)


def _in_one_tensor(
    collective: _Collective,
    operands: torch.Tensor,
) -> tuple[torch.Tensor, int | None]:
    """A linear collective among the elements of dim 0.

    Returns:
        the result, and the dim in which its elements lie (None: all are the same).
    """
    if collective.kind == "psum":
        return operands.sum(0, dtype=operands.dtype), None
    if collective.kind == "all_gather":
        return operands, None
    if collective.kind == "psum_scatter":
        return operands.sum(0, dtype=operands.dtype), 0
    if collective.kind == "all_to_all":
        return operands.transpose(0, 1), 0
    received = [torch.zeros_like(operands[0])] * collective.size
    for source, destination in collective.pairs:
        received[destination] = operands[source]
    return torch.stack(received), 0


def _refuse_escaped(index: torch.Tensor | None, collective: _Collective) -> None:
    if index is not None:
        raise AxisError(
            f"{collective.kind}: a collective over axis {collective.axes[0]!r} runs outside of the "
            "fp.vmap that binds it: a closure of the mapped function was called after it had "
            "returned. Return what it computes instead"
        )
