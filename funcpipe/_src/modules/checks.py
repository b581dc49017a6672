"""What from_module, to_module and apply_fn refuse.

In: a module, or tensors for its names.
Out: a ModuleError that names the tensor or submodule, and the cure.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from funcpipe._src.core.describe_value import describe
from funcpipe._src.modules.references import check_references
from funcpipe._src.modules.slots import Slot, Slots, find_slots
from funcpipe.errors import ModuleError

_CALLS = {
    "apply_fn": "apply_fn(params, buffers, *inputs)",
    "to_module": "to_module(module, params, buffers)",
}


def check_module(module: Any) -> None:
    """ModuleError unless a value is a module that can be a pure function."""
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise ModuleError(
            "from_module and to_module take a torch.nn.Module written in Python, not "
            f"{describe(module)}"
        )
    slots = find_slots(module)
    for name, tensor in slots.tensors:
        if is_lazy(tensor):
            raise ModuleError(
                f"{name!r} has no shape yet (a lazy module): call the module once on an example "
                "input first"
            )
    for path, submodule in slots.modules:
        if isinstance(submodule, nn.SyncBatchNorm):
            raise ModuleError(
                f"submodule {path!r} is a SyncBatchNorm, which talks to all ranks of "
                "torch.distributed, while a loss function is written for one device: use "
                "nn.BatchNorm1d, 2d or 3d, or fp.psum over a named axis"
            )
    _check_not_expanded(slots.params)
    _check_disjoint(slots.params)
    check_references(slots)


def _check_not_expanded(params: list[Slot]) -> None:
    for name, tensor in params:
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in dims):
            raise ModuleError(
                f"parameter {name!r} of shape {tuple(tensor.shape)} is expanded: several of its "
                "elements are one number in memory, which as a leaf they would not stay. Make a "
                "parameter of what was expanded; expand it in forward"
            )


class _Span(NamedTuple):
    """The bytes of a parameter, from ``start`` to ``end``."""

    start: int
    end: int
    name: str


def _check_disjoint(params: list[Slot]) -> None:
    spans = []
    for name, tensor in params:
        if tensor.numel() and not tensor.is_meta:
            spans.append(_span(name, tensor))
    for first, second in itertools.pairwise(sorted(spans)):
        if second.start < first.end:
            raise ModuleError(
                f"parameters {first.name!r} and {second.name!r} are views of the same memory: as "
                "two leaves they would go apart. To tie them, assign one nn.Parameter to both "
                "names; else clone one"
            )


def _span(name: str, tensor: Tensor) -> _Span:
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in dims)
    start = tensor.data_ptr()
    return _Span(start, start + (last + 1) * tensor.element_size(), name)


def check_tensors(
    argument: str,
    given: Any,
    wanted: list[Slot],
    slots: Slots,
) -> None:
    """ModuleError unless a dict has a tensor of the right shape for every slot, and no other.

    Args:
        argument: what errors call the dict: ``"apply_fn: params"``.
    """
    if not isinstance(given, dict):
        function, _, _ = argument.partition(":")
        raise ModuleError(
            f"{argument} is {describe(given)}, not a dict from names to tensors; the call is "
            f"{_CALLS[function]}"
        )
    shapes = {slot.name: slot.tensor.shape for slot in wanted}
    missing = [name for name in shapes if name not in given]
    if missing:
        raise ModuleError(
            f"{argument} lacks {_some(missing)}: give a tensor for every name that from_module gave"
        )
    unexpected = [name for name in given if name not in shapes]
    if unexpected:
        reason = _why_unexpected(unexpected[0], slots)
        raise ModuleError(f"{argument} has {_some(unexpected)}: {reason}")
    for name, shape in shapes.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise ModuleError(
                f"{argument}[{name!r}] is {describe(tensor)}, but the module's has shape "
                f"{tuple(shape)}; run.unplace(state) puts together what ranks hold of a state"
            )


def _why_unexpected(name: Any, slots: Slots) -> str:
    path, _, key = str(name).rpartition(".")
    parents = [module for other, module in slots.modules if other == path]
    for slot in slots.tensors:
        if slot.name == name:
            return "the module has it, but params and buffers are two dicts"
        for parent in parents:
            if (parent._parameters | parent._buffers).get(key) is slot.tensor:
                return f"it is tied, and one leaf under its first name, {slot.name!r}"
    return "the module has no tensor of that name"


def _some(names: list[str]) -> str:
    """The first three names.

    >>> _some(["a", "b", "c", "d", "e"])
    "'a', 'b', 'c' and 2 more"
    """
    text = ", ".join(map(repr, names[:3]))
    more = len(names) - 3
    return f"{text} and {more} more" if more > 0 else text


def check_same_buffers(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """ModuleError where a call made or removed a buffer, or changed its shape."""
    for name in (*before, *after):
        was, now = before.get(name), after.get(name)
        if was is None or now is None or was.shape != now.shape:
            raise ModuleError(
                f"apply_fn: buffer {name!r} is {describe(was)} before the call and {describe(now)} "
                "after it, but a state keeps its structure: register every buffer in __init__, in "
                "the shape that it keeps"
            )
