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

Held = Callable[[int], bool]  # whether a rank holds a parameter


def every_param(param: int) -> bool:
    """Holds every parameter."""
    return True


class Tags:
    """The sizes that tell the leaves of params apart, and fakes of those sizes."""

    def __init__(self, params: Any, batch: Any, mode: FakeTensorMode) -> None:
        self.leaves, self.spec = check_params(params)
        self.paths = tuple(tree.paths(params))
        self.shapes = tuple(tuple(leaf.shape) for leaf in self.leaves)
        tensors = self.leaves + tree.leaves(batch)
        self.first = max(1 << 20, *_sizes(tensors)) + 1
        self.mode = mode
        self.moved: frozenset[int] = frozenset()

    def resized(self, params: frozenset[int]) -> Tags:
        """Tags that give these parameters other sizes, in all dims."""
        out = copy.copy(self)
        out.moved = params
        return out

    def fake_shape(self, param: int) -> list[int]:
        """The shape of a parameter's fake: its tag in the first dim (a 0-d leaf gets one), ones in
        the others."""
        size = self.first + param
        other = 1
        if param in self.moved:
            size += len(self.leaves)
            other = 2
        others = self.leaves[param].dim() - 1
        return [size, *[other] * others]

    def shape_of(self, sizes: list[int]) -> tuple[str, int] | None:
        """What stands for a list of sizes that is the shape of a parameter."""
        param = self._param_of(sizes[0])
        if param is None or sizes != self.fake_shape(param):
            return None
        return "the shape of a parameter", param

    def fake(self, param: int) -> torch.Tensor:
        """A parameter as a fake."""
        shape = self.fake_shape(param)
        return fake(shape, self.leaves[param], self.mode)

    def params(self, held: Held = every_param) -> Any:
        """The tree of params as fakes, None where ``held`` says no."""
        fakes: list[torch.Tensor | None] = []
        for param in range(len(self.leaves)):
            fakes.append(self.fake(param) if held(param) else None)
        return tree.unflatten(self.spec, fakes)

    def of(self, value: Any) -> int | None:
        """The parameter that a tensor belongs to."""
        if not isinstance(value, torch.Tensor):
            return None
        for size in value.shape:
            param = self._param_of(size)
            if param is not None:
                return param
        return None

    def _param_of(self, size: int) -> int | None:
        """The parameter that has a size."""
        param = size - self.first
        if 0 <= param < len(self.leaves):
            return param
        param -= len(self.leaves)
        return param if param in self.moved else None

    def sizes(self, args: Any) -> list[int]:
        """The parameters whose sizes stand among the arguments of an op that makes a tensor."""
        found = []
        for value in pytree.tree_leaves(args):
            if type(value) is not int:
                continue
            param = self._param_of(value)
            if param is not None:
                found.append(param)
        return found

    def name(self, param: int) -> str:
        """How to call a parameter in a message."""
        return f"params{self.paths[param]}"

    def name_of(self, value: Any) -> str | None:
        """How to call the parameter that a tensor belongs to."""
        param = self.of(value)
        return None if param is None else self.name(param)


def _sizes(leaves: list[Any]) -> list[int]:
    """The sizes of all dims of tensors."""
    sizes: list[int] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            sizes += leaf.shape
    return sizes
