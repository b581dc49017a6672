"""Leaves of params as optimizers see them: which are trained, which belong together, how they lie
in memory.

Terms. A leaf is *trained* if it is a floating-point (or complex) tensor; all others are frozen. A
tree *beside* params has a
leaf where params has one: gradients, moments. Leaves of one *group* go through one call of a
kernel. *Factors* are what the settings of an optimizer are multiplied by for one leaf.

In: params, and trees beside them. Out: lists of leaves in the order of params, or an OptimError
that names the path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import writable
from funcpipe.errors import OptimError

Schedule = Callable[[torch.Tensor], torch.Tensor | float]
T = TypeVar("T")


class Factors(NamedTuple):
    """What the learning rate and the weight decay are multiplied by, for one leaf."""

    lr: float = 1.0
    weight_decay: float = 1.0


class Optimizer(NamedTuple):
    """A pair of pure functions.

    Args:
        init: ``params -> opt_state``.
        update: ``(grads, opt_state, params) -> (new_params, new_opt_state)``. A fourth argument
            ``factors``, one `Factors` for each of ``tree.leaves(params)`` or None, is what
            `per_leaf` calls it with.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def trained(leaf: Any) -> TypeGuard[torch.Tensor]:
    """Whether a leaf is trained."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def step_of(params: Any) -> torch.Tensor:
    """A new step count, where the parameters are: read on the device. In float64 it is exact for
    longer than anyone trains, and schedules compute in float64."""
    device = next((leaf.device for leaf in tree.leaves(params) if trained(leaf)), None)
    return torch.zeros((), dtype=torch.float64, device=device)


def zeros_like(params: Any) -> Any:
    """Zeros for every tensor, frozen ones too, so that the state of a leaf is sharded as the leaf
    is."""
    return tree.map_tensors(lambda leaf: torch.zeros_like(leaf, requires_grad=False), params)


def by_path(fn: Callable[[str], T]) -> Callable[[Any], list[T]]:
    """From the structure of a tree to ``fn`` of every leaf's path; remembered, since paths take
    longer than an update.

    >>> by_path(len)(tree.flatten({"w": 1, "long": 2})[1])
    [8, 5]
    """

    @functools.cache
    def of(spec: Any) -> list[T]:
        return [fn(path) for path in tree.paths(tree.unflatten(spec, range(spec.num_leaves)))]

    return of


def groups(params: list[Any], key: Callable[[int], Any] = lambda i: None) -> dict[tuple, list[int]]:
    """Which trained leaves one kernel call may take together: one device, one dtype, one key (of
    the leaf's number)."""
    out: dict[tuple, list[int]] = {}
    for i, leaf in enumerate(params):
        if trained(leaf):
            out.setdefault((leaf.device, leaf.dtype, key(i)), []).append(i)
    return out


def pick(leaves: list[Any], numbers: list[int]) -> list[torch.Tensor]:
    """The leaves of these numbers."""
    return [leaves[i] for i in numbers]


def put(leaves: list[Any], numbers: list[int], values: Any) -> None:
    """Set the leaves of these numbers."""
    for i, value in zip(numbers, values, strict=True):
        leaves[i] = value


def laid_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` itself, or a copy if its dtype or its strides are not those of ``like``."""
    same = x.dtype == like.dtype and x.stride() == like.stride()
    return x if same else torch.empty_like(like).copy_(x)


def fresh(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` with the strides of ``like``, or ``x`` itself if it lies so and is
    donated."""
    y = laid_out(x, like)
    return writable(x) if y is x else y


def scheduled(value: float | Schedule, step: torch.Tensor) -> torch.Tensor | float:
    """A setting at a step."""
    return value(step) if callable(value) else value


def rate_on(device: torch.device, dtype: torch.dtype, rate: torch.Tensor | float) -> Any:
    """A rate as leaves of a dtype take it: a number stays a number (no copy to the device); a
    tensor goes where they are, with no less precision than theirs."""
    if not isinstance(rate, torch.Tensor):
        return float(rate)
    return rate.to(device=device, dtype=torch.promote_types(dtype, torch.float32))


# ---- what is refused


def check_settings(who: str, lr: float | Schedule, **settings: float) -> None:
    """OptimError where a setting is negative or NaN."""
    if not callable(lr):
        settings["lr"] = lr
    for name, value in settings.items():
        if not value >= 0.0:
            raise OptimError(f"{who}: {name}={value!r} must not be negative")


def up_to(params: Any, other: Any, who: str) -> list[Any]:
    """What ``other`` has at the leaves of params, subtrees and None included; OptimError where the
    trees differ."""
    try:
        return tree.flatten(params)[1].flatten_up_to(other)
    except (ValueError, TypeError) as error:
        raise OptimError(_difference(params, other, who, str(error))) from None


def leaves_beside(params: Any, other: Any, who: str, same_dtype: bool = False) -> list[Any]:
    """The leaves of ``other`` in the order of those of ``params``; OptimError where the two do not
    fit."""
    leaves, beside = tree.leaves(params), up_to(params, other, who)
    for i, (p, x) in enumerate(zip(leaves, beside, strict=True)):
        if trained(p) and _misfit("", p, x, who, same_dtype):
            raise OptimError(_misfit(tree.paths(params)[i], p, x, who, same_dtype))
    return beside


def _difference(params: Any, other: Any, who: str, error: str) -> str:
    """What to say of two trees of which the one does not fit upon the other."""
    mine, theirs = tree.paths(params), tree.paths(other)
    lost = [path for path in mine if not any(t.startswith(path) for t in theirs)]
    added = [path for path in theirs if not any(path.startswith(m) for m in mine)]
    if lost or added:
        what = (
            f"no leaf {lost[0]}, but params has one"
            if lost
            else f"a leaf {added[0]}, but params has none"
        )
        return f"{who} has {what}; both need the same tree"
    return f"{who} and params are different trees: {error}"


def _misfit(path: str, p: torch.Tensor, x: Any, who: str, same_dtype: bool) -> str | None:
    if p.is_complex():
        return (
            f"params{path} is complex; keep torch.view_as_real of it: the kernels know real "
            "numbers only"
        )
    if x is None:
        return f"{who}{path} is None, but params{path} is {_text(p)}; give zeros for an unused leaf"
    fits = isinstance(x, torch.Tensor) and x.shape == p.shape and x.device == p.device
    if not fits or (same_dtype and x.dtype != p.dtype):
        return f"{who}{path} is {_text(x)}, but params{path} is {_text(p)}"
    return None


def _text(x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return f"of type {type(x).__name__}"
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
