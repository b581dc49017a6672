"""Gradient reduction: sums of gradients over the axes that split the batch, once per step.

In: a rank's gradients, summed over its microbatches. Out: the same, summed over ranks. Gradients of
sharded params have been reduced along the axes of their shards inside the program.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.core.loss_types import differentiable
from funcpipe._src.core.mesh import Axes
from funcpipe._src.graph.ids import ArgId
from funcpipe._src.planning.placement import LeafLayout

Grads = dict[ArgId, torch.Tensor]
Together = tuple[torch.dtype, Axes]  # what gradients share that travel in one all-reduce


def reduce_grads(
    grads: Grads,
    layouts: Sequence[LeafLayout],
    split_axes: Axes,
    comm: Communicator,
) -> None:
    """Replace gradients by their sums over ranks; those that travel over the same axes in the same
    dtype go together.

    Args:
        grads: by arg.
        layouts: by arg.
        split_axes: the axes that split the batch.
        comm: of this rank.
    """
    together: dict[Together, list[ArgId]] = defaultdict(list)
    for arg, grad in grads.items():
        layout = layouts[arg]
        axes = axes_of_sum(layout, split_axes)
        if axes and differentiable(grad):
            together[grad.dtype, axes].append(arg)
    for (_, axes), args in together.items():
        own = [grads[arg] for arg in args]
        sums = all_reduce_packed(own, axes, comm)
        grads.update(zip(args, sums, strict=True))


def axes_of_sum(layout: LeafLayout, split_axes: Axes) -> Axes:
    """The axes that split the batch and do not shard a param."""
    return tuple(axis for axis in split_axes if axis not in layout.axes)


def all_reduce_packed(
    tensors: Sequence[torch.Tensor],
    axes: Axes,
    comm: Communicator,
) -> list[torch.Tensor]:
    """The sums of tensors of one dtype over ranks, in one all-reduce."""
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    total = comm.all_reduce(packed, axes)
    sizes = [tensor.numel() for tensor in tensors]
    sums = []
    for part, tensor in zip(total.split(sizes), tensors, strict=True):
        sums.append(part.view(tensor.shape))
    return sums
