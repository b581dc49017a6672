"""Precision: what `mixed_precision` asks for, done around the step and around its loss functions.

Terms. *Masters* are the params as the state holds them, in float32. The loss function sees them in
the *compute* dtype: every rank casts its own once per step (a shard before it is gathered), and
gradients are added up in the dtype of the masters. The *loss scale* is what the backward pass
starts from in place of 1, so that small gradients do not vanish in float16; gradients are divided
by it after all sums, and the loss never sees it. A *dynamic* scale lies in the state: `Scaled`.

In: a step, an ``init_state`` or a loss function, and `Precision`. Out: the same with precision
taken care of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from funcpipe._src.core import loss_scale as scaling
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import Mean, is_summary
from funcpipe.errors import StateError

DYNAMIC = "dynamic"
ROUNDED = (
    "Here parts are computed in {dtype}, the whole as written: if the weight is rounded, leave "
    "what it is summed from out of mixed_precision (batch=...), or sum it in float32"
)
# The largest power of two that float16 holds: a loss that ends in float16 takes it too.
_FIRST = 2.0**15


@dataclass(frozen=True)
class Precision:
    """In which dtype a loss function computes, and how its backward pass is scaled; see
    `mixed_precision`."""

    compute: torch.dtype
    loss_scale: float | str | None = None
    growth_interval: int = 2000
    growth: float = 2.0
    backoff: float = 0.5
    keep: Callable[[str], bool] | None = None
    batch: bool | Callable[[str], bool] = True

    def __str__(self) -> str:
        compute = str(self.compute).removeprefix("torch.")
        words = [f"compute={compute!r}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                shown = "..." if callable(value) else repr(value)
                words.append(f"{field.name}={shown}")
        return f"mixed_precision({', '.join(words)})"

    @property
    def dynamic(self) -> bool:
        """Whether the loss scale lies in the state."""
        return self.loss_scale == DYNAMIC

    @property
    def constant(self) -> float:
        """The loss scale that is the same in every step, 1 for none."""
        return self.loss_scale if isinstance(self.loss_scale, int | float) else 1.0

    def of_param(self, path: str, own: torch.dtype) -> torch.dtype:
        """The dtype in which the loss function sees a parameter."""
        if self.keep is not None and self.keep(path):
            return own
        return self._narrowed(own)

    def of_batch(self, path: str, own: torch.dtype) -> torch.dtype:
        """The dtype in which the loss function sees a tensor of the batch."""
        wanted = self.batch(path) if callable(self.batch) else self.batch
        return self._narrowed(own) if wanted else own

    def _narrowed(self, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point or own.itemsize < self.compute.itemsize:
            return own
        return self.compute


class Scaled(NamedTuple):
    """The state of a step with a dynamic loss scale, as `run.init` makes it.

    Args:
        state: what ``init_state`` made, and the step sees.
        scale: the loss scale of the next step: 0-d, float32.
        good_steps: how many steps in a row had finite gradients since the scale last changed: 0-d,
            int64.
        skipped: how many steps were skipped so far: 0-d, int64.
    """

    state: Any
    scale: torch.Tensor
    good_steps: torch.Tensor
    skipped: torch.Tensor


# ---- the loss function


def computed(loss_fn: Callable, has_aux: bool, precision: Precision) -> Callable:
    """A loss function that sees its batch in the compute dtype, and whose sums leave it in float32
    at least: they go on being added up, over microbatches and ranks. Its params come cast
    already."""

    @functools.wraps(loss_fn)
    def run(params: Any, batch: Any) -> Any:
        leaves, spec = tree.flatten(batch)
        cast = []
        for path, leaf in zip(tree.paths(batch), leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                leaf = leaf.to(precision.of_batch(path, leaf.dtype))
            cast.append(leaf)
        out = loss_fn(params, tree.unflatten(spec, cast))
        if not has_aux:
            return _wide(out)
        if type(out) is not tuple:
            return out  # refused where it is read
        aux = tree.map(_wide_mean, out[1], is_leaf=is_summary)
        return _wide(out[0]), aux

    return run


def _wide(value: Any) -> Any:
    """A value in float32 at least."""
    if isinstance(value, Mean):
        return Mean(_wide(value.total), _wide(value.weight))
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.float() if value.dtype.itemsize < torch.float32.itemsize else value


def _wide_mean(summary: Any) -> Any:
    return _wide(summary) if isinstance(summary, Mean) else summary


# ---- the step


def scaled_init(init_state: Callable[[Any], Any], device: torch.device) -> Callable[[Any], Scaled]:
    """An ``init_state`` whose state comes with a loss scale."""

    def init(params: Any) -> Scaled:
        zeros = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)]
        return Scaled(init_state(params), torch.full((), _FIRST, device=device), *zeros)

    return init


def scaled_step(
    step: Callable[[Any, Any], Any],
    precision: Precision,
) -> Callable[[Any, Any], Any]:
    """A step whose state is `Scaled`: one with a non-finite gradient anywhere on the mesh changes
    no leaf of the state.

    Nothing waits for the host: both states are at hand, and elementwise one of them is taken.
    """

    @functools.wraps(step)
    def run(state: Any, batch: Any) -> Any:
        if not isinstance(state, Scaled):
            raise StateError(
                f"the state is {describe(state)}, but with a dynamic loss scale it is an "
                "fp.Scaled. Pass the state that run.init, run.place or the last step returned"
            )
        with scaling.scaled(state.scale) as found:
            out = step(state.state, batch)
        if not (isinstance(out, tuple) and len(out) == 2):
            return out  # refused where it is read
        new, metrics = out
        del out
        skip = found.bad > 0
        scale, good_steps = _next(state, skip, precision)
        skipped = state.skipped + skip
        # The metric is a copy: a captured step writes the next scale into the memory of this one.
        told = _told(metrics, {"loss_scale": state.scale.clone(), "skipped_steps": skipped})
        return Scaled(_chosen(skip, state.state, new), scale, good_steps, skipped), told

    return run


def _next(
    state: Scaled,
    skip: torch.Tensor,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and good steps after a step. A scale that would leave the range of float32
    stays."""
    good_steps = torch.where(skip, 0, state.good_steps + 1)
    grow = good_steps >= precision.growth_interval
    grown = torch.where(grow, state.scale * precision.growth, state.scale)
    wanted = torch.where(skip, state.scale * precision.backoff, grown)
    scale = torch.where(wanted.isfinite() & (wanted > 0), wanted, state.scale)
    return scale, torch.where(grow, 0, good_steps)


