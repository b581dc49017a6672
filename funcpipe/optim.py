"""Functional optimizers: ``(init, update)`` pairs over torch's fused and foreach kernels.

``init(params) -> opt_state`` and ``update(grads, opt_state, params) -> (params, opt_state)`` are pure: they
modify no argument. Where optax's ``update`` returns a tree of *updates* still to be added, this one returns
the new parameters, because torch's fused kernels write parameters and moments in one pass.

The rules of every optimizer in this file, which transforms rely on:

- Leaves are touched elementwise only, so a rank may hold any slice of any leaf.
- ``None`` is an absent leaf, in all trees alike; a rank may hold no leaf at all.
- Integer, bool and non-tensor leaves are frozen: they come out as they went in, whatever their gradient.
- Nothing waits for the device, so that a step on a GPU can be captured into a CUDA graph. A learning rate
  that changes is therefore a tensor, computed from the ``step`` tensor in the state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch

from funcpipe import tree
from funcpipe.errors import OptimError

Schedule = Callable[[torch.Tensor], torch.Tensor | float]


class Optimizer(NamedTuple):
    """A pair of pure functions.

    Args:
        init: ``params -> opt_state``.
        update: ``(grads, opt_state, params) -> (new_params, new_opt_state)``.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


class AdamWState(NamedTuple):
    """``step``: how many updates so far, 0-d float32; ``m``, ``v``: the moments, trees like params."""

    step: torch.Tensor
    m: Any
    v: Any


