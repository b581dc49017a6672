"""Fully sharded training (FSDP, ZeRO-3) of a plain step: four processes, each of which holds a
quarter of the model.

    python examples/fsdp.py              in four processes, over gloo; on GPUs if there are four
    python examples/fsdp.py --simulate   the same four ranks inside this process

The step is written for one device. Two transforms spread it: `data_parallel` splits the batch,
`sharded_weights` splits weights, gradients and optimizer state over the same axis. No rank ever has
the whole model: each makes its own part of the params from a key, and a block's weights are whole
only while the block runs. At the end rank 0 trains the same model alone, and compares.
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
        # A boundary after every block: what lies between two of them is gathered together.
        x = fp.stage_boundary(x + F.linear(F.silu(F.linear(x, block["up"])), block["down"]))
    total = F.cross_entropy(F.linear(x, params["head"]), batch["label"], reduction="sum")
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
    return {"x": x.to(device), "label": (x[:, :CLASSES]).argmax(1).to(device)}


# ---- spread over a mesh

sharded = fp.compose(fp.data_parallel(axis="data"), fp.sharded_weights(axis="data", prefetch=1))(
    step
)


def train(run: Any, verbose: bool) -> None:
    state = run.init(init_state, make_params, make_batch(0, run.device), key=0)
    if verbose:
        tell(run.plan(state, make_batch(0, run.device)))
    for i in range(STEPS):
        state, metrics = run(state, make_batch(i, run.device))
        if verbose:
            print(f"step {i}  loss {metrics['loss']:.4f}  gradient norm {metrics['norm']:.3f}")
    full = run.unplace(state)
    if verbose:
        compare(full, run.device)


def tell(plan: fp.Plan) -> None:
    model = sum(torch.Size(x.shape).numel() for x in plan.placement.layouts) * 8
    print(f"{MESH}: a model of {model / 1024:.0f} KiB")
    for what, n in plan.memory[0].items():
        print(f"  {what:12} {n / 1024:7.1f} KiB on a rank")
    for axes, n in plan.traffic[0].items():
        print(f"  a rank receives {n / 1024:.1f} KiB along {', '.join(axes)} in a step")


def compare(full: State, device: torch.device) -> None:
    alone = init_state(optree.tree_map(lambda p: p.to(device), make_params(fp.random.key(0))))
    for i in range(STEPS):
        alone, _ = step(alone, make_batch(i, device))
    pairs = zip(optree.tree_leaves(full.params), optree.tree_leaves(alone.params), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
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
