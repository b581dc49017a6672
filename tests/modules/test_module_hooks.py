"""`from_module` and what modules do beside computing: hooks of their own, hooks of loading,
conversion in forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from support.models import refused
from torch import nn

import funcpipe as fp
from funcpipe._src.modules.from_module import from_module, to_module
from funcpipe.errors import ModuleError
from funcpipe.testing import assert_equivalent

X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DIMS = {"x": 0, "buffers": None}


class Block(nn.Module):
    """Linear layers in a module, so that hooks may sit at either, and be methods of either."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x)).tanh()

    def beside(self, *args: Any) -> None:
        """For saving and loading."""

    def after(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * 1.5

    def before(self, module: nn.Module, args: Any) -> Any:
        return (args[0] + 1,)


def made(kind: type[nn.Module] = Block) -> Any:
    torch.manual_seed(0)
    return kind().double()


def step_of(module: nn.Module) -> tuple[Callable, dict[str, torch.Tensor]]:
    apply_fn, params, buffers = from_module(module, copy=True)

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        out, _ = apply_fn(params, batch["buffers"], batch["x"])
        return fp.Mean(
            out.double().square().sum(), torch.tensor(float(len(batch["x"])), dtype=torch.float64)
        )

    def step(params: Any, batch: torch.Tensor) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(params, {"x": batch, "buffers": buffers})
        return optree.tree_map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}

    return step, params


def check_step(module: nn.Module, rtol: float = 1e-12) -> None:
    """One step over data ranks has the loss and gradients of ``backward()`` in plain PyTorch."""
    step, params = step_of(module)
    run = fp.simulate(fp.data_parallel(step, axis="data", dims=DIMS), fp.Mesh(data=2))
    full, metrics = run(run.init(lambda params: params, params, X), X)
    after = run.unplace(full)
    loss = module(X).double().square().sum() / len(X)
    loss.backward()
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=rtol, atol=0)
    for name, p in module.named_parameters():
        torch.testing.assert_close(after[name], params[name] - 0.1 * p.grad, rtol=rtol, atol=rtol)


# ---- hooks


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m._register_load_state_dict_pre_hook(m.beside),
        lambda m: m.register_load_state_dict_pre_hook(m.beside),
        lambda m: m.inner.register_load_state_dict_pre_hook(m.beside),
        lambda m: m.register_load_state_dict_post_hook(m.beside),
        lambda m: m._register_state_dict_hook(m.beside),
        lambda m: m.register_state_dict_pre_hook(m.beside),
        lambda m: m.register_state_dict_pre_hook(lambda *args: m.inner.weight),
    ],
)
def test_hooks_of_saving_and_loading_play_no_part(register: Callable) -> None:
    module = made()
    register(module)
    check_step(module)


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(m.after),
        lambda m: m.inner.register_forward_hook(m.after),
        lambda m: m.inner.register_forward_pre_hook(m.before),
        lambda m: m.inner.register_full_backward_hook(
            lambda m, gi, go: tuple(g if g is None else 2 * g for g in gi)
        ),
        lambda m: m.inner.weight.register_hook(lambda grad: 0 * grad).remove(),
    ],
)
def test_hooks_of_modules_are_called(register: Callable) -> None:
    module = made()
    register(module)
    check_step(module)


@pytest.mark.parametrize("by", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_parameters_are_refused(by: str, late: bool) -> None:
    """Also one that is registered after `from_module`. To write params back is allowed."""
    module = made()
    text = (
        f"parameter 'inner.weight' has a hook ({by}): plain PyTorch calls it with the whole "
        "gradient, but in a step each microbatch of each shard has a part of it. Do what the hook "
        "does in the step, to grads['inner.weight'] as value_and_grad returns it, and remove the "
        "hook"
    )
    if late:
        apply_fn, params, buffers = from_module(module)
        getattr(module.inner.weight, by)(lambda x: None)
        with refused(ModuleError, text):
            apply_fn(params, buffers, X)
        to_module(module, params, buffers)
    else:
        getattr(module.inner.weight, by)(lambda x: None)
        with refused(ModuleError, text):
            from_module(module)


# ---- conversion in forward


class Converts(nn.Module):
    """A router that is converted by its caller, as in transformers' Switch Transformers."""

    dtype = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.rest = nn.Sequential(nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner = self.inner.to(self.dtype)
        routed = self.inner(x.to(self.dtype)) * self.inner.scale
        return (
            self.rest.float()(routed.float()) if self.dtype == torch.float32 else self.rest(routed)
        )


class Narrows(Converts):
    dtype = torch.float32


def test_a_conversion_to_the_same_dtype() -> None:
    check_step(made(Converts))


def test_a_conversion_to_another_dtype_is_a_cast() -> None:
    """Gradients go through it, and neither the module nor the params that came in change."""
    module = made(Narrows)
    step, params = step_of(module)
    before = {name: x.clone() for name, x in params.items()}
    assert_equivalent(
        step,
        fp.data_parallel(step, axis="data", dims=DIMS),
        fp.Mesh(data=2),
        lambda p: p,
        params,
        [X],
        rtol=1e-6,
    )
    moved, _ = step(params, X)
    assert all(
        x.dtype == torch.float64 and torch.equal(x, before[name]) for name, x in params.items()
    )
    assert {x.dtype for x in module.parameters()} == {torch.float64}
    assert all((moved[name] != before[name]).any() for name in params)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.to(self.wanted)(x.to(self.wanted)[None])[0]

    wanted = torch.float64


def test_a_module_that_converts_in_a_way_of_its_own() -> None:
    check_step(made(Recurrent))
    module = made(Recurrent)
    module.wanted = torch.float32
    apply_fn, params, buffers = from_module(module)
    text = (
        "LSTM is converted in forward (.to(), .float() and their like), and refers to "
        "'weight_ih_l0' in more places than one: convert it before from_module"
    )
    with refused(ModuleError, text):
        apply_fn(params, buffers, X)
