"""Optimizers of other libraries.

In: a pair of functions of optax's shape.
Out: an `Optimizer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.optim.leaves import (
    Factors,
    Optimizer,
    is_trained,
    matching_leaves,
    with_layout_of,
)
from funcpipe.errors import OptimError


def from_optax(pair: Any) -> Optimizer:
    """The optimizer of an optax-shaped pair, such as ``torchopt.adam(1e-3)`` or a chain of them.

    Args:
        pair: ``(init, update)`` with ``update(grads, state, params=...) -> (updates, state)``, in
            which the new parameters are ``params + updates``. It sees ``None`` for leaves that are
            absent or frozen, and must touch leaves elementwise if they are to be sharded. Its
            argument ``inplace``, as torchopt has it, is set to False.

    Returns:
        an `Optimizer` with the state of the pair.

    Raises:
        OptimError: ``pair`` is not a pair of functions; in ``update``, trees that do not fit, with
        the path.

    Example:
        >>> def descend(grads, state, params):
        ...     return [-g for g in grads], state
        >>> from_optax((lambda params: (), descend)).update([torch.ones(2)], (), [torch.ones(2)])
        ([tensor([0., 0.])], ())

    Reference:
        DeepMind et al., optax, https://optax.readthedocs.io; Ren et al., TorchOpt,
        https://arxiv.org/abs/2211.06934
    """
    try:
        pair_init, pair_update = pair
        takes_inplace = "inplace" in inspect.signature(pair_update).parameters
    except (TypeError, ValueError):
        raise OptimError(
            "from_optax takes a pair of functions (init, update), such as torchopt.adam(1e-3); "
            f"got {pair!r}"
        ) from None
    not_in_place = {"inplace": False} if takes_inplace else {}

    def init(params: Any) -> Any:
        return pair_init(pytree.map(_trained_or_none, params))

    @torch.no_grad()
    def update(
        grads: Any,
        state: Any,
        params: Any,
        factors: Sequence[Factors] | None = None,
    ) -> tuple[Any, Any]:
        leaves, spec = pytree.flatten(params)
        shown_grads: list[Tensor | None] = []
        for leaf, grad in zip(leaves, matching_leaves(params, grads, "grads"), strict=True):
            shown_grads.append(with_layout_of(grad, leaf) if is_trained(leaf) else None)
        updates, state = pair_update(
            spec.unflatten(shown_grads),
            state,
            params=spec.unflatten(map(_trained_or_none, leaves)),
            **not_in_place,
        )
        moves = matching_leaves(params, updates, "the updates of the pair")
        rates = _lr_factors(factors or [Factors()] * len(leaves))
        new = []
        for leaf, move, rate in zip(leaves, moves, rates, strict=True):
            if is_trained(leaf):
                leaf = torch.add(leaf, with_layout_of(move, leaf), alpha=rate)
            new.append(leaf)
        return spec.unflatten(new), state

    return Optimizer(init, update)


def _trained_or_none(leaf: Any) -> Tensor | None:
    return leaf if is_trained(leaf) else None


def _lr_factors(factors: Sequence[Factors]) -> list[float]:
    if any(factor.weight_decay != 1.0 for factor in factors):
        raise OptimError(
            "from_optax: the updates of a pair contain its weight decay already, so no factor of "
            "it can be changed; give per_leaf an lr alone, or mask the decay inside the pair"
        )
    return [factor.lr for factor in factors]
