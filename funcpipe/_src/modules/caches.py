"""Buffers that a module fills on its first call, and remembers by an attribute.

A functional call reads the attribute as it is now, while its buffers may be of before.

In: what a module has, at from_module and at a call.
Out: a ModuleError where an attribute and a buffer have changed together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from funcpipe._src.modules.functional_copy import PLAIN_TYPES
from funcpipe._src.modules.slots import Slots, join_path
from funcpipe.errors import ModuleError


class _Content(NamedTuple):
    """A buffer as it is now. It is held, so that its id stays its own."""

    id: int
    version: int | None
    buffer: Tensor | None

    def same(self, other: _Content | None) -> bool:
        return other is not None and self[:2] == other[:2]


class _Contents(NamedTuple):
    """The plain attributes of a submodule, and its buffers that are not in the state dict."""

    attributes: dict[str, Any]
    buffers: dict[str, _Content]


class Caches:
    """What submodules with such buffers were at from_module.

    Args:
        slots: what the module had then.
        copied: whether the buffers of calls are copies, which do not follow when the module writes
            to its own.
    """

    def __init__(self, slots: Slots, copied: bool) -> None:
        self.copied = copied
        self.contents: dict[str, _Contents] = {}
        for path, module in slots.modules:
            if module._non_persistent_buffers_set:
                self.contents[path] = self._contents(module)

    def check(self, slots: Slots) -> None:
        """ModuleError where an attribute and a buffer of a submodule have changed together."""
        if not self.contents:
            return
        for path, module in slots.modules:
            if path in self.contents:
                _check_same(path, self.contents[path], self._contents(module))

    def _contents(self, module: nn.Module) -> _Contents:
        attributes = {}
        for key, value in module.__dict__.items():
            if type(value) in PLAIN_TYPES and key != "training":
                attributes[key] = value
        buffers = {}
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers.get(key)
            buffers[key] = _Content(id(buffer), self._version(buffer), buffer)
        return _Contents(attributes, buffers)

    def _version(self, buffer: Tensor | None) -> int | None:
        if not self.copied or buffer is None or buffer.is_inference():
            return None
        return buffer._version


def _check_same(path: str, old: _Contents, now: _Contents) -> None:
    missing = object()
    for key, value in now.attributes.items():
        if old.attributes.get(key, missing) != value:
            changed = key
            break
    else:
        return
    for key, content in now.buffers.items():
        if not content.same(old.buffers.get(key)):
            raise ModuleError(
                f"apply_fn: a call of the module has filled buffer {join_path(path, key)!r} and "
                f"set {join_path(path, changed)!r} since from_module, so that the buffers of then "
                "do not fit the module of now. Call the module first, then from_module"
            )
