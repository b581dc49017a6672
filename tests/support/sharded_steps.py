"""A step with leaves of all kinds, and the transforms that spread it: for tests of sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch

import funcpipe as fp

pipe = fp.pipelined(axis="pipe", microbatches=2)
data = fp.data_parallel(axis="data")
sharded = fp.sharded_weights(axis="data")


def start(params: Any) -> Any:
    return params, optree.tree_map(torch.zeros_like, params)


def linear(params: Any, batch: Any) -> fp.Mean:
    """Leaves of all kinds: 0-d, with no element, with one, frozen integers, unused."""
    x = fp.stage_boundary(batch["x"] @ params["w"] + params["one"])
    x = (
        fp.stage_boundary(torch.tanh(x)[:, params["order"]] * params["scale"])
        + params["none"].sum()
    )
    return fp.Mean((x.square().sum(1) * batch["weight"]).sum(), batch["weight"].sum())


def linear_params(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 5, generator=g, dtype=dtype),
        "one": torch.randn(1, 1, generator=g, dtype=dtype),
        "scale": torch.tensor(0.7, dtype=dtype),
        "order": torch.tensor([4, 2, 0, 1, 3]),
        "none": torch.zeros(0, 2, dtype=dtype),
        "unused": torch.randn(2, 2, 2, generator=g, dtype=dtype),
    }


def linear_batch(seed: int, weight: Sequence[float]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(len(weight), 3, generator=g, dtype=torch.float64),
        "weight": torch.tensor(weight, dtype=torch.float64),
    }


def clipped(params: Any, batch: Any) -> tuple[Any, Any]:
    loss, grads = fp.value_and_grad(linear)(params[0], batch)
    grads, norm = fp.clip_by_global_norm(grads, 0.1)
    moved = optree.tree_map(lambda p, g: p - g if p.is_floating_point() else p, params[0], grads)
    return (moved, grads), {"loss": loss, "norm": norm}
