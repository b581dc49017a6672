"""How a collective over one run is differentiated and mapped.

Terms. A *linear* collective is its own derivative, and its *transpose* is linear, too. Every rank
seeds 1 on its local loss, so a gradient is that of the sum of all ranks' losses: the transpose of
psum is psum.

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

In: an operand of a rank (or of all elements of a mapped axis) and a run. Out: the result. Under
vmap over the run's own axis a collective is ordinary tensor code, which autograd and every outer
transform know; under another vmap it moves the foreign dim out of the way; on a mesh it is a pair
of ops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from funcpipe._src.collectives import ops
from funcpipe._src.collectives.axis_scope import Run
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
class _Call:
    """A collective: its kind, axes, their size, and (source, destination) pairs of a ppermute."""

    kind: str
    axes: Axes
    size: int
    pairs: Pairs = ()

    def transposed(self) -> _Call:
        if self.kind == "ppermute":
            return replace(self, pairs=tuple((d, s) for s, d in self.pairs))
        return replace(self, kind=_TRANSPOSES[self.kind])


def linear(kind: str, x: torch.Tensor, run: Run, pairs: Pairs = ()) -> torch.Tensor:
    """A linear collective over one run; see the table above."""
    return _Linear.apply(x, run.index, _Call(kind, run.axes, run.size, pairs))


def pmax(x: torch.Tensor, run: Run) -> torch.Tensor:
    """The maximum over one run. Ranks that hold it share its gradient equally, as in
    ``torch.amax``."""
    return _Max.apply(x, run.index, _Call("pmax", run.axes, run.size))


class _Linear(torch.autograd.Function):
    """``index`` is the run's own place, an operand so that vmap over the run's axis always calls
    the rule below."""

    @staticmethod
    def forward(x: torch.Tensor, index: torch.Tensor | None, call: _Call) -> torch.Tensor:  # type: ignore[override]
        _refuse_escaped(index, call)
        shapes = {"all_gather": (call.size, *x.shape), "psum_scatter": x.shape[1:]}
        perm = [i for pair in call.pairs for i in pair] if call.kind == "ppermute" else None
        return ops.collective(call.kind, x, call.axes, shapes.get(call.kind, x.shape), perm)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, index, ctx.call = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        return _Linear.apply(g, *ctx.saved_tensors, ctx.call.transposed()), None, None

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor, *_: Any) -> torch.Tensor:  # type: ignore[override]
        return _Linear.apply(t, *ctx.saved_tensors, ctx.call)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: torch.Tensor, index: Any, call: _Call
    ) -> tuple[torch.Tensor, int | None]:
        if in_dims[1] is not None:
            return _in_one_tensor(call, _spread(x, in_dims[0], call.size))
        before = (
            1 if call.kind in ("psum_scatter", "all_to_all") else 0
        )  # where the operand has its pieces in dim 0
        after = 1 if call.kind in ("all_gather", "all_to_all") else 0
        out = _Linear.apply(x.movedim(in_dims[0], before), index, call)
        return out.movedim(after, 0), 0


class _Max(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, index: torch.Tensor | None, call: _Call) -> torch.Tensor:  # type: ignore[override]
        _refuse_escaped(index, call)
        return ops.collective("pmax", x, call.axes, x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        x, index, ctx.call = inputs
        ctx.save_for_backward(x, index, output)
        ctx.save_for_forward(x, index, output)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        x, index, y = ctx.saved_tensors
        call = replace(ctx.call, kind="psum")
        mine = x == y
        holders = _Linear.apply(mine.to(g.dtype), index, call)
        return torch.where(mine, _Linear.apply(g, index, call) / holders, 0), None, None

    @staticmethod
    def jvp(ctx: Any, t: torch.Tensor, *_: Any) -> torch.Tensor:  # type: ignore[override]
        x, index, y = ctx.saved_tensors
        call = replace(ctx.call, kind="psum")
        mine = x == y
        holders = _Linear.apply(mine.to(t.dtype), index, call)
        return _Linear.apply(torch.where(mine, t, 0), index, call) / holders

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, x: torch.Tensor, index: Any, call: _Call
    ) -> tuple[torch.Tensor, int | None]:
        if in_dims[1] is not None:
            return _spread(x, in_dims[0], call.size).amax(0), None
        return _Max.apply(x.movedim(in_dims[0], 0), index, call), 0


def _spread(x: torch.Tensor, dim: int | None, n: int) -> torch.Tensor:
    """The operands of all elements of a mapped axis, along dim 0."""
    return x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)


def _in_one_tensor(call: _Call, x: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """A linear collective among the elements of dim 0; the result, and the dim in which its
    elements lie (None: all are the same)."""
    if call.kind == "psum":
        return x.sum(0, dtype=x.dtype), None
    if call.kind == "all_gather":
        return x, None
    if call.kind == "psum_scatter":
        return x.sum(0, dtype=x.dtype), 0
    if call.kind == "all_to_all":
        return x.transpose(0, 1), 0
    sources = {d: s for s, d in call.pairs}
    nothing = torch.zeros_like(x[0])
    return torch.stack([x[sources[d]] if d in sources else nothing for d in range(call.size)]), 0


def _refuse_escaped(index: torch.Tensor | None, call: _Call) -> None:
    if index is not None:
        raise AxisError(
            f"{call.kind}: a collective over axis {call.axes[0]!r} runs outside of the fp.vmap "
            "that binds it: a closure of the mapped function was called after it had returned. "
            "Return what it computes instead"
        )
