"""What code names: the globals, attributes and imports that a Python function may read when it
runs.

In: a code object. Out: `Names`, found once for each code object; and whose code it is, the user's
or a library's.
"""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch

from funcpipe._src.core.source_lines import OWN

EVERY = "*"  # among attributes: the code may read any

_GLOBALS = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"])
_ATTRIBUTES = frozenset(["LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"])
_BY_TEXT = frozenset(["getattr", "hasattr", "attrgetter", "methodcaller"])
_WHOLE = frozenset(["vars", "__dict__", "asdict", "astuple", "_asdict"])


def _holds_packages(folder: str) -> bool:
    """Whether pip installs into a folder: also that of another environment, or a ``--target``."""
    if folder.endswith(("/site-packages", "/dist-packages")):
        return True
    return any(Path(folder).glob("*.dist-info"))


_PACKAGES = tuple(
    {
        *(sysconfig.get_path(name) for name in ("purelib", "platlib")),
        *(str(Path(folder)) for folder in sys.path if folder and _holds_packages(folder)),
    }
)
_LIBRARIES = (*_PACKAGES, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")))
_TORCH = str(Path(torch.__file__).parent) + "/"


class Names(NamedTuple):
    """What code may read by name.

    Args:
        globals: of its module.
        attributes: of any object, also those that it names as texts for ``getattr``; or `EVERY`.
        imports: modules that it imports when it runs, with the level of the import.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    imports: frozenset[tuple[str, int]]


@functools.cache
def names_of(code: CodeType) -> Names:
    """What code, and the functions written inside it, may read.

    >>> names = names_of((lambda x: config.beta * getattr(x, "scale")).__code__)
    >>> sorted(names.globals), sorted(names.attributes)
    (['config', 'getattr'], ['beta', 'scale'])
    """
    found_globals: set[str] = set()
    attributes: set[str] = set()
    imports: set[tuple[str, int]] = set()
    level = 0
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBALS:
            found_globals.add(instruction.argval)
        elif instruction.opname in _ATTRIBUTES:
            attributes.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imports.add((instruction.argval, level))
        if type(instruction.argval) is int:
            level = instruction.argval  # an import's level is the constant before its last operand
    constants = code.co_consts
    texts = {text for text in constants if isinstance(text, str) and text.isidentifier()}
    called = found_globals | attributes
    if called & _BY_TEXT:
        attributes |= texts or {EVERY}
    if called & _WHOLE:
        attributes.add(EVERY)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            names = names_of(inner)
            found_globals |= names.globals
            attributes |= names.attributes
            imports |= names.imports
    return Names(frozenset(found_globals), frozenset(attributes), frozenset(imports))


def package_of(file: str) -> str | None:
    """The folder of the installed package that a file belongs to; None for a file elsewhere.

    A function that is installed with pip is followed where the step or the loss is of the same
    package.
    """
    for folder in _PACKAGES:
        if file.startswith(folder + "/"):
            top = file[len(folder) + 1 :].split("/")[0]
            return f"{folder}/{top}"
    return None


def is_user_file(file: str, packages: frozenset[str] = frozenset()) -> bool:
    """Whether code of a file is the user's, and not that of Python, of an installed library or of
    funcpipe.

    Args:
        packages: installed ones (`package_of`) that count as the user's.
    """
    if file.startswith(("<frozen", *OWN, _TORCH)):
        return False
    return not file.startswith(_LIBRARIES) or file.startswith(tuple(packages))
