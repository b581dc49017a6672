"""Collectives over process groups.

In: a tensor, and the process group of this rank over some axes (`groups.py`).
Out: a new contiguous tensor. Errors are those of torch.distributed.

On CPUs a reduction moves the operands and folds them here, in the order of the mesh. The bits are
then those of the simulated ranks, whatever the size of the group, and no dtype is missing. On GPUs
NCCL reduces. Operations that only move elements move bytes, so every dtype can.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from funcpipe._src.comm import Done, Pending, tensor_layout
from funcpipe._src.comm.groups import AxesGroup

# Bytes that a gather may hand to every rank at once, rather than in a ring of steps.
_SMALL = 1 << 16
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


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _folded_here(tensor: torch.Tensor) -> bool:
    """Whether a reduction moves the operands and folds them, rather than NCCL."""
    return tensor.device.type == "cpu" or tensor.dtype not in _REDUCED_BY_NCCL


def _moves_nothing(tensor: torch.Tensor, group: AxesGroup) -> bool:
    return group.process_group is None or tensor.numel() == 0


def all_gather(tensor: torch.Tensor, group: AxesGroup) -> torch.Tensor:
    """The tensors of all ranks, stacked: shape ``(n, *tensor.shape)``."""
    size = len(group.ranks)
    if _moves_nothing(tensor, group):
        return torch.stack([tensor] * size)
    if tensor.device.type == "cpu" and size * tensor.nbytes <= _SMALL:
        return all_to_all(tensor.expand(size, *tensor.shape), group)
    gathered = tensor.new_empty((size, *tensor.shape))
    operand = _bytes(tensor.contiguous())
    _gather(_bytes(gathered), operand, group=group.process_group)
    return _in_mesh_order(gathered, group)


class _Started:
    """A collective under way, and what becomes of what it wrote."""

    def __init__(
        self,
        work: dist.Work,
        finish: Callable[[], torch.Tensor],
        operand: torch.Tensor,
    ) -> None:
        self.work = work
        self.finish = finish
        self.operand = operand  # lives until the end

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.finish()


def start_all_gather(tensor: torch.Tensor, group: AxesGroup) -> Pending:
    """``all_gather``, waited for later."""
    if _moves_nothing(tensor, group):
        return Done(all_gather(tensor, group))
    tensor = tensor.contiguous()
    gathered = tensor.new_empty((len(group.ranks), *tensor.shape))
    work = _gather(
        _bytes(gathered),
        _bytes(tensor),
        group=group.process_group,
        async_op=True,
    )

    def finish() -> torch.Tensor:
        return _in_mesh_order(gathered, group)

    return _Started(work, finish, tensor)


def start_reduce_scatter(tensor: torch.Tensor, group: AxesGroup) -> Pending:
    """``reduce_scatter``, waited for later."""
    if _moves_nothing(tensor, group):
        return Done(reduce_scatter(tensor, group))
    tensor = _in_group_order(tensor, group)
    if _folded_here(tensor):
        received = torch.empty_like(tensor)
        work = dist.all_to_all_single(
            _bytes(received),
            _bytes(tensor),
            group=group.process_group,
            async_op=True,
        )

        def finish() -> torch.Tensor:
            order = group.positions or range(len(group.ranks))
            return tensor_layout.fold([received[position] for position in order], "sum")

        return _Started(work, finish, tensor)
    reduced = tensor.new_empty(tensor.shape[1:])
    work = _reduce_scatter(
        reduced.view(-1),
        tensor.view(-1),
        group=group.process_group,
        async_op=True,
    )
    return _Started(work, lambda: reduced, tensor)


def all_to_all(tensor: torch.Tensor, group: AxesGroup) -> torch.Tensor:
    """``tensor[i]`` goes to rank ``i`` of the group; the result has what came from each."""
    if _moves_nothing(tensor, group):
        return tensor_layout.fresh(tensor)
    tensor = _in_group_order(tensor, group)
    received = torch.empty_like(tensor)
    dist.all_to_all_single(_bytes(received), _bytes(tensor), group=group.process_group)
    return _in_mesh_order(received, group)


def reduce_scatter(tensor: torch.Tensor, group: AxesGroup) -> torch.Tensor:
    """The sum over ranks of their ``tensor[i]``, where ``i`` is the own index in the group."""
    if _folded_here(tensor) or _moves_nothing(tensor, group):
        received = all_to_all(tensor, group)
        return tensor_layout.fold(list(received), "sum")
    tensor = _in_group_order(tensor, group)
    reduced = tensor.new_empty(tensor.shape[1:])
    _reduce_scatter(reduced.view(-1), tensor.view(-1), group=group.process_group)
    return reduced


def all_reduce(
    tensor: torch.Tensor,
    op: str,
    group: AxesGroup,
) -> torch.Tensor:
    """The sum or maximum over ranks."""
    size = len(group.ranks)
    if _moves_nothing(tensor, group):
        return tensor_layout.fresh(tensor)
    if not _folded_here(tensor):
        reduced = tensor_layout.fresh(tensor)
        dist.all_reduce(reduced, _OPS[op], group=group.process_group)
        return reduced
    if size * tensor.nbytes <= _SMALL:
        gathered = all_gather(tensor, group)
        return tensor_layout.fold(list(gathered), op)
    # Every rank folds one n-th of the elements, as in a reduce-scatter followed by an all-gather.
    share = -(-tensor.numel() // size)
    padded = tensor.new_zeros(size * share)
    padded[: tensor.numel()] = tensor.reshape(-1)
    received = all_to_all(padded.view(size, share), group)
    folded = tensor_layout.fold(list(received), op)
    gathered = all_gather(folded, group)
    return gathered.view(-1)[: tensor.numel()].view(tensor.shape)


def _in_mesh_order(tensor: torch.Tensor, group: AxesGroup) -> torch.Tensor:
    """What came from each rank, from the order of the process group to that of the mesh."""
    return tensor if group.positions is None else tensor[group.positions]


def _in_group_order(tensor: torch.Tensor, group: AxesGroup) -> torch.Tensor:
    """What goes to each rank, from the order of the mesh to that of the process group."""
    positions = group.positions
    if positions is None:
        return tensor.contiguous()
    order = [positions.index(position) for position in range(len(positions))]
    return tensor[order].contiguous()
