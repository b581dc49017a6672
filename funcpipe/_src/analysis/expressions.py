"""How every tensor of a step was computed, outside ``value_and_grad``, as a number: two runs of a
step compute the same where their numbers are equal.

In: every op of a run, its arguments and its results. Out: the number of a tensor's expression.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
Sources = frozenset[Source]
Arguments = tuple[tuple, dict[str, Any]]  # by position, and by name

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
        calls, reductions: what every ``value_and_grad`` and every global sum got.
    """

    expressions: Expressions
    init_state: Any
    init: Numbers | None = None
    state: Any = None
    metrics: Any = None
    calls: Sequence[Given] = ()
    reductions: Sequence[Numbers] = ()


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
        following = len(self._numbers)
        return self._numbers.setdefault(expression, following)


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
        self.table = table
        self.shape = shape
        self.param = param
        self.entered: set[int] = set()
        self.joined: dict[int, Line | None] = {}
        self._numbers: Any = WeakTensorKeyDictionary()
        self._sources: Any = WeakTensorKeyDictionary()
        self._written: dict[int, int] = {}  # the last write to a memory

    def of(self, value: Any) -> int:
        """The number of a value."""
        if not isinstance(value, Tensor):
            return self.table.number(_plain(value))
        known = self._numbers.get(value)
        if known is None:
            return self.table.number(("constant", *_content(value)))
        number, written = known
        last = self._written.get(_memory(value))
        if last == written:
            return number
        return self.table.number(("view", number, last))

    def name(self, value: Any, expression: Hashable) -> None:
        """Say what a tensor is, that no op made."""
        if isinstance(value, Tensor):
            self._set(value, self.table.number(expression))

    def entry(self, value: Any, source: Source) -> None:
        """Say that a tensor is the entry of a leaf in what a global sum gave."""
        self.entered.add(source[0])
        if isinstance(value, Tensor):
            self._sources[value] = Sources([source])

    def whole(self, value: Any) -> None:
        """Note that a tensor is used on every rank: the entries in it have to be there."""
        sources = self._sources_of([value])
        self._join(sources)

    def record(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Note an op that ran."""
        name = func.overloadpacket.__name__
        if not name.startswith(("_foreach_", "_fused_")):
            self._record(func, (args, kwargs), _outputs(out))
            return
        for place, given in enumerate(_by_place(args, kwargs)):
            self._record(func, given, _outputs_at(out, place))

    def _record(self, func: Any, given: Arguments, outputs: list[Any]) -> None:
        """Note an op on tensors, or on those at one place of its lists."""
        expression = str(func), self._key(given)
        sources = self._joined(given)
        for number, output in enumerate(outputs):
            self._made(output, (*expression, number), sources)
        for target, argument in _written(func, given):
            self._write(target, (*expression, argument), sources)

    def _made(self, value: Any, expression: Hashable, sources: Sources) -> None:
        if not isinstance(value, Tensor):
            return
        number = self.table.number(expression)
        self._set(value, number)
        if sources:
            self._sources[value] = sources

    def _write(self, value: Any, expression: Hashable, sources: Sources) -> None:
        if not isinstance(value, Tensor):
            return
        memory = _memory(value)
        self._written[memory] = self.table.number(expression)
        self._made(value, expression, sources)

    def _set(self, tensor: Tensor, number: int) -> None:
        memory = _memory(tensor)
        self._numbers[tensor] = number, self._written.get(memory)

    def _joined(self, given: Any) -> Sources:
        """The entries that an op reads; those of several leaves, or of one leaf beside another
        leaf, are noted as joined."""
        if not self._sources:
            return Sources()
        values = pytree.tree_leaves(given)
        sources = self._sources_of(values)
        if not sources:
            return sources
        params = {param for _, param in sources}
        for value in values:
            param = self.param(value)
            if param is not None:
                params.add(param)
        if len(params) > 1:
            self._join(sources)
        return sources

    def _join(self, sources: Sources) -> None:
        """Note that a line of the user joins entries."""
        for reduction, _ in sources:
            self.joined.setdefault(reduction, user_line())

    def _sources_of(self, values: list[Any]) -> Sources:
        found = Sources()
        for value in values:
            if isinstance(value, Tensor):
                found |= self._sources.get(value, Sources())
        return found

    def _key(self, value: Any) -> Hashable:
        """What stands for the arguments of an op."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, list | tuple):
            sizes = self._shape_key(value)
            return tuple(map(self._key, value)) if sizes is None else sizes
        if isinstance(value, dict):
            names = sorted(value)
            return tuple((name, self._key(value[name])) for name in names)
        return _plain(value)

    def _shape_key(self, value: list | tuple) -> Hashable:
        """What stands for a list that is the shape of a parameter; None of any other."""
        kinds = set(map(type, value))
        return self.shape(list(value)) if kinds == {int} else None


def _plain(value: Any) -> Hashable:
    """A value of Python; 1, 1.0 and True are three, and of other objects the class counts."""
    text = repr(value) if isinstance(value, _VALUES) else None
    return type(value).__name__, text


def _content(tensor: Tensor) -> tuple:
    """What tells a tensor from others that the step did not make."""
    shape = tuple(tensor.shape)
    kind = shape, str(tensor.dtype), str(tensor.device)
    if not _is_read(tensor):
        return (*kind, id(tensor))
    with _disable_current_modes(), torch.no_grad():
        here = tensor.detach().cpu()
        flat = here.contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes()
    digest = hashlib.sha256(raw).digest()
    return (*kind, digest)


def _is_read(tensor: Tensor) -> bool:
    """Whether a constant is told by its numbers: it has some, and not too many."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    if tensor.layout != torch.strided:
        return False
    return tensor.numel() <= _LARGE


def _memory(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.untyped_storage()._cdata


# ---- ops on lists, such as _foreach_add


def _by_place(args: tuple, kwargs: dict[str, Any]) -> Iterator[Arguments]:
    """The arguments of an op on lists, for each place in the lists."""
    length = 0
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            length = max(length, len(value))

    def at(place: int, value: Any) -> Any:
        listed = isinstance(value, list | tuple)
        return value[place] if listed and len(value) == length else value

    for place in range(length):
        own = tuple(at(place, value) for value in args)
        by_name = {}
        for name, value in kwargs.items():
            by_name[name] = at(place, value)
        yield own, by_name


def _outputs(out: Any) -> list[Any]:
    """What an op made."""
    if isinstance(out, Tensor):
        return [out]
    return pytree.tree_leaves(out)


def _outputs_at(out: Any, place: int) -> list[Any]:
    """What an op made at a place of its lists."""
    if not isinstance(out, list | tuple):
        return []
    several = bool(out) and isinstance(out[0], list | tuple)
    found = []
    for values in out if several else [out]:
        known = isinstance(values, list | tuple) and place < len(values)
        found.append(values[place] if known else None)
    return found


# ---- ops that write


_writes: dict[Any, list[tuple[int, str]]] = {}


def _written(func: Any, given: Arguments) -> Iterator[tuple[Any, str]]:
    """The arguments that an op writes to: what they are, and their names."""
    args, kwargs = given
    if func not in _writes:
        _writes[func] = list(_arguments_written(func))
    for place, name in _writes[func]:
        if place < len(args):
            yield args[place], name
        else:
            yield kwargs.get(name), name


def _arguments_written(func: Any) -> Iterator[tuple[int, str]]:
    """The arguments that an op writes to: places and names."""
    for place, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            yield place, argument.name
