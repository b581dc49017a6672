"""Stand-ins: shallow copies of a module and of all in it, which hold other tensors.

Terms. A *slot* is a parameter or buffer of a module, under the first of its names. A stand-in
shares every Python value of its module but containers, modules and tensors; so a call on it neither
changes the module nor waits for another call. Swapping tensors in the module itself, as
``torch.func.functional_call`` does, ends with the call: a ``torch.utils.checkpoint`` in it would
recompute with the module's own tensors, and gradients be wrong without a word.

In: a module, and tensors for its slots. Out: a module of the same class; or a ModuleError that
names what a copy cannot follow.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from funcpipe._src.core.describe_value import describe
from funcpipe._src.functional.batch_statistic import batch_statistic
from funcpipe.errors import ModuleError

_LEAVES = frozenset([type(None), bool, int, float, str])
_HOOKS = {
    "register_hook": "_backward_hooks",
    "register_post_accumulate_grad_hook": "_post_accumulate_grad_hooks",
}
# Hooks of saving and loading: they play no part in a call, whatever they hold.
_LOADING = frozenset(
    [
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ]
)


class Slot(NamedTuple):
    """A parameter or buffer of a module, under the first of its names."""

    name: str
    tensor: torch.Tensor


class Slots(NamedTuple):
    """What a module has: every submodule with its path, itself included, every parameter and every
    buffer, each once."""

    modules: list[tuple[str, nn.Module]]
    params: list[Slot]
    buffers: list[Slot]


def slots(module: nn.Module) -> Slots:
    """What a module has now."""
    modules = list(module.named_modules())
    return Slots(modules, *(_tensors(modules, kind) for kind in ("_parameters", "_buffers")))


def _tensors(modules: list[tuple[str, nn.Module]], kind: str) -> list[Slot]:
    found: dict[int, Slot] = {}
    for path, m in modules:
        for key, x in m.__dict__[kind].items():
            if x is not None and id(x) not in found:
                found[id(x)] = Slot(f"{path}.{key}" if path else key, x)
    return list(found.values())


def stand_in(module: nn.Module, has: Slots, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a module and all in it, with the tensors of these names."""
    new: dict[int, Any] = {id(s.tensor): tensors[s.name] for s in (*has.params, *has.buffers)}
    for _, m in has.modules:
        new[id(m)] = object.__new__(type(m))
    for _, m in has.modules:
        copy = new[id(m)]
        copy.__dict__.update(
            (key, x if type(x) in _LEAVES else _moved(x, new)) for key, x in m.__dict__.items()
        )
        copy.__dict__["_apply"] = functools.partial(_apply, weakref.ref(copy))
        if _may_normalize(m):
            copy.__dict__["forward"] = _with_open_batch_norm(copy.forward)
    return new[id(module)]


