"""Donation: memory of a state that an optimizer may write to, since nobody reads what it holds any more.

A step is pure, and so are optimizers: they make new tensors. In a step that is replayed from a CUDA graph the state is updated
in place anyway, so a copy that is copied back is work for nothing. Whether a leaf is read again after its update cannot be
seen in a step; but a step does the same every time, so it can be seen by *watching* it once. Old params that are compared
with new ones, or kept for an average, are read, and go on being copied.

Terms. An optimizer *offers* a tensor when it asks for one that it may write to in its place.

In: a step that runs under a `Ledger`, first watched, then donating. Out: `writable`, which gives an optimizer a copy of a
tensor, or the tensor itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe import tree

_ledger: ContextVar[Ledger | None] = ContextVar("funcpipe_ledger", default=None)


def writable(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` that may be written to; ``x`` itself where it is donated.

    >>> x = torch.ones(2)
    >>> writable(x) is x, Ledger([x]).free
    (False, set())
    """
    ledger = _ledger.get()
    return x.clone() if ledger is None else ledger.writable(x)


def memory(x: torch.Tensor) -> int:
    """Where the memory of a tensor begins: the same for all views of it. 0 for none."""
    return x.untyped_storage().data_ptr()


class Ledger:
    """What a step's optimizers offer, and what of it is read again.

    Args:
        leaves: the tensors of the state, no two of which share memory.
    """

    def __init__(self, leaves: Iterable[torch.Tensor]) -> None:
        self._own = {memory(x) for x in leaves} - {0}
        self._offered: set[int] = set()
        self._read: set[int] = set()
        self._donating = False

    @property
    def free(self) -> set[int]:
        """The memory that optimizers may write to."""
        return (self._offered & self._own) - self._read

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch a step that runs inside. What it returns is to be shown to `read`."""
        token = _ledger.set(self)
        try:
            with _Watching(self):
                yield
        finally:
            _ledger.reset(token)

    @contextlib.contextmanager
    def donate(self) -> Iterator[None]:
        """Inside, optimizers write to what is free."""
        token, self._donating = _ledger.set(self), True
        try:
            yield
        finally:
            self._donating = False
            _ledger.reset(token)

    def read(self, x: Any) -> None:
        """Note that all tensors of a tree are read."""
        if self._offered:
            self._read |= {memory(leaf) for leaf in tree.leaves(x) if isinstance(leaf, torch.Tensor)} & self._offered

    def writable(self, x: torch.Tensor) -> torch.Tensor:
        """See the function of this name."""
        if self._donating:
            return x if memory(x) in self.free else x.clone()
        out = x.clone()  # seen by `read` where the same memory was offered before
        self._offered.add(memory(x))
        return out


class _Watching(TorchDispatchMode):
    """Shows a ledger what every op reads."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ledger.read((args, kwargs or {}))
        return func(*args, **(kwargs or {}))
