"""Runs of a step with leaves of all kinds, on several stacks: for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch

import funcpipe as fp
from support.models import same_bits
from support.sharded_steps import clipped, data, linear_batch, linear_params, pipe, sharded


def with_counts(p: Any) -> Any:
    """A state with leaves that are no parameters, one of them no tensor."""
    return {
        "of": (p, optree.tree_map(torch.zeros_like, p)),
        "n": 0,
        "key": torch.tensor([3, 4]),
        "on": True,
    }


def counting(state: Any, b: Any) -> Any:
    new, metrics = clipped(state["of"], b)
    return {**state, "of": new, "n": state["n"] + 1}, metrics


STACKS: dict[str, tuple[fp.Mesh, list[Callable]]] = {
    "plain": (fp.Mesh(), []),
    "pipe=3": (fp.Mesh(pipe=3), [pipe]),
    "pipe=2 data=2 sharded": (fp.Mesh(pipe=2, data=2), [pipe, data, sharded]),
    "data=4 sharded": (fp.Mesh(data=4), [data, sharded]),
    "data=3 whole": (fp.Mesh(data=3), [data]),
    "HSDP": (fp.Mesh(r=2, data=2), [fp.data_parallel(axis=("r", "data")), sharded]),
}
BATCHES = [linear_batch(k, [1.0] * 12) for k in range(4)]


def started(name: str, init: Callable = with_counts, step: Callable = counting) -> tuple[Any, Any]:
    """A runner and its first state."""
    mesh, stack = STACKS[name]
    run = fp.simulate(fp.compose(*stack)(step) if stack else step, mesh)
    return run, run.init(init, linear_params(), BATCHES[0])


def equal(a: Any, b: Any) -> bool:
    return optree.tree_structure(a) == optree.tree_structure(b) and same_bits(a, b)
