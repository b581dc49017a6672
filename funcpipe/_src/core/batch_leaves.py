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


def _flatten_items(x: Any) -> tuple[Iterable[Any], Any, Iterable[Any]]:
    keys = tree.flatten(dict.fromkeys(x, 0))[
        1
    ].entries()  # in the order in which those of a dict are
    return [x[key] for key in keys], (tuple(keys), tuple(x)), keys


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
    return tree.unflatten(spec, [_read(path, x) for path, x in zip(paths, leaves, strict=True)])


def with_tensors(batch: Any) -> Any:
    """The batch with tensors in place of numpy's arrays and numbers, as plain PyTorch gets it; all
    else stays.

    >>> with_tensors([np.float32(2.0), "train"])
    [tensor(2.), 'train']
    """
    leaves, spec = tree.flatten(batch)
    if not any(map(_holds_numpy, leaves)):
        return batch
    return tree.unflatten(spec, [_with_tensors(x) if _holds_numpy(x) else x for x in leaves])


def as_dicts(batch: Any) -> Any:
    """The batch with a dict in place of every `Items`, in the same order of leaves.

    >>> as_dicts([Items(x=1)])
    [{'x': 1}]
    """

    def node(x: Any) -> Any:
        return {key: as_dicts(y) for key, y in x.items()} if isinstance(x, Items) else x

    return tree.map(node, batch, is_leaf=lambda x: isinstance(x, Items))


def _is_read(x: Any) -> bool:
    """Whether a leaf is a tensor or a constant already, of the usual kinds."""
    kind = type(x)
    if kind is torch.Tensor:
        return x.layout is torch.strided and not (
            x.is_meta or x.is_conj() or x.is_neg() or x.is_quantized
        )
    return kind in _PLAIN or (kind is float and x == x)


def _read(path: str, x: Any) -> Any:
    if _is_read(x):
        return x
    if isinstance(x, torch.Tensor):
        return _read_tensor(path, x)
    if isinstance(x, np.ndarray | np.generic) and not isinstance(x, str | bytes):
        return _from_numpy(path, x)
    if isinstance(x, Mapping):
        return read_batch(Items(x), path)
    problem = _problem(x)
    if problem:
        raise BatchError(f"{path} is {problem}")
    return x


def _read_tensor(path: str, x: torch.Tensor) -> torch.Tensor:
    if isinstance(x, FakeTensor):
        return x
    if x.is_nested:
        what = (
            "a nested tensor (torch.nested)",
            "pad it (x.to_padded_tensor(0)), or pass its values() and offsets()",
        )
    elif x.is_meta:
        what = (
            "a tensor on the meta device, which holds no numbers",
            "make it on the device of the others",
        )
    elif x.is_quantized:
        what = (
            f"a quantized tensor ({x.dtype})",
            "pass x.dequantize(), or x.int_repr() with scale and zero point",
        )
    elif x.layout is not torch.strided:
        what = (
            f"a sparse tensor ({x.layout})",
            "pass x.to_dense(), or its indices and values as two leaves",
        )
    elif type(x) not in (torch.Tensor, nn.Parameter):
        what = (
            f"a {type(x).__name__}, a subclass of torch.Tensor",
            "pass x.as_subclass(torch.Tensor)",
        )
    else:
        return x.resolve_conj().resolve_neg()
    raise BatchError(
        f"{path} is {what[0]}; a batch is split and traced as dense tensors: {what[1]}"
    )


# ---- numpy


def _holds_numpy(x: Any) -> bool:
    """Whether a leaf is an array of numbers, or a mapping that holds some."""
    if isinstance(x, np.ndarray | np.generic):
        return type(x) is not np.ma.MaskedArray and x.dtype.kind in "biufc"
    return isinstance(x, Mapping) and any(map(_holds_numpy, tree.leaves(dict(x))))


def _with_tensors(x: Any) -> Any:
    return with_tensors(Items(x)) if isinstance(x, Mapping) else _from_numpy("batch", x)


def _from_numpy(path: str, x: np.ndarray | np.generic) -> torch.Tensor:
    if isinstance(x, np.ma.MaskedArray):
        raise BatchError(f"{path} is a masked array of numpy: pass x.data and x.mask as two leaves")
    array = np.asarray(x)
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


def key_of(x: Any) -> tuple:
    """What tells a constant from others: equal keys mean that a plan holds for both.

    >>> key_of(1) == key_of(True), key_of(0.0) == key_of(-0.0)
    (False, False)
    """
    kind = type(x)
    if kind in _PLAIN:
        return kind, x
    if kind is float:
        return kind, x, math.copysign(1.0, x)
    if kind is complex:
        return kind, repr(x)
    if kind is slice:
        return kind, *map(key_of, (x.start, x.stop, x.step))
    if kind is frozenset:
        return kind, frozenset(map(key_of, x))
    if _is_frozen(x):
        return kind, *(key_of(getattr(x, f.name)) for f in dataclasses.fields(x))
    return kind, x


def _problem(x: Any) -> str:
    """Why a leaf is no constant, and what to pass instead; empty if it is one."""
    name, kind = type(x).__name__, type(x)
    if kind in (float, complex) and x != x:
        return (
            f"{x}, which equals nothing, itself included: no plan could be found for it again. "
            f"Write torch.tensor({x})"
        )
    if isinstance(x, set):
        return f"a {name}, which has no order that ranks could share: write a sorted tuple or list"
    if isinstance(x, nn.Module):
        return (
            f"a {name}, a module: pass its tensors (fp.from_module gives them), and close over the "
            "rest"
        )
    if _holds(x, lambda y: isinstance(y, torch.Tensor | np.ndarray)):
        return _unregistered(x, "whose tensors are not seen")
    if (
        kind in _PLAIN
        or x is None
        or isinstance(x, (float, complex, slice, frozenset, *_BY_IDENTITY, *_BY_VALUE))
    ):
        return ""
    if _is_frozen(x):
        found = ((f.name, _problem(getattr(x, f.name))) for f in dataclasses.fields(x))
        return next(
            (f"a {name} whose {field} is {problem}" for field, problem in found if problem), ""
        )
    if kind.__eq__ is object.__eq__ and not callable(x):
        return _unregistered(x, "compared by identity, so that a change in it would not be seen")
    try:
        hash(x)
    except TypeError:
        return _unregistered(x, "which cannot be hashed, so that no plan could be found for it")
    return ""


def _unregistered(x: Any, why: str) -> str:
    name = type(x).__name__
    what = f"a {name} (a dataclass)" if dataclasses.is_dataclass(x) else f"a {name}"
    return (
        f"{what}, {why}: the class is no pytree node. Pass tensors, or a dict of them; or register "
        f"the class: optree.register_pytree_node({name}, flatten, unflatten, "
        f"namespace={tree.NAMESPACE!r})"
    )


def _is_frozen(x: Any) -> bool:
    """Whether a value is a dataclass that cannot change and compares by its fields."""
    if isinstance(x, type) or not dataclasses.is_dataclass(x):
        return False
    params: Any = type(x).__dict__.get("__dataclass_params__")
    return params is not None and params.frozen and params.eq


def _holds(x: Any, what: Callable[[Any], bool]) -> bool:
    """Whether an object has such a value among its attributes, or in a container there."""
    attributes = getattr(x, "__dict__", None)
    if not attributes or isinstance(x, type | FunctionType | enum.Enum):
        return False
    return any(what(y) for value in attributes.values() for y in tree.leaves(value))
