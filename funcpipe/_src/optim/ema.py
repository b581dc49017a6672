"""The exponential moving average of parameters.

In: a decay. Out: a pair of pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.optim.leaves import (
    Schedule,
    groups,
    leaves_beside,
    pick,
    put,
    rate_on,
    scheduled,
    step_of,
    trained,
)
from funcpipe.errors import OptimError


class AverageState(NamedTuple):
    """``step``: how many updates so far, 0-d float64; ``average``: a tree like params."""

    step: torch.Tensor
    average: Any


class Average(NamedTuple):
    """A pair of pure functions.

    Args:
        init: ``params -> state``; the first average is the params themselves.
        update: ``(state, params) -> state``, after every step.
    """

    init: Callable[[Any], AverageState]
    update: Callable[[AverageState, Any], AverageState]


def ema(decay: float | Schedule) -> Average:
    r"""The exponential moving average of the parameters: what one evaluates.

    .. math::
        a_t = \beta_t a_{t-1} + (1 - \beta_t) p_t, \quad a_0 = p_0

    Args:
        decay: :math:`\beta`, in [0, 1]; or a schedule from ``step`` (how many updates were made
            before: 0-d, float64) to it, such as ``lambda step: ((1 + step) / (10 +
            step)).clamp(max=0.999)``, which forgets the first params sooner.

    Returns:
        an `Average` with an `AverageState`. Averages of leaves with less than 32 bits are float32:
        a bfloat16 would not move by a thousandth of itself. Frozen leaves (integers, bools) are
        those of the last params.

    Raises:
        OptimError: a decay out of range; in ``update``, trees that do not fit each other, with the
        path.

    Example:
        >>> average = ema(0.75)
        >>> state = average.init({"w": torch.zeros(2)})
        >>> state = average.update(state, {"w": torch.ones(2)})
        >>> state.average
        {'w': tensor([0.2500, 0.2500])}

    Reference:
        Polyak & Juditsky, 1992, https://doi.org/10.1137/0330046;
        ``torch.optim.swa_utils.get_ema_multi_avg_fn``
    """
    if not callable(decay) and not 0.0 <= decay <= 1.0:
        raise OptimError(f"ema: decay={decay!r}; it is at least 0 and at most 1")

    @torch.no_grad()
    def init(params: Any) -> AverageState:
        # Clones: a state must not hold one tensor twice, since a step may be captured to update it
        # in place.
        return AverageState(
            step_of(params), tree.map_tensors(lambda p: _wide(p).detach().clone(), params)
        )

    @torch.no_grad()
    def update(state: AverageState, params: Any) -> AverageState:
        p, spec = tree.flatten(params)
        out = list(p)
        old = leaves_beside(params, state.average, "the average")
        share = 1 - scheduled(decay, state.step)
        for (device, dtype, _), at in groups(p).items():
            put(
                out,
                at,
                _mixed(
                    pick(old, at), [_wide(x) for x in pick(p, at)], rate_on(device, dtype, share)
                ),
            )
        return AverageState(state.step + 1, spec.unflatten(out))

    return Average(init, update)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A trained leaf in the dtype of its average."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if trained(x) else x


def _mixed(old: Any, new: Any, share: torch.Tensor | float) -> Any:
    """``old + share * (new - old)``; a tensor cannot be the weight of the kernel for numbers."""
    if isinstance(share, torch.Tensor):
        way = torch._foreach_mul(torch._foreach_sub(new, old), share)
        return torch._foreach_add(old, way)
    return torch._foreach_lerp(old, new, share)
