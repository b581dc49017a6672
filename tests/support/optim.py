"""Random params and gradients, training on them, and a comparison, for the tests of optimizers."""

from __future__ import annotations

from typing import Any

import optree
import torch

from funcpipe.optim import Optimizer


def random_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    return {
        "embed": rand(7, 4),
        "blocks": [{"w": rand(4, 4), "norm": rand(4)} for _ in range(2)],
        "scale": rand(),
    }


def random_grads(params: Any, step: int) -> Any:
    gen = torch.Generator().manual_seed(100 + step)

    def grad(p: torch.Tensor) -> torch.Tensor:
        return torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)

    return optree.tree_map(grad, params)


def train(
    optimizer: Optimizer, params: Any, steps: int, grads: Any = random_grads
) -> tuple[Any, Any]:
    state = optimizer.init(params)
    for i in range(steps):
        params, state = optimizer.update(grads(params, i), state, params)
    return params, state


def assert_same(a: Any, b: Any, rtol: float = 0.0) -> None:
    assert optree.tree_structure(a) == optree.tree_structure(b)
    for path, x, y in zip(
        optree.tree_paths(a), optree.tree_leaves(a), optree.tree_leaves(b), strict=True
    ):
        torch.testing.assert_close(
            x, y, rtol=rtol, atol=rtol, msg=lambda text, path=path: f"{path}: {text}"
        )
