"""`seq_ring`: the sequence split over a mesh axis; in attention, keys and values travel around the
ring of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.core.mesh import as_axes
from funcpipe._src.spec.requests import PositionSplit
from funcpipe._src.spec.transform_spec import TransformSpec, with_spec
from funcpipe.errors import StackError


@dataclass(frozen=True)
class SeqRingSpec(TransformSpec):
    """What `seq_ring` asks for."""

    name: str = "seq_ring"
    split: PositionSplit = field(kw_only=True)

    def split_positions(self) -> PositionSplit:
        return self.split


def seq_ring(
    step: Callable | None = None, *, axis: str | Iterable[str], dims: Any = 1, zigzag: bool = True
) -> Any:
    """Split the sequence over a mesh axis of any size, also beyond the number of heads: ring
    attention.

    Every rank keeps its queries; keys and values go around, and partial results are merged by their
    log-sum-exp, in float32 at least. Stacked with `seq_all_to_all` on another axis, heads are
    exchanged inside each piece of the ring (USP): the ring then has fewer, larger messages.

    Args:
        step: the step; without it, a transform to apply later.
        axis: the mesh axis, or a tuple of axes, of which the first is major.
        dims: a pytree prefix of the batch: the dim of positions of a leaf, or None; as in
            `seq_all_to_all`.
        zigzag: give every rank a piece from the front and one from the back of the sequence, so
            that under a causal mask all have equal work; else one piece each.

    Returns:
        A step with the same interface and the same numbers, but for the rounding of merged sums
        (float64: 1e-10).

    Raises:
        SequenceError, when the plan is made: as for `seq_all_to_all`.

    Liu et al. 2023, "Ring Attention with Blockwise Transformers"; Fang and Zhao 2024, "USP".

    >>> seq_ring(axis="ring")(lambda state, batch: (state, {}))
    <step <lambda>
      seq_ring(axis='ring')>
    """
    axes = as_axes(axis)
    if not axes:
        raise StackError(f"seq_ring: axis={axis!r}; name the mesh axis or axes of the ring")
    return with_spec(step, SeqRingSpec(axes=axes, split=PositionSplit(dims, "ring", bool(zigzag))))
