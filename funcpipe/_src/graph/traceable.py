"""Traceable: lets a loss function run on fakes whatever libraries it calls.

Lookups in tables give dense gradients, even where sparse ones are asked for; distributions do not
look at values to check them.

In: a loss function's calls of torch. Out: the same numbers.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode


def _position_of_sparse(fn: Callable) -> int:
    return list(inspect.signature(fn).parameters).index("sparse")


# Calls that give sparse gradients if asked to: the option, and its position among the arguments.
_SPARSE: dict[Callable, tuple[str, int]] = {
    F.embedding: ("sparse", _position_of_sparse(F.embedding)),
    F.embedding_bag: ("sparse", _position_of_sparse(F.embedding_bag)),
    torch.embedding: ("sparse", 4),
    torch.embedding_bag: ("sparse", 5),
    torch.gather: ("sparse_grad", 3),
    torch.Tensor.gather: ("sparse_grad", 3),
}


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Run a loss function so that it can be traced.

    >>> table = torch.ones(3, 2, requires_grad=True)
    >>> with traceable():
    ...     rows = F.embedding(torch.tensor([1, 1]), table, sparse=True)
    >>> torch.autograd.grad(rows.sum(), table)[0].tolist()
    [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    """
    with _unchecked, _Dense():
        yield


class _Unchecked:
    """While any thread is inside, distributions do not check their arguments, unless a call asks
    for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = False

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = Distribution._validate_args
                Distribution.set_default_validate_args(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                Distribution.set_default_validate_args(self.before)


_unchecked = _Unchecked()


class _Dense(TorchFunctionMode):
    """Turns requests for sparse gradients into dense ones: their sums over ranks and microbatches
    are dense anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SPARSE:
            option, position = _SPARSE[func]
            if len(args) > position:
                args = (*args[:position], False, *args[position + 1 :])
            if option in kwargs:
                kwargs = kwargs | {option: False}
        return func(*args, **kwargs)
