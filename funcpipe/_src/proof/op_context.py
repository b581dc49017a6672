"""Sites: what a rule sees of one op, and what it may say of its results.

Terms. A *site* is a `OpCall` with the states of its operands. A dim of a tensor is *split* (its state
says so), *free* (it moves, and the tensor is constant along it) or *fixed*.

In: a call, states. Out: operands and arguments by name; the state of elementwise results; the last
check of every state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from funcpipe._src.proof.align import Differs, OpCall, Pair
from funcpipe._src.proof.placements import (
    COUNTS,
    PSUM,
    Average,
    Number,
    Partial,
    Refusal,
    Replicate,
    Shard,
    State,
    World,
    plain,
)

MIXES = (
    "Only attention may mix positions: do it there, outside of the loss function on the whole "
    "sequence (and pass the result through batch), or for every position by itself"
)


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of both runs, its shapes on a rank and on one device, and what is known of it."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    dtype: torch.dtype
    state: State
    made: str = ""  # by which op it came to its state
    # the number of the tensor whose entries it has, in their order, perhaps in another shape or
    # dtype
    source: int = -1

    @property
    def ndim(self) -> int:
        return len(self.a)

    def moves(self, dim: int) -> bool:
        """Whether a dim has another size on one device."""
        return (
            self.a[dim : dim + 1] != self.b[dim : dim + 1]
        )  # a tensor without dims has a dim 0, for torch

    @property
    def moving(self) -> list[int]:
        """The dims that move."""
        return [d for d in range(self.ndim) if self.moves(d)]

    def split_at(self, dim: int) -> Shard | None:
        """How the positions lie along a dim, if they do."""
        return self.state if isinstance(self.state, Shard) and self.state.dim == dim else None

    def free_at(self, dim: int) -> bool:
        """Whether a dim moves, and the tensor is constant along it."""
        return self.moves(dim) and self.split_at(dim) is None

    def __str__(self) -> str:
        by = (
            f", made by {self.made}"
            if self.made and not isinstance(self.state, Shard | Replicate)
            else ""
        )
        return f"a tensor of shape {self.a} ({self.state}{by})"


@dataclass(frozen=True, eq=False)
class OpContext:
    """One op.

    Args:
        call: the op.
        args: its arguments by name, tensors as `Operand`.
        world: what is known beforehand.
        value_of: the value of a tensor of the call that is made of numbers alone.
    """

    call: OpCall
    args: dict[str, Any]
    world: World
    value_of: Callable[[Pair], torch.Tensor | None] = lambda _: None

    @property
    def outs(self) -> tuple[Pair, ...]:
        return self.call.outs

    @property
    def out(self) -> Pair:
        """The first result."""
        return self.call.outs[0]

    @property
    def operands(self) -> list[Operand]:
        """All tensors among the arguments."""
        return list(_operands(self.args.values()))

    def x(self, name: str = "self") -> Operand:
        """A tensor."""
        return self.args[name]

    def value(self, name: str) -> Any:
        """An argument that must not depend on lengths."""
        value = self.args[name]
        if isinstance(value, Differs):
            raise Refusal(
                f"its {name} is {value.a} on a rank and {value.b} on one device: it is made from a "
                "slice's length"
            )
        return value

    def all_values(self) -> None:
        """Refuse any argument that depends on lengths."""
        for name in self.args:
            self.value(name)

    def term(self, name: str) -> State:
        """The state of an argument that is a tensor or a number."""
        value = self.args[name]
        if isinstance(value, Operand):
            return value.state
        if isinstance(value, Differs):
            return Number(value.a, value.b)
        return Number(value, value) if isinstance(value, int | float) else Replicate()

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """A dim of an operand, counted from the front."""
        return self.value(name) % max(self.x(of).ndim, 1)

    def dims(self, name: str = "dim", of: str = "self") -> tuple[int, ...]:
        """Dims of an operand; none given: all."""
        given, n = self.value(name) if name in self.args else None, self.x(of).ndim
        given = [given] if isinstance(given, int) else given
        return tuple(d % n for d in given) if given and n else tuple(range(n))


def _operands(values: Iterable[Any]) -> Iterable[Operand]:
    for v in values:
        if isinstance(v, Operand):
            yield v
        elif isinstance(v, list | tuple):
            yield from _operands(v)


def elementwise(s: OpContext, operands: Sequence[Operand], ndim: int) -> State:
    """The state of what is computed element by element from operands that broadcast to ``ndim``
    dims, one of them split."""
    splits = [
        x.state.at(x.state.dim + ndim - x.ndim) for x in operands if isinstance(x.state, Shard)
    ]
    first = splits[0]
    for other in splits[1:]:
        if other.dim != first.dim:
            raise Refusal(
                f"it puts positions along dim {first.dim} beside positions along dim {other.dim}: "
                f"every pair of a rank's own positions, but none with another rank's. {MIXES}"
            )
        if other != first:
            raise Refusal(
                f"its operands have positions in different order along dim {first.dim}, or of "
                "different sequences"
            )
    for x in operands:
        if isinstance(x.state, Partial | Average):
            raise Refusal(f"it puts {x} beside {first}: {PSUM}; or {COUNTS}")
        if isinstance(x.state, Number) and not x.state.constant:
            raise Refusal(
                f"it puts {x.state} beside {first}, but the number is made from the length of a "
                f"slice; {COUNTS}"
            )
        d = first.dim - ndim + x.ndim
        if d >= 0 and not x.split_at(d) and not x.moves(d) and x.a[d] != 1:
            raise Refusal(
                f"it puts {first} beside {x}, whose dim {d} is as long on every rank: take a "
                "rank's part of it by fp.positions(x, dim), or split it with the batch"
            )
    return first


def refuse_mixing(x: Operand, dims: Sequence[int], what: str) -> None:
    """Refuse what runs along positions, or along a dim whose size is that of a slice."""
    for d in dims:
        if x.split_at(d):
            raise Refusal(
                f"it {what} along dim {d} of a tensor of shape {x.a}, along which a rank has "
                f"{x.a[d]} of {x.b[d]} positions, and one device has all. {MIXES}"
            )
        if x.moves(d):
            raise Refusal(
                f"it {what} along dim {d} of a tensor of shape {x.a}, whose size is made from a "
                "slice's length"
            )


def check(state: State, out: Pair, world: World) -> None:
    """Refuse a state that the shapes of a result do not bear out."""
    if len(out.a) != len(out.b):
        raise Refusal(f"its result has shape {out.a} on a rank and {out.b} on one device")
    moving = [d for d in range(len(out.a)) if out.a[d] != out.b[d]]
    if isinstance(state, Partial | Average) and moving:
        raise Refusal(f"it repeats {state} along dim {moving[0]} as often as a rank has positions")
    if isinstance(state, Shard):
        a, b = world.lengths[state.part]
        rest = state.outer * state.inner
        if (out.a[state.dim], out.b[state.dim]) != (a * rest, b * rest):
            raise Refusal(
                f"its result, {state}, has shape {out.a} on a rank and {out.b} on one device"
            )


def all_plain(operands: Iterable[Operand]) -> bool:
    """Whether all operands are the same on every rank as on one device, sizes included."""
    return all(plain(x.state) and not x.moving for x in operands)
