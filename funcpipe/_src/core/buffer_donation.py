"""Donation: memory of a state that an optimizer may write to, since nobody reads what it holds any
more.

A step is pure, and so are optimizers: they make new tensors. A runner that is given a state to use
up needs no copy of it. Whether a leaf is read again after its update cannot be seen in a step; but
a step does the same every time, so it can be seen by *watching* it once, on fakes
(`analysis/state.py`). Old params that are compared with new ones, or kept for an average, are read,
and go on being copied.

Terms. An optimizer *offers* a tensor when it asks for one that it may write to in its place.

In: a step that runs once under a `DonationAnalysis` that watches, then inside `donate`. Out: `writable`,
which gives an optimizer a copy of a tensor, or the tensor itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe._src.core import pytree as tree
from funcpipe.errors import StateError

_ledger: ContextVar[DonationAnalysis | None] = ContextVar("funcpipe_ledger", default=None)
_writable: ContextVar[Lent | None] = ContextVar("funcpipe_writable", default=None)
# an attribute of the leaves of states that a runner has made: whether what they held is gone
_SPENT = "_funcpipe_spent"


def writable(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` that may be written to; ``x`` itself where it is donated.

    >>> x = torch.ones(2)
    >>> writable(x) is x, DonationAnalysis([x]).free
    (False, set())
    """
    given = _writable.get()
    if given is not None and given.take(x):
        return x
    out = x.clone()  # seen by the ledger where the same memory was offered before
    if (ledger := _ledger.get()) is not None:
        ledger.offer(x)
    return out


def memory(x: torch.Tensor) -> int:
    """Where the memory of a tensor begins: the same for all views of it. 0 for none."""
    return x.untyped_storage().data_ptr()


class Lent:
    """Leaves of a state that optimizers may write to. A leaf is spent before one does, so that a
    step which fails half-way leaves nothing that passes as good."""

    def __init__(self, leaves: Iterable[torch.Tensor]) -> None:
        self._leaves = {memory(x): x for x in leaves}

    def take(self, x: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of a leaf, which is spent then."""
        leaf = self._leaves.get(memory(x)) if self._leaves else None
        if leaf is None:
            return False
        spend([leaf])
        return True


@contextlib.contextmanager
def donate(leaves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, optimizers write to these leaves of a state, no two of which share memory; they lie
    at places that a ledger found to be ``free``."""
    token = _writable.set(Lent(leaves))
    try:
        yield
    finally:
        _writable.reset(token)


def spend(leaves: Iterable[Any], gone: bool = True) -> None:
    """Note of leaves that a runner has made that what they held is gone, or is not."""
    for x in leaves:
        if isinstance(x, torch.Tensor):
            setattr(x, _SPENT, gone)


def spent(x: Any) -> bool | None:
    """Whether what a tensor held is gone; None if no runner has made it."""
    return getattr(x, _SPENT, None)


SPENT_LEAF = (
    "{path} was given to an earlier step, which has updated it in place, or is a view of such a "
    "leaf: it is used up (half, if that step failed). Pass the state that the last step returned; "
    "clone what you want to keep, load a checkpoint, or let steps leave old states alone: "
    "fp.spmd(..., donate=False), without a CUDA graph"
)


def refuse_spent(name: str, x: Any) -> None:
    """StateError where a leaf of a tree is spent."""
    for k, leaf in enumerate(tree.leaves(x)):
        if spent(leaf):
            raise StateError(SPENT_LEAF.format(path=f"{name}{tree.paths(x)[k]}"))


class DonationAnalysis:
    """What a step's optimizers offer, and what of it is read again.

    Args:
        leaves: those of the state that the step is watched with, no two of which share memory.
    """

    def __init__(self, leaves: Iterable[Any]) -> None:
        self._own = {_storage(x): k for k, x in enumerate(leaves) if isinstance(x, torch.Tensor)}
        self._offered: set[int] = set()
        self._read: set[int] = set()

    @property
    def free(self) -> set[int]:
        """The places in the state of the leaves that optimizers may write to."""
        return {self._own[m] for m in self._offered - self._read if m in self._own}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch a step that runs inside. What it returns is to be shown to `read`."""
        token = _ledger.set(self)
        try:
            with _Watching(self):
                yield
        finally:
            _ledger.reset(token)

    def read(self, x: Any) -> None:
        """Note that all tensors of a tree are read."""
        if self._offered:
            self._read |= {
                _storage(leaf) for leaf in tree.leaves(x) if isinstance(leaf, torch.Tensor)
            } & self._offered

    def offer(self, x: torch.Tensor) -> None:
        """Note that an optimizer would write to a tensor."""
        self._offered.add(_storage(x))


def _storage(x: torch.Tensor) -> int:
    """Which memory a tensor lies in, also of one that is a fake."""
    return x.untyped_storage()._cdata


class _Watching(TorchDispatchMode):
    """Shows a ledger what every op reads."""

    def __init__(self, ledger: DonationAnalysis) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ledger.read((args, kwargs or {}))
        return func(*args, **(kwargs or {}))
