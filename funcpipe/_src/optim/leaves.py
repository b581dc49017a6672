"""Leaves of params as optimizers see them: which are trained, and which one kernel call may take.

A leaf is trained if it is a floating-point tensor. Every other leaf is frozen.

In: params, and trees with a leaf where params has one (gradients, moments).
Out: lists of leaves in the order of params, or an OptimError that names the path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.core.buffer_donation import writable
from funcpipe.errors import OptimError

Schedule = Callable[[Tensor], Tensor | float]
T = TypeVar("T")


class Factors(NamedTuple):
    """What the learning rate and the weight decay are multiplied by, for one leaf."""

    lr: float = 1.0
    weight_decay: float = 1.0


class Optimizer(NamedTuple):
    """A pair of pure functions.

    Args:
        init: ``params -> opt_state``.
        update: ``(grads, opt_state, params) -> (new_params, new_opt_state)``. `per_leaf` passes a
            fourth argument ``factors``: one `Factors` for each of ``tree.leaves(params)``, or None.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def is_trained(leaf: Any) -> TypeGuard[Tensor]:
    """Whether an optimizer updates a leaf. (A complex leaf counts as trained, to be refused.)"""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def new_step_count(params: Any) -> Tensor:
    """Zero, on the device of the parameters, where kernels read it.

    It is float64: exact for longer than anyone trains, and schedules compute in float64.
    """
    device = None
    for leaf in pytree.leaves(params):
        if is_trained(leaf):
            device = leaf.device
            break
    return torch.zeros((), dtype=torch.float64, device=device)


def zeros_like(params: Any) -> Any:
    """Zeros for every tensor, the frozen ones too: so the state is sharded as the params are."""
    return pytree.map_tensors(lambda leaf: torch.zeros_like(leaf, requires_grad=False), params)


def cached_by_path(fn: Callable[[str], T]) -> Callable[[Any], list[T]]:
    """A function from the structure of a tree to ``fn(path)`` of every leaf.

    Results are cached by structure, because making the paths takes longer than an update.

    >>> cached_by_path(len)(pytree.flatten({"w": 1, "long": 2})[1])
    [8, 5]
    """

    @functools.cache
    def of_structure(spec: Any) -> list[T]:
        numbered = pytree.unflatten(spec, range(spec.num_leaves))
        return [fn(path) for path in pytree.paths(numbered)]

    return of_structure


class LeafGroup(NamedTuple):
    """Trained leaves that one kernel call may take together.

    Args:
        device, dtype: of all of them.
        key: what else they have in common.
        indices: where they stand among the leaves of params.
    """

    device: torch.device
    dtype: torch.dtype
    key: Any
    indices: list[int]

    def select(self, leaves: list[Any]) -> list[Tensor]:
        """The leaves of this group."""
        return [leaves[index] for index in self.indices]

    def assign(self, leaves: list[Any], values: Iterable[Any]) -> None:
        """Replace the leaves of this group."""
        for index, value in zip(self.indices, values, strict=True):
            leaves[index] = value


def _no_key(index: int) -> None:
    return None


def group_leaves(leaves: list[Any], key: Callable[[int], Any] = _no_key) -> list[LeafGroup]:
    """The trained leaves, grouped by device, dtype and the ``key`` of a leaf's index."""
    groups: dict[tuple, LeafGroup] = {}
    for index, leaf in enumerate(leaves):
        if not is_trained(leaf):
            continue
        common = (leaf.device, leaf.dtype, key(index))
        group = groups.setdefault(common, LeafGroup(*common, indices=[]))
        group.indices.append(index)
    return list(groups.values())


def with_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` itself, or a copy if its dtype or its strides are not those of ``like``."""
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like).copy_(tensor)


def writable_with_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy with the strides of ``like``; the tensor itself if it has them and is donated."""
    laid_out = with_layout_of(tensor, like)
    return writable(tensor) if laid_out is tensor else laid_out


def setting_at(step: Tensor, setting: float | Schedule) -> Tensor | float:
    """The value of a setting at a step, be it a number or a schedule."""
    return setting(step) if callable(setting) else setting


def rate_on(
    device: torch.device,
    dtype: torch.dtype,
    rate: Tensor | float,
) -> Any:
    """A rate as leaves of a device and a dtype take it.

    A number stays a number, which needs no copy to the device. A tensor is moved to the leaves,
    with no less precision than theirs.
    """
    if not isinstance(rate, Tensor):
        return float(rate)
    return rate.to(device=device, dtype=torch.promote_types(dtype, torch.float32))


# ---- what is refused


def check_settings(
    optimizer: str,
    lr: float | Schedule,
    **settings: float,
) -> None:
    """OptimError where a setting is negative or NaN."""
    if not callable(lr):
        settings["lr"] = lr
    for name, value in settings.items():
        if not value >= 0.0:
            raise OptimError(f"{optimizer}: {name}={value!r} must not be negative")


def flatten_like(
    params: Any,
    tree: Any,
    name: str,
) -> list[Any]:
    """What ``tree`` has at the leaves of params, subtrees and None included.

    Raises:
        OptimError: the two have other structures.
    """
    spec = pytree.flatten(params)[1]
    try:
        return spec.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise OptimError(_structure_error(params, tree, name, str(error))) from None


def matching_leaves(
    params: Any,
    tree: Any,
    name: str,
    same_dtype: bool = False,
) -> list[Any]:
    """The leaves of ``tree`` in the order of those of ``params``.

    Raises:
        OptimError: another structure; a trained leaf without a tensor of its shape and device.
    """
    leaves = pytree.leaves(params)
    others = flatten_like(params, tree, name)
    for index, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        if is_trained(leaf) and not _matches(leaf, other, same_dtype):
            path = pytree.paths(params)[index]
            raise OptimError(_leaf_error(path, leaf, other, name))
    return others


def _structure_error(
    params: Any,
    tree: Any,
    name: str,
    error: str,
) -> str:
    """The first leaf that only one of the trees has; else what optree says."""
    params_paths = pytree.paths(params)
    tree_paths = pytree.paths(tree)
    for path in params_paths:
        if not any(other.startswith(path) for other in tree_paths):
            return f"{name} has no leaf {path}, but params has one; both need the same tree"
    for path in tree_paths:
        if not any(path.startswith(other) for other in params_paths):
            return f"{name} has a leaf {path}, but params has none; both need the same tree"
    return f"{name} and params are different trees: {error}"


def _matches(
    leaf: Tensor,
    other: Any,
    same_dtype: bool,
) -> bool:
    if leaf.is_complex() or not isinstance(other, Tensor):
        return False
    if same_dtype and other.dtype != leaf.dtype:
        return False
    return other.shape == leaf.shape and other.device == leaf.device


def _leaf_error(
    path: str,
    leaf: Tensor,
    other: Any,
    name: str,
) -> str:
    if leaf.is_complex():
        return (
            f"params{path} is complex; keep torch.view_as_real of it: the kernels compute with "
            "real numbers only"
        )
    wanted = f"params{path} is {_describe(leaf)}"
    if other is None:
        return f"{name}{path} is None, but {wanted}; give zeros for an unused leaf"
    return f"{name}{path} is {_describe(other)}, but {wanted}"


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"of type {type(leaf).__name__}"
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)} on {leaf.device}"
