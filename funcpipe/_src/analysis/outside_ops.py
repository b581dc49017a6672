"""Outside: what a step computes outside ``value_and_grad``, with the Python values that it takes,
such as a learning rate. Ranks compare it, since what an update does on one rank alone lets replicas
drift apart.

In: ops, as a run on tagged fakes (`state.py`) meets them. Out: a text for every op, and the user's
line of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.checksum import checksums
from funcpipe._src.core.source_lines import Line, user_line

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.layout,
    torch.memory_format,
)
Op = tuple[str, Line | None]  # what is computed, and the user's line of it


class Outside:
    """The ops of a step and its ``init_state``, noted one by one.

    Args:
        batch: its tensors' values are not told: ranks may have other rows.
        name: how to call a tensor that stands for a parameter; None for others.
    """

    def __init__(self, batch: Any, name: Callable[[torch.Tensor], str | None]) -> None:
        self._name = name
        self._ops: list[Op] = []
        self._takes: list[set[int]] = []  # for every op those that made what it takes
        self._roots: set[int] = set()  # ops on params or the batch
        # Without references of its own: torch detaches what a dispatch mode returns where another
        # one refers to it.
        self._makers: Any = WeakTensorKeyDictionary()  # the last op that wrote a tensor
        self._rows: Any = WeakTensorKeyDictionary()  # the batch, and what is made of it
        self._rows.update((x, True) for x in _tensors(tree.leaves(batch)))

    def note(self, op: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        """An op, its arguments, and what it returned."""
        told = [*map(self._text, args), *(f"{k}={self._text(x)}" for k, x in kwargs.items())]
        number = len(self._ops)
        self._ops.append((f"{op}({', '.join(told)})", user_line()))
        taken, made = _tensors((args, kwargs)), _tensors(out)
        self._takes.append(self._made_by(taken))
        if any(isinstance(x, FakeTensor) or x in self._rows for x in taken):
            self._roots.add(number)
            self._rows.update((x, True) for x in made)
        for x in [*made, *taken] if op._schema.is_mutable else made:
            self._makers[x] = number

    def _made_by(self, xs: list[torch.Tensor]) -> set[int]:
        """The ops that made tensors, of those that ops made."""
        return {self._makers[x] for x in xs if x in self._makers}

    def _text(self, x: Any) -> str:
        if isinstance(x, torch.Tensor):
            return self._tensor(x)
        if isinstance(x, list | tuple):
            return f"[{', '.join(map(self._text, x))}]"
        if isinstance(x, torch.device):
            return x.type  # a rank's own number says nothing
        return repr(x) if isinstance(x, _PLAIN) else type(x).__name__

    def _tensor(self, x: torch.Tensor) -> str:
        name = self._name(x)
        if name is not None:
            return name
        text = f"{x.dtype}{list(x.shape)}".removeprefix("torch.")
        # What an op has made is told by that op, so that values are told of closed-over tensors
        # alone.
        if isinstance(x, FakeTensor) or x in self._rows or x in self._makers:
            return text
        return f"{text} {x.item() if x.numel() == 1 else checksums([x])[0]}"

    def ops(self, results: Any) -> tuple[Op, ...]:
        """The ops on params and the batch, and those that make what these and ``results`` take.
        Others may be anyone's, such as of an object that is collected meanwhile. Sorted: in which
        order a step goes over leaves does not matter."""
        todo = [*self._roots, *self._made_by(_tensors(results))]
        found: set[int] = set()
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                todo += self._takes[number]
        return tuple(sorted((self._ops[n] for n in found), key=lambda op: op[0]))


def _tensors(x: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(x) if isinstance(x, torch.Tensor)]