class SGDState(NamedTuple):
    """``step``: how many updates so far; ``momentum``: a tree like params, or ``()`` without momentum."""

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
        lr: the learning rate :math:`\eta`: a number, or a schedule from ``step`` (how many updates were made
            before this one: a 0-d float32 tensor where the parameters are) to a number or a 0-d tensor.
        betas: the decay rates :math:`\beta_1, \beta_2` of the two moments, each in [0, 1).
        eps: :math:`\epsilon`, outside the root.
        weight_decay: :math:`\lambda`.
        decay: which leaves the weight decay applies to. By default those with two dims or more, thus neither
            norms nor biases. Ask about dims or dtype, not about sizes: a rank may hold a slice of the leaf.

    Returns:
        an `Optimizer` with an `AdamWState`; the moments have the dtypes of the parameters.

    Raises:
        OptimError: a setting out of range; in ``update``, trees that do not fit each other, with the path.

    Example:
        >>> params = {"w": torch.ones(2, 2), "ids": torch.arange(2)}
        >>> optimizer = adamw(lr=0.5, weight_decay=0.0)
        >>> grads = {"w": torch.ones(2, 2), "ids": None}
        >>> params, state = optimizer.update(grads, optimizer.init(params), params)
        >>> params
        {'w': tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]]), 'ids': tensor([0, 1])}
        >>> state.step
        tensor(1.)

    Reference:
        Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019, https://arxiv.org/abs/1711.05101
    """
    _check_settings("adamw", lr, eps=eps, weight_decay=weight_decay)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise OptimError(f"adamw: betas={betas!r}; each of the two is at least 0 and less than 1")

    def init(params: Any) -> AdamWState:
        return AdamWState(_step_of(params), _zeros_like(params), _zeros_like(params))

    @torch.no_grad()
    def update(grads: Any, state: AdamWState, params: Any) -> tuple[Any, AdamWState]:
        p, spec = tree.flatten(params)
        g = _leaves_beside(params, grads, "grads")
        m = _leaves_beside(params, state.m, "opt_state.m", same_dtype=True)
        v = _leaves_beside(params, state.v, "opt_state.v", same_dtype=True)
        step = state.step + 1
        rate = lr(state.step) if callable(lr) else lr
        for (device, _, decays), at in _groups(p, lambda leaf: bool(decay(leaf))).items():
            # The kernel works in place and takes all four tensors of a leaf to lie in memory alike.
            for i in at:
                p[i] = p[i].clone()
                g[i], m[i], v[i] = _laid_out(g[i], p[i]), _fresh(m[i], p[i]), _fresh(v[i], p[i])
            torch._fused_adamw_(
                _at(p, at),
                _at(g, at),
                _at(m, at),
                _at(v, at),
                [],  # amsgrad's maxima
                [step.to(device)] * len(at),
                lr=_rate_on(device, rate),
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=weight_decay if decays else 0.0,
                eps=eps,
                amsgrad=False,
                maximize=False,
            )
        return spec.unflatten(p), AdamWState(step, spec.unflatten(m), spec.unflatten(v))

    return Optimizer(init, update)


def sgd(lr: float | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    r"""Stochastic gradient descent, with momentum and L2 regularization as in ``torch.optim.SGD``.

    .. math::
        g_t &\leftarrow g_t + \lambda p_{t-1} \\
        b_t &= \mu b_{t-1} + g_t \\
        p_t &= p_{t-1} - \eta_t \begin{cases} g_t + \mu b_t & \text{nesterov} \\ b_t & \text{else} \end{cases}

    Args:
        lr: the learning rate :math:`\eta`, a number or a schedule as in `adamw`.
        momentum: :math:`\mu`; with 0 no buffers are kept.
        nesterov: look ahead along the momentum.
        weight_decay: :math:`\lambda`, for every leaf.

    Returns:
        an `Optimizer` with an `SGDState`.

    Raises:
        OptimError: a setting out of range; in ``update``, trees that do not fit each other, with the path.

    Example:
        >>> optimizer = sgd(lr=0.25)
        >>> params = [torch.ones(2), None]
        >>> optimizer.update([torch.ones(2), None], optimizer.init(params), params)
        ([tensor([0.7500, 0.7500]), None], SGDState(step=tensor(1.), momentum=()))

    Reference:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013,
        https://proceedings.mlr.press/v28/sutskever13.html
    """
    _check_settings("sgd", lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and not momentum:
        raise OptimError("sgd: nesterov=True looks ahead along the momentum; give it one, as in momentum=0.9")

    def init(params: Any) -> SGDState:
        return SGDState(_step_of(params), _zeros_like(params) if momentum else ())

    @torch.no_grad()
    def update(grads: Any, state: SGDState, params: Any) -> tuple[Any, SGDState]:
        p, spec = tree.flatten(params)
        g = _leaves_beside(params, grads, "grads")
        b = _leaves_beside(params, state.momentum, "opt_state.momentum", same_dtype=True) if momentum else []
        rate = lr(state.step) if callable(lr) else lr
        for (device, *_), at in _groups(p).items():
            ps: Any = _at(p, at)
            gs: Any = [_laid_out(g[i], p[i]) for i in at]
            if weight_decay:
                gs = torch._foreach_add(gs, ps, alpha=weight_decay)
            if momentum:
                bs = torch._foreach_add(torch._foreach_mul(_at(b, at), momentum), gs)
                gs = torch._foreach_add(gs, bs, alpha=momentum) if nesterov else bs
                _put(b, at, bs)
            _put(p, at, _descend(ps, gs, _rate_on(device, rate)))
        return spec.unflatten(p), SGDState(state.step + 1, spec.unflatten(b) if momentum else ())

    return Optimizer(init, update)


def from_optax(pair: Any) -> Optimizer:
    """The optimizer of an optax-shaped pair, such as ``torchopt.adam(1e-3)`` or a chain of them.

    Args:
        pair: ``(init, update)`` with ``update(grads, state, params=...) -> (updates, state)``, in which the
            new parameters are ``params + updates``. It sees ``None`` for leaves that are absent or frozen,
            and must touch leaves elementwise if they are to be sharded. Its argument ``inplace``, as torchopt
            has it, is set to False.

    Returns:
        an `Optimizer` with the state of the pair.

    Raises:
        OptimError: ``pair`` is not a pair of functions; in ``update``, trees that do not fit, with the path.

    Example:
        >>> def descend(grads, state, params):
        ...     return [-g for g in grads], state
        >>> from_optax((lambda params: (), descend)).update([torch.ones(2)], (), [torch.ones(2)])
        ([tensor([0., 0.])], ())

    Reference:
        DeepMind et al., optax, https://optax.readthedocs.io; Ren et al., TorchOpt, https://arxiv.org/abs/2211.06934
    """
    try:
        pair_init, pair_update = pair
        pure = {"inplace": False} if "inplace" in inspect.signature(pair_update).parameters else {}
    except (TypeError, ValueError):
        raise OptimError(
            f"from_optax takes a pair of functions (init, update), such as torchopt.adam(1e-3); got {pair!r}"
        ) from None

    def init(params: Any) -> Any:
        return pair_init(tree.map(lambda leaf: leaf if _trained(leaf) else None, params))

    @torch.no_grad()
    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        p, spec = tree.flatten(params)
        g = _leaves_beside(params, grads, "grads")
        trained = [_trained(leaf) for leaf in p]
        g = [_laid_out(x, leaf) if t else None for x, leaf, t in zip(g, p, trained, strict=True)]
        shown_g, shown_p = (
            spec.unflatten(leaf if t else None for leaf, t in zip(leaves, trained, strict=True)) for leaves in (g, p)
        )
        updates, state = pair_update(shown_g, state, params=shown_p, **pure)
        moves = _leaves_beside(params, updates, "the updates of the pair")
        new = [x + _laid_out(u, x) if t else x for x, u, t in zip(p, moves, trained, strict=True)]
        return spec.unflatten(new), state

    return Optimizer(init, update)


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.1) -> Schedule:
    r"""A learning rate that rises linearly over ``warmup`` steps, then falls along half a cosine.

    .. math::
        \eta_t = \text{peak} \cdot \min\left(1, \frac{t + 1}{\text{warmup}}\right) \cdot
        \left(\text{floor} + \frac{1 - \text{floor}}{2} (1 + \cos \pi x_t)\right), \quad
        x_t = \text{clip}\left(\frac{t - \text{warmup}}{\text{total} - \text{warmup}}, 0, 1\right)

    Args:
        peak: the highest learning rate.
        warmup: steps of the rise, 0 or more. The first step moves too: it has ``peak / warmup``, not 0.
        total: steps in all, more than ``warmup``; later ones stay at the floor.
        floor: the last learning rate as a fraction of ``peak``.

    Returns:
        a schedule: from a 0-d tensor ``step``, 0 at first, to a 0-d tensor on its device.

    Raises:
        OptimError: a setting out of range.

    Example:
        >>> schedule = warmup_cosine(peak=1.0, warmup=4, total=12)
        >>> [round(float(schedule(torch.tensor(t))), 2) for t in (0, 1, 3, 4, 8, 12, 99)]
        [0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]

    Reference:
        Loshchilov & Hutter, SGDR, 2017, https://arxiv.org/abs/1608.03983 (one period, no restart)
    """
    _check_settings("warmup_cosine", peak, floor=floor)
    if not 0 <= warmup < total:
        raise OptimError(f"warmup_cosine: warmup={warmup} and total={total}; 0 <= warmup < total is needed")

    def schedule(step: torch.Tensor) -> torch.Tensor:
        rise = ((step + 1) / max(warmup, 1)).clamp(max=1.0)
        fall = ((step - warmup) / (total - warmup)).clamp(0.0, 1.0)
        return peak * rise * (floor + (1.0 - floor) * 0.5 * (1.0 + torch.cos(math.pi * fall)))

    return schedule


# ---- leaves: which are trained, which belong together, how they lie in memory


def _trained(leaf: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _step_of(params: Any) -> torch.Tensor:
    """A new step count, where the parameters are: the kernels read it on the device."""
    device = next((leaf.device for leaf in tree.leaves(params) if _trained(leaf)), None)
    return torch.zeros((), dtype=torch.float32, device=device)


def _zeros_like(params: Any) -> Any:
    """Zeros for every tensor, frozen ones too, so that the state of a leaf is sharded as the leaf is."""
    return tree.map_tensors(lambda leaf: torch.zeros_like(leaf, requires_grad=False), params)


def _groups(
    params: list[Any], key: Callable[[torch.Tensor], Any] = lambda leaf: None
) -> dict[tuple[torch.device, torch.dtype, Any], list[int]]:
    """Which trained leaves one kernel call may take together: one device, one dtype, one key."""
    out: dict[tuple[torch.device, torch.dtype, Any], list[int]] = {}
    for i, leaf in enumerate(params):
        if _trained(leaf):
            out.setdefault((leaf.device, leaf.dtype, key(leaf)), []).append(i)
    return out


def _at(leaves: list[Any], at: list[int]) -> list[torch.Tensor]:
    return [leaves[i] for i in at]


def _put(leaves: list[Any], at: list[int], values: Any) -> None:
    for i, value in zip(at, values, strict=True):
        leaves[i] = value


def _laid_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` itself, or a copy if its dtype or its strides are not those of ``like``."""
    same = x.dtype == like.dtype and x.stride() == like.stride()
    return x if same else torch.empty_like(like).copy_(x)


