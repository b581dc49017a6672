"""Batch leaves: what people pass in a batch becomes tensors and constants, or is refused by its
path.

A numpy array becomes a tensor. A mapping that is no dict, such as a tokenizer's output, becomes
`Items`. A *constant* is any other leaf; a plan holds for its value, so that it needs a key which
tells it from every other value.

In: a batch as it was passed. Out: the same batch of tensors and constants; or a BatchError that
names the path.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import optree
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.source_lines import user_line
from funcpipe.errors import BatchError

_PLAIN = frozenset([bool, int, str, bytes])  # equal values of one of these types mean the same
_BY_IDENTITY = (enum.Enum, type, FunctionType, BuiltinFunctionType)
_BY_VALUE = (torch.dtype, torch.device, torch.layout, torch.memory_format, range)


class MissingEntry(BatchError, AttributeError):
    """A mapping is asked for what is no entry of it."""


class Items(dict):
    """A mapping that was no dict: a dict whose entries can be read as attributes, as those of a
    tokenizer's output can.

    >>> Items(x=1).x
    1
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise MissingEntry(
            f"a mapping in the batch has no entry {name!r}{user_line() or ''}: in a loss function "
            f"it is a dict of its entries, {list(self)}. Call the mapping's own methods before the "
            "step"
        )


def _flatten_items(items: Any) -> tuple[Iterable[Any], Any, Iterable[Any]]:
    # In the order in which those of a dict are.
    keys = tree.flatten(dict.fromkeys(items, 0))[1].entries()
    return [items[key] for key in keys], (tuple(keys), tuple(items)), keys


def _unflatten_items(keys: Any, children: Iterable[Any]) -> Items:
    values = dict(zip(keys[0], children, strict=True))
    return Items((key, values[key]) for key in keys[1])


optree.register_pytree_node(
    Items,
    _flatten_items,
    _unflatten_items,
    path_entry_type=optree.MappingEntry,
    namespace=tree.NAMESPACE,
)


# ---- reading


