"""`data_parallel`: the batch dim of the batch split over mesh axes; gradients and metrics summed
once per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.core.mesh import as_axes
from funcpipe._src.spec.requests import RowSplit
from funcpipe._src.spec.transform_spec import TransformSpec, with_spec


@dataclass(frozen=True)
class DataParallelSpec(TransformSpec):
    """What `data_parallel` asks for."""

    name: str = "data_parallel"
    split: RowSplit = field(kw_only=True)

    def split_rows(self) -> RowSplit:
        return self.split


def data_parallel(step: Callable | None = None, *, axis: str | Iterable[str], dims: Any = 0) -> Any:
    """Split the batch over one or several mesh axes; every rank computes on its own rows.

    Args:
        step: the step; without it, a transform to apply later.
        axis: the mesh axis, or a tuple of axes, of which the first is major.
        dims: a pytree prefix of the batch: the dim along which a leaf is split (default 0), or None
            to hand the leaf to every rank whole.

    Returns:
        A step with the same interface and the same numbers, whatever the shards hold: loss and
        gradients are the sum of all totals over the sum of all weights.

    Weights, gradients and optimizer state are held by every rank of the axis; stack
    `sharded_weights` on the same axis to split those as well.

    >>> data_parallel(axis="data")(lambda state, batch: (state, {}))
    <step <lambda>
      data_parallel(axis='data')>
    """
    axes = as_axes(axis)
    split = RowSplit(dims)
    spec = DataParallelSpec(axes=axes, split=split)
    return with_spec(step, spec)
