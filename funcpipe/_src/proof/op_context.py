"""Op contexts: what a rule sees of one op, and what several rules have in common.

A dim of a tensor is *split* if its placement says so. It is *constant* if its size varies (differs
between a rank and one device) and the tensor has the same entries all along it.

In: an op of both runs, placements. Out: operands and arguments by name; the placement of
elementwise results; the last check of every placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcpipe._src.proof.align import AlignedTensor, Differs, OpCall
from funcpipe._src.proof.placements import (
    Average,
    Number,
    Partial,
    Placement,
    Refusal,
    Replicate,
    Shard,
    SplitContext,
    describe,
    replicated,
)
from funcpipe._src.proof.words import COUNTS, Words


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of both runs, and what is known of it.

    Args:
        local, full: its shapes, on a rank and on one device.
        words: how errors name what is split.
        made_by: the op that gave it its placement.
        source: the number of the tensor whose entries it has, in their order, perhaps in another
            shape or dtype.
    """

    local: tuple[int, ...]
    full: tuple[int, ...]
    dtype: torch.dtype
    placement: Placement
    words: Words
    made_by: str = ""
    source: int = -1

    @property
    def ndim(self) -> int:
        return len(self.local)

    def varies(self, dim: int) -> bool:
        """Whether a dim has another size on one device. To torch, a tensor without dims has a dim
        0; that does not vary."""
        return self.local[dim : dim + 1] != self.full[dim : dim + 1]

    @property
    def varying(self) -> list[int]:
        """The dims that vary."""
        return [dim for dim in range(self.ndim) if self.varies(dim)]

    def sizes(self, dim: int) -> tuple[int, int]:
        """The sizes of a dim, on a rank and on one device."""
        return self.local[dim], self.full[dim]

    @property
    def shard(self) -> Shard | None:
        """How the positions lie, if it is split."""
        return self.placement if isinstance(self.placement, Shard) else None

    def split_at(self, dim: int) -> Shard | None:
        """How the positions lie along a dim, if they do."""
        shard = self.shard
        return shard if shard is not None and shard.dim == dim else None

    def constant_along(self, dim: int) -> bool:
        """Whether a dim varies, and the tensor is constant along it."""
        return self.varies(dim) and self.split_at(dim) is None

    def __str__(self) -> str:
        placement = describe(self.placement, self.words)
        if self.made_by and not isinstance(self.placement, Shard | Replicate):
            placement = f"{placement}, made by {self.made_by}"
        return f"a tensor of shape {self.local} ({placement})"


Kind = TypeVar("Kind")


def _no_value(_: AlignedTensor) -> None:
    return None


@dataclass(frozen=True, eq=False)
class OpContext:
    """One op.

    Args:
        call: the op.
        args: its arguments by name, tensors as `Operand`.
        split: what is split.
        value_of: gives the value of a tensor of the call that is made of numbers alone.
    """

    call: OpCall
    args: dict[str, Any]
    split: SplitContext
    value_of: Callable[[AlignedTensor], Tensor | None] = _no_value

    @property
    def words(self) -> Words:
        return self.split.words

    @property
    def outs(self) -> tuple[AlignedTensor, ...]:
        return self.call.outs

    @property
    def out(self) -> AlignedTensor:
        """The first result."""
        return self.call.outs[0]

    @property
    def operands(self) -> list[Operand]:
        """All tensors among the arguments."""
        return list(_operands(self.args.values()))

    def operand(self, name: str = "self") -> Operand:
        """A tensor."""
        return self.args[name]

    def placements(self, kind: type[Kind]) -> list[Kind]:
        """The placements of a kind, among those of the operands."""
        placements = (operand.placement for operand in self.operands)
        return [placement for placement in placements if isinstance(placement, kind)]

    def value(self, name: str) -> Any:
        """An argument that must not depend on lengths."""
        value = self.args[name]
        if isinstance(value, Differs):
            raise Refusal(
                f"its {name} is {value.local} {self.words.at_owner} and {value.full} on one "
                f"device: it is made from {self.words.length}"
            )
        return value

    def check_values(self) -> None:
        """Refuse any argument that depends on lengths."""
        for name in self.args:
            self.value(name)

    def placement_of(self, name: str) -> Placement:
        """The placement of an argument that is a tensor or a number."""
        value = self.args[name]
        if isinstance(value, Operand):
            return value.placement
        if isinstance(value, Differs):
            return Number(value.local, value.full)
        return Number(value, value) if isinstance(value, int | float) else Replicate()

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """A dim of an operand, counted from the front."""
        return self.value(name) % max(self.operand(of).ndim, 1)

    def dims(self, name: str = "dim", of: str = "self") -> tuple[int, ...]:
        """Dims of an operand; all of them if the op names none."""
        given = self.value(name) if name in self.args else None
        ndim = self.operand(of).ndim
        if isinstance(given, int):
            given = [given]
        if not given or not ndim:
            return tuple(range(ndim))
        return tuple(dim % ndim for dim in given)


