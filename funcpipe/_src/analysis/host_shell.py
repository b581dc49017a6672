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
from collections.abc import Iterator
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from funcpipe._src.analysis.host_code import is_user_file

MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()
_NUMBERS = frozenset([int, float, complex])
_FLAGS = frozenset([bool, str, bytes, type(None), type(...)])
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
FIELDS = (SimpleNamespace, argparse.Namespace)


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

    def of(self, x: Any) -> int:
        """The number of an object; lives no longer than it does, where Python can tell."""
        held, number = self._known.get(id(x), (None, 0))
        if (held() if isinstance(held, weakref.ref) else held) is x:
            return number
        self._count += 1
        key = id(x)
        try:
            held = weakref.ref(x, lambda _: self._known.pop(key, None))
        except TypeError:
            held = x
        self._known[key] = held, self._count
        return self._count


_identities = _Identities()


def token(x: Any) -> Token:
    """What a value is compared by: numbers, texts and the like by value, all others by identity.

    >>> token(1.0) == token(1.0), token(1) == token(True), str(token(0.5))
    (True, False, '0.5')
    """
    kind = type(x)
    if kind in _NUMBERS or kind in _FLAGS or isinstance(x, (np.generic, *_TORCH_VALUES)):
        return Token(kind.__name__, repr(x))
    if isinstance(x, enum.Enum):
        return Token(kind.__qualname__, str(x))
    if isinstance(x, list | deque):
        return Token(kind.__name__, f"a {kind.__name__} of {len(x)}")
    if isinstance(
        x, dict | tuple | set | frozenset | FunctionType | MethodType | functools.partial
    ):
        return Token(kind.__name__, f"a {kind.__name__}")  # what is in it is read for itself
    return Token(kind.__name__, 0 if _is_open(kind) else _identities.of(x))


def _is_open(kind: type) -> bool:
    """Whether objects are compared by what is in them: the user's, and those that are nothing but
    fields."""
    return kind in FIELDS or dataclasses.is_dataclass(kind) or is_user_file(file_of(kind))


def is_number(x: Any) -> bool:
    """Whether a token is a number's."""
    return isinstance(x, Token) and x.kind in ("int", "float", "complex")


def is_flag(x: Any) -> bool:
    """Whether a token is of a kind that code branches on: a flag, a text, None; or another
    function."""
    return isinstance(x, CodeType) or (
        isinstance(x, Token) and x.kind in ("bool", "str", "NoneType")
    )


@functools.cache
def file_of(kind: type) -> str:
    """The file that a class was written in."""
    module = sys.modules.get(kind.__module__)
    return getattr(module, "__file__", None) or (
        "<main>" if kind.__module__ == "__main__" else "<frozen>"
    )


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
            if now and not (len(now) == len(by_name) and all(map(is_, now.values(), by_name))):
                return False
        return True


def shell_of(fn: Any) -> Shell:
    """Look into a function, its closure and defaults; partials, methods and wrappers as well."""
    values: list[tuple[str, Any]] = []
    objects: list[tuple[str, Any]] = []
    functions: list[FunctionType] = []
    cells: list[tuple[CellType, Any]] = []
    seen: set[int] = set()

    def look(x: Any, path: str) -> None:
        if isinstance(x, FunctionType):
            if id(x) not in seen:
                seen.add(id(x))
                functions.append(x)
                values.append((path, x.__code__))
                inside(x)
        elif isinstance(x, MethodType):
            look(x.__func__, path)
            look(x.__self__, "self")
        elif type(x) is functools.partial:
            look(x.func, path)
            for n, value in enumerate(x.args):
                look(value, f"{path}.args[{n}]")
            for name, value in x.keywords.items():
                look(value, name)
        elif is_value(x):
            values.append((path, token(x)))
        elif not isinstance(x, type | ModuleType) and "__wrapped__" in getattr(x, "__dict__", ()):
            look(x.__wrapped__, path)
            objects.append((path, x))
        else:
            objects.append((path, x))

    def inside(x: FunctionType) -> None:
        code = x.__code__
        for name, cell in zip(code.co_freevars, x.__closure__ or (), strict=True):
            held = contents(cell)
            cells.append((cell, held))
            look(held, name)
        for name, value in defaults_of(x):
            look(value, name)

    look(fn, "self" if not isinstance(fn, FunctionType) and not _has_function(fn) else "the loss")
    defaults = tuple((x.__defaults__, tuple((x.__kwdefaults__ or {}).values())) for x in functions)
    return Shell(tuple(values), tuple(objects), tuple(functions), tuple(cells), defaults)


def same_function(a: Any, b: Any) -> bool:
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    return a is b


def _has_function(fn: Any) -> bool:
    return isinstance(fn, MethodType) or type(fn) is functools.partial


def is_value(x: Any) -> bool:
    kind = type(x)
    return (
        x is MISSING
        or kind in _NUMBERS
        or kind in _FLAGS
        or isinstance(x, (np.generic, *_TORCH_VALUES, enum.Enum))
    )


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
