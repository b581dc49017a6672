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
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from operator import itemgetter
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from funcpipe._src.analysis.host_code import EVERY, is_user_file, names_of
from funcpipe._src.analysis.host_places import (
    identities,
    identities_of_defaults,
    identity_at,
    identity_in_cell,
    identity_in_slot,
    trained_flags,
    value_in_slot,
    version_of,
)
from funcpipe._src.analysis.host_shell import (
    FIELDS,
    MISSING,
    Shell,
    Token,
    contents,
    defaults_of,
    file_of,
    is_value,
    token,
)

DEPTH = 12
LONGEST = 256

_IMPLICIT = frozenset(["__call__", "forward", "__getitem__", "__len__", "__iter__", "__contains__"])
_NOT_READ = frozenset(["__init__", "__new__", "__repr__", "__str__", "__setattr__", "__delattr__"])
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_TORCH = frozenset(
    [
        *(
            "_parameters",
            "_buffers",
            "_non_persistent_buffers_set",
            "_modules",
            "_is_full_backward_hook",
        ),
        *(
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
            "_forward_pre_hooks_with_kwargs",
        ),
    ]
)


class Walk:
    """One walk over everything that can be reached from a shell, by attributes of these names."""

    def __init__(
        self, names: set[str], packages: frozenset[str], written: set[str], tensors: bool
    ) -> None:
        self.names, self.packages, self.written, self.tensors = names, packages, written, tensors
        self.values: list[tuple[str, Any]] = []
        # Entries of dicts: where they lie, what was there, and their numbers among values.
        self.dicts: list[tuple[Mapping, Any]] = []
        self.last: list[Any] = []
        self.getters: list[tuple[Callable[[Any], tuple], Any]] = []
        self.places: list[int] = []
        self.sized: list[Any] = []  # what can get more entries, or fewer
        self.sizes: list[int] = []
        self.polls: list[tuple[Callable[[Any], Any], Any]] = []  # whatever else can change
        self.polled: list[Any] = []
        self.cells: list[tuple[CellType, Any]] = []
        self.lists: list[tuple[Any, list]] = []  # with what was in them, which keeps its identities
        self.owners: dict[int, type] = {}  # by number among dicts: the class whose dict it is
        self.params: list[dict] = []
        self.kept: list[Any] = []  # so that no other object gets its number
        self.seen: dict[int, Any] = {}
        self.queue: deque[tuple[Any, str, int, bool]] = deque()

    def run(self, shell: Shell) -> None:
        for x in shell.functions:
            self.seen[id(x)] = x
            self.attributes_of_function(x, x.__name__, 0)
            self.code(x, 0)
        for path, x in shell.objects:
            self.put(path, x, 0)
        while self.queue:
            self.visit(*self.queue.popleft())
        if self.params:
            self.poll(trained_flags, self.params)
        self.group()

    def group(self) -> None:
        """Have the entries of one dict read at once, in a sixth of the time."""
        boxes: dict[int, list[int]] = {}
        for n, (box, _) in enumerate(self.dicts):
            boxes.setdefault(id(box), []).append(n)
        order: list[int] = []
        for numbers in boxes.values():
            some = (
                numbers if len(numbers) > 1 else numbers * 2
            )  # of one key alone, a getter gives no tuple
            order += some
            self.getters.append(
                (itemgetter(*(self.dicts[n][1] for n in some)), self.dicts[some[0]][0])
            )
        self.owners = {n: self.owners[old] for n, old in enumerate(order) if old in self.owners}
        self.dicts = [self.dicts[n] for n in order]
        self.last = [self.last[n] for n in order]
        self.places = [self.places[n] for n in order]

    # -- places

    def put(self, path: str, x: Any, depth: int, whole: bool = False) -> bool:
        """Note what is at a place, and go there later; False where the function itself writes
        there."""
        if path in self.written:
            return False
        small = self.tensors and _is_small(x)
        self.values.append((path, Token("Tensor", "a tensor") if small else token(x)))
        if not is_value(x) and depth < DEPTH:
            self.queue.append((x, path, depth + 1, whole))
        return True

    def entry(self, box: Mapping, key: Any, path: str, depth: int, whole: bool = False) -> None:
        """A place in a dict."""
        own = isinstance(box, dict) and type(box) not in (
            dict,
            OrderedDict,
        )  # may look up in its own way
        x = dict.get(box, key, MISSING) if own else box.get(key, MISSING)  # type: ignore[call-overload]
        if not self.put(path, x, depth, whole):
            return
        if own:
            self.kept.append(x)
            self.poll(functools.partial(identity_at, key), box)
        else:
            self.dicts.append((box, key))
            self.last.append(x)
            self.places.append(len(self.values) - 1)

    def size(self, x: Any) -> None:
        """The number of entries of something."""
        self.sized.append(x)
        self.sizes.append(len(x))

    def poll(self, read: Callable[[Any], Any], x: Any) -> None:
        """Something else that can change."""
        self.polls.append((read, x))
        self.polled.append(read(x))

    # -- by kind

    def visit(self, x: Any, path: str, depth: int, whole: bool) -> None:
        if id(x) in self.seen:
            return
        self.seen[id(x)] = x
        if isinstance(x, FunctionType):
            self.function(x, path, depth)
        elif isinstance(x, MethodType):
            self.put(path, x.__func__, depth)
            self.put("self", x.__self__, depth)
        elif type(x) is functools.partial:
            self.put(path, x.func, depth)
            for n, value in enumerate((*x.args, *x.keywords.values())):
                self.put(f"{path}.args[{n}]", value, depth)
        elif isinstance(x, type):
            self.attributes_of_class(x, path, depth, instance=False)
            self.attributes_of_class(type(x), path, depth, instance=True)
        elif isinstance(x, ModuleType):
            self.module(x, path, depth)
        elif isinstance(x, torch.Tensor):
            if self.tensors and not _is_uncounted(x):
                self.poll(version_of, x)
                self.values.append(
                    (path, Token("Tensor", repr(x.tolist()) if _is_small(x) else x._version))
                )
        elif isinstance(x, dict):
            self.entries(x, path, depth, whole)
        elif isinstance(x, list | deque):
            self.elements(x, path, depth, whole)
        elif isinstance(x, tuple):
            for n, value in enumerate(x[:LONGEST]):
                self.put(f"{path}[{n}]", value, depth, whole)
        elif isinstance(x, set | frozenset):
            self.poll(frozenset, x)
            self.values.append((path, Token("set", repr(sorted(map(repr, x))))))
        elif isinstance(x, np.ndarray):
            if x.size <= LONGEST and not x.dtype.hasobject:
                self.poll(np.ndarray.tobytes, x)
                self.values.append((path, Token("ndarray", repr(x.tolist()))))
        else:
            self.object(x, path, depth, whole)

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
        self.values.append((path, fn.__code__))
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            held = contents(cell)
            if self.put(name, held, depth):
                self.cells.append((cell, held))
                self.poll(identity_in_cell, cell)
        for name, value in defaults_of(fn):
            self.put(name, value, depth)
        self.kept.append((fn.__defaults__, dict(fn.__kwdefaults__ or {})))
        self.poll(identities_of_defaults, fn)
        self.attributes_of_function(fn, path, depth)
        self.code(fn, depth)

    def attributes_of_function(self, fn: FunctionType, path: str, depth: int) -> None:
        self.size(fn.__dict__)
        for name in sorted(self.names & fn.__dict__.keys()):
            self.entry(fn.__dict__, name, f"{path}.{name}", depth)

    def module(self, x: ModuleType, path: str, depth: int) -> None:
        if is_user_file(getattr(x, "__file__", None) or "<frozen>", self.packages):
            for name in sorted(self.names & x.__dict__.keys()):
                self.entry(x.__dict__, name, f"{path}.{name}", depth)

    def entries(self, x: dict, path: str, depth: int, whole: bool) -> None:
        self.size(x)
        if len(x) <= LONGEST:
            for key in list(x):
                self.entry(x, key, f"{path}[{key!r}]", depth, whole)
        if type(x) not in (dict, OrderedDict):
            self.object(x, path, depth, whole)

    def elements(self, x: Any, path: str, depth: int, whole: bool) -> None:
        if len(x) > LONGEST:
            self.size(x)
            return
        self.poll(identities, x)
        self.lists.append((x, list(x)))
        for n, value in enumerate(x):
            self.put(f"{path}[{n}]", value, depth, whole)

    def object(self, x: Any, path: str, depth: int, whole: bool) -> None:
        kind = type(x)
        held = getattr(x, "__dict__", None)
        if isinstance(x, nn.Module):
            self.nn_module(x, path, depth)
            return
        whole = whole or EVERY in self.names or hasattr(kind, "__getattr__")
        if isinstance(held, dict):
            self.size(held)
            names = held.keys() if whole else self.names_for(kind) & held.keys()
            for name in sorted(n for n in names if isinstance(n, str)):
                self.entry(held, name, f"{path}.{name}", depth, whole)
        self.attributes_of_class(kind, path, depth, instance=True)
        for base in kind.__mro__:
            for name, slot in base.__dict__.items():
                if isinstance(slot, MemberDescriptorType) and (whole or name in self.names):
                    self.kept.append(value_in_slot(slot, x))
                    self.put(f"{path}.{name}", self.kept[-1], depth, whole)
                    self.poll(functools.partial(identity_in_slot, slot), x)

    def names_for(self, kind: type) -> set[str]:
        """The attributes that are read of an object: also those that methods of a library, which
        are called, name."""
        if is_user_file(file_of(kind), self.packages):
            return self.names
        found = set(self.names)
        for name in self.names:
            method = _static(kind, name)
            code = getattr(getattr(method, "fget", method), "__code__", None)
            if isinstance(code, CodeType):
                found |= names_of(code).attributes
        return found

    def nn_module(self, x: nn.Module, path: str, depth: int) -> None:
        """A module: all of a library's, which other code reads; of the user's own what is named,
        and the flags."""
        kinds = [k for k in type(x).__mro__ if k not in (nn.Module, object)]
        users = all(is_user_file(file_of(k), self.packages) for k in kinds)
        held = x.__dict__
        self.size(held)
        self.size(x._modules)
        for name in _HOOKS:
            self.size(held[name])
            for hook in held[name].values():
                self.put(f"{path}.{name}", hook, depth)
        for name in sorted(
            name for name in held if name not in _OF_TORCH and not name.endswith("_hooks")
        ):
            named = name in self.names or name == "training"
            if named or (not users and _is_setting(held[name])):
                self.entry(held, name, f"{path}.{name}", depth, whole=not users and not named)
        for name in x._modules:
            self.entry(x._modules, name, f"{path}.{name}", min(depth, DEPTH - 2))
        if x._parameters:
            self.params.append(x._parameters)
            trained = [n for n, p in x._parameters.items() if p is not None and p.requires_grad]
            self.values.append(
                (f"{path}, requires_grad of its params", Token("list", repr(trained)))
            )
        self.attributes_of_class(type(x), path, depth, instance=True)

    def attributes_of_class(self, kind: type, path: str, depth: int, instance: bool) -> None:
        for base in kind.__mro__:
            if base is object or not is_user_file(file_of(base), self.packages):
                continue
            self.size(base.__dict__)
            for name, x in base.__dict__.items():
                if not self.may_read(name, x, instance):
                    continue
                inner = (
                    x.fget
                    if isinstance(x, property)
                    else getattr(x, "__func__", getattr(x, "func", x))
                )
                before = len(self.dicts)
                self.entry(base.__dict__, name, f"{path}.{name}", depth)
                if len(self.dicts) > before:
                    self.owners[before] = base
                if isinstance(inner, FunctionType) and inner is not x:
                    self.put(f"{path}.{name}", inner, depth)

    def may_read(self, name: str, x: Any, instance: bool) -> bool:
        if isinstance(x, MemberDescriptorType):
            return False
        if name in self.names or name in _IMPLICIT:
            return True
        if name in ("__init__", "__post_init__", "__new__"):
            return not instance and isinstance(x, FunctionType)
        return name.startswith("__") and name not in _NOT_READ and isinstance(x, FunctionType)


def _is_uncounted(x: torch.Tensor) -> bool:
    """Whether a tensor holds nothing, or nobody counts its changes."""
    return isinstance(x, FakeTensor) or x.is_meta or x.is_inference()


def _is_small(x: Any) -> bool:
    """Whether a tensor is compared by its elements: reading them must not wait for a GPU."""
    if not isinstance(x, torch.Tensor) or _is_uncounted(x):
        return False
    return x.is_cpu and x.layout is torch.strided and x.numel() <= LONGEST


def _static(kind: type, name: str) -> Any:
    return next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), None)


def _imported(name: str, level: int, of: dict) -> ModuleType | None:
    full = (
        importlib.util.resolve_name("." * level + name, of.get("__package__") or "")
        if level
        else name
    )
    return sys.modules.get(full)


def _is_setting(x: Any) -> bool:
    """Whether an attribute of a library's module is read by its code, as far as can be said without
    that."""
    plain = is_value(x) or isinstance(x, dict | list | tuple | set) or dataclasses.is_dataclass(x)
    return plain or type(x) in FIELDS or "Config" in type(x).__name__