def _fresh(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` with the strides of ``like``."""
    y = _laid_out(x, like)
    return y.clone() if y is x else y


def _rate_on(device: torch.device, rate: torch.Tensor | float) -> Any:
    """A number stays a number (no copy to the device); a tensor goes where and how the kernels read it."""
    return rate.to(device=device, dtype=torch.float32) if isinstance(rate, torch.Tensor) else float(rate)


def _descend(params: Any, directions: Any, rate: Any) -> Any:
    """``params - rate * directions``; a tensor cannot be the ``alpha``, which the host has to know."""
    if isinstance(rate, torch.Tensor):
        return torch._foreach_sub(params, torch._foreach_mul(directions, rate))
    return torch._foreach_add(params, directions, alpha=-rate)


# ---- what is refused


def _check_settings(who: str, lr: float | Schedule, **settings: float) -> None:
    if not callable(lr):
        settings["lr"] = lr
    for name, value in settings.items():
        if not value >= 0.0:
            raise OptimError(f"{who}: {name}={value!r} must not be negative")


def _leaves_beside(params: Any, other: Any, who: str, same_dtype: bool = False) -> list[Any]:
    """The leaves of ``other`` in the order of those of ``params``; OptimError where the two do not fit."""
    leaves, spec = tree.flatten(params)
    try:
        beside = spec.flatten_up_to(other)
    except (ValueError, TypeError) as error:
        raise OptimError(_difference(params, other, who, str(error))) from None
    for i, (p, x) in enumerate(zip(leaves, beside, strict=True)):
        if _trained(p) and _misfit("", p, x, who, same_dtype):
            raise OptimError(_misfit(tree.paths(params)[i], p, x, who, same_dtype))
    return beside


def _difference(params: Any, other: Any, who: str, error: str) -> str:
    """What to say of two trees of which the one does not fit upon the other."""
    mine, theirs = tree.paths(params), tree.paths(other)
    lost = [path for path in mine if not any(t.startswith(path) for t in theirs)]
    added = [path for path in theirs if not any(path.startswith(m) for m in mine)]
    if lost or added:
        what = f"no leaf {lost[0]}, but params has one" if lost else f"a leaf {added[0]}, but params has none"
        return f"{who} has {what}; both need the same tree"
    return f"{who} and params are different trees: {error}"


def _misfit(path: str, p: torch.Tensor, x: Any, who: str, same_dtype: bool) -> str | None:
    if p.is_complex():
        return f"params{path} is complex; keep torch.view_as_real of it: the kernels know real numbers only"
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
