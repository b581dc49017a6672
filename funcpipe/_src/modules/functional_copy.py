"""Shallow copies of a module and its submodules, which hold other tensors.

A copy shares every Python value with its module but containers, modules and tensors. So a call of
the copy neither changes the module nor waits for another call. ``torch.func.functional_call``
instead swaps tensors in the module itself for the time of a call: a ``torch.utils.checkpoint`` in
it would recompute with the module's own tensors, and gradients be wrong without a word.

In: a module, and tensors for its slots.
Out: a module of the same class.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from funcpipe._src.modules.batch_norm import may_normalize, with_functional_batch_norm
from funcpipe._src.modules.slots import Slots
from funcpipe.errors import ModuleError

PLAIN_TYPES = frozenset([type(None), bool, int, float, str])
DICTS = (dict, OrderedDict)
SEQUENCES = (list, tuple, set)


def copy_with_tensors(
    module: nn.Module,
    slots: Slots,
    tensors: dict[str, Tensor],
) -> nn.Module:
    """A copy of a module and its submodules, with the tensors of these names."""
    replacements: dict[int, Any] = {}
    for slot in slots.tensors:
        replacements[id(slot.tensor)] = tensors[slot.name]
    for _, submodule in slots.modules:
        replacements[id(submodule)] = object.__new__(type(submodule))
    for _, submodule in slots.modules:
        copied = replacements[id(submodule)]
        for key, value in submodule.__dict__.items():
            is_plain = type(value) in PLAIN_TYPES
            copied.__dict__[key] = value if is_plain else _replaced(value, replacements)
        copied.__dict__["_apply"] = functools.partial(_apply, weakref.ref(copied))
        if may_normalize(submodule):
            copied.__dict__["forward"] = with_functional_batch_norm(copied.forward)
    return replacements[id(module)]


def _apply(
    reference: weakref.ref[nn.Module],
    fn: Callable,
    recurse: bool = True,
) -> nn.Module:
    """``nn.Module._apply``, by which ``.to()``, ``.float()`` and their like convert, on a copy.

    It puts new tensors in the slots. Torch's writes to the tensors that are there: so the caller's
    params would change, and no gradient would go through a cast.
    """
    module = reference()
    assert module is not None  # its method is being called
    for child in module.children() if recurse else ():
        child._apply(fn)
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            converted = None if tensor is None else fn(tensor)
            if converted is not tensor and type(module)._apply is not nn.Module._apply:
                raise ModuleError(
                    f"{type(module).__name__} is converted in forward (.to(), .float() and their "
                    f"like), and refers to {key!r} in more places than one: convert it before "
                    "from_module"
                )
            tensors[key] = converted
    return module


def _replaced(value: Any, replacements: dict[int, Any]) -> Any:
    """A value with its modules and tensors replaced; containers are copied."""
    if id(value) in replacements:
        return replacements[id(value)]
    kind = type(value)
    if kind in DICTS:
        return kind((key, _replaced(item, replacements)) for key, item in value.items())
    if kind in SEQUENCES:
        return kind([_replaced(item, replacements) for item in value])
    if kind is MethodType:
        return MethodType(value.__func__, _replaced(value.__self__, replacements))
    if kind is functools.partial:
        fn = _replaced(value.func, replacements)
        args = _replaced(value.args, replacements)
        return functools.partial(fn, *args, **_replaced(value.keywords, replacements))
    return value
