"""`sharded_weights`: weights, gradients and optimizer state split over mesh axes; whole only while
a unit needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from funcpipe._src.core.mesh import as_axes
from funcpipe._src.spec.requests import WeightSharding
from funcpipe._src.spec.transform_spec import TransformSpec, with_spec
from funcpipe.errors import StackError


@dataclass(frozen=True)
class ShardedWeightsSpec(TransformSpec):
    """What `sharded_weights` asks for."""

    name: str = "sharded_weights"
    options: WeightSharding = field(kw_only=True)
    only: Callable[[str], bool] | None = field(kw_only=True, default=None)

    def shards_weights(self) -> bool:
        return True

    def weight_layout(self, path: str, shape: tuple[int, ...]) -> WeightSharding | None:
        chosen = self.only is None or self.only(path)
        return self.options if chosen else None

    def may_share_axes(self, other: TransformSpec) -> bool:
        """Each may shard its own leaves, which are known with the params."""
        if not isinstance(other, ShardedWeightsSpec):
            return False
        return self.only is not None or other.only is not None


def sharded_weights(
    step: Callable | None = None,
    *,
    axis: str | Iterable[str],
    regather: str | int = "microbatch",
    reduce: str = "each",
    prefetch: int = 1,
    bucket_bytes: int | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    only: Callable[[str], bool] | None = None,
) -> Any:
    """Split weights, gradients and optimizer state over mesh axes, and nothing else.

    On an axis over which another transform splits the data it is FSDP / ZeRO-3; on one of two data
    axes, HSDP; on a sequence axis, InternEvo's intern sequence parallelism. Every leaf is cut flat
    into equal pieces, any size will do; 0-d leaves stay whole. A leaf is gathered for one segment
    at a time, so mark a boundary after every block.

    Args:
        step: the step; without it, a transform to apply later.
        axis: the mesh axis, or a tuple of axes.
        regather: when a leaf is gathered again: "microbatch" for each unit that uses it (unless the
            next one is within ``prefetch``), "step" once (held from the first use to the last), or
            after a number of microbatches.
        reduce: "each" microbatch's gradients are reduced and added up in shards; or "last": they
            are added up whole, and reduced once.
        prefetch: how many units before its use a gather starts. Gathered memory grows with it.
        bucket_bytes: the most that one collective gathers; by default, all that a unit needs.
        param_dtype: in which leaves are gathered and the loss function sees them (the state keeps
            its own).
        reduce_dtype: of gradients on the wire.
        only: a predicate on a parameter's path, such as ``lambda path: "embed" not in path``.

    Returns:
        A step with the same interface and the same numbers. Outside ``value_and_grad`` a rank sees
        its shards.

    Raises:
        StackError: an option that is not valid; once a plan is made, several `sharded_weights` that
            shard one leaf over one axis, or with different options. With ``only`` each may shard
            its own leaves over axes, and with options, of its own: dense leaves over ``("data",
            "expert")`` and experts over ``"data"``, for instance.

    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models";
    Zhao et al. 2023, "PyTorch FSDP".

    >>> sharded_weights(axis="data")(lambda state, batch: (state, {}))
    <step <lambda>
      sharded_weights(axis='data')>
    """
    axes = as_axes(axis)
    if not axes:
        raise StackError(
            f"sharded_weights: axis={axis!r}; name the mesh axis or axes to shard over"
        )
    _check_dtype("param_dtype", param_dtype)
    _check_dtype("reduce_dtype", reduce_dtype)
    if only is not None and not callable(only):
        raise StackError(
            f"sharded_weights: only={only!r}; pass a function from a parameter's path to True or "
            "False"
        )
    options = WeightSharding(regather, reduce, prefetch, bucket_bytes, param_dtype, reduce_dtype)
    return with_spec(step, ShardedWeightsSpec(axes=axes, options=options, only=only))


def _check_dtype(name: str, dtype: Any) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise StackError(
            f"sharded_weights: {name}={dtype!r}; pass a floating-point dtype such as torch.bfloat16"
        )
