"""Steps, runs and references for tests of `mixed_precision`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.mixed_precision import Scaled
from funcpipe.optim import adamw
from funcpipe.testing import Layer, Model
from support.models import same_bits

# Sums in float64, the dtype of the masters, in another order; what is summed has the same bits.
FLOAT64 = 1e-12
# Totals, and gradients of leaves that are used twice, are summed in float32, the compute dtype, in
# another order.
FLOAT32 = 1e-5

OPTIMIZER = adamw(1e-2, eps=1e-3)
FIRST = 2.0**15  # the first dynamic scale

CHAIN = Model(
    tuple((Layer("linear", (k, k)), Layer("norm", (k, k))) for k in range(3)), unused=True
)
TIED = Model(
    (
        (Layer("linear", (0, 0)),),
        (Layer("permute", (0,)), Layer("linear", (0, 1))),
        (Layer("scale", (0,)),),
    ),
    tied_head=True,
    aux=1,
)
DATA = fp.data_parallel(axis="data")
SHARDED = fp.sharded_weights(axis="data")


def training(model: Model) -> tuple[Callable, Callable]:
    """A step as people write them: clipping, AdamW, a counter."""

    def init_state(params: Any) -> dict[str, Any]:
        return {"params": params, "opt": OPTIMIZER.init(params), "n": torch.zeros(())}

    def step(state: dict[str, Any], batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state["params"], batch)
        clipped, norm = fp.clip_by_global_norm(grads, 0.5)
        params, opt = OPTIMIZER.update(clipped, state["opt"], state["params"])
        loss = out[0] if model.has_aux else out
        return {"params": params, "opt": opt, "n": state["n"] + 1}, {"loss": loss, "norm": norm}

    return step, init_state


def recording(model: Model) -> tuple[Callable, Callable]:
    """A step whose state is the params and the last gradients."""

    def step(state: Any, batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state[0], batch)
        return (state[0], grads), {"loss": out[0] if model.has_aux else out}

    return step, lambda params: (params, optree.tree_map(torch.zeros_like, params))


def ran(
    step: Callable,
    mesh: fp.Mesh,
    init_state: Callable,
    params: Any,
    batches: Sequence[Any],
    edit: Callable | None = None,
) -> tuple[Any, list[Any]]:
    """The full state and all metrics after some steps; ``edit`` changes every rank's first
    state."""
    run = fp.simulate(step, mesh)
    state, metrics = run.init(init_state, params, batches[0]), []
    state = state if edit is None else [edit(s) for s in state]
    for batch in batches:
        state, found = run(state, batch)
        metrics.append(found)
    assert same_bits(run.place(run.unplace(state)), state)
    return run.unplace(state), metrics


def readable(metrics: Any) -> Any:
    """In tensors of their own, with NaN, which equals nothing, as -1."""
    return tree.map(lambda x: torch.where(x.isnan(), -1, x), metrics)


def scale_of(scale: float) -> Callable[[Scaled], Scaled]:
    return lambda state: state._replace(scale=torch.full_like(state.scale, scale))


def by_hand(
    model: Model, params: Any, batch: Any, compute: torch.dtype, scale: float
) -> tuple[torch.Tensor, Any]:
    """Loss and gradients in a compute dtype, as one writes it without funcpipe."""
    cast = lambda x: x.to(compute) if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
    leaves, spec = optree.tree_flatten(params)
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in leaves]
    out = model.loss_fn(
        optree.tree_map(cast, optree.tree_unflatten(spec, inputs)), optree.tree_map(cast, batch)
    )
    total, weight = (x.float() for x in (out[0] if model.has_aux else out))
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(
        torch.autograd.grad(total * scale, wanted, allow_unused=True, materialize_grads=True)
    )
    grads = [
        (next(found) / (weight * scale)).to(x.dtype) if x.requires_grad else torch.zeros_like(x)
        for x in inputs
    ]
    return (total / weight).detach(), optree.tree_unflatten(spec, grads)


def untied(model: Model) -> bool:
    """Whether every leaf is used once."""
    used = [
        (kind, n)
        for layers in model.segments
        for x in layers
        for kind, n in zip(_POOLS[x.kind], x.leaves, strict=False)
    ]
    return not model.tied_head and len(set(used)) == len(used)


_POOLS = {
    "linear": "MV",
    "gated": "MM",
    "norm": "VV",
    "mix": "M",
    "scale": "S",
    "permute": "P",
    "skip": "",
}


def close(got: Any, want: Any, rtol: float) -> None:
    """Every leaf within a relative error, in the norm of the leaf or a thousandth of that of the
    largest."""
    assert optree.tree_structure(got) == optree.tree_structure(want)
    pairs = list(zip(tree.paths(want), tree.leaves(got), tree.leaves(want), strict=True))
    pairs = [(path, a.double(), b.double()) for path, a, b in pairs if torch.is_tensor(b)]
    floor = 1e-3 * max((b.norm() for _, _, b in pairs if b.dim()), default=0.0)
    for path, a, b in pairs:
        assert (a - b).norm() <= rtol * max(b.norm(), floor), path
