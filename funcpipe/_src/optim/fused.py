"""AdamW and SGD over torch's fused and foreach kernels.

In: settings. Out: an `Optimizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import writable
from funcpipe._src.optim.leaves import (
    Factors,
    Optimizer,
    Schedule,
    check_settings,
    fresh,
    groups,
    laid_out,
    leaves_beside,
    pick,
    put,
    rate_on,
    scheduled,
    step_of,
    zeros_like,
)
from funcpipe.errors import OptimError


class AdamWState(NamedTuple):
    """``step``: how many updates so far, 0-d float64; ``m``, ``v``: the moments, trees like
    params."""

    step: torch.Tensor
    m: Any
    v: Any


class SGDState(NamedTuple):
    """``step``: how many updates so far; ``momentum``: a tree like params, or ``()`` without
    momentum."""

    step: torch.Tensor
    momentum: Any


def adamw(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Callable[[torch.Tensor], bool] = lambda leaf: leaf.dim() >= 2,
) -> Optimizer:
    r"""AdamW: Adam with decoupled weight decay.

    With step :math:`t` counted from 1, all operations elementwise:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \eta_t \lambda) p_{t-1}
               - \eta_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Args:
        lr: the learning rate :math:`\eta`: a number, or a schedule from ``step`` (how many updates
            were made before this one: a 0-d float64 tensor where the parameters are) to a number or
            a 0-d tensor. A float64 leaf is updated with it in float64, others in float32.
        betas: the decay rates :math:`\beta_1, \beta_2` of the two moments, each in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`.
        decay: which leaves the weight decay applies to. By default those with two dims or more,
            thus neither norms nor biases. Ask about dims or dtype, not about sizes: a rank may hold
            a slice of the leaf.

    Returns:
        an `Optimizer` with an `AdamWState`; the moments have the dtypes of the parameters.

    Raises:
        OptimError: a setting out of range; in ``update``, trees that do not fit each other, with
        the path.

    Example:
        >>> params = {"w": torch.ones(2, 2), "ids": torch.arange(2)}
        >>> optimizer = adamw(lr=0.5, weight_decay=0.0)
        >>> grads = {"w": torch.ones(2, 2), "ids": None}
        >>> params, state = optimizer.update(grads, optimizer.init(params), params)
        >>> params
        {'w': tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]]), 'ids': tensor([0, 1])}
        >>> state.step
        tensor(1., dtype=torch.float64)

    Reference:
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019,
        https://arxiv.org/abs/1711.05101
    """
    check_settings("adamw", lr, eps=eps, weight_decay=weight_decay)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise OptimError(f"adamw: betas={betas!r}; each of the two is at least 0 and less than 1")

    def init(params: Any) -> AdamWState:
        return AdamWState(step_of(params), zeros_like(params), zeros_like(params))

    @torch.no_grad()
    def update(
        grads: Any, state: AdamWState, params: Any, factors: Sequence[Factors] | None = None
    ) -> tuple[Any, AdamWState]:
        p, spec = tree.flatten(params)
        scale = factors or [Factors()] * len(p)
        g = leaves_beside(params, grads, "grads")
        m = leaves_beside(params, state.m, "opt_state.m", same_dtype=True)
        v = leaves_beside(params, state.v, "opt_state.v", same_dtype=True)
        step = state.step + 1
        rate = scheduled(lr, state.step)
        for (device, dtype, (decays, factor)), at in groups(
            p, lambda i: (bool(decay(p[i])), scale[i])
        ).items():
            # The kernel works in place and takes all four tensors of a leaf to lie in memory alike.
            for i in at:
                p[i] = writable(p[i])
                g[i], m[i], v[i] = laid_out(g[i], p[i]), fresh(m[i], p[i]), fresh(v[i], p[i])
            count = [step.to(device=device, dtype=torch.float32)] * len(
                at
            )  # as the kernel reads it
            kernel = functools.partial(
                _adamw_, pick(g, at), pick(m, at), pick(v, at), count, betas=betas, eps=eps
            )
            shrink = weight_decay * factor.weight_decay if decays else 0.0
            pace = rate_on(device, dtype, rate * factor.lr)
            if isinstance(pace, torch.Tensor) and pace.dtype == torch.float64:
                _scaled_(kernel, pick(p, at), pace, shrink)
            else:
                kernel(pick(p, at), lr=pace, weight_decay=shrink)
        return spec.unflatten(p), AdamWState(step, spec.unflatten(m), spec.unflatten(v))

    return Optimizer(init, update)


def _adamw_(
    grads: list[torch.Tensor],
    m: list[torch.Tensor],
    v: list[torch.Tensor],
    count: list[torch.Tensor],
    params: list[torch.Tensor],
    *,
    lr: torch.Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The fused kernel, in place: of params and of both moments."""
    maxima: list[torch.Tensor] = []  # of amsgrad
    torch._fused_adamw_(
        params,
        grads,
        m,
        v,
        maxima,
        count,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _scaled_(
    kernel: Callable, params: list[torch.Tensor], rate: torch.Tensor, weight_decay: float
) -> None:
    """An update with a rate that is a float64 tensor, which the kernel does not take on GPUs: it
    updates zeros with rate 1."""
    directions: Any = [torch.zeros_like(p) for p in params]
    kernel(directions, lr=1.0, weight_decay=0.0)
    if weight_decay:
        torch._foreach_mul_(params, 1 - rate * weight_decay)
    torch._foreach_add_(params, torch._foreach_mul(directions, rate))


def sgd(
    lr: float | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    r"""Stochastic gradient descent, with momentum and L2 regularization as in ``torch.optim.SGD``.

    .. math::
        g_t &\leftarrow g_t + \lambda p_{t-1} \\ b_t &= \mu b_{t-1} + g_t \\ p_t &= p_{t-1} - \eta_t
        \begin{cases} g_t + \mu b_t & \text{nesterov} \\ b_t & \text{else} \end{cases}

    Args:
        lr: the learning rate :math:`\eta`, a number or a schedule as in `adamw`.
        momentum: :math:`\mu`; with 0 no buffers are kept.
        nesterov: look ahead along the momentum.
        weight_decay: :math:`\lambda`, for every leaf.

    Returns:
        an `Optimizer` with an `SGDState`.

    Raises:
        OptimError: a setting out of range; in ``update``, trees that do not fit each other, with
        the path.

    Example:
        >>> optimizer = sgd(lr=0.25)
        >>> params = [torch.ones(2), None]
        >>> optimizer.update([torch.ones(2), None], optimizer.init(params), params)
        ([tensor([0.7500, 0.7500]), None], SGDState(step=tensor(1., dtype=torch.float64),
        momentum=()))

    Reference:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013,
        https://proceedings.mlr.press/v28/sutskever13.html
    """
    check_settings("sgd", lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and not momentum:
        raise OptimError(
            "sgd: nesterov=True looks ahead along the momentum; give it one, as in momentum=0.9"
        )

    def init(params: Any) -> SGDState:
        return SGDState(step_of(params), zeros_like(params) if momentum else ())

    @torch.no_grad()
    def update(
        grads: Any, state: SGDState, params: Any, factors: Sequence[Factors] | None = None
    ) -> tuple[Any, SGDState]:
        p, spec = tree.flatten(params)
        scale = factors or [Factors()] * len(p)
        g = leaves_beside(params, grads, "grads")
        b = (
            leaves_beside(params, state.momentum, "opt_state.momentum", same_dtype=True)
            if momentum
            else []
        )
        rate = scheduled(lr, state.step)
        for (device, dtype, factor), at in groups(p, lambda i: scale[i]).items():
            ps: Any = pick(p, at)
            gs: Any = [laid_out(g[i], p[i]) for i in at]
            if weight_decay * factor.weight_decay:
                gs = torch._foreach_add(gs, ps, alpha=weight_decay * factor.weight_decay)
            if momentum:
                bs = torch._foreach_add(torch._foreach_mul(pick(b, at), momentum), gs)
                gs = torch._foreach_add(gs, bs, alpha=momentum) if nesterov else bs
                put(b, at, bs)
            put(p, at, _descend(ps, gs, rate_on(device, dtype, rate * factor.lr)))
        return spec.unflatten(p), SGDState(state.step + 1, spec.unflatten(b) if momentum else ())

    return Optimizer(init, update)


def _descend(params: Any, directions: Any, rate: Any) -> Any:
    """``params - rate * directions``; a tensor cannot be the ``alpha``, which the host has to
    know."""
    if isinstance(rate, torch.Tensor):
        return torch._foreach_sub(params, torch._foreach_mul(directions, rate))
    return torch._foreach_add(params, directions, alpha=-rate)
