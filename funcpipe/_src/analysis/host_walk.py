"""The walk over what a function reaches in Python: objects in its cells and globals, as far as code
names them.

In: a shell. Out: `Walk`: every place that may be read, what is there, and how to see quickly
whether it is still.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections import deque
from collections.abc import Iterable
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from funcpipe._src.analysis.host_code import EVERY, is_user_file, names_of
from funcpipe._src.analysis.host_found import (
    DEPTH,
    LONGEST,
    Found,
    is_small,
    is_uncounted,
    looks_up_itself,
)
from funcpipe._src.analysis.host_places import (
    identities,
    identities_of_defaults,
    identity_in_cell,
    identity_in_slot,
    trained_flags,
    value_in_slot,
    version_of,
)
from funcpipe._src.analysis.host_shell import (
    FIELDS,
    Shell,
    Token,
    contents,
    defaults_of,
    file_of,
    is_value,
)

_DEEPEST = DEPTH - 2  # of what a module is counted to hold: its own modules are read in any case
_IMPLICIT = frozenset(["__call__", "forward", "__getitem__", "__len__", "__iter__", "__contains__"])
_NOT_READ = frozenset(["__init__", "__new__", "__repr__", "__str__", "__setattr__", "__delattr__"])
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_TORCH = frozenset(
    [
        "_parameters",
        "_buffers",
        "_non_persistent_buffers_set",
        "_modules",
        "_is_full_backward_hook",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    ]
)


class Walk(Found):
    """One walk over everything that can be reached from a shell, by attributes of these names."""

    def __init__(
        self,
        names: set[str],
        packages: frozenset[str],
        written: set[str],
        tensors: bool,
    ) -> None:
        super().__init__(written, tensors)
        self.names = names
        self.packages = packages
        self.seen: dict[int, Any] = {}

    def run(self, shell: Shell) -> None:
        for function in shell.functions:
            self.seen[id(function)] = function
            self.attributes_of_function(function, function.__name__, 0)
            self.code(function, 0)
        for path, value in shell.objects:
            self.put(path, value, 0)
        while self.queue:
            self.visit(*self.queue.popleft())
        if self.params:
            self.poll(trained_flags, self.params)
        self.group()

    def visit(self, value: Any, path: str, depth: int, whole: bool) -> None:
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, FunctionType):
            self.function(value, path, depth)
        elif isinstance(value, MethodType):
            self.put(path, value.__func__, depth)
            self.put("self", value.__self__, depth)
        elif type(value) is functools.partial:
            self.partial(value, path, depth)
        elif isinstance(value, type):
            self.attributes_of_class(value, path, depth, instance=False)
            self.attributes_of_class(type(value), path, depth, instance=True)
        elif isinstance(value, ModuleType):
            self.module(value, path, depth)
        elif isinstance(value, torch.Tensor):
            self.tensor(value, path)
        elif isinstance(value, dict):
            self.entries(value, path, depth, whole)
        elif isinstance(value, list | deque):
            self.elements(value, path, depth, whole)
        elif isinstance(value, tuple):
            self.numbered(path, value[:LONGEST], depth, whole)
        elif isinstance(value, set | frozenset):
            texts = sorted(map(repr, value))
            self.poll(frozenset, value)
            self.values.append((path, Token("set", repr(texts))))
        elif isinstance(value, np.ndarray):
            self.array(value, path)
        else:
            self.object(value, path, depth, whole)

    def partial(self, value: functools.partial, path: str, depth: int) -> None:
        self.put(path, value.func, depth)
        given = *value.args, *value.keywords.values()
        self.numbered(f"{path}.args", given, depth)

    def numbered(
        self,
        path: str,
        values: Iterable[Any],
        depth: int,
        whole: bool = False,
    ) -> None:
        """Values that have numbers in place of names."""
        for number, value in enumerate(values):
            self.put(f"{path}[{number}]", value, depth, whole)

    def tensor(self, tensor: torch.Tensor, path: str) -> None:
        if not self.tensors or is_uncounted(tensor):
            return
        self.poll(version_of, tensor)
        counted = repr(tensor.tolist()) if is_small(tensor) else tensor._version
        self.values.append((path, Token("Tensor", counted)))

    def array(self, array: np.ndarray, path: str) -> None:
        if array.size > LONGEST or array.dtype.hasobject:
            return
        self.poll(np.ndarray.tobytes, array)
        text = repr(array.tolist())
        self.values.append((path, Token("ndarray", text)))

    def code(self, fn: FunctionType, depth: int) -> None:
        """What a function of the user names."""
        if not is_user_file(fn.__code__.co_filename, self.packages):
            return
        names = names_of(fn.__code__)
        self.names |= names.attributes
        for name in sorted(names.globals):
            if name in fn.__globals__:
                self.entry(fn.__globals__, name, name, depth)
        for name, level in sorted(names.imports):
            module = _imported(name, level, fn.__globals__)
            if module is not None:
                self.put(name, module, depth)

    def function(self, fn: FunctionType, path: str, depth: int) -> None:
        code = fn.__code__
        self.values.append((path, code))
        for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
            held = contents(cell)
            if self.put(name, held, depth):
                self.cells.append((cell, held))
                self.poll(identity_in_cell, cell)
        for name, value in defaults_of(fn):
            self.put(name, value, depth)
        by_name = dict(fn.__kwdefaults__ or {})
        self.kept.append((fn.__defaults__, by_name))
        self.poll(identities_of_defaults, fn)
        self.attributes_of_function(fn, path, depth)
        self.code(fn, depth)

    def attributes_of_function(self, fn: FunctionType, path: str, depth: int) -> None:
        self.size(fn.__dict__)
        self.named_entries(fn.__dict__, path, depth)

    def module(self, module: ModuleType, path: str, depth: int) -> None:
        file = getattr(module, "__file__", None)
        if is_user_file(file or "<frozen>", self.packages):
            self.named_entries(module.__dict__, path, depth)

    def named_entries(self, box: dict, path: str, depth: int) -> None:
        """The entries that code names."""
        for name in sorted(self.names & box.keys()):
            self.entry(box, name, f"{path}.{name}", depth)

    def entries(self, box: dict, path: str, depth: int, whole: bool) -> None:
        self.size(box)
        if len(box) <= LONGEST:
            for key in list(box):
                self.entry(box, key, f"{path}[{key!r}]", depth, whole)
        if looks_up_itself(box):
            self.object(box, path, depth, whole)

    def elements(self, box: Any, path: str, depth: int, whole: bool) -> None:
        if len(box) > LONGEST:
            self.size(box)
            return
        self.poll(identities, box)
        self.lists.append((box, list(box)))
        self.numbered(path, box, depth, whole)

    def object(self, value: Any, path: str, depth: int, whole: bool) -> None:
        if isinstance(value, nn.Module):
            self.nn_module(value, path, depth)
            return
        kind = type(value)
        held = getattr(value, "__dict__", None)
        whole = whole or EVERY in self.names or hasattr(kind, "__getattr__")
        if isinstance(held, dict):
            self.size(held)
            names = held.keys() if whole else self.names_for(kind) & held.keys()
            for name in sorted(filter(_is_text, names)):
                self.entry(held, name, f"{path}.{name}", depth, whole)
        self.attributes_of_class(kind, path, depth, instance=True)
        for base in kind.__mro__:
            for name, slot in base.__dict__.items():
                named = whole or name in self.names
                if named and isinstance(slot, MemberDescriptorType):
                    self.slot(slot, value, f"{path}.{name}", depth, whole)

    def slot(
        self,
        slot: MemberDescriptorType,
        owner: Any,
        path: str,
        depth: int,
        whole: bool,
    ) -> None:
        """An attribute of an object that has ``__slots__``."""
        value = value_in_slot(slot, owner)
        self.kept.append(value)
        self.put(path, value, depth, whole)
        self.poll(functools.partial(identity_in_slot, slot), owner)

    def names_for(self, kind: type) -> set[str]:
        """The attributes that are read of an object: also those that methods of a library, which
        are called, name."""
        if is_user_file(file_of(kind), self.packages):
            return self.names
        found = set(self.names)
        for name in self.names:
            method = _static(kind, name)
            getter = getattr(method, "fget", method)
            code = getattr(getter, "__code__", None)
            if isinstance(code, CodeType):
                found |= names_of(code).attributes
        return found

    def nn_module(self, module: nn.Module, path: str, depth: int) -> None:
        """A module: all of a library's, which other code reads; of the user's own what is named,
        and the flags."""
        held = module.__dict__
        self.size(held)
        self.size(module._modules)
        for name in _HOOKS:
            self.size(held[name])
            for hook in held[name].values():
                self.put(f"{path}.{name}", hook, depth)
        users = self.is_users_module(type(module))
        for name in sorted(held):
            if name in _OF_TORCH or name.endswith("_hooks"):
                continue
            named = name in self.names or name == "training"
            if named or (not users and _is_setting(held[name])):
                whole = not users and not named
                self.entry(held, name, f"{path}.{name}", depth, whole)
        for name in module._modules:
            self.entry(module._modules, name, f"{path}.{name}", min(depth, _DEEPEST))
        if module._parameters:
            self.trained_params(module._parameters, path)
        self.attributes_of_class(type(module), path, depth, instance=True)

    def is_users_module(self, kind: type) -> bool:
        """Whether all classes of a module are the user's, down to torch's own base."""
        for base in kind.__mro__:
            if base in (nn.Module, object):
                continue
            if not is_user_file(file_of(base), self.packages):
                return False
        return True

    def trained_params(self, params: dict, path: str) -> None:
        """Which params of a module require gradients."""
        self.params.append(params)
        trained = []
        for name, param in params.items():
            if param is not None and param.requires_grad:
                trained.append(name)
        noted = Token("list", repr(trained))
        self.values.append((f"{path}, requires_grad of its params", noted))

    def attributes_of_class(self, kind: type, path: str, depth: int, instance: bool) -> None:
        for base in kind.__mro__:
            if base is object or not is_user_file(file_of(base), self.packages):
                continue
            self.size(base.__dict__)
            for name, value in base.__dict__.items():
                if self.may_read(name, value, instance):
                    self.attribute_of_class(base, name, f"{path}.{name}", depth)

    def attribute_of_class(self, base: type, name: str, path: str, depth: int) -> None:
        number = len(self.dicts)
        self.entry(base.__dict__, name, path, depth)
        if len(self.dicts) > number:
            self.owners[number] = base
        value = base.__dict__[name]
        inner = _function_in(value)
        if isinstance(inner, FunctionType) and inner is not value:
            self.put(path, inner, depth)

    def may_read(self, name: str, value: Any, instance: bool) -> bool:
        if isinstance(value, MemberDescriptorType):
            return False
        if name in self.names or name in _IMPLICIT:
            return True
        if not isinstance(value, FunctionType):
            return False
        if name in ("__init__", "__post_init__", "__new__"):
            return not instance
        return name.startswith("__") and name not in _NOT_READ


def _is_text(name: Any) -> bool:
    return isinstance(name, str)


def _function_in(value: Any) -> Any:
    """The function in a property, a static or class method, or a cached property."""
    if isinstance(value, property):
        return value.fget
    wrapped = getattr(value, "func", value)
    return getattr(value, "__func__", wrapped)


def _static(kind: type, name: str) -> Any:
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def _imported(name: str, level: int, names: dict) -> ModuleType | None:
    if level:
        package = names.get("__package__") or ""
        name = importlib.util.resolve_name("." * level + name, package)
    return sys.modules.get(name)


def _is_setting(value: Any) -> bool:
    """Whether an attribute of a library's module is read by its code, as far as can be said without
    that."""
    if is_value(value) or isinstance(value, dict | list | tuple | set):
        return True
    if dataclasses.is_dataclass(value):
        return True
    return type(value) in FIELDS or "Config" in type(value).__name__
