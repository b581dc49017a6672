"""Looking at a function without the work: params are fakes, the batch is real.

What follows from the batch alone is computed, so that a weight has its value and Python may decide
by it; what any fake tensor enters is computed as shapes.
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
    """To call a loss function on fake params and a real batch; gives params of which it may take
    gradients itself.

    Args:
        params: fakes of ``mode``.
    """
    with (
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),
        traceable(),
        BatchIsReal(mode),
    ):
        try:
            yield tree.map(
                lambda x: x.detach().requires_grad_() if differentiable(x) else x, params
            )
        except RuntimeError as error:
            raise explain_grouped(error) or error from error


class BatchIsReal(TorchDispatchMode):
    """Ops that a fake tensor enters are computed as shapes; all others run."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self._fake, (args, kwargs))
        with self.mode:
            return func(*args, **kwargs)

    def _fake(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.mode.from_tensor(x)
