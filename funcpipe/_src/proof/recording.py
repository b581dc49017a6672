"""Recordings: what a loss function did on fake tensors, op by op.

A tensor has a number in its recording; what came in has the first numbers. A *known call*
(`functional/dispatch.py`) is one entry.

In: ops with fake tensors. Out: entries, with a `TensorRef` for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from funcpipe._src.core.source_lines import Line, user_line

# Around the ops of a declared batch statistic.
BEGIN = "begin"
STATISTIC = "batch_statistic"
BUFFER = "changed_buffer"
NAMED = "named"  # a collective over axes that split rows
CONSTANT, UNKNOWN = "constant", "unknown"  # tensors that came in by themselves
# These use the shape of an operand alone.
SHAPE_ONLY = (
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
)


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a recording."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class RecordedOp:
    """An op.

    Args:
        name: of the op without its overload, such as ``"add_"`` (ATen's) or ``"funcpipe::wait"``,
            or of a known call.
        func: the op; None for a known call.
        args: by name, defaults included; tensors as `TensorRef`.
        outs: its results; one that it only writes to keeps its number.
        line: of the user's code.
        grad: whether gradients are recorded.
    """

    name: str
    func: Any
    args: dict[str, Any]
    outs: tuple[TensorRef, ...]
    line: Line | None
    grad: bool = True


@dataclass
class Recording:
    """What a run did.

    Args:
        mode: of all fakes.
        entries: in order.
        count: of tensors that came in.
        hooked: whether the loss function put a hook on a gradient.
        judging: whether the loss is done, and its gradient is taken (`custom_backward.py`).
    """

    mode: FakeTensorMode
    entries: list[RecordedOp] = field(default_factory=list)
    count: int = 0
    hooked: bool = False
    judging: bool = False
    _numbers: dict[int, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # so that an id stays one tensor's

    def entry(self, place: int) -> RecordedOp | None:
        """An entry; None behind the last."""
        if place < len(self.entries):
            return self.entries[place]
        return None

    def new(self, tensor: Tensor) -> TensorRef:
        """A tensor that is seen for the first time."""
        self._numbers[id(tensor)] = len(self._kept)
        self._kept.append(tensor)
        return self.ref(tensor)

    def ref(self, tensor: Tensor) -> TensorRef:
        """A tensor, which may have come from elsewhere."""
        if id(tensor) in self._numbers:
            return TensorRef(self._numbers[id(tensor)], tuple(tensor.shape), tensor.dtype)
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        has_value = type(tensor) is Tensor and not wrapped
        out = self.new(tensor)
        name, args = (CONSTANT, {"value": tensor}) if has_value else (UNKNOWN, {})
        self.entries.append(RecordedOp(name, None, args, (out,), user_line()))
        return out

    def is_free(self, tensor: Tensor) -> bool:
        """Whether a tensor comes neither from params nor from the batch."""
        bound = set(range(self.count))
        for entry in self.entries:
            if entry.name in SHAPE_ONLY:
                continue
            if any(ref.number in bound for ref in refs(entry.args.values())):
                bound.update(out.number for out in entry.outs)
        return self.ref(tensor).number not in bound

    def inputs(self, count: int) -> list[TensorRef]:
        """The tensors that came in."""
        return [
            TensorRef(number, tuple(tensor.shape), tensor.dtype)
            for number, tensor in enumerate(self._kept[:count])
        ]

    def tensors(self) -> list[Tensor]:
        """All tensors, by number."""
        return self._kept

    def add(self, name: str, func: Any, args: dict[str, Any], out: Any) -> None:
        """Write an op down."""
        named = tree_map_only(Tensor, self.ref, args)
        operands = {leaf.number for leaf in tree_leaves(named) if isinstance(leaf, TensorRef)}
        outs = []
        for tensor in tensors_of(out):
            is_operand = self._numbers.get(id(tensor)) in operands
            outs.append(self.ref(tensor) if is_operand else self.new(tensor))
        grad = torch.is_grad_enabled()
        self.entries.append(RecordedOp(name, func, named, tuple(outs), user_line(), grad))


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors of a tree."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def refs(values: Iterable[Any]) -> Iterator[TensorRef]:
    """The tensors among arguments."""
    for value in values:
        if isinstance(value, TensorRef):
            yield value
        elif isinstance(value, list | tuple):
            yield from refs(value)


def holds_refs(value: Any) -> bool:
    """Whether an argument is a list of tensors, among others."""
    return isinstance(value, list | tuple) and any(isinstance(item, TensorRef) for item in value)


def writes(entry: RecordedOp) -> bool:
    """Whether an op changes an operand."""
    schema = getattr(entry.func, "_schema", None)
    return schema is not None and schema.is_mutable