def read_batch(batch: Any, name: str = "batch") -> Any:
    """The batch of tensors and constants that a runner works on; ``batch`` itself if it is one.

    Args:
        batch: a pytree. Numpy arrays and numbers become tensors, without a copy where torch can do
            without.
        name: what it is called in errors.

    Raises:
        BatchError: a leaf that is neither; names its path.

    >>> read_batch({"x": np.ones(2), "name": "train"})
    {'x': tensor([1., 1.], dtype=torch.float64), 'name': 'train'}
    """
    leaves, spec = tree.flatten(batch)
    if all(map(_is_read, leaves)):
        return batch
    paths = [name + path for path in tree.paths(batch)]
    return tree.unflatten(
        spec, [_read(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    )


def with_tensors(batch: Any) -> Any:
    """The batch with tensors in place of numpy's arrays and numbers, as plain PyTorch gets it; all
    else stays.

    >>> with_tensors([np.float32(2.0), "train"])
    [tensor(2.), 'train']
    """
    leaves, spec = tree.flatten(batch)
    if not any(map(_holds_numpy, leaves)):
        return batch
    return tree.unflatten(
        spec, [_with_tensors(leaf) if _holds_numpy(leaf) else leaf for leaf in leaves]
    )


def as_dicts(batch: Any) -> Any:
    """The batch with a dict in place of every `Items`, in the same order of leaves.

    >>> as_dicts([Items(x=1)])
    [{'x': 1}]
    """

    def is_items(node: Any) -> bool:
        return isinstance(node, Items)

    def as_dict(node: Any) -> Any:
        if not is_items(node):
            return node
        return {key: as_dicts(value) for key, value in node.items()}

    return tree.map(as_dict, batch, is_leaf=is_items)


def _is_read(leaf: Any) -> bool:
    """Whether a leaf is a tensor or a constant already, of the usual kinds."""
    kind = type(leaf)
    if kind is torch.Tensor:
        return leaf.layout is torch.strided and not (
            leaf.is_meta or leaf.is_conj() or leaf.is_neg() or leaf.is_quantized
        )
    return kind in _PLAIN or (kind is float and leaf == leaf)


def _read(path: str, leaf: Any) -> Any:
    if _is_read(leaf):
        return leaf
    if isinstance(leaf, torch.Tensor):
        return _read_tensor(path, leaf)
    if isinstance(leaf, np.ndarray | np.generic) and not isinstance(leaf, str | bytes):
        return _from_numpy(path, leaf)
    if isinstance(leaf, Mapping):
        return read_batch(Items(leaf), path)
    problem = _problem(leaf)
    if problem:
        raise BatchError(f"{path} is {problem}")
    return leaf


def _read_tensor(path: str, leaf: torch.Tensor) -> torch.Tensor:
    if isinstance(leaf, FakeTensor):
        return leaf
    if leaf.is_nested:
        what = (
            "a nested tensor (torch.nested)",
            "pad it (x.to_padded_tensor(0)), or pass its values() and offsets()",
        )
    elif leaf.is_meta:
        what = (
            "a tensor on the meta device, which holds no numbers",
            "make it on the device of the others",
        )
    elif leaf.is_quantized:
        what = (
            f"a quantized tensor ({leaf.dtype})",
            "pass x.dequantize(), or x.int_repr() with scale and zero point",
        )
    elif leaf.layout is not torch.strided:
        what = (
            f"a sparse tensor ({leaf.layout})",
            "pass x.to_dense(), or its indices and values as two leaves",
        )
    elif type(leaf) not in (torch.Tensor, nn.Parameter):
        what = (
            f"a {type(leaf).__name__}, a subclass of torch.Tensor",
            "pass x.as_subclass(torch.Tensor)",
        )
    else:
        return leaf.resolve_conj().resolve_neg()
    raise BatchError(
        f"{path} is {what[0]}; a batch is split and traced as dense tensors: {what[1]}"
    )


# ---- numpy


def _holds_numpy(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, or a mapping that holds some."""
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf) is not np.ma.MaskedArray and leaf.dtype.kind in "biufc"
    return isinstance(leaf, Mapping) and any(map(_holds_numpy, tree.leaves(dict(leaf))))


def _with_tensors(leaf: Any) -> Any:
    return with_tensors(Items(leaf)) if isinstance(leaf, Mapping) else _from_numpy("batch", leaf)


def _from_numpy(path: str, leaf: np.ndarray | np.generic) -> torch.Tensor:
    if isinstance(leaf, np.ma.MaskedArray):
        raise BatchError(f"{path} is a masked array of numpy: pass x.data and x.mask as two leaves")
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        if array.flags.writeable and all(stride >= 0 for stride in array.strides):
            return torch.from_numpy(array)
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):
        raise BatchError(
            f"{path} is an array of numpy with dtype {array.dtype}, which torch does not have: "
            "write x.astype(...) with one that it has; texts go in a list of str, the fields of "
            "records in a dict"
        ) from None


# ---- constants


def key_of(constant: Any) -> tuple:
    """What tells a constant from others: equal keys mean that a plan holds for both.

    >>> key_of(1) == key_of(True), key_of(0.0) == key_of(-0.0)
    (False, False)
    """
    kind = type(constant)
    if kind in _PLAIN:
        return kind, constant
    if kind is float:
        return kind, constant, math.copysign(1.0, constant)
    if kind is complex:
        return kind, repr(constant)
    if kind is slice:
        return kind, *map(key_of, (constant.start, constant.stop, constant.step))
    if kind is frozenset:
        return kind, frozenset(map(key_of, constant))
    if _is_frozen(constant):
        return kind, *(
            key_of(getattr(constant, field.name)) for field in dataclasses.fields(constant)
        )
    return kind, constant


def _problem(leaf: Any) -> str:
    """Why a leaf is no constant, and what to pass instead; empty if it is one."""
    name, kind = type(leaf).__name__, type(leaf)
    if kind in (float, complex) and leaf != leaf:
        return (
            f"{leaf}, which equals nothing, itself included: no plan could be found for it again. "
            f"Write torch.tensor({leaf})"
        )
    if isinstance(leaf, set):
        return f"a {name}, which has no order that ranks could share: write a sorted tuple or list"
    if isinstance(leaf, nn.Module):
        return (
            f"a {name}, a module: pass its tensors (fp.from_module gives them), and close over the "
            "rest"
        )
    if _holds(leaf, lambda held: isinstance(held, torch.Tensor | np.ndarray)):
        return _unregistered(leaf, "whose tensors are not seen")
    if (
        kind in _PLAIN
        or leaf is None
        or isinstance(leaf, (float, complex, slice, frozenset, *_BY_IDENTITY, *_BY_VALUE))
    ):
        return ""
    if _is_frozen(leaf):
        found = ((f.name, _problem(getattr(leaf, f.name))) for f in dataclasses.fields(leaf))
        return next(
            (f"a {name} whose {field} is {problem}" for field, problem in found if problem), ""
        )
    if kind.__eq__ is object.__eq__ and not callable(leaf):
        return _unregistered(leaf, "compared by identity, so that a change in it would not be seen")
    try:
        hash(leaf)
    except TypeError:
        return _unregistered(leaf, "which cannot be hashed, so that no plan could be found for it")
    return ""


def _unregistered(leaf: Any, why: str) -> str:
    name = type(leaf).__name__
    what = f"a {name} (a dataclass)" if dataclasses.is_dataclass(leaf) else f"a {name}"
    return (
        f"{what}, {why}: the class is no pytree node. Pass tensors, or a dict of them; or register "
        f"the class: optree.register_pytree_node({name}, flatten, unflatten, "
        f"namespace={tree.NAMESPACE!r})"
    )


def _is_frozen(value: Any) -> bool:
    """Whether a value is a dataclass that cannot change and compares by its fields."""
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return False
    params: Any = type(value).__dict__.get("__dataclass_params__")
    return params is not None and params.frozen and params.eq


def _holds(value: Any, what: Callable[[Any], bool]) -> bool:
    """Whether an object has such a value among its attributes, or in a container there."""
    attributes = getattr(value, "__dict__", None)
    if not attributes or isinstance(value, type | FunctionType | enum.Enum):
        return False
    leaves = itertools.chain.from_iterable(map(tree.leaves, attributes.values()))
    return any(map(what, leaves))
