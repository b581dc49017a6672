"""Modules as pure functions: any ``nn.Module``, Hugging Face models included.

A submodule has a *path*, as ``named_modules`` has it; a tensor has a *name*, as
``named_parameters`` and ``named_buffers`` have it. Names of one tensor are *tied*: it is one leaf,
under the first of them.

In: a module, and after which of its submodules it may be cut.
Out: a function ``(params, buffers, *inputs) -> (out, new_buffers)``, params and buffers; and the
way back into a module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funcpipe._src.functional import random
from funcpipe._src.functional.batch_statistic import changed_buffer
from funcpipe._src.modules.boundaries import Boundaries, boundary_paths, mark_boundary
from funcpipe._src.modules.buffers import Tensors
from funcpipe._src.modules.caches import Caches
from funcpipe._src.modules.checks import check_module, check_same_buffers, check_tensors
from funcpipe._src.modules.functional_copy import copy_with_tensors
from funcpipe._src.modules.references import check_hooks
from funcpipe._src.modules.slots import Slots, find_slots

ApplyFn = Callable[..., tuple[Any, Tensors]]


def from_module(
    module: nn.Module,
    boundaries: Boundaries = (),
    *,
    copy: bool = False,
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
    >>> layers = [torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)]
    >>> model = torch.nn.Sequential(*layers)
    >>> apply_fn, params, buffers = from_module(model, boundaries=["1"])
    >>> list(params), list(buffers)  # doctest: +NORMALIZE_WHITESPACE
    (['0.weight', '0.bias', '1.weight', '1.bias', '2.weight', '2.bias'],
     ['1.running_mean', '1.running_var', '1.num_batches_tracked'])
    >>> def loss_fn(params, batch):
    ...     y, new_buffers = apply_fn(params, batch["buffers"], batch["x"])
    ...     rows = torch.tensor(float(len(y)))
    ...     means = fp.buffer_means(batch["buffers"], new_buffers, rows)
    ...     return fp.Mean(y.square().sum(), rows), means
    >>> def step(state, batch):
    ...     params, buffers = state
    ...     run = fp.value_and_grad(loss_fn, has_aux=True)
    ...     (loss, means), grads = run(params, {**batch, "buffers": buffers})
    ...     params = optree.tree_map(lambda p, g: p - 0.1 * g, params, grads)
    ...     return (params, fp.update_buffers(buffers, means)), {"loss": loss}
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
    check_module(module)
    paths = boundary_paths(module, boundaries)
    slots = find_slots(module)
    check_hooks(slots)
    caches = Caches(slots, copy)

    def apply_fn(
        params: Tensors,
        buffers: Tensors,
        *args: Any,
        dropout_key: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensors]:
        """Call the module on other parameters and buffers; see `from_module`."""
        slots = find_slots(module)
        check_hooks(slots)
        caches.check(slots)
        check_tensors("apply_fn: params", params, slots.params, slots)
        check_tensors("apply_fn: buffers", buffers, slots.buffers, slots)
        before = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        versions = {name: _version(buffer) for name, buffer in before.items()}
        copied = copy_with_tensors(module, slots, _without_frozen(params, slots) | before)
        if dropout_key is not None:
            _draw_dropout_from(dropout_key, copied)
        for path in paths:
            copied.get_submodule(path).register_forward_hook(mark_boundary)
        out = copied(*args, **kwargs)
        after = {slot.name: slot.tensor for slot in find_slots(copied).buffers}
        check_same_buffers(before, after)
        new_buffers = {}
        for name, buffer in buffers.items():
            unchanged = (
                after[name] is before[name]
                and versions[name] is not None
                and _version(after[name]) == versions[name]
            )
            # A copy, since a checkpoint that recomputes batch normalization changes the statistics
            # once more.
            new_buffers[name] = buffer if unchanged else changed_buffer(after[name])
        return out, new_buffers

    params = {slot.name: _detached(slot.tensor, copy) for slot in slots.params}
    buffers = {slot.name: _detached(slot.tensor, copy) for slot in slots.buffers}
    return apply_fn, params, buffers


def _without_frozen(params: Tensors, slots: Slots) -> Tensors:
    """Params, detached where the module's parameter does not require gradients."""
    found = {}
    for name, parameter in slots.params:
        param = params[name]
        found[name] = param if parameter.requires_grad else param.detach()
    return found


def _draw_dropout_from(key: Tensor, copied: nn.Module) -> None:
    """Let every `nn.Dropout` draw from the key, folded with its path."""
    for path, submodule in copied.named_modules():
        if type(submodule) is nn.Dropout and submodule.training:
            own_key = random.fold_in(key, path)
            submodule.__dict__["forward"] = functools.partial(_dropout, submodule.p, own_key)


def _dropout(rate: float, key: Tensor, x: Tensor) -> Tensor:
    return random.dropout(x, rate, key)


def to_module(
    module: nn.Module,
    params: Tensors,
    buffers: Tensors | None = None,
) -> nn.Module:
    """Write params, and buffers, back into a module, in place.

    Args:
        module: the one they come from, or one with the same names and shapes.
        params, buffers: unsharded, as `from_module` or ``run.unplace`` gave them; any dtype and
            device. Without buffers the module keeps its own.

    Returns:
        the module.

    Raises:
        ModuleError: missing or unexpected names, other shapes; nothing is written then.

    >>> module = torch.nn.Linear(2, 1, bias=False)
    >>> to_module(module, {"weight": torch.tensor([[1.0, 2.0]])}).weight.tolist()
    [[1.0, 2.0]]
    """
    check_module(module)
    slots = find_slots(module)
    check_tensors("to_module: params", params, slots.params, slots)
    if buffers is not None:
        check_tensors("to_module: buffers", buffers, slots.buffers, slots)
    given = params | (buffers or {})
    with torch.no_grad():
        for name, tensor in slots.tensors:
            if name in given:
                tensor.copy_(given[name])
    return module


def _detached(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().clone() if copy else tensor.detach()


def _version(tensor: Tensor) -> int | None:
    """A number that grows when a tensor is changed in place; None under inference mode."""
    return None if tensor.is_inference() else tensor._version
