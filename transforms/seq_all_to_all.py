"""`seq_all_to_all`: the sequence split over mesh axes; around attention, slices of the sequence are
exchanged for heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.core.mesh import as_axes
from funcpipe._src.spec.requests import PositionSplit
from funcpipe._src.spec.transform_spec import TransformSpec, with_spec
from funcpipe.errors import StackError


@dataclass(frozen=True)
class SeqAllToAllSpec(TransformSpec):
    """What `seq_all_to_all` asks for."""

    name: str = "seq_all_to_all"
    split: PositionSplit = field(kw_only=True)

    def split_positions(self) -> PositionSplit:
        return self.split


def seq_all_to_all(
    step: Callable | None = None, *, axis: str | Iterable[str], dims: Any = 1
) -> Any:
    """Split the sequence over one or several mesh axes; every rank computes on its own positions.

    Around every attention two exchanges swap slices of the sequence for heads, so that a rank sees
    all positions of some heads. The model's code is not changed: calls of
    ``torch.nn.functional.scaled_dot_product_attention`` are rewritten where they are, in plain
    functions, nn.Modules and Hugging Face models, as are calls of `fp.attention`.

    Args:
        step: the step; without it, a transform to apply later.
        axis: the mesh axis, or a tuple of axes, of which the first is major.
        dims: a pytree prefix of the batch: the dim of positions of a leaf (default 1, as in
            ``(batch, positions)``), or None to hand the leaf to every rank whole (``cu_seqlens``,
            whole masks). Lengths need not divide.

    Returns:
        A step with the same interface and the same numbers. Tokens, labels, masks and position ids
        are split once with the batch; `fp.positions` numbers them. The loss has to be a `Mean`.

    Raises:
        SequenceError, when the plan is made: the loss function mixes positions outside of attention
            (``arange`` of the local length, a label shift, a softmax, cumsum or convolution over
            positions, …), or calls no attention.

    Jacobs et al. 2023, "DeepSpeed Ulysses"; with `sharded_weights` on the same axis, Chen et al.
    2024, "InternEvo".

    >>> seq_all_to_all(axis="seq")(lambda state, batch: (state, {}))
    <step <lambda>
      seq_all_to_all(axis='seq')>
    """
    axes = as_axes(axis)
    if not axes:
        raise StackError(
            f"seq_all_to_all: axis={axis!r}; name the mesh axis or axes to split the sequence over"
        )
    return with_spec(step, SeqAllToAllSpec(axes=axes, split=PositionSplit(dims)))
