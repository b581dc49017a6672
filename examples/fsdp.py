"""Fully sharded training (FSDP, ZeRO-3) of a plain step: each of four ranks holds a quarter.

    python examples/fsdp.py              in four processes, over gloo; on GPUs if there are four
    python examples/fsdp.py --simulate   the same four ranks inside this process

The step is written for one device. Two transforms spread it: `data_parallel` splits the batch,
`sharded_weights` shards weights, gradients and optimizer state over the same axis. No rank ever has
the full model: each makes its own shard of the params from a key, and a block's weights are
gathered only while the block runs. At the end rank 0 trains the same model alone, and compares.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F

import funcpipe as fp

BLOCKS, WIDTH, CLASSES, ROWS, STEPS = 6, 64, 10, 32, 5
FLOAT64 = 1e-12  # allowed: sums over ranks are taken in another order than on one device
MESH = fp.Mesh(data=4)


# ---- the model and the step, for one device


class State(NamedTuple):
    params: Any
    opt: Any


def make_params(key: torch.Tensor) -> dict[str, Any]:
    def normal(*shape: int) -> fp.random.Initialiser:
        return fp.random.scaled_normal(shape, std=shape[-1] ** -0.5, dtype=torch.float64)

    block = {"up": normal(4 * WIDTH, WIDTH), "down": normal(WIDTH, 4 * WIDTH)}
    return fp.random.init(key, {"blocks": [block] * BLOCKS, "head": normal(CLASSES, WIDTH)})


def loss_fn(params: dict[str, Any], batch: dict[str, torch.Tensor]) -> fp.Mean:
    x = batch["x"]
    for block in params["blocks"]:
        hidden = F.silu(F.linear(x, block["up"]))
        # A boundary after every block: what lies between two of them is gathered together.
        x = fp.stage_boundary(x + F.linear(hidden, block["down"]))
    logits = F.linear(x, params["head"])
    total = F.cross_entropy(logits, batch["label"], reduction="sum")
    return fp.Mean(total, weight=torch.ones_like(batch["label"]).sum())


optimizer = fp.optim.adamw(1e-3)


def init_state(params: Any) -> State:
    return State(params, optimizer.init(params))


def step(state: State, batch: Any) -> tuple[State, dict[str, torch.Tensor]]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, batch)
    grads, norm = fp.clip_by_global_norm(grads, 1.0)
    params, opt = optimizer.update(grads, state.opt, state.params)
    return State(params, opt), {"loss": loss, "norm": norm}


def make_batch(number: int, device: torch.device) -> dict[str, torch.Tensor]:
    x = fp.random.normal(fp.random.key(number), (ROWS, WIDTH), torch.float64)
    label = x[:, :CLASSES].argmax(1)
    return {"x": x.to(device), "label": label.to(device)}


# ---- spread over a mesh


sharded = fp.data_parallel(step, axis="data")
sharded = fp.sharded_weights(sharded, axis="data", prefetch=1)


def train(run: Any, verbose: bool) -> None:
    first_batch = make_batch(0, run.device)
    state = run.init(init_state, make_params, first_batch, key=0)
    if verbose:
        print_plan(run.plan(state, first_batch))
    for number in range(STEPS):
        state, metrics = run(state, make_batch(number, run.device))
        if verbose:
            print(f"step {number}  loss {metrics['loss']:.4f}  gradient norm {metrics['norm']:.3f}")
    full = run.unplace(state)
    if verbose:
        compare(full, run.device)


def print_plan(plan: fp.Plan) -> None:
    elements = sum(torch.Size(layout.shape).numel() for layout in plan.placement.layouts)
    print(f"{MESH}: a model of {elements * 8 / 1024:.0f} KiB")
    for what, size in plan.memory[0].items():
        print(f"  {what:12} {size / 1024:7.1f} KiB on a rank")
    for axes, size in plan.traffic[0].items():
        print(f"  a rank receives {size / 1024:.1f} KiB along {', '.join(axes)} in a step")


def compare(full: State, device: torch.device) -> None:
    """The state after the sharded steps against the same steps on one device."""
    params = optree.tree_map(lambda param: param.to(device), make_params(fp.random.key(0)))
    alone = init_state(params)
    for number in range(STEPS):
        alone, _ = step(alone, make_batch(number, device))
    pairs = zip(optree.tree_leaves(full.params), optree.tree_leaves(alone.params), strict=True)
    error = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    print(
        f"after {STEPS} steps the params equal those of one device: largest relative error "
        f"{error:.0e}"
    )
    if not error <= FLOAT64:
        sys.exit("fsdp: the sharded step computes something else")


def work() -> None:
    """What every process runs."""
    with_gpus = torch.cuda.device_count() >= MESH.size
    run = fp.spmd(sharded, MESH, device=None if with_gpus else "cpu")
    train(run, verbose=run.rank == 0)
    run.close()


if __name__ == "__main__":
    if "--simulate" in sys.argv[1:]:
        train(fp.simulate(sharded, MESH), verbose=True)
    elif "RANK" in os.environ:  # torchrun has started this process, and the others
        work()
    else:
        fp.launch(work, MESH.size)
