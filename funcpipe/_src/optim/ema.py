"""The exponential moving average of parameters.

In: a decay.
Out: a pair of pure functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.optim.leaves import (
    Schedule,
    group_leaves,
    is_trained,
    matching_leaves,
    new_step_count,
    rate_on,
    setting_at,
)
from funcpipe.errors import OptimError


class AverageState(NamedTuple):
    """The state of an `ema`.

    Args:
        step: how many updates there were so far, 0-d float64.
        average: a tree like params.
    """

    step: Tensor
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
    r"""The exponential moving average of the parameters, to be evaluated in their place.

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
        average = pytree.map_tensors(lambda leaf: _widened(leaf).detach().clone(), params)
        return AverageState(new_step_count(params), average)

    @torch.no_grad()
    def update(state: AverageState, params: Any) -> AverageState:
        leaves, spec = pytree.flatten(params)
        old = matching_leaves(params, state.average, "the average")
        new = list(leaves)
        share = 1 - setting_at(state.step, decay)
        for group in group_leaves(leaves):
            latest = [_widened(leaf) for leaf in group.select(leaves)]
            group_share = rate_on(group.device, group.dtype, share)
            group.assign(new, _mixed(group.select(old), latest, group_share))
        return AverageState(state.step + 1, spec.unflatten(new))

    return Average(init, update)


def _widened(leaf: Tensor) -> Tensor:
    """A trained leaf in the dtype of its average."""
    if not is_trained(leaf):
        return leaf
    return leaf.to(torch.promote_types(leaf.dtype, torch.float32))


def _mixed(
    old: Any,
    new: Any,
    share: Tensor | float,
) -> Any:
    """``old + share * (new - old)``. A tensor cannot be the weight that ``_foreach_lerp`` takes."""
    if isinstance(share, Tensor):
        moves = torch._foreach_mul(torch._foreach_sub(new, old), share)
        return torch._foreach_add(old, moves)
    return torch._foreach_lerp(old, new, share)
