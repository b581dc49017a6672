"""Batch normalization by an op that returns the new statistics.

The usual op changes running statistics in place, which its schema does not say.

In: the forward of a module that may normalize.
Out: a forward that computes the same, with changes of statistics that a trace sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from funcpipe._src.core.describe_value import describe
from funcpipe._src.functional.batch_statistic import batch_statistic
from funcpipe.errors import ModuleError


def may_normalize(module: nn.Module) -> bool:
    """Whether a module's own forward may change running statistics, its own or its children's.

    A norm can be fused with its parent. Not every forward runs under the mode, which costs a
    microsecond for every call into torch.
    """
    if not module.training:
        return isinstance(module, _BatchNorm) and module.running_mean is None
    if module._buffers or isinstance(module, _BatchNorm):
        return True
    return any(isinstance(child, _BatchNorm) for child in module._modules.values())


def with_functional_batch_norm(forward: Callable) -> Callable:
    """A forward whose norms run by the op that returns new statistics."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _FunctionalBatchNorm():
            return forward(*args, **kwargs)

    return run


class _FunctionalBatchNorm(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        if func is F.instance_norm:
            func = _instance_norm
        elif func is F.batch_norm:
            func = _batch_norm
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``; in training mode it is a declared batch statistic."""
    norm = batch_statistic(F.batch_norm) if training else F.batch_norm
    if not training or running_mean is None or running_var is None:
        return norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.numel() == input.shape[1]:
        raise ModuleError(
            f"batch normalization in training mode got {describe(input)}: one value for each "
            "channel has no variance. To it each microbatch of each shard is a batch of its own: "
            "give those more rows"
        )
    op = batch_statistic(torch.ops.aten._native_batch_norm_legit_functional)
    # Clones: autograd keeps what it is given, and must not see it change.
    old_mean = running_mean.clone()
    old_var = running_var.clone()
    out, _, _, mean, var = op(input, weight, bias, old_mean, old_var, training, momentum, eps)
    running_mean.copy_(mean)
    running_var.copy_(var)
    return out


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``; one that changes statistics is refused."""
    if use_input_stats and running_mean is not None:
        raise ModuleError(
            f"instance normalization of {describe(input)} in training mode changes running "
            "statistics unseen: make the module with track_running_stats=False, or set it to eval "
            "mode"
        )
    return F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
