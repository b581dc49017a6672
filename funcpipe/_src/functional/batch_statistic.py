"""Declared batch statistics: where the rows of a part of the batch may meet.

In: a function of tensors. Out: the same function, of which a proof (`proof/rows.py`) knows that it
is meant so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcpipe._src.functional import dispatch as hook


def changed_buffer(buffer: Tensor) -> Tensor:
    """A clone of a module's buffer that a call changed, which counts as declared."""
    declared = getattr(hook.current(), "changed_buffer", None)
    if declared is None:
        return buffer.detach().clone()
    return declared(buffer)


def batch_statistic(fn: Callable) -> Callable:
    """Declare that rows of the batch meet in a function: each microbatch of each shard is a batch
    of its own.

    Where a step's batch is split, a loss function in which rows meet is refused, since its parts do
    not add up to what one device computes. In ``fn`` they may meet. It sees the rows of one
    microbatch of one shard, so that what the step computes depends on how its batch is split; that
    is what batch normalization does everywhere. The BatchNorm modules of `from_module` are declared
    so already. In plain PyTorch, ``fn`` is called as it is.

    Args:
        fn: any function of tensors, which may come in any way. Of what it returns, a tensor with an
            entry for every row (one dim as long as the rows) counts as the rows' own values; any
            other one as a value that every row of the part sees.

    Returns:
        a function with the arguments and results of ``fn``.

    A penalty on the balance of experts within every microbatch. It counts once for every row, as
    the weight does:

    >>> import torch
    >>> import funcpipe as fp
    >>> def balance(share):
    ...     return share.mean(0).square().sum()
    >>> def loss_fn(w, x):
    ...     share = (x @ w).softmax(-1)
    ...     rows = torch.tensor(float(len(x)))
    ...     return fp.Mean(share[:, 0].sum() + rows * fp.batch_statistic(balance)(share), rows)
    >>> loss_fn(torch.zeros(3, 4), torch.ones(8, 3))
    Mean(total=tensor(4.), weight=tensor(8.))
    """

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        declared = getattr(hook.current(), "batch_statistic", None)
        if declared is None:
            return fn(*args, **kwargs)
        return declared(fn, args, kwargs)

    return run