def _operands(values: Iterable[Any]) -> Iterable[Operand]:
    for value in values:
        if isinstance(value, Operand):
            yield value
        elif isinstance(value, list | tuple):
            yield from _operands(value)


def elementwise(op: OpContext, operands: Sequence[Operand], ndim: int) -> Shard:
    """The placement of what is computed element by element, from operands that broadcast to
    ``ndim`` dims. At least one of them is split."""
    first, words = _common_split(op, operands, ndim), op.words
    for operand in operands:
        placement = operand.placement
        if isinstance(placement, Partial | Average):
            raise Refusal(
                f"it puts {operand} beside {op.split.text(first)}: {words.sum_first}; or {COUNTS}"
            )
        if isinstance(placement, Number) and not placement.constant:
            raise Refusal(
                f"it puts {placement} beside {op.split.text(first)}, but the number is made from "
                f"{words.length}; {COUNTS}"
            )
        dim = first.dim - ndim + operand.ndim
        if dim < 0 or operand.split_at(dim) or operand.varies(dim):
            continue
        if operand.local[dim] != 1:
            raise Refusal(
                f"it puts {op.split.text(first)} beside {operand}, whose dim {dim} is as long "
                f"{words.at_every}: {words.take_share}"
            )
    return first


def _common_split(op: OpContext, operands: Sequence[Operand], ndim: int) -> Shard:
    """How all split operands lie, along the same dim of the result."""
    splits = []
    for operand in operands:
        shard = operand.shard
        if shard is not None:
            splits.append(shard.at(shard.dim + ndim - operand.ndim))
    first, words = splits[0], op.words
    for other in splits[1:]:
        if other.dim != first.dim:
            raise Refusal(
                f"it puts {words.items} along dim {first.dim} beside {words.items} along dim "
                f"{other.dim}: every pair of {words.own_items}, but no pair with those of another "
                f"{words.owner}. {words.keep_apart}"
            )
        if other != first:
            raise Refusal(
                f"its operands have {words.items} in different order along dim {first.dim}, or "
                f"not the same {words.items}"
            )
    return first


def refuse_mixing(operand: Operand, dims: Iterable[int], what: str) -> None:
    """Refuse what runs along positions, or along a dim whose size is that of a slice."""
    for dim in dims:
        if operand.split_at(dim) or operand.varies(dim):
            raise Refusal(_mixing(operand, dim, what))


def _mixing(operand: Operand, dim: int, what: str) -> str:
    words = operand.words
    along = f"it {what} along dim {dim} of a tensor of shape {operand.local}"
    if not operand.split_at(dim):
        return f"{along}, whose size is made from {words.length}"
    return (
        f"{along}, along which a {words.owner} has {operand.local[dim]} of {operand.full[dim]} "
        f"{words.items}, and one device has all. {words.keep_apart}"
    )


def check(placement: Placement, out: AlignedTensor, split: SplitContext) -> None:
    """Refuse a placement that the shapes of a result contradict."""
    if len(out.local) != len(out.full):
        raise Refusal(f"its result {_shapes(out, split)}")
    if isinstance(placement, Partial | Average):
        for dim in varying_dims(out)[:1]:
            raise Refusal(
                f"it repeats {split.text(placement)} along dim {dim} as often as a "
                f"{split.words.owner} has {split.words.items}"
            )
    if isinstance(placement, Shard):
        local, full = split.lengths[placement.layout]
        multiple = placement.outer * placement.inner
        sizes = (out.local[placement.dim], out.full[placement.dim])
        if sizes != (local * multiple, full * multiple):
            raise Refusal(f"its result, {split.text(placement)}, {_shapes(out, split)}")


def _shapes(out: AlignedTensor, split: SplitContext) -> str:
    return f"has shape {out.local} {split.words.at_owner} and {out.full} on one device"


def varying_dims(tensor: AlignedTensor) -> list[int]:
    """The dims of a tensor of equally many dims in both runs that have another size on one
    device."""
    return [dim for dim in range(len(tensor.local)) if tensor.local[dim] != tensor.full[dim]]


def all_replicated(operands: Iterable[Operand]) -> bool:
    """Whether all operands are the same on every rank as on one device, sizes included."""
    return all(replicated(operand.placement) and not operand.varying for operand in operands)
