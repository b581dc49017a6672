"""What a functional copy cannot follow: hooks of parameters, and references that it does not see.

In: what a module has.
Out: a ModuleError that names the first such place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from funcpipe._src.core.describe_value import describe
from funcpipe._src.modules.functional_copy import DICTS, PLAIN_TYPES, SEQUENCES
from funcpipe._src.modules.slots import Slots, join_path
from funcpipe.errors import ModuleError

_HOOKS = {
    "register_hook": "_backward_hooks",
    "register_post_accumulate_grad_hook": "_post_accumulate_grad_hooks",
}
# Hooks of saving and loading play no part in a call, whatever they hold.
_LOADING = frozenset(
    [
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ]
)


def check_hooks(slots: Slots) -> None:
    """ModuleError where a parameter has hooks of its own."""
    for name, tensor in slots.tensors:
        for registration, attribute in _HOOKS.items():
            if getattr(tensor, attribute):
                raise ModuleError(
                    f"parameter {name!r} has a hook ({registration}): plain PyTorch calls it with "
                    "the whole gradient, but in a step each microbatch of each shard has a part "
                    f"of it. Do what the hook does in the step, to grads[{name!r}] as "
                    "value_and_grad returns it, and remove the hook"
                )


def check_references(slots: Slots) -> None:
    """ModuleError unless every module and tensor is referred to only where a copy finds it."""
    search = _Search(_names(slots))
    for path, module in slots.modules:
        for key, value in module.__dict__.items():
            held = None if key in _LOADING else search.unreachable(value, reached=True)
            if held:
                raise ModuleError(
                    f"{join_path(path, key)} is {describe(value)} that holds {held}, where a call "
                    "cannot put other tensors in its place. Keep it in an attribute, list or "
                    "dict; take a module before torch.compile or another wrapper "
                    "(module._orig_mod)"
                )


def _names(slots: Slots) -> dict[int, str]:
    """What errors call the modules and tensors, by id."""
    names = {}
    for path, module in slots.modules:
        names[id(module)] = f"submodule {path!r}" if path else "the module itself"
    for slot in slots.tensors:
        names[id(slot.tensor)] = repr(slot.name)
    return names


class _Search:
    """Follows references, and remembers which values it has been at."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.seen: set[tuple[int, bool]] = set()

    def unreachable(self, value: Any, reached: bool) -> str | None:
        """The first module or tensor below a value that a copy does not reach.

        Args:
            reached: whether a copy reaches the value itself.
        """
        if id(value) in self.names:
            return None if reached else self.names[id(value)]
        if type(value) in PLAIN_TYPES or isinstance(value, type | nn.Module | Tensor):
            return None
        if (id(value), reached) in self.seen:
            return None
        self.seen.add((id(value), reached))
        below = _references(value)
        for item in below.values:
            found = self.unreachable(item, reached and below.copied)
            if found:
                return found
        return None


class _References(NamedTuple):
    """What a value refers to, and whether a copy of it refers to copies."""

    values: Iterable[Any]
    copied: bool


def _references(value: Any) -> _References:
    kind = type(value)
    if isinstance(value, dict):
        return _References(value.values(), kind in DICTS)
    if isinstance(value, list | tuple | set | frozenset):
        return _References(value, kind in SEQUENCES)
    if kind is MethodType:
        return _References((value.__self__,), True)
    if kind is functools.partial:
        return _References((value.func, *value.args, *value.keywords.values()), True)
    if kind is FunctionType:
        return _References(_closure(value), False)
    if kind is fx.Graph:  # a call runs the code that was made of it
        return _References((), False)
    return _References(getattr(value, "__dict__", {}).values(), False)


def _closure(fn: FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell can be empty
            continue
