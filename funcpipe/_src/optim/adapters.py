"""Optimizers of other libraries.

In: a pair of functions of optax's shape. Out: an `Optimizer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.optim.leaves import Factors, Optimizer, laid_out, leaves_beside, trained
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
        pure = {"inplace": False} if "inplace" in inspect.signature(pair_update).parameters else {}
    except (TypeError, ValueError):
        raise OptimError(
            "from_optax takes a pair of functions (init, update), such as torchopt.adam(1e-3); "
            f"got {pair!r}"
        ) from None

    def init(params: Any) -> Any:
        return pair_init(tree.map(lambda leaf: leaf if trained(leaf) else None, params))

    @torch.no_grad()
    def update(
        grads: Any, state: Any, params: Any, factors: Sequence[Factors] | None = None
    ) -> tuple[Any, Any]:
        p, spec = tree.flatten(params)
        g = leaves_beside(params, grads, "grads")
        moving = [trained(leaf) for leaf in p]
        g = [laid_out(x, leaf) if t else None for x, leaf, t in zip(g, p, moving, strict=True)]
        shown_g, shown_p = (
            spec.unflatten(leaf if t else None for leaf, t in zip(leaves, moving, strict=True))
            for leaves in (g, p)
        )
        updates, state = pair_update(shown_g, state, params=shown_p, **pure)
        moves = leaves_beside(params, updates, "the updates of the pair")
        scale = _rates(factors or [Factors()] * len(p))
        new = [
            torch.add(x, laid_out(u, x), alpha=f) if t else x
            for x, u, f, t in zip(p, moves, scale, moving, strict=True)
        ]
        return spec.unflatten(new), state

    return Optimizer(init, update)


def _rates(factors: Sequence[Factors]) -> list[float]:
    if any(f.weight_decay != 1.0 for f in factors):
        raise OptimError(
            "from_optax: a pair hands out updates that contain its weight decay, so no factor of "
            "it can be changed; give per_leaf an lr alone, or mask the decay inside the pair"
        )
    return [f.lr for f in factors]
