"""Constants: the values of tensors that a loss function makes of numbers alone, such as tables of
relative positions.

Where the ops that made one do not tell how its entries go with those of rows beside it, its values
do.

In: two recordings. Out: whether a constant of a part is what one device has for the part's rows, in
some layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from funcpipe._src.proof.align import AlignedTensor, Alignment
from funcpipe._src.proof.placements import Shard, SplitContext
from funcpipe._src.proof.recording import CONSTANT, RecordedOp, Recording, TensorRef, refs, writes

_LARGEST = 1 << 20  # numbers in a tensor that is computed


class Constants:
    """The values of what two recordings make of numbers alone."""

    def __init__(self, alignment: Alignment) -> None:
        self.local = _Values(alignment.local)
        self.full = _Values(alignment.full)

    def value(self, tensor: AlignedTensor) -> Tensor | None:
        """The value of a tensor of numbers alone that a part and one device have alike."""
        local = self.local.of(tensor.number)
        full = self.full.of(tensor.other)
        if local is None or full is None:
            return None
        if not torch.equal(local, full):
            return None
        return local

    def lies(self, tensor: AlignedTensor, placement: Shard, split: SplitContext) -> bool:
        """Whether a tensor is made of numbers alone, and is split by rows in a layout."""
        rows, all_rows = split.lengths[placement.layout]
        numbers = math.prod(tensor.local), math.prod(tensor.full)
        if max(numbers) > _LARGEST:
            return False
        if not rows:
            return False
        dim = placement.dim
        multiple = placement.outer * placement.inner
        sizes = tensor.sizes(dim)
        if sizes != (rows * multiple, all_rows * multiple):
            return False
        local = self.local.of(tensor.number)
        full = self.full.of(tensor.other)
        if local is None or full is None:
            return False
        outer = placement.outer
        inner = placement.inner
        part = local.unflatten(dim, (outer, rows, inner))
        whole = full.unflatten(dim, (outer, all_rows, inner))
        pieces = whole.split(rows, dim + 1)
        return all(torch.equal(part, piece) for piece in pieces)


class _Values:
    """Values of one recording.

    Args:
        known: of a tensor that an op writes to: None.
    """

    def __init__(self, recording: Recording) -> None:
        self.makers: dict[int, tuple[RecordedOp, int]] = {}
        self.known: dict[int, Tensor | None] = {}
        for entry in recording.entries:
            for place, out in enumerate(entry.outs):
                self.makers.setdefault(out.number, (entry, place))
            if writes(entry):
                operands = refs(entry.args.values())
                for ref in (*operands, *entry.outs):
                    self.known[ref.number] = None

    def of(self, number: int) -> Tensor | None:
        """The value of a tensor; None if it comes from params, the batch or a rank, or changes."""
        if number not in self.known:
            maker = self.makers.get(number)
            self.known[number] = None if maker is None else self._computed(*maker)
        return self.known[number]

    def _computed(self, entry: RecordedOp, place: int) -> Tensor | None:
        if entry.name == CONSTANT:
            return entry.args["value"]
        func = entry.func
        if not hasattr(func, "_schema"):
            return None
        if func.namespace != "aten":
            return None
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        operands = refs(entry.args.values())
        values = {ref.number: self.of(ref.number) for ref in operands}
        if None in values.values():
            return None
        if math.prod(entry.outs[place].shape) > _LARGEST:
            return None

        def value_of(ref: TensorRef) -> Any:
            return values[ref.number]

        args = tree_map_only(TensorRef, value_of, entry.args)
        if "device" in args:
            args["device"] = "cpu"
        out = _called(func, args)
        if isinstance(out, Tensor):
            return out
        return out[place]


def _called(func: Any, args: dict[str, Any]) -> Any:
    positional, named = [], {}
    for parameter in func._schema.arguments:
        if parameter.kwarg_only:
            named[parameter.name] = args[parameter.name]
        else:
            positional.append(args[parameter.name])
    return func(*positional, **named)
