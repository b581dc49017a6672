"""`mixed_precision`: the loss function computes in bfloat16 or float16; the state and every sum
keep float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from funcpipe._src.core.mixed_precision import DYNAMIC, Precision, computed, scaled_step
from funcpipe._src.spec.transform_spec import TransformSpec, require_positive, with_spec
from funcpipe.errors import StackError


@dataclass(frozen=True)
class MixedPrecisionSpec(TransformSpec):
    """What `mixed_precision` asks for."""

    name: str = "mixed_precision"
    options: Precision = field(kw_only=True)

    def precision(self) -> Precision:
        return self.options

    def dtype_of(self, path: str, dtype: torch.dtype) -> torch.dtype:
        return self.options.of_param(path, dtype)

    def wrap_loss(self, loss_fn: Callable, has_aux: bool) -> Callable:
        return computed(loss_fn, has_aux, self.options)

    def wrap_step(self, step: Callable) -> Callable | None:
        return scaled_step(step, self.options) if self.options.dynamic else None

    def __str__(self) -> str:
        return str(self.options)


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def mixed_precision(
    step: Callable | None = None,
    *,
    compute: str,
    loss_scale: float | str | None = None,
    growth_interval: int = 2000,
    growth: float = 2.0,
    backoff: float = 0.5,
    keep: Callable[[str], bool] | None = None,
    batch: bool | Callable[[str], bool] = True,
) -> Any:
    """Compute the loss and its gradient in another dtype than that of the params, which stay as
    they are: the masters.

    Floating leaves of params that have at least as many bits are cast to ``compute``, once per
    step; so are those of the batch. Gradients come back in the masters' dtype, and are added up in
    it: over microbatches, uses and ranks. Total and weight of the loss, and of every `Mean` in aux,
    are added up in float32 at least. The optimizer sees masters alone.

    With `sharded_weights` a shard is cast before it is gathered, with the same bits and half the
    bytes, and gradients are reduced in the masters' dtype unless ``reduce_dtype`` says another; a
    ``param_dtype`` there wins for its leaves.

    In float16 small gradients vanish unless the loss is scaled. The backward pass starts from the
    scale instead of 1, and gradients are divided by it after all sums; the loss that is reported
    never sees it. A *dynamic* scale lies in the state,
    which is then an `Scaled`: ``run.init``, ``place`` and ``unplace`` handle it, and ``init_state``
    and the step see their own part. A step with a gradient that is not finite, anywhere on the
    mesh, leaves that part as it was, bit by bit, on every rank, and makes the scale smaller.
    Nothing waits for the host, so it works in a CUDA graph; while a leaf is chosen its old and new
    values are both held.

    Args:
        step: the step; without it, a transform to apply later.
        compute: "bfloat16", "float16" or "float32".
        loss_scale: "dynamic"; a number, best a power of two, which changes no bits, and with which
            no step is skipped; None for "dynamic" in float16, and no scale in the others. Write 1
            for none in float16.
        growth_interval: after how many good steps in a row a dynamic scale grows. It starts at
            2**15.
        growth, backoff: what it is multiplied by then, and where a step is skipped.
        keep: a predicate on a parameter's path, such as ``lambda path: "norm" in path``: those
            leaves are not cast.
        batch: whether floating leaves of the batch are cast; or a predicate on a leaf's path. Leave
            out what the weight is summed from: counts are exact to 256 in bfloat16, to 2048 in
            float16.

    Returns:
        A step with the same interface. With a dynamic scale it returns a dict of metrics, to which
        are added ``loss_scale`` (of this step) and ``skipped_steps`` (so far). Untransformed, it
        computes as written.

    Raises:
        StackError: an option that is none; once resolved, two `mixed_precision` on one step.
        BatchError: once a plan is made, a weight that is rounded in the compute dtype.
        StateError: with a dynamic scale, metrics that are no dict, or have one of these names; a
            leaf of the state that is a number of Python and changes.

    Micikevicius et al. 2018, "Mixed Precision Training"; the rule of the scale is that of
    ``torch.amp.GradScaler``; a scale in the state, and the choice between two states, are those of
    DeepMind's JMP.

    >>> mixed_precision(compute="bfloat16")(lambda state, batch: (state, {}))
    <step <lambda>
      mixed_precision(compute='bfloat16')>
    """
    if not isinstance(compute, str) or compute not in _DTYPES:
        raise StackError(
            f"mixed_precision: compute={compute!r}; write {' or '.join(map(repr, _DTYPES))}"
        )
    if loss_scale is None and compute == "float16":
        loss_scale = DYNAMIC
    if not (loss_scale is None or loss_scale == DYNAMIC or _positive(loss_scale)):
        raise StackError(
            f"mixed_precision: loss_scale={loss_scale!r}; write 'dynamic' or a positive number, "
            "such as 2.0**12"
        )
    require_positive("mixed_precision", "growth_interval", growth_interval)
    if not (_positive(growth) and growth >= 1):
        raise StackError(f"mixed_precision: growth={growth!r}; it is a number of 1 or more")
    if not (_positive(backoff) and backoff < 1):
        raise StackError(f"mixed_precision: backoff={backoff!r}; it is a number between 0 and 1")
    if keep is not None and not callable(keep):
        raise StackError(
            f"mixed_precision: keep={keep!r}; pass a function from a parameter's path to True or "
            "False"
        )
    if not (isinstance(batch, bool) or callable(batch)):
        raise StackError(
            f"mixed_precision: batch={batch!r}; write True, False, or a function from a leaf's "
            "path to one of them"
        )
    options = Precision(_DTYPES[compute], loss_scale, growth_interval, growth, backoff, keep, batch)
    return with_spec(step, MixedPrecisionSpec(options=options))


def _positive(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
