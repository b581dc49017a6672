"""Pytrees (optree): leaves with their paths, prefixes, and absent leaves.

In funcpipe ``None`` in a rank's tree means one thing: this rank does not hold the leaf. So the
trees of users are flattened with ``None`` as an empty node, and the trees of ranks are flattened
*up to* the full tree's structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch

NAMESPACE = "funcpipe"


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves and structure.

    >>> flatten({"a": 1, "b": None})
    ([1], PyTreeSpec({'a': *, 'b': None}))
    """
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(spec: optree.PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """The tree of a structure and its leaves."""
    return optree.tree_unflatten(spec, leaves)


def paths(tree: Any) -> list[str]:
    """The path of every leaf, as code.

    >>> paths({"w": [1, 2]})
    ["['w'][0]", "['w'][1]"]
    """
    accessors = optree.tree_accessors(tree, namespace=NAMESPACE)
    return [accessor.codify("") for accessor in accessors]


def leaves(tree: Any) -> list[Any]:
    """The leaves alone."""
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def leaves_up_to(spec: optree.PyTreeSpec, tree: Any) -> list[Any]:
    """What a tree has at the leaves of a structure, subtrees and None included.

    Raises:
        ValueError: the tree has another structure; says where, without the data.

    >>> leaves_up_to(flatten({"a": 1, "b": 2})[1], {"a": None, "b": [3]})
    [None, [3]]
    """
    try:
        return spec.flatten_up_to(tree)
    except ValueError:
        pass
    return spec.flatten_up_to(without_data(tree))


def leaves_or_none(spec: optree.PyTreeSpec, tree: Any) -> list[Any]:
    """What a tree has at the leaves of a structure; None in it stands for all leaves below.

    Raises:
        ValueError: the tree has another structure.

    >>> leaves_or_none(flatten({"a": {"x": 1, "y": 2}, "b": 3})[1], {"a": None, "b": 3})
    [None, None, 3]
    """
    try:
        return spec.flatten_up_to(tree)
    except ValueError:
        if tree is None:
            return [None] * spec.num_leaves
    level = optree.tree_flatten_one_level(tree, namespace=NAMESPACE)
    children, _, entries, _ = level
    wanted = spec.entries()
    if tuple(entries) != tuple(wanted):
        raise ValueError(f"entries {entries}, not {wanted}")
    found = []
    for below, child in zip(spec.children(), children, strict=True):
        found += leaves_or_none(below, child)
    return found


class _Leaf:
    def __repr__(self) -> str:
        return "*"


def without_data(tree: Any) -> Any:
    """A tree of the same structure, for messages.

    >>> without_data({"a": [1, 2]})
    {'a': [*, *]}
    """
    return map(lambda _: _Leaf(), tree)


def map(
    fn: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """``optree.tree_map``."""
    return optree.tree_map(fn, tree, *rest, is_leaf=is_leaf, namespace=NAMESPACE)


def map_tensors(fn: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """``fn`` on the tensors of a tree; every other leaf as it is."""

    def on_leaf(leaf: Any) -> Any:
        return fn(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return map(on_leaf, tree)


def broadcast_prefix(prefix: Any, tree: Any) -> list[Any]:
    """For every leaf of ``tree`` the leaf of ``prefix`` that stands above it; ``None`` is a leaf of
    the prefix.

    >>> broadcast_prefix({"x": 0, "y": None}, {"x": [1, 2], "y": {"z": 3}})
    [0, 0, None]
    """
    options: Any = {"none_is_leaf": True, "namespace": NAMESPACE}
    spread = optree.broadcast_prefix(prefix, tree, **options)
    leaves_and_none = optree.tree_leaves(tree, **options)
    found = []
    for above, leaf in zip(spread, leaves_and_none, strict=True):
        if leaf is not None:
            found.append(above)
    return found
