"""Requests: what a transform may ask of the stages of the compiler, as data.

In: the options of a transform. Out: the records that a `TransformSpec` answers with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from funcpipe._src.schedule.actions import ScheduleFn
from funcpipe.errors import StackError


@dataclass(frozen=True)
class RowSplit:
    """Split rows of the batch over the transform's axes.

    Args:
        dims: a pytree prefix of the batch: the dim along which a leaf is split, or None for a leaf
            that every rank gets whole.
    """

    dims: Any = 0


@dataclass(frozen=True)
class PositionSplit:
    """Split positions of a sequence over the transform's axes.

    Args:
        dims: as for `RowSplit`.
        attention: how attention sees all positions: by an exchange of "heads", or around a "ring".
        zigzag: whether a rank of a ring has a piece of the front and one of the back.
    """

    dims: Any = 1
    attention: str = "heads"
    zigzag: bool = False


@dataclass(frozen=True)
class MicrobatchSplit:
    """Split what a rank gets of the batch into microbatches.

    Args:
        count: how many; None for as many as `Microbatches` brings.
        dims: as for `RowSplit`.
    """

    count: int | None
    dims: Any = 0

    def __post_init__(self) -> None:
        if self.count is not None and not _is_whole(self.count, 1):
            raise StackError(
                f"microbatches is {self.count!r}; it has to be a whole number, 1 or more"
            )


@dataclass(frozen=True)
class Pipeline:
    """Cut the loss into stages along the transform's axis.

    Args:
        schedule: lays out the table of actions.
        stages: "balanced", "even", or how many segments each stage gets.
        profile: whether units are measured first, and the schedule gets their costs.
    """

    schedule: ScheduleFn
    stages: str | tuple[int, ...] = "balanced"
    profile: bool = False


@dataclass(frozen=True)
class WeightSharding:
    """Split weights, gradients and optimizer state over the transform's axes; the fields are
    `sharded_weights`' options.

    Raises:
        StackError: an option that is not valid.
    """

    regather: str | int = "microbatch"
    reduce: str = "each"
    prefetch: int = 1
    bucket_bytes: int | None = None
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.regather not in ("microbatch", "step") and not _is_whole(self.regather, 1):
            raise StackError(
                f"sharded_weights: regather={self.regather!r}; write 'microbatch', 'step', or a "
                "number of microbatches"
            )
        if self.reduce not in ("each", "last"):
            raise StackError(f"sharded_weights: reduce={self.reduce!r}; write 'each' or 'last'")
        if not _is_whole(self.prefetch, 0):
            raise StackError(
                f"sharded_weights: prefetch is {self.prefetch!r}; it is a number of units, 0 or "
                "more"
            )
        if self.bucket_bytes is not None and not _is_whole(self.bucket_bytes, 1):
            raise StackError(
                f"sharded_weights: bucket_bytes is {self.bucket_bytes!r}; it has to be a whole "
                "number, 1 or more"
            )


@dataclass(frozen=True)
class Remat:
    """Save fewer values for the backward half of segments; the fields are `remat`'s options."""

    policy: str | None = None
    budget: float | None = None
    save: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    segments: tuple[int, ...] | Callable[[int], bool] | None = None

    def covers(self, segment: int) -> bool:
        """Whether it is about a segment."""
        if self.segments is None:
            return True
        if isinstance(self.segments, tuple):
            return segment in self.segments
        return bool(self.segments(segment))

    def __str__(self) -> str:
        given = []
        for option in fields(self):
            value = getattr(self, option.name)
            if value not in (None, ()):
                given.append(f"{option.name}={_text(value)}")
        return f"remat({', '.join(given)})"


def _is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number, at least so large."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value >= least


def _text(value: Any) -> str:
    if callable(value):
        return "..."
    return repr(list(value) if isinstance(value, tuple) else value)
