"""Leaf by leaf: which leaves are trained, and how fast.

A leaf is chosen by its path in params, as code: ``"['blocks'][0]['w']"``. On a mesh a rank holds
some of the leaves, under the same paths, so every rank chooses alike. The functions of a path have
to be pure: they are asked once for a tree.

In: an `Optimizer` and functions of a path. Out: an `Optimizer`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.optim.leaves import Factors, Optimizer, by_path, up_to
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
    trained_leaves = by_path(lambda path: not frozen(path))

    def shown(params: Any, leaves: list[Any]) -> Any:
        spec = tree.flatten(params)[1]
        return spec.unflatten(
            x if t else None for x, t in zip(leaves, trained_leaves(spec), strict=True)
        )

    def init(params: Any) -> Any:
        leaves = tree.leaves(params)
        device = next(
            (x.device for x in leaves if isinstance(x, torch.Tensor)), torch.get_default_device()
        )
        with device:  # of a step count beside leaves that are all frozen
            return optimizer.init(shown(params, leaves))

    def update(
        grads: Any, state: Any, params: Any, factors: Sequence[Factors] | None = None
    ) -> tuple[Any, Any]:
        p, spec = tree.flatten(params)
        kept = trained_leaves(spec)
        rest = () if factors is None else ([f for f, t in zip(factors, kept, strict=True) if t],)
        g = up_to(params, grads, "grads")
        new, state = optimizer.update(shown(params, g), state, shown(params, p), *rest)
        moved = iter(tree.leaves(new))
        return spec.unflatten(
            next(moved) if t else _still(x) for x, t in zip(p, kept, strict=True)
        ), state

    return Optimizer(init, update)


def _still(x: Any) -> Any:
    """The leaf itself; without its graph, as trained leaves have none."""
    return x.detach() if isinstance(x, torch.Tensor) and x.requires_grad else x


def per_leaf(
    optimizer: Optimizer,
    lr: Callable[[str], float] = lambda path: 1.0,
    weight_decay: Callable[[str], float] = lambda path: 1.0,
) -> Optimizer:
    """Learning rates and weight decays that differ between leaves.

    Args:
        optimizer: `adamw`, `sgd`, a pair `from_optax` (``lr`` alone), or one of these in a
            `freeze`.
        lr: from a leaf's path to what its learning rate is multiplied by: 0 or more.
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
    of = by_path(
        lambda path: Factors(
            _checked("lr", path, lr(path)), _checked("weight_decay", path, weight_decay(path))
        )
    )

    def update(
        grads: Any, state: Any, params: Any, factors: Sequence[Factors] | None = None
    ) -> tuple[Any, Any]:
        mine = of(tree.flatten(params)[1])
        if factors is not None:
            mine = [
                Factors(a.lr * b.lr, a.weight_decay * b.weight_decay)
                for a, b in zip(mine, factors, strict=True)
            ]
        return optimizer.update(grads, state, params, mine)

    return Optimizer(optimizer.init, update)


def _checked(name: str, path: str, factor: Any) -> float:
    if (
        isinstance(factor, bool)
        or not isinstance(factor, int | float)
        or not 0.0 <= factor < math.inf
    ):
        raise OptimError(
            f"per_leaf: {name} of params{path} is {factor!r}; a factor is a number, 0 or more"
        )
    return float(factor)
