"""Shells: a function with those in its cells, and values as they are compared.

In: a function, which a step may make anew each time that it runs. Out: `Shell`: numbers and texts
that it holds, the objects that it leads to (`host_walk.py`); `token` of any value.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import sys
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from operator import is_
from types import (
    CellType,
    CodeType,
    EllipsisType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy as np
import torch

from funcpipe._src.analysis.host_code import is_user_file

MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()
_NUMBERS = frozenset([int, float, complex])
_FLAGS = frozenset([bool, str, bytes, NoneType, EllipsisType])
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_NUMBER_KINDS = ("int", "float", "complex")
_FLAG_KINDS = ("bool", "str", "NoneType")
_BY_REPR = _NUMBERS | _FLAGS
_VALUES = (np.generic, *_TORCH_VALUES)
FIELDS = (SimpleNamespace, argparse.Namespace)
# What is in one of these is read for itself.
_READ_INSIDE = (dict, tuple, set, frozenset, FunctionType, MethodType, functools.partial)


class Token(NamedTuple):
    """A value as it is compared and told: its kind, and its text; what has none has a number."""

    kind: str
    text: Any

    def __str__(self) -> str:
        return self.text if isinstance(self.text, str) else f"a {self.kind}"


# The values of a reading: for every place its path, and what is there.
Values = tuple[tuple[str, Any], ...]


class _Identities:
    """Numbers for objects: two have the same only if they are one object."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}
        self._count = 0

    def of(self, value: Any) -> int:
        """The number of an object; lives no longer than it does, where Python can tell."""
        key = id(value)
        held, number = self._known.get(key, (None, 0))
        if isinstance(held, weakref.ref):
            held = held()
        if held is value:
            return number

        def forget(_: Any) -> None:
            self._known.pop(key, None)

        self._count += 1
        try:
            held = weakref.ref(value, forget)
        except TypeError:
            held = value
        self._known[key] = held, self._count
        return self._count


_identities = _Identities()


def token(value: Any) -> Token:
    """What a value is compared by: numbers, texts and the like by value, all others by identity.

    >>> token(1.0) == token(1.0), token(1) == token(True), str(token(0.5))
    (True, False, '0.5')
    """
    kind = type(value)
    name = kind.__name__
    if kind in _BY_REPR or isinstance(value, _VALUES):
        return Token(name, repr(value))
    if isinstance(value, enum.Enum):
        return Token(kind.__qualname__, str(value))
    if isinstance(value, list | deque):
        return Token(name, f"a {name} of {len(value)}")
    if isinstance(value, _READ_INSIDE):
        return Token(name, f"a {name}")
    if _is_open(kind):
        return Token(name, 0)
    return Token(name, _identities.of(value))


def _is_open(kind: type) -> bool:
    """Whether objects are compared by what is in them: the user's, and those that are nothing but
    fields."""
    if kind in FIELDS or dataclasses.is_dataclass(kind):
        return True
    return is_user_file(file_of(kind))


def is_number(noted: Any) -> bool:
    """Whether a token is a number's."""
    return isinstance(noted, Token) and noted.kind in _NUMBER_KINDS


def is_flag(noted: Any) -> bool:
    """Whether a token is of a kind that code branches on: a flag, a text, None; or another
    function."""
    if isinstance(noted, CodeType):
        return True
    return isinstance(noted, Token) and noted.kind in _FLAG_KINDS


@functools.cache
def file_of(kind: type) -> str:
    """The file that a class was written in."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file:
        return file
    return "<main>" if kind.__module__ == "__main__" else "<frozen>"


# ---- the function itself: what is made anew each time that a step runs


class Shell(NamedTuple):
    """A function and those in its cells, which a step may make anew each time: values in them, and
    objects.

    Args:
        values: numbers and texts in cells and defaults, and the code of functions.
        objects: everything else that they hold, with its path.
        functions: the functions.
        cells: all cells, with what they hold.
        defaults: those of every function.
    """

    values: Values
    objects: tuple[tuple[str, Any], ...]
    functions: tuple[FunctionType, ...]
    cells: tuple[tuple[CellType, Any], ...]
    defaults: tuple[tuple[Any, Any], ...]

    def holds(self) -> bool:
        """Whether cells and defaults hold the same objects still."""
        for cell, held in self.cells:
            if contents(cell) is not held:
                return False
        for fn, (defaults, by_name) in zip(self.functions, self.defaults, strict=True):
            if fn.__defaults__ is not defaults:
                return False
            now = fn.__kwdefaults__
            if now and not _same_objects(now.values(), by_name):
                return False
        return True


def _same_objects(some: Collection[Any], others: Collection[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def shell_of(fn: Any) -> Shell:
    """Look into a function, its closure and defaults; partials, methods and wrappers as well."""
    made_of_functions = isinstance(fn, FunctionType | MethodType) or _is_partial(fn)
    found = _Look()
    found.look(fn, "the loss" if made_of_functions else "self")
    return found.shell()


class _Look:
    """What was found so far in a function."""

    def __init__(self) -> None:
        self.values: list[tuple[str, Any]] = []
        self.objects: list[tuple[str, Any]] = []
        self.functions: list[FunctionType] = []
        self.cells: list[tuple[CellType, Any]] = []
        self.seen: set[int] = set()

    def look(self, value: Any, path: str) -> None:
        if isinstance(value, FunctionType):
            self.function(value, path)
        elif isinstance(value, MethodType):
            self.look(value.__func__, path)
            self.look(value.__self__, "self")
        elif _is_partial(value):
            self.look(value.func, path)
            for number, given in enumerate(value.args):
                self.look(given, f"{path}.args[{number}]")
            for name, given in value.keywords.items():
                self.look(given, name)
        elif is_value(value):
            self.values.append((path, token(value)))
        else:
            if _is_wrapper(value):
                self.look(value.__wrapped__, path)
            self.objects.append((path, value))

    def function(self, fn: FunctionType, path: str) -> None:
        if id(fn) in self.seen:
            return
        self.seen.add(id(fn))
        code = fn.__code__
        self.functions.append(fn)
        self.values.append((path, code))
        for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
            held = contents(cell)
            self.cells.append((cell, held))
            self.look(held, name)
        for name, value in defaults_of(fn):
            self.look(value, name)

    def shell(self) -> Shell:
        defaults = tuple(map(_all_defaults, self.functions))
        return Shell(
            values=tuple(self.values),
            objects=tuple(self.objects),
            functions=tuple(self.functions),
            cells=tuple(self.cells),
            defaults=defaults,
        )


def _all_defaults(fn: FunctionType) -> tuple[Any, Any]:
    by_name = fn.__kwdefaults__ or {}
    return fn.__defaults__, tuple(by_name.values())


def same_function(one: Any, other: Any) -> bool:
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other


def _is_partial(value: Any) -> bool:
    return type(value) is functools.partial


def _is_wrapper(value: Any) -> bool:
    """Whether an object wraps a function, as those of `functools.wraps` do."""
    if isinstance(value, type | ModuleType):
        return False
    return "__wrapped__" in getattr(value, "__dict__", ())


def is_value(value: Any) -> bool:
    if value is MISSING or type(value) in _BY_REPR:
        return True
    return isinstance(value, (*_VALUES, enum.Enum))


def contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell can be empty
        return MISSING


def defaults_of(fn: FunctionType) -> Iterator[tuple[str, Any]]:
    defaults = fn.__defaults__ or ()
    last = fn.__code__.co_argcount
    names = fn.__code__.co_varnames[last - len(defaults) : last]
    yield from zip(names, defaults, strict=True)
    yield from (fn.__kwdefaults__ or {}).items()
