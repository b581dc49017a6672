"""Containers: objects that hold tensors and that a tree does not look into.

To a tree such an object is one leaf, so its tensors would be neither placed on ranks, nor updated,
nor saved.

In: a tree. Out: nothing, or a StateError that names the object's class, its path and how to
register it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from funcpipe._src.core import pytree as tree
from funcpipe.errors import StateError

_DEPTH = 4  # how deep tensors are looked for in an object
_PLAIN = (int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


def check_containers(name: str, x: Any) -> None:
    """Refuse a tree with a leaf that holds tensors and is not one itself.

    Args:
        name: what the tree is called in the error.

    Raises:
        StateError: it has one.

    >>> check_containers("state", {"w": torch.ones(2), "count": 0})
    >>> check_containers("state", {"w": {torch.ones(2)}})
    Traceback (most recent call last):
    funcpipe.errors.StateError: state['w'] is a set, which holds
    tensors but is not registered as a container: use a list or dict
    """
    for number, leaf in enumerate(tree.leaves(x)):
        if not isinstance(leaf, torch.Tensor) and _holds_tensors(leaf, _DEPTH):
            raise StateError(
                f"{name}{tree.paths(x)[number]} is {_described(leaf)}, which holds tensors but is "
                f"not registered as a container: {_remedy(leaf)}"
            )


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, _PLAIN):
        return False
    return any(_holds_tensors(held, depth - 1) for held in tree.leaves(_held(value)))


def _held(value: Any) -> list[Any]:
    """What an object holds: its entries and attributes."""
    if isinstance(value, torch.nn.Module):
        return [*value.parameters(), *value.buffers()]
    held: list[Any] = []
    if isinstance(value, Mapping):
        held += value.values()
    elif isinstance(value, set | frozenset | list | tuple):
        held += value
    held += getattr(value, "__dict__", {}).values()
    held += (getattr(value, slot, None) for slot in _slots(type(value)))
    return held


def _slots(cls: type) -> Iterable[str]:
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from [slots] if isinstance(slots, str) else slots


def _described(leaf: Any) -> str:
    if isinstance(leaf, torch.nn.Module):
        return f"the module {type(leaf).__name__}"
    if type(leaf) in (set, frozenset):
        return f"a {type(leaf).__name__}"
    kind = "dataclass" if dataclasses.is_dataclass(leaf) else "class"
    return f"an instance of the {kind} {type(leaf).__name__}"


def _remedy(leaf: Any) -> str:
    if isinstance(leaf, torch.nn.Module):
        return "use fp.from_module(module), which gives its tensors as a dict"
    if type(leaf) in (set, frozenset):
        return "use a list or dict"
    if dataclasses.is_dataclass(leaf):
        return (
            'decorate it with @optree.dataclasses.dataclass(namespace="") in place of '
            "@dataclasses.dataclass, or make it a "
            "typing.NamedTuple or dict"
        )
    return (
        'decorate it with @optree.register_pytree_node_class(namespace="funcpipe"), give it the '
        "methods tree_flatten and "
        "tree_unflatten, and name that namespace in optree.tree_map; or make it a "
        "typing.NamedTuple or dict"
    )
