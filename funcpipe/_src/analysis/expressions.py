"""How every tensor of a step was computed, outside ``value_and_grad``, as a number: two runs of a
step compute the same where their numbers are equal.

In: every op of a run, its arguments and its results. Out: the number of a tensor's expression.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from funcpipe._src.core.source_lines import Line, user_line

_LARGE = 1 << 24  # elements; larger constants are told apart as objects
_VALUES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)

Source = tuple[int, int]  # a global sum of the step, and the parameter whose entry it is


Numbers = list[int | None]  # of the expressions of leaves; None of one that is not held


class Given(NamedTuple):
    """What a ``value_and_grad`` was given."""

    params: Numbers
    batch: Numbers


@dataclass(frozen=True)
class Seen:
    """A run of ``init_state`` and a step.

    Args:
        expressions: those of its tensors.
        init_state, init: what ``init_state`` made, and the numbers of its leaves (None: the step
            did not run).
        state, metrics: what the step returned.
        calls, sums: what every ``value_and_grad`` and every global sum got.
    """

    expressions: Expressions
    init_state: Any
    init: Numbers | None = None
    state: Any = None
    metrics: Any = None
    calls: Sequence[Given] = ()
    sums: Sequence[Numbers] = ()


class Table:
    """Numbers of expressions: what runs that are to be compared have in common."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def number(self, expression: Hashable) -> int:
        """The number of an expression; equal ones have one.

        >>> table = Table()
        >>> table.number(("add", 1, 2)), table.number("x"), table.number(("add", 1, 2))
        (0, 1, 0)
        """
        return self._numbers.setdefault(expression, len(self._numbers))