def _apply(module: weakref.ref, fn: Callable, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, of which ``.to()``, ``.float()`` and their like are made, with new
    tensors in the slots. Torch's
    writes to those that are there: to the caller's params, and no gradient goes through a cast."""
    m = module()
    assert m is not None  # its method is being called
    for child in m.children() if recurse else ():
        child._apply(fn)
    for tensors in (m._parameters, m._buffers):
        for key, x in tensors.items():
            converted = None if x is None else fn(x)
            if converted is not x and type(m)._apply is not nn.Module._apply:
                raise ModuleError(
                    f"{type(m).__name__} is converted in forward (.to(), .float() and their like), "
                    f"and refers to {key!r} in more places than one: convert it before from_module"
                )
            tensors[key] = converted
    return m


def _moved(x: Any, new: dict[int, Any]) -> Any:
    """A value of a module with what is new in place of modules and tensors; containers are
    copied."""
    if id(x) in new:
        return new[id(x)]
    kind = type(x)
    if kind is dict or kind is OrderedDict:
        return kind((key, _moved(y, new)) for key, y in x.items()) if x else kind()
    if kind is list or kind is tuple or kind is set:
        return kind([_moved(y, new) for y in x]) if x else kind()
    if kind is MethodType:
        return MethodType(x.__func__, _moved(x.__self__, new))
    if kind is functools.partial:
        return functools.partial(
            _moved(x.func, new), *_moved(x.args, new), **_moved(x.keywords, new)
        )
    return x


# ---- batch normalization


class _OpenBatchNorm(TorchFunctionMode):
    """Batch normalization by an op that returns the new statistics: the usual one changes them, and
    does not say so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.instance_norm:
            return _instance_norm(*args, **(kwargs or {}))
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _may_normalize(m: nn.Module) -> bool:
    """Whether a module's own forward may change running statistics: its own, or those of a norm
    fused with it.

    (Not all of them run under the mode, which costs a microsecond for every call into torch.)
    """
    norms = (m, *m._modules.values())
    if not m.training:
        return isinstance(m, _BatchNorm) and m.running_mean is None
    return bool(m._buffers) or any(isinstance(x, _BatchNorm) for x in norms)


def _with_open_batch_norm(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _OpenBatchNorm():
            return forward(*args, **kwargs)

    return run


def _batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.batch_norm``, with statistics that are seen to change; in training mode a declared batch
    statistic."""
    norm = batch_statistic(F.batch_norm) if training else F.batch_norm
    if not training or running_mean is None or running_var is None:
        return norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.numel() == input.shape[1]:
        raise ModuleError(
            f"batch normalization in training mode got {describe(input)}: one value for each "
            "channel has no variance. To it each microbatch of each shard is a batch of its own: "
            "give those more rows"
        )
    op = batch_statistic(torch.ops.aten._native_batch_norm_legit_functional)
    # Clones: autograd keeps what it is given, and must not see it change.
    out, _, _, mean, var = op(
        input, weight, bias, running_mean.clone(), running_var.clone(), training, momentum, eps
    )
    running_mean.copy_(mean)
    running_var.copy_(var)
    return out


def _instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.instance_norm``; one that changes statistics is refused."""
    if use_input_stats and running_mean is not None:
        raise ModuleError(
            f"instance normalization of {describe(input)} in training mode changes running "
            "statistics unseen: make the module with track_running_stats=False, or set it to eval "
            "mode"
        )
    return F.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


# ---- what a stand-in cannot follow


def check_hooks(has: Slots) -> None:
    """ModuleError where a parameter has hooks of its own."""
    for name, x in (*has.params, *has.buffers):
        for made_by in ("register_hook", "register_post_accumulate_grad_hook"):
            if getattr(x, _HOOKS[made_by]):
                raise ModuleError(
                    f"parameter {name!r} has a hook ({made_by}): plain PyTorch calls it with the "
                    "whole gradient, but in a step each microbatch of each shard has a part of "
                    f"it. Do what the hook does in the step, to grads[{name!r}] as value_and_grad "
                    "returns it, and remove the hook"
                )


def check_references(has: Slots) -> None:
    """ModuleError unless every module and tensor is referred to only where `stand_in` finds it."""
    own = {id(m): f"submodule {path!r}" if path else "the module itself" for path, m in has.modules}
    own |= {id(s.tensor): repr(s.name) for s in (*has.params, *has.buffers)}
    seen: set[tuple[int, bool]] = set()
    for path, m in has.modules:
        for key, x in m.__dict__.items():
            held = None if key in _LOADING else _out_of_reach(x, True, own, seen)
            if held:
                raise ModuleError(
                    f"{f'{path}.{key}' if path else key} is {describe(x)} that holds {held}, where "
                    "a call cannot put other tensors in its place. Keep it in an attribute, list "
                    "or dict; take a module before torch.compile or another wrapper "
                    "(module._orig_mod)"
                )


# ---- buffers that calls of the module itself fill


class Caches:
    """The buffers of a module that are no part of its state dict, and the plain attributes beside
    them, as they are now.

    A module that fills such a buffer on a first call remembers that in an attribute. A call reads
    the attribute as it is then, while its buffers may be of before.

    Args:
        copied: whether the buffers of calls are copies, which do not follow when the module writes
            to its own.
    """

    def __init__(self, has: Slots, copied: bool) -> None:
        self.copied = copied
        self.known = {path: self._of(m) for path, m in has.modules if m._non_persistent_buffers_set}

    def check(self, has: Slots) -> None:
        """ModuleError where an attribute and a buffer of a submodule have changed together."""
        for path, m in has.modules if self.known else ():
            if path not in self.known:
                continue
            attributes, buffers = self._of(m)
            old_attributes, old_buffers = self.known[path]
            changed = [
                k
                for k, x in attributes.items()
                if k not in old_attributes or old_attributes[k] != x
            ]
            filled = [k for k, x in buffers.items() if old_buffers.get(k) != x]
            if changed and filled:
                at = f"{path}." if path else ""
                raise ModuleError(
                    f"apply_fn: a call of the module has filled buffer {at + filled[0]!r} and set "
                    f"{at + changed[0]!r} since from_module, so that the buffers of then do not "
                    "fit the module of now. Call the module first, then from_module"
                )

    def _of(self, m: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        attributes = {k: x for k, x in m.__dict__.items() if type(x) in _LEAVES and k != "training"}
        buffers = {k: m._buffers.get(k) for k in m._non_persistent_buffers_set}
        return attributes, {
            k: (id(x), self._version(x), x) for k, x in buffers.items()
        }  # held, so that ids stay theirs

    def _version(self, x: torch.Tensor | None) -> int | None:
        return x._version if self.copied and x is not None and not x.is_inference() else None


def _out_of_reach(
    x: Any, reached: bool, own: dict[int, str], seen: set[tuple[int, bool]]
) -> str | None:
    """What a value holds of ``own`` where `_moved` does not find it."""
    if id(x) in own:
        return None if reached else own[id(x)]
    if (
        type(x) in _LEAVES
        or (id(x), reached) in seen
        or isinstance(x, type | nn.Module | torch.Tensor)
    ):
        return None
    seen.add((id(x), reached))
    inside, followed = _inside(x)
    return next(
        (found for y in inside if (found := _out_of_reach(y, reached and followed, own, seen))),
        None,
    )


def _inside(x: Any) -> tuple[Iterable[Any], bool]:
    """What a value refers to, and whether `_moved` goes there."""
    kind = type(x)
    if isinstance(x, dict):
        return x.values(), kind is dict or kind is OrderedDict
    if isinstance(x, list | tuple | set | frozenset):
        return x, kind in (list, tuple, set)
    if kind is MethodType:
        return (x.__self__,), True
    if kind is functools.partial:
        return (x.func, *x.args, *x.keywords.values()), True
    if kind is FunctionType:
        return _closure(x), False
    if kind is fx.Graph:  # a call runs the code that was made of it
        return (), False
    return getattr(x, "__dict__", {}).values(), False


def _closure(fn: FunctionType) -> Iterator[Any]:
    for cell in fn.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a cell can be empty
            continue
