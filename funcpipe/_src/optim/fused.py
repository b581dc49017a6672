"""AdamW and SGD over torch's fused and foreach kernels.

In: settings.
Out: an `Optimizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcpipe._src.core import pytree
from funcpipe._src.core.buffer_donation import writable
from funcpipe._src.optim.leaves import (
    Factors,
    Optimizer,
    Schedule,
    check_settings,
    group_leaves,
    matching_leaves,
    new_step_count,
    rate_on,
    setting_at,
    with_layout_of,
    writable_with_layout_of,
    zeros_like,
)
from funcpipe.errors import OptimError


class AdamWState(NamedTuple):
    """The state of `adamw`.

    Args:
        step: how many updates there were so far, 0-d float64.
        m, v: the moments, trees like params.
    """

    step: Tensor
    m: Any
    v: Any


class SGDState(NamedTuple):
    """The state of `sgd`.

    Args:
        step: how many updates there were so far, 0-d float64.
        momentum: a tree like params, or ``()`` without momentum.
    """

    step: Tensor
    momentum: Any


def _is_matrix(leaf: Tensor) -> bool:
    return leaf.dim() >= 2


def adamw(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Callable[[Tensor], bool] = _is_matrix,
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
    _check_betas(betas)

    def init(params: Any) -> AdamWState:
        return AdamWState(new_step_count(params), zeros_like(params), zeros_like(params))

    @torch.no_grad()
    def update(
        grads: Any,
        state: AdamWState,
        params: Any,
        factors: Sequence[Factors] | None = None,
    ) -> tuple[Any, AdamWState]:
        p, spec = pytree.flatten(params)
        g = matching_leaves(params, grads, "grads")
        m = matching_leaves(params, state.m, "opt_state.m", same_dtype=True)
        v = matching_leaves(params, state.v, "opt_state.v", same_dtype=True)
        leaf_factors = factors or [Factors()] * len(p)
        step = state.step + 1
        rate = setting_at(state.step, lr)

        for group in group_leaves(p, lambda index: (bool(decay(p[index])), leaf_factors[index])):
            decays, factor = group.key
            _make_writable(group.indices, p, g, m, v)
            kernel = functools.partial(
                _fused_adamw_,
                grads=group.select(g),
                m=group.select(m),
                v=group.select(v),
                step=step.to(device=group.device, dtype=torch.float32),  # as the kernel reads it
                betas=betas,
                eps=eps,
            )
            _update_(
                kernel,
                group.select(p),
                rate_on(group.device, group.dtype, rate * factor.lr),
                weight_decay * factor.weight_decay if decays else 0.0,
            )
        return spec.unflatten(p), AdamWState(step, spec.unflatten(m), spec.unflatten(v))

    return Optimizer(init, update)


def _check_betas(betas: tuple[float, float]) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise OptimError(f"adamw: betas={betas!r}; each of the two is at least 0 and less than 1")


def _make_writable(
    indices: list[int],
    p: list,
    g: list,
    m: list,
    v: list,
) -> None:
    """Replace leaves by copies for a kernel that works in place.

    The kernel also takes all four tensors of a leaf to lie in memory alike.
    """
    for index in indices:
        p[index] = writable(p[index])
        g[index] = with_layout_of(g[index], p[index])
        m[index] = writable_with_layout_of(m[index], p[index])
        v[index] = writable_with_layout_of(v[index], p[index])


def _fused_adamw_(
    params: list[Tensor],
    *,
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    step: Tensor,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Torch's fused kernel, which updates params and both moments in place."""
    maxima: list[Tensor] = []  # of amsgrad
    torch._fused_adamw_(
        params,
        grads,
        m,
        v,
        maxima,
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _update_(
    kernel: Callable[..., None],
    params: list[Tensor],
    rate: Tensor | float,
    weight_decay: float,
) -> None:
    """Run the kernel on params, in place.

    On GPUs it takes no rate that is a float64 tensor. For such a rate it updates zeros with rate 1,
    and its result is scaled here.
    """
    if not isinstance(rate, Tensor) or rate.dtype != torch.float64:
        kernel(params, lr=rate, weight_decay=weight_decay)
        return
    directions: Any = [torch.zeros_like(param) for param in params]
    kernel(directions, lr=1.0, weight_decay=0.0)
    if weight_decay:
        torch._foreach_mul_(params, 1 - rate * weight_decay)
    torch._foreach_add_(params, torch._foreach_mul(directions, rate))


def sgd(
    lr: float | Schedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    r"""Stochastic gradient descent, with momentum and L2 regularization as in ``torch.optim.SGD``.

    .. math::
        g_t &\leftarrow g_t + \lambda p_{t-1} \\
        b_t &= \mu b_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta_t
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
        >>> params, state = optimizer.update([torch.ones(2), None], optimizer.init(params), params)
        >>> params
        [tensor([0.7500, 0.7500]), None]
        >>> state
        SGDState(step=tensor(1., dtype=torch.float64), momentum=())

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
        return SGDState(new_step_count(params), zeros_like(params) if momentum else ())

    @torch.no_grad()
    def update(
        grads: Any,
        state: SGDState,
        params: Any,
        factors: Sequence[Factors] | None = None,
    ) -> tuple[Any, SGDState]:
        p, spec = pytree.flatten(params)
        g = matching_leaves(params, grads, "grads")
        buffers: list[Tensor] = []
        if momentum:
            buffers = matching_leaves(params, state.momentum, "opt_state.momentum", same_dtype=True)
        leaf_factors = factors or [Factors()] * len(p)
        rate = setting_at(state.step, lr)
        for group in group_leaves(p, lambda index: leaf_factors[index]):
            factor = group.key
            params_in: Any = group.select(p)
            moves: Any = list(map(with_layout_of, group.select(g), params_in))
            shrink = weight_decay * factor.weight_decay
            if shrink:
                moves = torch._foreach_add(moves, params_in, alpha=shrink)
            if momentum:
                decayed = torch._foreach_mul(group.select(buffers), momentum)
                sums = torch._foreach_add(decayed, moves)
                group.assign(buffers, sums)
                moves = torch._foreach_add(moves, sums, alpha=momentum) if nesterov else sums
            group_rate = rate_on(group.device, group.dtype, rate * factor.lr)
            group.assign(p, _descend(params_in, moves, group_rate))
        new_momentum = spec.unflatten(buffers) if momentum else ()
        return spec.unflatten(p), SGDState(state.step + 1, new_momentum)

    return Optimizer(init, update)


def _descend(
    params: Any,
    moves: Any,
    rate: Any,
) -> Any:
    """``params - rate * moves``. A tensor cannot be ``alpha``, whose value the host has to have."""
    if isinstance(rate, Tensor):
        return torch._foreach_sub(params, torch._foreach_mul(moves, rate))
    return torch._foreach_add(params, moves, alpha=-rate)
