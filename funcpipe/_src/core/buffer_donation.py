"""Donation: an optimizer may write to the memory of a state that nobody reads any more.

A step is pure, and so are optimizers: they make new tensors. A runner that is given a state to use
up needs no copy of it. Whether a leaf is read again after its update cannot be seen in a step; but
a step does the same every time, so it can be seen by watching it run once, on fakes
(`analysis/state.py`). Old params that are compared with new ones, or kept for an average, are read,
and go on being copied.

In: the context of a step, whose ``donation`` notes what optimizers would write to, and whose
``overwritable`` says what they may write to. Out: `writable`, which gives an optimizer a copy of a
tensor, or the tensor itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import current
from funcpipe.errors import StateError

# An attribute of the leaves of states that a runner has made: whether their values are gone.
_INVALIDATED = "_funcpipe_invalidated"


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor`` that may be written to; ``tensor`` itself where it is donated.

    >>> x = torch.ones(2)
    >>> writable(x) is x
    False
    """
    context = current()
    if context.overwritable is not None and context.overwritable.take(tensor):
        return tensor
    # Where the same memory was marked before, the copy is seen as a read of it.
    copy = tensor.clone()
    if context.donation is not None:
        context.donation.mark_overwritable(tensor)
    return copy


def memory(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins: the same for all views of it. 0 for none."""
    return tensor.untyped_storage().data_ptr()


class Overwritable:
    """Leaves of a state that optimizers may write to.

    A leaf is invalidated before one does, so that a step which fails half-way leaves nothing that
    passes as good.

    Args:
        leaves: no two of which share memory; a `DonationAnalysis` found them ``overwritable``.
    """

    def __init__(self, leaves: Iterable[torch.Tensor]) -> None:
        self._leaves = {memory(leaf): leaf for leaf in leaves}

    def take(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of a leaf, which is invalidated then."""
        leaf = self._leaves.get(memory(tensor)) if self._leaves else None
        if leaf is None:
            return False
        invalidate([leaf])
        return True


def invalidate(leaves: Iterable[Any], gone: bool = True) -> None:
    """Note of leaves that a runner has made that their values are gone, or are not."""
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            setattr(leaf, _INVALIDATED, gone)


def invalidated(tensor: Any) -> bool | None:
    """Whether the values of a tensor are gone; None if no runner has made it."""
    return getattr(tensor, _INVALIDATED, None)


INVALIDATED_LEAF = (
    "{path} was given to an earlier step, which has updated it in place, or is a view of such a "
    "leaf: it is used up (half, if that step failed). Pass the state that the last step returned; "
    "clone what you want to keep, load a checkpoint, or let steps leave old states alone: "
    "fp.spmd(..., donate=False), without a CUDA graph"
)


def refuse_invalidated(name: str, values: Any) -> None:
    """StateError where a leaf of a tree is invalidated."""
    for number, leaf in enumerate(tree.leaves(values)):
        if invalidated(leaf):
            path = tree.paths(values)[number]
            raise StateError(INVALIDATED_LEAF.format(path=f"{name}{path}"))


class DonationAnalysis:
    """Which leaves of a state optimizers would write to, and which of these are read again.

    Args:
        leaves: those of the state that the step is watched with, no two of which share memory.
    """

    def __init__(self, leaves: Iterable[Any]) -> None:
        self._leaf_of = {}
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                self._leaf_of[_storage(leaf)] = number
        self._marked: set[int] = set()
        self._read: set[int] = set()

    @property
    def overwritable(self) -> set[int]:
        """The numbers of the leaves that optimizers may write to."""
        replaced = self._marked - self._read
        return {self._leaf_of[storage] for storage in replaced if storage in self._leaf_of}

    def watch(self) -> TorchDispatchMode:
        """A mode under which a step is watched. What the step returns is to be shown to `read`."""
        return _Reads(self)

    def read(self, values: Any) -> None:
        """Note that all tensors of a tree are read."""
        if self._marked:
            tensors = filter(torch.is_tensor, tree.leaves(values))
            self._read |= self._marked.intersection(map(_storage, tensors))

    def mark_overwritable(self, tensor: torch.Tensor) -> None:
        """Note that an optimizer would write to a tensor."""
        self._marked.add(_storage(tensor))


def _storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in, also of one that is a fake."""
    return tensor.untyped_storage()._cdata


class _Reads(TorchDispatchMode):
    """Shows a `DonationAnalysis` what every op reads."""

    def __init__(self, analysis: DonationAnalysis) -> None:
        super().__init__()
        self.analysis = analysis

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.analysis.read((args, kwargs or {}))
        return func(*args, **(kwargs or {}))
