"""Looking at a function without the work: params are fakes, the batch is real.

What follows from the batch alone is computed, so that a weight has its value and Python may decide by it; what any fake
tensor enters is computed as shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def fake(shape: Any, like: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous fake of a shape, with dtype and device of a tensor."""
    with mode:
        return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


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
