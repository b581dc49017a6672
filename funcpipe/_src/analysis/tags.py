"""Tags: the fake of each param has a size in its first dim that nothing else has, by which tensors
that belong to the param are known.

In: params and a batch. Out: `Tags`, which makes the fakes, and tells from a tensor which parameter
it belongs to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.gradients import check_params
from funcpipe._src.graph.fake_tensors import fake


class Tags:
    """The sizes that tell the leaves of params apart, and fakes of those sizes."""

    def __init__(self, params: Any, batch: Any, mode: FakeTensorMode) -> None:
        self.leaves, self.spec = check_params(params)
        self.paths = tuple(tree.paths(params))
        self.shapes = tuple(tuple(x.shape) for x in self.leaves)
        sizes = [
            n
            for x in (*self.leaves, *tree.leaves(batch))
            if isinstance(x, torch.Tensor)
            for n in x.shape
        ]
        self.first = max([1 << 20, *sizes]) + 1
        self.mode = mode
        self.moved: frozenset[int] = frozenset()

    def resized(self, params: frozenset[int]) -> Tags:
        """Tags that give these parameters other sizes, in all dims."""
        out = copy.copy(self)
        out.moved = params
        return out

    def fake_shape(self, i: int) -> list[int]:
        """The shape of a parameter's fake: its tag in the first dim (a 0-d leaf gets one), ones in
        the others."""
        size, rest = (
            (self.first + len(self.leaves) + i, 2) if i in self.moved else (self.first + i, 1)
        )
        return [size, *[rest] * (self.leaves[i].dim() - 1)]

    def shape_of(self, sizes: list[int]) -> tuple[str, int] | None:
        """What stands for a list of sizes that is the shape of a parameter."""
        i = self._analysis(sizes[0])
        return None if i is None or sizes != self.fake_shape(i) else ("the shape of a parameter", i)

    def fake(self, i: int) -> torch.Tensor:
        """Parameter ``i`` as a fake."""
        return fake(self.fake_shape(i), self.leaves[i], self.mode)

    def params(self, held: Callable[[int], bool] = lambda i: True) -> Any:
        """The tree of params as fakes, None where ``held`` says no."""
        return tree.unflatten(
            self.spec, [self.fake(i) if held(i) else None for i in range(len(self.leaves))]
        )

    def of(self, x: Any) -> int | None:
        """The parameter that a tensor belongs to."""
        if not isinstance(x, torch.Tensor):
            return None
        return next((i for i in map(self._analysis, x.shape) if i is not None), None)

    def _analysis(self, size: int) -> int | None:
        """The parameter that has a size."""
        i, moved = size - self.first, size - self.first - len(self.leaves)
        if 0 <= i < len(self.leaves):
            return i
        return moved if moved in self.moved else None

    def sizes(self, args: Any) -> list[int]:
        """The parameters whose sizes stand among the arguments of an op that makes a tensor."""
        numbers = [self._analysis(n) for n in pytree.tree_leaves(args) if type(n) is int]
        return [i for i in numbers if i is not None]

    def name(self, i: int) -> str:
        """How to call a parameter in a message."""
        return f"params{self.paths[i]}"
