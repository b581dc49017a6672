"""Reads places that can change, so that it is seen quickly whether they have.

Each function takes what holds the place, and gives a value that differs once another object, or
another number, is there.

In: a dict, a cell, a list, a function, params, a tensor. Out: identities, flags or versions.
"""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any

import torch

from funcpipe._src.analysis.host_shell import MISSING, contents


def identity_at(key: Any, entries: dict) -> int:
    """Which object an entry of a dict is."""
    return id(dict.get(entries, key, MISSING))


def value_in_slot(slot: Any, holder: Any) -> Any:
    """What a slot of an object (``__slots__``) holds."""
    try:
        return slot.__get__(holder)
    except AttributeError:  # not set
        return MISSING


def identity_in_slot(slot: Any, holder: Any) -> int:
    """Which object a slot of an object holds."""
    return id(value_in_slot(slot, holder))


def identity_in_cell(cell: CellType) -> int:
    """Which object a closure's cell holds."""
    return id(contents(cell))


def identities(elements: Any) -> list[int]:
    """Which objects are in a list."""
    return list(map(id, elements))


def identities_of_defaults(fn: FunctionType) -> list[int]:
    """Which objects a function's defaults are."""
    by_name = fn.__kwdefaults__ or {}
    return [id(fn.__defaults__), *map(id, by_name.values())]


def trained_flags(modules: list[dict]) -> list[bool]:
    """For every param of some modules, whether it requires a gradient."""
    flags = []
    for params in modules:
        for param in params.values():
            flags.append(param is not None and param.requires_grad)
    return flags


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to."""
    return tensor._version
