"""Leaf by leaf: which leaves are trained, and how fast.

A leaf is chosen by its path in params, as code: ``"['blocks'][0]['w']"``. On a mesh a rank holds
some of the leaves, under the same paths, so every rank chooses alike. The functions of a path have
to be pure, because each is called once for a tree.

In: an `Optimizer` and functions of a path.
Out: an `Optimizer`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.optim.leaves import Factors, Optimizer, cached_by_path, flatten_like
from funcpipe.errors import OptimError


def freeze(optimizer: Optimizer, frozen: Callable[[str], bool]) -> Optimizer:
    """Leave some leaves as they are: no update, no weight decay, and no moments in the state.

    Args:
        optimizer: trains all other leaves.
        frozen: from a leaf's path to whether it is frozen.

    Returns:
        an `Optimizer`. Its state is that of ``optimizer`` for params in which frozen leaves are
        None.

    The gradient of a frozen leaf may be None. `value_and_grad` gives it one all the same, and a
    global norm counts it: ``detach`` the leaf in the loss function, and no time is spent on it
    either.

    Example:
        >>> from funcpipe.optim import sgd
        >>> optimizer = freeze(sgd(lr=0.5, momentum=0.9), lambda path: "head" in path)
        >>> params = {"head": torch.ones(2), "w": torch.ones(2)}
        >>> optimizer.init(params).momentum
        {'head': None, 'w': tensor([0., 0.])}
        >>> optimizer.update(params, optimizer.init(params), params)[0]
        {'head': tensor([1., 1.]), 'w': tensor([0.5000, 0.5000])}

    Reference:
        ``requires_grad_(False)`` of torch.nn; ``optax.transforms.freeze``
    """
    is_frozen = cached_by_path(frozen)

    def without_frozen(spec: Any, leaves: list[Any]) -> Any:
        pairs = zip(leaves, is_frozen(spec), strict=True)
        return spec.unflatten(None if skip else leaf for leaf, skip in pairs)

    def init(params: Any) -> Any:
        leaves, spec = pytree.flatten(params)
        with _device_of(leaves):  # for a step count beside leaves that are all frozen
            return optimizer.init(without_frozen(spec, leaves))

    def update(
        grads: Any,
        state: Any,
        params: Any,
        factors: Sequence[Factors] | None = None,
    ) -> tuple[Any, Any]:
        leaves, spec = pytree.flatten(params)
        skips = is_frozen(spec)
        trained_grads = without_frozen(spec, flatten_like(params, grads, "grads"))
        trained_params = without_frozen(spec, leaves)
        if factors is None:
            new, state = optimizer.update(trained_grads, state, trained_params)
        else:
            trained_factors = [
                factor for factor, skip in zip(factors, skips, strict=True) if not skip
            ]
            new, state = optimizer.update(trained_grads, state, trained_params, trained_factors)
        updated = iter(pytree.leaves(new))
        merged = []
        for leaf, skip in zip(leaves, skips, strict=True):
            merged.append(_detached(leaf) if skip else next(updated))
        return spec.unflatten(merged), state

    return Optimizer(init, update)


def _device_of(leaves: list[Any]) -> torch.device:
    """The device of the first tensor; torch's default device if there is none."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            return leaf.device
    return torch.get_default_device()


def _detached(leaf: Any) -> Any:
    """A frozen leaf without its graph, as updated leaves have none."""
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _one(path: str) -> float:
    return 1.0


def per_leaf(
    optimizer: Optimizer,
    lr: Callable[[str], float] = _one,
    weight_decay: Callable[[str], float] = _one,
) -> Optimizer:
    """Learning rates and weight decays that differ between leaves.

    Args:
        optimizer: `adamw`, `sgd`, a pair `from_optax` (``lr`` alone), or one of these in a
            `freeze`.
        lr: from a leaf's path to what its learning rate is multiplied by, 0 or more; 1 by default.
        weight_decay: the same for the weight decay, where ``optimizer`` decays the leaf at all (see
            ``decay`` of `adamw`).

    Returns:
        an `Optimizer` with the state of ``optimizer``, in the same layout whatever the factors are.
        One kernel call serves all leaves of the same factors.

    Raises:
        OptimError: ``optimizer`` takes no factors; in ``update``, a factor that is no number of 0
        or more, with the path.

    Example:
        >>> from funcpipe.optim import sgd
        >>> optimizer = per_leaf(sgd(lr=0.5), lr=lambda path: 0.5 if "head" in path else 1.0)
        >>> params = {"head": torch.ones(2), "w": torch.ones(2)}
        >>> optimizer.update(params, optimizer.init(params), params)[0]
        {'head': tensor([0.7500, 0.7500]), 'w': tensor([0.5000, 0.5000])}

    Reference:
        parameter groups of torch.optim; layer-wise rates: Howard & Ruder, ULMFiT, 2018,
        https://arxiv.org/abs/1801.06146
    """
    if "factors" not in inspect.signature(optimizer.update).parameters:
        raise OptimError(
            "per_leaf: the update of this optimizer takes no factors; write it as update(grads, "
            "state, params, factors=None), with one fp.optim.Factors for each leaf of params"
        )

    @cached_by_path
    def own_factors(path: str) -> Factors:
        return Factors(
            lr=_checked("lr", path, lr(path)),
            weight_decay=_checked("weight_decay", path, weight_decay(path)),
        )

    def update(
        grads: Any,
        state: Any,
        params: Any,
        factors: Sequence[Factors] | None = None,
    ) -> tuple[Any, Any]:
        products = own_factors(pytree.flatten(params)[1])
        if factors is not None:
            products = [_product(*pair) for pair in zip(products, factors, strict=True)]
        return optimizer.update(grads, state, params, products)

    return Optimizer(optimizer.init, update)


def _product(inner: Factors, outer: Factors) -> Factors:
    return Factors(inner.lr * outer.lr, inner.weight_decay * outer.weight_decay)


def _checked(
    name: str,
    path: str,
    factor: Any,
) -> float:
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 0.0 <= factor < math.inf:
        raise OptimError(
            f"per_leaf: {name} of params{path} is {factor!r}; a factor is a number, 0 or more"
        )
    return float(factor)
