"""`accumulated`: the microbatch loop without a pipe axis (gradient accumulation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.spec.requests import MicrobatchSplit
from funcpipe._src.spec.transform_spec import TransformSpec, require_positive, with_spec


@dataclass(frozen=True)
class AccumulatedSpec(TransformSpec):
    """What `accumulated` asks for."""

    name: str = "accumulated"
    split: MicrobatchSplit = field(kw_only=True)

    def microbatches(self) -> MicrobatchSplit:
        return self.split


def accumulated(
    step: Callable | None = None, *, microbatches: int | None = None, dims: Any = 0
) -> Any:
    """Run ``value_and_grad`` on one microbatch after another and add up: less memory, the same
    numbers.

    Args:
        step: the step; without it, a transform to apply later.
        microbatches: how many; None takes them as `fp.Microbatches` brings them.
        dims: a pytree prefix of the batch: the dim along which a leaf is split, or None to hand it
            out whole.

    Returns:
        A step with the same interface. Loss and gradients are sums over microbatches in order,
        divided once.

    >>> accumulated(lambda state, batch: (state, {}), microbatches=4).specs[0].split.count
    4
    """
    if microbatches is not None:
        require_positive("accumulated", "microbatches", microbatches)
    return with_spec(step, AccumulatedSpec(split=MicrobatchSplit(microbatches, dims)))
