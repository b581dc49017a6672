"""Modules as pure functions: any ``nn.Module``, Hugging Face models included, over dicts of
tensors.

Terms. A *path* names a submodule as ``named_modules`` does, a *name* a tensor as
``named_parameters`` and ``named_buffers`` do. *Tied* names are several names of one tensor: it is
one leaf, under the first of them.

In: a module, and after which of its submodules it may be cut. Out: a function ``(params, buffers,
*inputs) -> (out, new_buffers)``, params and buffers; and the way back into a module.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import Mean
from funcpipe._src.core.primitives.stage_boundary import stage_boundary
from funcpipe._src.functional import random
from funcpipe._src.functional.batch_statistic import changed_buffer
from funcpipe._src.modules.functional_copy import (
    Caches,
    Slot,
    Slots,
    check_hooks,
    check_references,
    slots,
    stand_in,
)
from funcpipe.errors import ModuleError

Tensors = dict[str, torch.Tensor]
ApplyFn = Callable[..., tuple[Any, Tensors]]
Boundaries = Iterable[str] | Callable[[str, nn.Module], bool]


# ---- a module as a function, and back


def from_module(
    module: nn.Module, boundaries: Boundaries = (), *, copy: bool = False
) -> tuple[ApplyFn, Tensors, Tensors]:
    """A module as a pure function of its parameters and buffers.

    Args:
        module: any module; it is not changed. What it is at the time of a call counts, such as
            train or eval mode.
        boundaries: after which submodules `stage_boundary` is put: paths, in which ``*``, ``?`` and
            ``[]`` stand for anything but a dot (``["model.layers.*"]``), or a predicate ``(path,
            submodule) -> bool``. There is none for "before": name the submodule that runs before.
        copy: whether params and buffers get memory of their own, instead of the module's.

    Returns:
        ``(apply_fn, params, buffers)``. ``apply_fn(params, buffers, *args, **kwargs)`` calls the
        module and returns ``(out, new_buffers)``. ``params`` and ``buffers`` are dicts from names
        to detached tensors, in any dtype as long as the shapes are the module's; a tied parameter
        is one leaf, read under all its names. Parameters that do not require gradients in the
        module get zeros. A buffer that the call changed (in place or by assignment) is another
        tensor in ``new_buffers``, the others are those that were passed in.

    Raises:
        ModuleError: a boundary that matches nothing; parameters that are not there yet (lazy),
            share memory without being tied, are expanded, or have hooks of their own; a submodule
            that the module refers to where no copy can follow, as ``torch.compile`` and wrappers of
            ``forward`` do. In a call: params or buffers with missing or unexpected names or other
            shapes; a buffer that appears or vanishes; a cache that the module itself has filled
            since.

    In a step, params are the params; buffers have no gradient, so they go through the batch, whole
    (``dims={"x": 0, "buffers": None}``), and live in the state if they change:

    >>> import optree
    >>> import funcpipe as fp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    >>> apply_fn, params, buffers = from_module(model, boundaries=["1"])
    >>> list(params), list(buffers)  # doctest: +NORMALIZE_WHITESPACE
    (['0.weight', '0.bias', '1.weight', '1.bias', '2.weight', '2.bias'],
     ['1.running_mean', '1.running_var', '1.num_batches_tracked'])
    >>> def loss_fn(params, batch):
    ...     y, new_buffers = apply_fn(params, batch["buffers"], batch["x"])
    ...     rows = torch.tensor(float(len(y)))
    ...     return fp.Mean(y.square().sum(), rows), buffer_means(batch["buffers"], new_buffers, rows)
    >>> def step(state, batch):
    ...     params, buffers = state
    ...     run = fp.value_and_grad(loss_fn, has_aux=True)
    ...     (loss, means), grads = run(params, {**batch, "buffers": buffers})
    ...     params = optree.tree_map(lambda p, g: p - 0.1 * g, params, grads)
    ...     return (params, update_buffers(buffers, means)), {"loss": loss}
    >>> (params, buffers), _ = step((params, buffers), {"x": torch.ones(4, 2)})
    >>> buffers["1.num_batches_tracked"]
    tensor(1)
    >>> model = to_module(model, params, buffers)

    To batch normalization each microbatch of each shard is a batch of its own, as anywhere in
    funcpipe; `buffer_means` averages what they make of the running statistics. ``F.batch_norm`` in
    training mode is run by the native kernel, also on GPUs, because cuDNN's hides that it changes
    the statistics.

    With ``dropout_key``, a key for every row (`fp.random.keys`, a leaf of the batch), every
    ``nn.Dropout`` in train mode is `fp.random.dropout` with that key folded with its path:
    ``apply_fn(params, buffers, x, dropout_key=batch["key"])``. Without it, and for dropout that a
    module calls as a function, a transformed step refuses randomness.

    A call runs on a copy of its own (`functional_copy.py`), which holds the same Python values as
    the module: tensors that are neither parameters nor buffers are closed over (register them as
    buffers), and attributes that the call sets are gone after it. Other Python objects, classes and
    functions that keep tensors (tables, an ``lru_cache``) are put back after each run on fakes, so
    that a plan leaves no trace in the module. Forward and full backward hooks of modules are
    called; those of saving and loading are not.

    Hugging Face models (transformers 5; Llama, GPT-2 and T5 are tested):
    ``attn_implementation="sdpa"`` or ``"eager"``; no dropout in the config, or eval mode;
    ``use_cache=False`` in the call (where the sequence is split: ``use_cache=True``, so that no
    mask is made from the length of a slice, and ``position_ids`` from the batch). Sum the loss over
    ``out.logits`` yourself, and
    shift the labels outside: with ``labels=`` the model returns a mean, which is refused where the
    batch is split. T5 takes ``decoder_input_ids`` then. ``attention_mask`` and ``position_ids``
    come through the batch, where rows are padded or packed; without them attention is causal
    without a mask, which is faster. Checkpointing of layers takes ``{"use_reentrant": False}``.
    Boundaries are ``["model.layers.*"]``, ``["transformer.h.*"]``, and ``["encoder.block.*",
    "decoder.block.*"]``, where what the encoder found travels past the decoder's stages by itself.

    Reference:
        ``torch.func.functional_call``; flax's ``module.apply(variables, *inputs, mutable=...)``.
    """
    _check_module(module)
    paths = _boundary_paths(module, boundaries)
    has = slots(module)
    check_hooks(has)
    caches = Caches(has, copy)
    params, buffers = (
        {x.name: _own(x.tensor, copy) for x in some} for some in (has.params, has.buffers)
    )

    def apply_fn(
        params: Tensors,
        buffers: Tensors,
        *args: Any,
        dropout_key: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensors]:
        """Call the module on other parameters and buffers; see `from_module`."""
        has = slots(module)
        check_hooks(has)
        caches.check(has)
        _check_tensors("apply_fn: params", params, has.params, has)
        _check_tensors("apply_fn: buffers", buffers, has.buffers, has)
        trained = {
            x.name: params[x.name] if x.tensor.requires_grad else params[x.name].detach()
            for x in has.params
        }
        before = {name: x.detach().clone() for name, x in buffers.items()}
        versions = {name: _version(x) for name, x in before.items()}
        copied = stand_in(module, has, trained | before)
        if dropout_key is not None:
            _with_keys(copied, dropout_key)
        for path in paths:
            copied.get_submodule(path).register_forward_hook(_mark)
        out = copied(*args, **kwargs)
        after = {x.name: x.tensor for x in slots(copied).buffers}
        _check_same_buffers(before, after)
        same = {
            name
            for name, x in after.items()
            if x is before[name] and _version(x) == versions[name] is not None
        }
        # Clones, since a checkpoint that recomputes batch normalization changes the statistics once
        # more.
        return out, {
            name: x if name in same else changed_buffer(after[name]) for name, x in buffers.items()
        }

    return apply_fn, params, buffers


def _with_keys(copied: nn.Module, key: torch.Tensor) -> None:
    """Let every `nn.Dropout` draw from the key, folded with its path."""
    for path, m in copied.named_modules():
        if type(m) is nn.Dropout and m.training:
            m.__dict__["forward"] = functools.partial(_dropout, m.p, random.fold_in(key, path))


def _dropout(rate: float, key: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return random.dropout(x, rate, key)


def to_module(module: nn.Module, params: Tensors, buffers: Tensors | None = None) -> nn.Module:
    """Write params, and buffers, back into a module, in place.

    Args:
        module: the one they come from, or one with the same names and shapes.
        params, buffers: whole, as `from_module` or ``run.unplace`` gave them; any dtype and device.
            Without buffers the module keeps its own.

    Returns:
        the module.

    Raises:
        ModuleError: missing or unexpected names, other shapes; nothing is written then.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> to_module(module, {"weight": torch.tensor([[1.0, 2.0]])}).weight.tolist()
    [[1.0, 2.0]]
    """
    _check_module(module)
    has = slots(module)
    _check_tensors("to_module: params", params, has.params, has)
    if buffers is not None:
        _check_tensors("to_module: buffers", buffers, has.buffers, has)
    given = params | (buffers or {})
    with torch.no_grad():
        for x in (*has.params, *has.buffers):
            if x.name in given:
                x.tensor.copy_(given[x.name])
    return module


# ---- buffers that change, through a loss whose batch is split


def buffer_means(buffers: Tensors, new_buffers: Tensors, weight: torch.Tensor) -> dict[str, Mean]:
    """The buffers that a call changed, as aux of a loss function: their mean over microbatches and
    shards.

    Args:
        buffers, new_buffers: what ``apply_fn`` of `from_module` took and gave.
        weight: how much this part of the batch counts, such as its number of rows: a 0-d tensor,
            from the batch alone.

    Returns:
        a `Mean` for every changed buffer, with the buffer's shape; integers are averaged in
        float64.

    The mean of running variances is that of the variances within microbatches, as in gradient
    accumulation elsewhere. A count of batches grows by one for a step, not for a microbatch.

    >>> old = {"mean": torch.zeros(2), "table": torch.ones(3)}
    >>> buffer_means(old, old | {"mean": torch.tensor([1.0, 2.0])}, torch.tensor(4.0))
    {'mean': Mean(total=tensor([4., 8.]), weight=tensor(4.))}
    """
    changed = {name: x for name, x in new_buffers.items() if x is not buffers[name]}
    return {name: Mean(_as_float(x) * weight, weight) for name, x in changed.items()}


def update_buffers(buffers: Tensors, means: Tensors) -> Tensors:
    """The buffers after a step.

    Args:
        buffers: those before it.
        means: what became of `buffer_means`, as ``value_and_grad`` returned it.

    Returns:
        all buffers, in their old dtypes (integers rounded).

    >>> update_buffers({"seen": torch.tensor(2), "w": torch.ones(1)}, {"seen": torch.tensor(2.9999999)})
    {'seen': tensor(3), 'w': tensor([1.])}
    """
    return {
        name: _as_dtype(means[name], x.dtype) if name in means else x for name, x in buffers.items()
    }


def _own(x: torch.Tensor, copy: bool) -> torch.Tensor:
    return x.detach().clone() if copy else x.detach()


def _version(x: torch.Tensor) -> int | None:
    """A number that grows when a tensor is changed in place; None under inference mode, where
    nobody counts."""
    return None if x.is_inference() else x._version


def _as_float(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_floating_point() or x.is_complex() else x.double()


def _as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if dtype.is_floating_point or dtype.is_complex else x.round().to(dtype)


# ---- boundaries


def _mark(module: nn.Module, args: Any, out: Any) -> Any:
    """A forward hook: a boundary. (Torch's pytrees know the outputs of Hugging Face models.)"""
    leaves, spec = pytree.tree_flatten(out)
    return pytree.tree_unflatten(stage_boundary(leaves), spec)


def _boundary_paths(module: nn.Module, boundaries: Boundaries) -> list[str]:
    """The paths of the submodules after which there is a boundary, each submodule once."""
    submodules = {path: m for path, m in module.named_modules(remove_duplicate=False) if path}
    if callable(boundaries):
        found = [path for path, m in submodules.items() if boundaries(path, m)]
        if not found:
            raise ModuleError(
                "from_module: boundaries, a predicate, is true of no submodule: there is nowhere "
                "to cut"
            )
    elif isinstance(boundaries, str):
        raise ModuleError(
            f"from_module: boundaries={boundaries!r}; write a list of paths: [{boundaries!r}]"
        )
    else:
        found = [path for pattern in boundaries for path in _matching(pattern, list(submodules))]
    once = {id(submodules[path]): path for path in reversed(found)}
    for path in once.values():
        if type(submodules[path]).forward is nn.Module.forward:
            raise ModuleError(
                f"from_module: boundary {path!r} is a {type(submodules[path]).__name__}, which "
                f"holds submodules and is never called itself; write '{path}.*' for what is in it"
            )
    return list(once.values())


def _matching(pattern: str, paths: list[str]) -> list[str]:
    """The paths that a pattern matches, part by part."""
    parts = pattern.split(".")
    same_depth = [path for path in paths if path.count(".") + 1 == len(parts)]
    found = [path for path in same_depth if all(map(fnmatchcase, path.split("."), parts))]
    if not found:
        some = ", ".join(map(repr, paths[:8])) + ", ..." * (len(paths) > 8)
        raise ModuleError(
            f"from_module: boundary {pattern!r} matches no submodule. A path is one of "
            "named_modules(), and * stands for what is between two dots; this module has "
            f"{some or 'no submodules'}"
        )
    return found


# ---- what is refused


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise ModuleError(
            "from_module and to_module take a torch.nn.Module written in Python, not "
            f"{describe(module)}"
        )
    has = slots(module)
    for x in (*has.params, *has.buffers):
        if is_lazy(x.tensor):
            raise ModuleError(
                f"{x.name!r} has no shape yet (a lazy module): call the module once on an example "
                "input first"
            )
    for path, m in has.modules:
        if isinstance(m, nn.SyncBatchNorm):
            raise ModuleError(
                f"submodule {path!r} is a SyncBatchNorm, which talks to all ranks of "
                "torch.distributed, while a loss function is written for one device: use "
                "nn.BatchNorm1d, 2d or 3d, or fp.psum over a named axis"
            )
    _check_memory(has.params)
    check_references(has)


def _check_memory(params: list[Slot]) -> None:
    """ModuleError unless every element of every parameter is a number of its own."""
    for x in params:
        if any(
            n > 1 and stride == 0
            for n, stride in zip(x.tensor.shape, x.tensor.stride(), strict=True)
        ):
            raise ModuleError(
                f"parameter {x.name!r} of shape {tuple(x.tensor.shape)} is expanded: several of "
                "its elements are one number in memory, which as a leaf they would not stay. Make "
                "a parameter of what was expanded; expand it in forward"
            )
    spans = sorted(
        (*_span(x.tensor), x.name) for x in params if x.tensor.numel() and not x.tensor.is_meta
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ModuleError(
                f"parameters {one!r} and {other!r} are views of the same memory: as two leaves "
                "they would go apart. To tie them, assign one nn.Parameter to both names; else "
                "clone one"
            )


def _span(x: torch.Tensor) -> tuple[int, int]:
    """From which byte to which a tensor reaches."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check_tensors(what: str, given: Any, wanted: list[Slot], has: Slots) -> None:
    """ModuleError unless a dict has a tensor of the right shape for every slot, and nothing
    else."""
    if not isinstance(given, dict):
        call = (
            "apply_fn(params, buffers, *inputs)"
            if what.startswith("apply_fn")
            else "to_module(module, params, buffers)"
        )
        raise ModuleError(
            f"{what} is {describe(given)}, not a dict from names to tensors; the call is {call}"
        )
    shapes = {x.name: x.tensor.shape for x in wanted}
    if missing := [name for name in shapes if name not in given]:
        raise ModuleError(
            f"{what} lacks {_some(missing)}: give a tensor for every name that from_module gave"
        )
    if unexpected := [name for name in given if name not in shapes]:
        raise ModuleError(f"{what} has {_some(unexpected)}: {_why(unexpected[0], has)}")
    for name, shape in shapes.items():
        if not isinstance(given[name], torch.Tensor) or given[name].shape != shape:
            raise ModuleError(
                f"{what}[{name!r}] is {describe(given[name])}, but the module's has shape "
                f"{tuple(shape)}; what a rank holds of a state is made whole by run.unplace(state)"
            )


def _why(name: str, has: Slots) -> str:
    """Why a name is not expected."""
    path, _, key = str(name).rpartition(".")
    for x in (*has.params, *has.buffers):
        if x.name == name:
            return "the module has it, but params and buffers are two dicts"
        for other, m in has.modules:
            if other == path and (m._parameters | m._buffers).get(key) is x.tensor:
                return f"it is tied, and one leaf under its first name, {x.name!r}"
    return "the module has no tensor of that name"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _check_same_buffers(before: Tensors, after: Tensors) -> None:
    for name in (*before, *after):
        was, now = before.get(name), after.get(name)
        if was is None or now is None or was.shape != now.shape:
            raise ModuleError(
                f"apply_fn: buffer {name!r} is {describe(was)} before the call and {describe(now)} "
                "after it, but a state keeps its structure: register every buffer in __init__, in "
                "the shape that it keeps"
            )