def _told(metrics: Any, more: dict[str, torch.Tensor]) -> dict[str, Any]:
    if not isinstance(metrics, dict):
        raise StateError(
            f"the step returns {describe(metrics)} as metrics, but with a dynamic loss scale "
            f"{' and '.join(more)} join them: return a dict"
        )
    for name in more:
        if name in metrics:
            raise StateError(
                f"metrics[{name!r}] is taken: mixed_precision reports its own under this name; "
                "give yours another one"
            )
    return {**metrics, **more}


def _chosen(skip: torch.Tensor, old: Any, new: Any) -> Any:
    """The old state where the step is skipped, else the new one, leaf by leaf."""
    before, spec = tree.flatten(old)
    leaves, new_spec = tree.flatten(new)
    if spec != new_spec:
        return new  # refused where it is read
    del new
    for number, path in enumerate(tree.paths(old)):
        if leaves[number] is not before[number]:
            name = f"state{path}"
            leaves[number] = _either(skip, name, before[number], leaves[number])
    return tree.unflatten(spec, leaves)


def _either(skip: torch.Tensor, name: str, old: Any, new: Any) -> Any:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return torch.where(skip, old, new)
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor) or old != new:
        raise StateError(
            f"{name} goes from {old!r} to {new!r}: whether a step is skipped is known on the "
            "device only, so that a number of Python cannot follow it. Make it a tensor, such as "
            "torch.zeros(())"
        )
    return new