class Expressions:
    """The expressions of one run of a step.

    Args:
        table: where they are numbered.
        shape: from a list of sizes to what stands for it, where it is the shape of a parameter.
        param: from a tensor to the parameter that it is, or belongs to.

    ``entered``: the global sums of which entries were handed out by leaf. ``joined``: those of
    which a step joins entries of several leaves, each with the line that does so.
    """

    def __init__(
        self,
        table: Table,
        shape: Callable[[list[int]], Hashable],
        param: Callable[[Any], int | None],
    ) -> None:
        self.table, self.shape, self.param = table, shape, param
        self.entered: set[int] = set()
        self.joined: dict[int, Line | None] = {}
        self._numbers: Any = WeakTensorKeyDictionary()
        self._sources: Any = WeakTensorKeyDictionary()
        self._written: dict[int, int] = {}  # the last write to a memory

    def of(self, x: Any) -> int:
        """The number of a value."""
        if not isinstance(x, torch.Tensor):
            return self.table.number(_plain(x))
        known = self._numbers.get(x)
        if known is None:
            return self.table.number(("constant", *_content(x)))
        number, written = known
        last = self._written.get(_memory(x))
        return number if last == written else self.table.number(("view", number, last))

    def name(self, x: Any, expression: Hashable) -> None:
        """Say what a tensor is, that no op made."""
        if isinstance(x, torch.Tensor):
            self._set(x, self.table.number(expression))

    def entry(self, x: Any, source: Source) -> None:
        """Say that a tensor is the entry of a leaf in what a global sum gave."""
        self.entered.add(source[0])
        if isinstance(x, torch.Tensor):
            self._sources[x] = frozenset([source])

    def whole(self, x: Any) -> None:
        """Note that a tensor is used on every rank: the entries in it have to be there."""
        for k, _ in self._sources_of([x]):
            self.joined.setdefault(k, user_line())

    def record(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Note an op that ran."""
        name = func.overloadpacket.__name__
        listed = name.startswith(("_foreach_", "_fused_"))
        runs: Iterable[tuple[int | None, Any]] = (
            _elements(args, kwargs) if listed else [(None, (args, kwargs))]
        )
        for j, given in runs:
            expression = (str(func), self._key(given))
            sources = self._joined(given)
            for at, x in _outputs(out, j):
                self._made(x, (*expression, at), sources)
            for place, argument in _written(func):
                x = args[place] if place < len(args) else kwargs.get(argument)
                self._write(x if j is None else _nth(x, j), (*expression, argument), sources)

    def _made(self, x: Any, expression: Hashable, sources: frozenset[Source]) -> None:
        if isinstance(x, torch.Tensor):
            self._set(x, self.table.number(expression))
            if sources:
                self._sources[x] = sources

    def _write(self, x: Any, expression: Hashable, sources: frozenset[Source]) -> None:
        if isinstance(x, torch.Tensor):
            number = self._written[_memory(x)] = self.table.number(expression)
            self._set(x, number)
            if sources:
                self._sources[x] = sources

    def _set(self, x: torch.Tensor, number: int) -> None:
        self._numbers[x] = number, self._written.get(_memory(x))

    def _joined(self, given: Any) -> frozenset[Source]:
        """The entries that an op reads; those of several leaves, or of one leaf beside another
        leaf, are noted as joined."""
        if not self._sources:
            return frozenset()
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
        sources = self._sources_of(tensors)
        if sources:
            params = {param for _, param in sources} | {
                p for p in map(self.param, tensors) if p is not None
            }
            if len(params) > 1:
                for k, _ in sources:
                    self.joined.setdefault(k, user_line())
        return sources

    def _sources_of(self, tensors: list[Any]) -> frozenset[Source]:
        found = [
            self._sources[x] for x in tensors if isinstance(x, torch.Tensor) and x in self._sources
        ]
        return frozenset().union(*found)

    def _key(self, x: Any) -> Hashable:
        """What stands for the arguments of an op."""
        if isinstance(x, torch.Tensor):
            return self.of(x)
        if isinstance(x, list | tuple):
            sizes = self.shape(list(x)) if x and all(type(n) is int for n in x) else None
            return sizes if sizes is not None else tuple(map(self._key, x))
        if isinstance(x, dict):
            return tuple((name, self._key(value)) for name, value in sorted(x.items()))
        return _plain(x)


def _plain(x: Any) -> Hashable:
    """A value of Python; 1, 1.0 and True are three, and of other objects the class counts."""
    return type(x).__name__, repr(x) if isinstance(x, _VALUES) else None


def _content(x: torch.Tensor) -> tuple:
    """What tells a tensor from others that the step did not make."""
    kind = (tuple(x.shape), str(x.dtype), str(x.device))
    if isinstance(x, FakeTensor) or x.is_meta or x.layout != torch.strided or x.numel() > _LARGE:
        return (*kind, id(x))
    with _disable_current_modes(), torch.no_grad():
        raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (*kind, hashlib.sha256(raw).digest())


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


def _elements(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """The arguments of an op on lists, for each place in the lists."""
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, list | tuple)]
    length = max(map(len, lists), default=0)

    def at(x: Any, j: int) -> Any:
        return x[j] if isinstance(x, list | tuple) and len(x) == length else x

    for j in range(length):
        yield j, ([at(x, j) for x in args], {name: at(x, j) for name, x in kwargs.items()})


def _outputs(out: Any, j: int | None) -> Iterator[tuple[int, Any]]:
    """What an op made, or what it made at a place of its lists."""
    if j is None:
        yield from (
            [(0, out)] if isinstance(out, torch.Tensor) else enumerate(pytree.tree_leaves(out))
        )
    elif isinstance(out, list | tuple):
        several = out if out and isinstance(out[0], list | tuple) else [out]
        yield from ((k, _nth(x, j)) for k, x in enumerate(several))


def _nth(x: Any, j: int) -> Any:
    return x[j] if isinstance(x, list | tuple) and j < len(x) else None


_writes: dict[Any, list[tuple[int, str]]] = {}


def _written(func: Any) -> list[tuple[int, str]]:
    """The arguments that an op writes to: place and name."""
    if func not in _writes:
        arguments = enumerate(func._schema.arguments)
        _writes[func] = [
            (n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write
        ]
    return _writes[func]
