"""Restore: a run on fakes leaves no tensor in the Python objects that a loss function reaches.

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
import itertools
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
                found = todo.pop()
                if self._skips(found):
                    continue
                self.seen.add(id(found))
                todo += self._inside(found)
                if left and type(found) is FunctionType:
                    named += self._globals(found)
            todo, named = named, []

    def _skips(self, found: Any) -> bool:
        if type(found) in _PLAIN or id(found) in self.seen:
            return True
        return isinstance(found, _LEAVES)

    def _inside(self, found: Any) -> Iterable[Any]:
        """What an object refers to; noted is what of it can change."""
        kind = type(found)
        if kind is FunctionType:
            defaults = found.__defaults__, found.__kwdefaults__
            return [*self._cells(found), *defaults, found.__dict__]
        if issubclass(kind, _CONTAINERS):
            return self._container(found)
        if kind is MethodType:
            return found.__self__, found.__func__
        if kind is _LRU_CACHE:
            self.caches.append(found)
            return (found.__wrapped__,)
        if kind is functools.partial:
            return found.func, found.args, found.keywords
        if kind is staticmethod or kind is classmethod:
            return (found.__func__,)
        if kind is property:
            return (found.fget,)
        return self._object(found)

    def _container(self, container: Any) -> Iterable[Any]:
        if len(container) > _MOST:
            return ()
        if isinstance(container, dict):
            self.held.append(_Dict(container))
            return list(container.values())
        if not isinstance(container, tuple | frozenset):
            self.held.append(_Items(container))
        return list(container)

    def _cells(self, fn: FunctionType) -> Iterator[Any]:
        for cell in fn.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell can be empty
                self.held.append(_Cell(cell))
                yield cell.cell_contents

    def _globals(self, fn: FunctionType) -> Iterable[Any]:
        """The globals that a function names; none of a library's function."""
        if _is_foreign(fn.__module__):
            return ()
        named = list(filter(fn.__globals__.__contains__, _names(fn.__code__)))
        self.held.append(_Entries(fn.__globals__, named))
        return [fn.__globals__[name] for name in named]

    def _object(self, found: Any) -> list[Any]:
        attributes = getattr(found, "__dict__", None)
        if type(attributes) is not dict:
            return []
        inside: list[Any] = [attributes]
        if isinstance(found, torch.nn.Module):
            self.held.append(_Dict(attributes))
            touched = attributes.keys() - _UNTOUCHED
            inside = [value for name, value in attributes.items() if name in touched]
        elif _is_foreign(type(found).__module__):
            return []
        for cls in type(found).__mro__:
            if id(cls) in self.seen or _is_foreign(cls.__module__):
                continue
            self.seen.add(id(cls))
            self.held.append(_Class(cls))
            inside += vars(cls).values()
        return inside

    def empty_caches(self) -> None:
        """Empty every ``lru_cache`` that holds a tensor: it would not be one of this run."""
        for cache in self.caches:
            if any(map(_has_tensor, _results(cache))):
                cache.cache_clear()

    def restore(self) -> None:
        """Put back what changed, if a tensor is among it."""
        changed = [held for held in self.held if held.changed()]
        new = itertools.chain.from_iterable(held.new() for held in changed)
        if any(map(_has_tensor, new)):
            for held in changed:
                held.put_back()


# ---- what can change


class _Held:
    """A mutable object, and what it held; identity counts, since values may be tensors."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.before = self.now()

    def now(self) -> list[Any]:
        """What it holds."""
        return list(self.target)

    def changed(self) -> bool:
        """Whether it holds something else by now."""
        now = self.now()
        if len(now) != len(self.before):
            return True
        return any(map(operator.is_not, now, self.before))

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
        self.target.clear()
        if isinstance(self.target, set):
            self.target.update(self.before)
        else:
            self.target.extend(self.before)


class _Cell(_Held):
    """A variable of a closure."""

    def now(self) -> list[Any]:
        return [self.target.cell_contents]

    def put_back(self) -> None:
        self.target.cell_contents = self.before[0]


class _Dict(_Held):
    """A dict: its keys, then its values."""

    def now(self) -> list[Any]:
        return [*self.target.keys(), *self.target.values()]

    def put_back(self) -> None:
        self.target.clear()
        self.target.update(_as_dict(self.before))


class _Entries(_Held):
    """The entries of a dict that have certain names."""

    def __init__(self, target: dict[Any, Any], names: list[str]) -> None:
        self.names = names
        super().__init__(target)

    def now(self) -> list[Any]:
        return list(map(self.target.get, self.names))

    def put_back(self) -> None:
        self.target.update(zip(self.names, self.before, strict=True))


class _Class(_Held):
    """The attributes of a class: their names, then their values."""

    def now(self) -> list[Any]:
        attributes = vars(self.target)
        return [*attributes.keys(), *attributes.values()]

    def put_back(self) -> None:
        before = _as_dict(self.before)
        for name in vars(self.target).keys() - before.keys():
            delattr(self.target, name)
        for name, value in before.items():
            if vars(self.target).get(name) is not value:
                setattr(self.target, name, value)


def _as_dict(keys_and_values: list[Any]) -> dict[Any, Any]:
    half = len(keys_and_values) // 2
    keys, values = keys_and_values[:half], keys_and_values[half:]
    return dict(zip(keys, values, strict=True))


def _is_foreign(module: str | None) -> bool:
    """Whether a module is a library's, which is not followed."""
    package, *_ = (module or "").split(".")
    return package in _FOREIGN


def _names(code: CodeType) -> Iterator[str]:
    """The globals that a function may name, and its inner functions."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


# ---- tensors


def _has_tensor(value: Any, depth: int = _NESTED) -> bool:
    """Whether a value is a tensor, or holds one in containers and attributes."""
    if isinstance(value, torch.Tensor):
        return True
    if not depth or isinstance(value, _LEAVES):
        return False
    some = itertools.islice(_held_by(value), _MOST)
    return any(_has_tensor(inner, depth - 1) for inner in list(some))


def _held_by(value: Any) -> Iterable[Any]:
    """What a container or an object holds."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, _CONTAINERS):
        return value
    attributes = getattr(value, "__dict__", None) or {}
    return attributes.values()


def _results(cache: Any) -> list[Any]:
    """What an ``lru_cache`` holds. A module is left there: it may be the only one."""
    inside = gc.get_referents(cache)
    keys = {id(vars(cache))}
    for table in inside:
        if type(table) is dict:
            keys.update(map(id, table))
    skipped = (torch.nn.Module, FunctionType)
    results = [value for value in inside if id(value) not in keys]
    return [value for value in results if not isinstance(value, skipped)]
