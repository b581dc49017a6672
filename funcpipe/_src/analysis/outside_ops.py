"""Outside: what a step computes outside ``value_and_grad``, with the Python values that it takes,
such as a learning rate. Ranks compare it, since what an update does on one rank alone lets replicas
drift apart.

In: ops, as a run on tagged fakes (`state.py`) meets them. Out: a text for every op, and the user's
line of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
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
_NUMBER = torch.ops.aten._local_scalar_dense.default
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
        self._mark_rows(_tensors(tree.leaves(batch)))
        self.in_step = False  # or in ``init_state``
        self._draws: dict[int, Line | None] = {}  # ops of the step that draw random values
        self.drawn_numbers: list[Line | None] = []  # where a draw became a Python number
        # The batch's leaves that have rows, and what is made of them.
        self._of_batch: Any = WeakTensorKeyDictionary()
        for leaf in _tensors(tree.leaves(batch)):
            if leaf.dim():
                self._of_batch[leaf] = True

    def note(self, op: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> None:
        """An op, its arguments, and what it returned."""
        told = list(map(self._text, args))
        for name, value in kwargs.items():
            told.append(f"{name}={self._text(value)}")
        number = len(self._ops)
        text = f"{op}({', '.join(told)})"
        self._ops.append((text, user_line()))
        taken = _tensors((args, kwargs))
        made = _tensors(out)
        self._takes.append(self._made_by(taken))
        if any(map(self._is_of_step, taken)):
            self._roots.add(number)
            self._mark_rows(made)
        written = made + taken if op._schema.is_mutable else made
        for tensor in written:
            self._makers[tensor] = number
        self._note_draw(number, op)
        if any(map(self.is_of_batch, taken)):
            for tensor in written:
                self._of_batch[tensor] = True

    def _note_draw(self, number: int, op: Any) -> None:
        """Note that the step draws random values, or takes drawn ones as a Python number."""
        if not self.in_step:
            return
        if torch.Tag.nondeterministic_seeded in op.tags:
            self._draws[number] = user_line()
        if op is not _NUMBER:
            return
        reached = self._reached(self._takes[number])
        draws = self._draws.keys() & reached
        if draws:
            self.drawn_numbers.append(user_line())

    def is_of_batch(self, leaf: Any) -> bool:
        """Whether a leaf is, or was computed from, a leaf of the batch that has rows."""
        return isinstance(leaf, torch.Tensor) and leaf in self._of_batch

    def draws_of(self, leaf: Any) -> list[Line | None]:
        """The lines of the step that drew random values for a leaf."""
        numbers = self._reached(self._made_by(_tensors(leaf)))
        return [self._draws[number] for number in sorted(numbers & self._draws.keys())]

    def _mark_rows(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self._rows[tensor] = True

    def _is_of_step(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is made of params or of the batch."""
        return isinstance(tensor, FakeTensor) or tensor in self._rows

    def _made_by(self, tensors: list[torch.Tensor]) -> set[int]:
        """The ops that made tensors, of those that ops made."""
        found = set()
        for tensor in tensors:
            if tensor in self._makers:
                found.add(self._makers[tensor])
        return found

    def _text(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, torch.device):
            return value.type  # a rank's own number says nothing
        if isinstance(value, _PLAIN):
            return repr(value)
        return type(value).__name__

    def _tensor(self, tensor: torch.Tensor) -> str:
        name = self._name(tensor)
        if name is not None:
            return name
        text = f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.")
        # What an op has made is told by that op, so that values are told of closed-over tensors
        # alone.
        if self._is_of_step(tensor) or tensor in self._makers:
            return text
        if tensor.numel() == 1:
            return f"{text} {tensor.item()}"
        return f"{text} {checksums([tensor])[0]}"

    def ops(self, results: Any) -> tuple[Op, ...]:
        """The ops on params and the batch, and those that make what these and ``results`` take.
        Others may be anyone's, such as of an object that is collected meanwhile. Sorted: in which
        order a step goes over leaves does not matter."""
        found = self._reached(self._roots | self._made_by(_tensors(results)))
        ops = [self._ops[number] for number in found]
        return tuple(sorted(ops, key=itemgetter(0)))

    def _reached(self, numbers: set[int]) -> set[int]:
        """Some ops, and those that made what they take."""
        todo = list(numbers)
        found: set[int] = set()
        while todo:
            number = todo.pop()
            if number not in found:
                found.add(number)
                todo += self._takes[number]
        return found


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
