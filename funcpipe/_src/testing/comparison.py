"""The comparison of what a step computes with what it computes on one device.

In: losses, gradients, metrics and states of both.
Out: the largest relative error, or an AssertionError that names the leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.planning.placement import take

# Of the largest leaf of a tree. A gradient that cancels to zero is rounding errors, 1e-16 of what
# was added up; measured against itself it would always be wrong. So no leaf is measured against
# less than this.
SMALL = 1e-3


class Call(NamedTuple):
    """What one ``value_and_grad`` returned.

    Args:
        context: of the rank that called it; None for the reference.
        loss, grads: what the rank got.
    """

    context: Any
    loss: Tensor
    grads: Any

    def shard(
        self,
        number: int,
        leaf: int,
        gradient: Tensor,
    ) -> tuple[Tensor, int]:
        """What a rank holds of an unsharded gradient, and which of its shards that is.

        Args:
            number: of this call in the step.
            leaf: the index of the gradient.
        """
        rank = self.context.rank
        param = rank.plan.calls[number].call.params[leaf]
        axes = rank.plan.placement.layouts[param].axes
        if not axes:
            return gradient, 0
        mesh, own_rank = rank.comm.mesh, rank.comm.rank
        return take(gradient, mesh, own_rank, axes), mesh.index(own_rank, axes)


class _Leaf(NamedTuple):
    """A leaf to compare: None is absent on a rank."""

    path: str
    got: Any
    want: Any


class Comparison:
    """Compares leaf by leaf, and keeps the largest error.

    Args:
        rtol: the largest relative error allowed.
        explain: what to say of a larger one.
    """

    def __init__(self, rtol: float, explain: Callable[[float], str]) -> None:
        self.rtol = rtol
        self.explain = explain
        self.prefix = ""
        self.error = 0.0
        self.where = ""
        self.compared = 0

    def calls(
        self,
        got: dict[int, list[Call]],
        want: list[Call],
        exact: bool,
    ) -> None:
        """Every rank's losses and gradients, and that copies on several ranks are the same."""
        copies = _Copies()
        for rank, calls in sorted(got.items()):
            if len(calls) != len(want):
                self._fail(
                    f"rank {rank} called value_and_grad {len(calls)} times instead of {len(want)}"
                )
            for number, (call, wanted) in enumerate(zip(calls, want, strict=True)):
                name = f"of value_and_grad {number} on rank {rank}"
                self._leaf(f"loss {name}", call.loss, wanted.loss, 0.0, exact)
                floor = _floor(wanted.grads)
                leaves = self._leaves(f"grads {name}", call.grads, wanted.grads)
                for index, (path, gradient, unsharded) in enumerate(leaves):
                    if gradient is None:
                        continue
                    own, shard = call.shard(number, index, unsharded)
                    self._leaf(f"grads{path} {name}", gradient, own, floor, exact)
                    first = copies.differing((number, index, shard), rank, gradient)
                    if first is not None:
                        self._fail(f"grads{path} {name}: other bits than on rank {first}")

    def tree(
        self,
        what: str,
        got: Any,
        want: Any,
    ) -> None:
        """Two full trees."""
        floor = _floor(want)
        for path, leaf, wanted in self._leaves(what, got, want):
            self._leaf(f"{what}{path}", leaf, wanted, floor, exact=False)

    def _leaves(
        self,
        what: str,
        got: Any,
        want: Any,
    ) -> Iterator[_Leaf]:
        leaves, spec = pytree.flatten(want)
        try:
            found = spec.flatten_up_to(got)
        except ValueError as error:
            self._fail(f"{what}: another structure than on one device: {error}")
        return map(_Leaf, pytree.paths(want), found, leaves)

    def _leaf(
        self,
        name: str,
        got: Any,
        want: Any,
        floor: float,
        exact: bool,
    ) -> None:
        self.compared += 1
        if _describe(got) != _describe(want):
            self._fail(f"{name}: {_describe(got)} instead of {_describe(want)}")
        if not isinstance(want, Tensor):
            return
        got = got.to(want.device)
        same = same_bits(got, want)
        error = 0.0 if same else _relative_error(got, want, floor)
        if error > self.error or not self.where:
            self.error, self.where = error, self.prefix + name
        if error > self.rtol:
            explanation = self.explain(error)
            if not math.isfinite(error):
                self._fail(f"{name}: {_difference(got, want)}")
            self._fail(f"{name}: relative error {error:.1e}, allowed {self.rtol:.1e}{explanation}")
        if exact and not same:
            self._fail(f"{name}: other bits than on one device (relative error {error:.1e})")

    def _fail(self, text: str) -> NoReturn:
        raise AssertionError(self.prefix + text)


class _Copies:
    """The first copy of every shard of a gradient, to compare the others with."""

    def __init__(self) -> None:
        self.first: dict[tuple, tuple[int, Tensor]] = {}

    def differing(
        self,
        key: tuple,
        rank: int,
        copy: Tensor,
    ) -> int | None:
        """The rank of the first copy, if this one has other bits."""
        first_rank, first = self.first.setdefault(key, (rank, copy))
        return None if same_bits(copy, first) else first_rank


def _floor(want: Any) -> float:
    """The least norm that a leaf of a tree is measured against.

    0-d leaves, which are often counters, do not set it.
    """
    largest = 0.0
    for leaf in pytree.leaves(want):
        if isinstance(leaf, Tensor) and leaf.dim():
            largest = max(largest, _norm(leaf))
    return SMALL * largest


def _describe(leaf: Any) -> str:
    """What must be the same of two leaves, whatever was computed."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return repr(leaf)


def same_bits(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor):
        return left == right
    if torch.equal(left, right):
        return True
    return left.shape == right.shape and bool(_same_elements(left, right).all())


def _same_elements(left: Tensor, right: Tensor) -> Tensor:
    """Where two tensors are equal, or both NaN."""
    both_nan = left.isnan() & right.isnan()
    return (left == right) | both_nan


def _relative_error(
    got: Tensor,
    want: Tensor,
    floor: float,
) -> float:
    """Infinite where one is NaN or infinite and the other is not, and where integers differ."""
    if not (want.is_floating_point() or want.is_complex()):
        return math.inf
    difference = got.to(_wide(got)) - want.to(_wide(want))
    error = _norm(torch.where(_same_elements(got, want), 0, difference))
    finite = torch.where(want.isfinite(), want, 0)
    scale = max(_norm(finite), floor)
    return error / scale if scale and math.isfinite(error) else math.inf


def _difference(got: Tensor, want: Tensor) -> str:
    """What to say where there is no relative error: of integers, NaN and infinite numbers."""
    differs = ~_same_elements(got, want)
    first = int(differs.flatten().nonzero()[0])
    text = f"{got.flatten()[first].item()} instead of {want.flatten()[first].item()}"
    if not differs.dim():
        return text
    return f"{text} at {int(differs.sum())} of {differs.numel()} elements"


def _norm(tensor: Tensor) -> float:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    return float(torch.linalg.vector_norm(tensor.to(_wide(tensor))))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
