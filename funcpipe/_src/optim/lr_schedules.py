"""Learning rates that follow from the step.

In: settings.
Out: a `Schedule`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcpipe._src.optim.leaves import Schedule, check_settings
from funcpipe.errors import OptimError


def warmup_cosine(
    peak: float,
    warmup: int,
    total: int,
    floor: float = 0.1,
) -> Schedule:
    r"""A learning rate that rises linearly over ``warmup`` steps, then falls along half a cosine.

    .. math::
        \eta_t = \text{peak} \cdot \min\left(1, \frac{t + 1}{\text{warmup}}\right) \cdot
        \left(\text{floor} + \frac{1 - \text{floor}}{2} (1 + \cos \pi x_t)\right), \quad
        x_t = \text{clip}\left(\frac{t - \text{warmup}}{\text{total} - \text{warmup}}, 0, 1\right)

    Args:
        peak: the highest learning rate.
        warmup: steps of the rise, 0 or more. The first step moves too: it has ``peak / warmup``,
            not 0.
        total: steps in all, more than ``warmup``; later ones stay at the floor.
        floor: the last learning rate as a fraction of ``peak``.

    Returns:
        a schedule: from a 0-d tensor ``step`` of any dtype, 0 at first, to a 0-d float64 tensor on
            its device.

    Raises:
        OptimError: a setting out of range.

    Example:
        >>> schedule = warmup_cosine(peak=1.0, warmup=4, total=12)
        >>> [round(float(schedule(torch.tensor(t))), 2) for t in (0, 1, 3, 4, 8, 12, 99)]
        [0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]

    Reference:
        Loshchilov & Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983 (one period, no restart)
    """
    check_settings("warmup_cosine", peak, floor=floor)
    if not 0 <= warmup < total:
        raise OptimError(
            f"warmup_cosine: warmup={warmup} and total={total}; 0 <= warmup < total is needed"
        )

    def schedule(step: Tensor) -> Tensor:
        step = step.double()
        rise = ((step + 1) / max(warmup, 1)).clamp(max=1.0)
        fall = ((step - warmup) / (total - warmup)).clamp(0.0, 1.0)
        cosine = 1.0 + torch.cos(math.pi * fall)
        fraction = floor + (1.0 - floor) * 0.5 * cosine
        return peak * rise * fraction

    return schedule
