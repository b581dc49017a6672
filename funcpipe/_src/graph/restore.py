"""Restore: a run on fake tensors leaves no tensor in the Python objects that a loss function
reaches.

Models keep what they have computed: a rotary table in a dict, an attribute or a class, a function's
``lru_cache``. On fakes they would keep fakes, and the next run, or the model itself, would find
them. Where a run left a tensor somewhere, all that it changed is put back, since a flag or a length
often says that the tensor is there.

In: a function. Out: while a run lasts its caches hold no tensors; after it everything is as it was.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

# How far the globals that functions name are followed: a model, what it calls, and what that calls.
_GLOBALS = 3
_MOST = 10_000  # entries of a container: a data set or a vocabulary is not looked through
_NESTED = 4  # how deep a tensor may lie in a value that is new
_FOREIGN = (
    "torch",
    "funcpipe",
    "builtins",
    "typing",
    "abc",
    "enum",
    "functools",
    "optree",
    "numpy",
)
_LEAVES = (type, ModuleType, enum.Enum, torch.Tensor, torch.dtype, torch.device)
_PLAIN = frozenset([type(None), bool, int, float, complex, str, bytes, BuiltinFunctionType])
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Of a module: what no call changes, and holds no code.
_TOUCHED = {"_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks"}
_UNTOUCHED = vars(torch.nn.Module()).keys() - _TOUCHED
_LRU_CACHE = type(functools.lru_cache(lambda: None))


@contextlib.contextmanager
def restored(fn: Callable) -> Iterator[None]:
    """Run a function on fakes; what it reaches is put back after it.

    Args:
        fn: followed are its closure, defaults and attributes, the globals that it and what it calls
            name, and from there containers, attributes of objects, and their classes. Objects with
            ``__slots__`` and code written in C are not.

    >>> def keeping(table):
    ...     return lambda x: table.setdefault("twice", 2 * x)
    >>> keep = keeping(table := {})
    >>> with restored(keep):
    ...     _ = keep(torch.ones(1))
    >>> table
    {}
    """
    reached = _Reached()
    reached.follow(fn)
    reached.empty_caches()
    try:
        yield
    finally:
        reached.restore()
        reached.empty_caches()


class _Reached:
    """What a function reaches: every mutable object, with its content at the time."""

    def __init__(self) -> None:
        self.held: list[_Held] = []
        self.caches: list[Any] = []
        self.seen: set[int] = set()

    def follow(self, root: Any) -> None:
        """Note everything that can be reached."""
        todo: list[Any] = [root]
        named: list[Any] = []
        for left in reversed(range(_GLOBALS + 1)):
            while todo:
                x = todo.pop()
                if type(x) in _PLAIN or id(x) in self.seen or isinstance(x, _LEAVES):
                    continue
                self.seen.add(id(x))
                todo += self._inside(x)
                if left and type(x) is FunctionType and not _foreign(x.__module__):
                    named += self._globals(x)
            todo, named = named, []

    def _inside(self, x: Any) -> Iterable[Any]:
        """What an object refers to; noted is what of it can change."""
        kind = type(x)
        if kind is FunctionType:
            return [*self._cells(x), x.__defaults__, x.__kwdefaults__, x.__dict__]
        if issubclass(kind, _CONTAINERS):
            return self._container(x)
        if kind is MethodType:
            return x.__self__, x.__func__
        if kind is _LRU_CACHE:
            self.caches.append(x)
            return (x.__wrapped__,)
        if kind is functools.partial:
            return x.func, x.args, x.keywords
        if kind is staticmethod or kind is classmethod:
            return (x.__func__,)
        if kind is property:
            return (x.fget,)
        return self._object(x)

    def _container(self, x: Any) -> Iterable[Any]:
        if len(x) > _MOST:
            return ()
        if isinstance(x, dict):
            self.held.append(_Dict(x))
            return list(x.values())
        if not isinstance(x, tuple | frozenset):
            self.held.append(_Items(x))
        return list(x)

    def _cells(self, fn: FunctionType) -> Iterator[Any]:
        for cell in fn.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell can be empty
                self.held.append(_Cell(cell))
                yield cell.cell_contents

    def _globals(self, fn: FunctionType) -> Iterable[Any]:
        named = [name for name in _names(fn.__code__) if name in fn.__globals__]
        self.held.append(_Dict(fn.__globals__, named))
        return [fn.__globals__[name] for name in named]

    def _object(self, x: Any) -> list[Any]:
        attributes = getattr(x, "__dict__", None)
        is_module = isinstance(x, torch.nn.Module)
        if type(attributes) is not dict or (_foreign(type(x).__module__) and not is_module):
            return []
        out: list[Any] = [attributes]
        if is_module:
            self.held.append(_Dict(attributes))
            out = [value for name, value in attributes.items() if name not in _UNTOUCHED]
        for cls in type(x).__mro__:
            if id(cls) not in self.seen and not _foreign(cls.__module__):
                self.seen.add(id(cls))
                self.held.append(_Class(cls))
                out += vars(cls).values()
        return out

    def empty_caches(self) -> None:
        """Empty every ``lru_cache`` that holds a tensor: it would not be one of this run."""
        for cache in self.caches:
            if any(map(_has_tensor, _results(cache))):
                cache.cache_clear()

    def restore(self) -> None:
        """Put back what changed, if a tensor is among it."""
        changed = [x for x in self.held if x.changed()]
        if any(_has_tensor(value) for x in changed for value in x.new()):
            for x in changed:
                x.put_back()


# ---- what can change


class _Held:
    """A mutable object, and what it held; identity counts, since values may be tensors."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.before = self.now()

    def now(self) -> list[Any]:
        """What it holds."""
        return list(self.x)

    def changed(self) -> bool:
        """Whether it holds something else by now."""
        now = self.now()
        return len(now) != len(self.before) or any(map(operator.is_not, now, self.before))

    def new(self) -> list[Any]:
        """What it did not hold."""
        old = set(map(id, self.before))
        return [value for value in self.now() if id(value) not in old]

    def put_back(self) -> None:
        """Let it hold what it held."""
        raise NotImplementedError


