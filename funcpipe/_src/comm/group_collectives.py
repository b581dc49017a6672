"""Collectives over process groups.

Terms. A *team* is the process group of a rank over some axes (`groups.py`). What only moves, moves
as bytes, so every dtype can. A *fold* is a sum or maximum taken in the order of the team.

In: a team and a tensor. Out: a new contiguous tensor. Errors are those of torch.distributed.

On CPUs reductions move the operands and fold them here, in team order: the bits are then those of
the in-process ranks, whatever the size of the team, and no dtype is missing. On GPUs NCCL reduces.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from funcpipe._src.comm import Done, Pending
from funcpipe._src.comm import tensor_layout as wire
from funcpipe._src.comm.groups import Team

_SMALL = (
    1 << 16
)  # bytes that a gather may hand to every member at once, rather than in a ring of steps
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_REDUCED_BY_NCCL = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
    }
)

# torch 2.13 renamed both and warns about the old names.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)


def all_gather(x: torch.Tensor, team: Team) -> torch.Tensor:
    """Every member's ``x``, stacked: shape ``(n, *x.shape)``."""
    n = len(team.ranks)
    if team.group is None or x.numel() == 0:
        return torch.stack([x] * n)
    if x.device.type == "cpu" and n * x.nbytes <= _SMALL:
        return all_to_all(x.expand(n, *x.shape), team)
    out = x.new_empty((n, *x.shape))
    _gather(_bytes(out), _bytes(x.contiguous()), group=team.group)
    return out if team.places is None else out[team.places]


class _Work:
    """A collective under way, and what becomes of what it wrote."""

    def __init__(
        self, work: dist.Work, finish: Callable[[], torch.Tensor], *held: torch.Tensor
    ) -> None:
        self.work, self.finish, self.held = work, finish, held

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.finish()


def start_all_gather(x: torch.Tensor, team: Team) -> Pending:
    """``all_gather``, waited for later."""
    if team.group is None or x.numel() == 0:
        return Done(all_gather(x, team))
    x = x.contiguous()
    out = x.new_empty((len(team.ranks), *x.shape))
    work = _gather(_bytes(out), _bytes(x), group=team.group, async_op=True)
    return _Work(work, lambda: out if team.places is None else out[team.places], x)


def start_reduce_scatter(x: torch.Tensor, team: Team) -> Pending:
    """``reduce_scatter``, waited for later."""
    if team.group is None or x.numel() == 0:
        return Done(reduce_scatter(x, team))
    x = _by_rank(x, team)
    if x.device.type == "cpu" or x.dtype not in _REDUCED_BY_NCCL:
        pieces = torch.empty_like(x)
        work = dist.all_to_all_single(_bytes(pieces), _bytes(x), group=team.group, async_op=True)
        order = team.places or range(len(team.ranks))
        return _Work(work, lambda: wire.fold([pieces[i] for i in order], "sum"), x)
    out = x.new_empty(x.shape[1:])
    work = _reduce_scatter(out.view(-1), x.view(-1), group=team.group, async_op=True)
    return _Work(work, lambda: out, x)


def all_to_all(x: torch.Tensor, team: Team) -> torch.Tensor:
    """Piece ``x[i]`` goes to member ``i``; what came from each, same shape."""
    if team.group is None or x.numel() == 0:
        return wire.fresh(x)
    x = _by_rank(x, team)
    out = torch.empty_like(x)
    dist.all_to_all_single(_bytes(out), _bytes(x), group=team.group)
    return out if team.places is None else out[team.places]


def _by_rank(x: torch.Tensor, team: Team) -> torch.Tensor:
    """Pieces in team order, put into the order of the process group."""
    if team.places is None:
        return x.contiguous()
    return x[[team.places.index(i) for i in range(len(team.places))]].contiguous()


def reduce_scatter(x: torch.Tensor, team: Team) -> torch.Tensor:
    """The sum over members of their ``x[i]``, where ``i`` is the own place."""
    if (
        x.device.type == "cpu"
        or team.group is None
        or x.dtype not in _REDUCED_BY_NCCL
        or x.numel() == 0
    ):
        return wire.fold(list(all_to_all(x, team)), "sum")
    x = _by_rank(x, team)
    out = x.new_empty(x.shape[1:])
    _reduce_scatter(out.view(-1), x.view(-1), group=team.group)
    return out


def all_reduce(x: torch.Tensor, op: str, team: Team) -> torch.Tensor:
    """The sum or maximum over members."""
    n = len(team.ranks)
    if team.group is None or x.numel() == 0:
        return wire.fresh(x)
    if x.device.type != "cpu" and x.dtype in _REDUCED_BY_NCCL:
        out = wire.fresh(x)
        dist.all_reduce(out, _OPS[op], group=team.group)
        return out
    if n * x.nbytes <= _SMALL:
        return wire.fold(list(all_gather(x, team)), op)
    # Every member folds one n-th of the elements, as in a reduce-scatter followed by an all-gather.
    piece = -(-x.numel() // n)
    padded = x.new_zeros(n * piece)
    padded[: x.numel()] = x.reshape(-1)
    folded = wire.fold(list(all_to_all(padded.view(n, piece), team)), op)
    return all_gather(folded, team).view(-1)[: x.numel()].view(x.shape)
