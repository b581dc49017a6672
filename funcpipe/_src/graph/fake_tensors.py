"""Fake tensors: calls a function without its work, on fake params and a real batch.

What follows from the batch alone is computed, so that a weight has its value and Python may decide
by it. Every op that a fake tensor enters only computes shapes.

In: params as fakes, a batch with its data. Out: fakes of results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import differentiable
from funcpipe._src.graph.grouped_mm import explain_grouped
from funcpipe._src.graph.traceable import traceable


def fake(
    shape: Any, like: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A contiguous fake of a shape, with dtype and device of a tensor."""
    with mode:
        return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


@contextlib.contextmanager
def looking(params: Any, mode: FakeTensorMode) -> Iterator[Any]:
    """A context in which a loss function can be called on fake params and a real batch.

    Args:
        params: fakes of ``mode``.

    Yields:
        params of which the loss function may take gradients itself.
    """
    with (
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),
        traceable(),
        BatchIsReal(mode),
    ):
        try:
            yield tree.map(as_leaf, params)
        except RuntimeError as error:
            raise explain_grouped(error) or error from error


def as_leaf(param: torch.Tensor) -> torch.Tensor:
    """A param as a leaf of autograd, if it can have a gradient."""
    return param.detach().requires_grad_() if differentiable(param) else param


class BatchIsReal(TorchDispatchMode):
    """Ops that a fake tensor enters are computed as shapes; all others run."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        with self.mode:
            return func(*args, **kwargs)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        return self.mode.from_tensor(tensor)