class _Items(_Held):
    """A list, set or deque."""

    def put_back(self) -> None:
        self.x.clear()
        (self.x.update if isinstance(self.x, set) else self.x.extend)(self.before)


class _Cell(_Held):
    """A variable of a closure."""

    def now(self) -> list[Any]:
        return [self.x.cell_contents]

    def put_back(self) -> None:
        self.x.cell_contents = self.before[0]


class _Dict(_Held):
    """A dict, or the entries of these names."""

    def __init__(self, x: dict[Any, Any], names: list[str] | None = None) -> None:
        self.names = names
        super().__init__(x)

    def now(self) -> list[Any]:
        if self.names is None:
            return [*self.x.keys(), *self.x.values()]
        return [self.x.get(name) for name in self.names]

    def put_back(self) -> None:
        if self.names is None:
            half = len(self.before) // 2
            self.x.clear()
            self.x.update(zip(self.before[:half], self.before[half:], strict=True))
        else:
            self.x.update(zip(self.names, self.before, strict=True))


class _Class(_Held):
    """The attributes of a class."""

    def now(self) -> list[Any]:
        return [*vars(self.x).keys(), *vars(self.x).values()]

    def put_back(self) -> None:
        half = len(self.before) // 2
        before = dict(zip(self.before[:half], self.before[half:], strict=True))
        for name in [name for name in vars(self.x) if name not in before]:
            delattr(self.x, name)
        for name, value in before.items():
            if vars(self.x).get(name) is not value:
                setattr(self.x, name, value)


def _foreign(module: str | None) -> bool:
    return (module or "").split(".", 1)[0] in _FOREIGN


def _names(code: CodeType) -> Iterator[str]:
    """The globals that a function may name, and its inner functions."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


# ---- tensors


def _has_tensor(x: Any, depth: int = _NESTED) -> bool:
    """Whether a value is a tensor, or holds one in containers and attributes."""
    if isinstance(x, torch.Tensor):
        return True
    if not depth or isinstance(x, _LEAVES):
        return False
    if isinstance(x, dict):
        inside: Any = list(x.values())
    elif isinstance(x, list | tuple | set | frozenset | deque):
        inside = list(x)
    else:
        inside = list((getattr(x, "__dict__", None) or {}).values())
    return any(_has_tensor(y, depth - 1) for y in inside[:_MOST])


def _results(cache: Any) -> list[Any]:
    """What an ``lru_cache`` holds. A module is left there: it may be the only one."""
    inside = gc.get_referents(cache)
    keys = {id(key) for x in inside if type(x) is dict for key in x}
    keys.add(id(vars(cache)))
    skipped = (torch.nn.Module, FunctionType)
    return [x for x in inside if id(x) not in keys and not isinstance(x, skipped)]
