"""Trace and cut time for 4, 16 and 64 layers, with backwards whole and as I and W: it has to be
linear in depth.

python tests/benchmarks/trace.py [--layers 4 16 64]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.node_labels import read_nodes
from funcpipe._src.graph.partition import cut
from funcpipe._src.graph.trace import trace

WIDTH, HEADS, HIDDEN, VOCABULARY, ROWS, LENGTH = 64, 4, 176, 128, 2, 32


def init(layers: int) -> dict:
    new = lambda *shape: torch.randn(shape) * 0.02  # noqa: E731
    block = lambda: {  # noqa: E731
        "norm1": torch.ones(WIDTH),
        "norm2": torch.ones(WIDTH),
        **{name: new(WIDTH, WIDTH) for name in ("q", "k", "v", "o")},
        **{"up": new(HIDDEN, WIDTH), "gate": new(HIDDEN, WIDTH), "down": new(WIDTH, HIDDEN)},
    }
    ends = {
        "embed": new(VOCABULARY, WIDTH),
        "norm": torch.ones(WIDTH),
        "head": new(VOCABULARY, WIDTH),
    }
    return {**ends, "blocks": [block() for _ in range(layers)]}


def attention(p: dict, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (F.linear(x, p[n]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(-2), p["o"])


def block(p: dict, x: torch.Tensor) -> torch.Tensor:
    x = x + attention(p, F.rms_norm(x, (WIDTH,), p["norm1"]))
    h = F.rms_norm(x, (WIDTH,), p["norm2"])
    return x + F.linear(F.silu(F.linear(h, p["gate"])) * F.linear(h, p["up"]), p["down"])


def loss_fn(params: dict, batch: dict) -> fp.Mean:
    x = F.embedding(batch["tokens"], params["embed"])
    for p in params["blocks"]:
        x = fp.stage_boundary(block(p, x))
    logits = F.linear(F.rms_norm(x, (WIDTH,), params["norm"]), params["head"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return fp.Mean(losses.sum(), torch.tensor(float(losses.numel())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    torch.set_num_threads(1)
    table = Table(
        "layers",
        "trace ms/layer",
        "cut ms/layer",
        "whole plan ms/layer",
        "with I and W",
        "distinct units",
    )
    measure(1)  # warm up
    for layers in parser.parse_args().layers:
        table.add_row(str(layers), *measure(layers))
    Console().print(table)


def measure(layers: int) -> list[str]:
    params, tokens = init(layers), torch.randint(VOCABULARY, (ROWS, LENGTH))
    batch, mode = {"tokens": tokens, "labels": tokens}, FakeTensorMode()
    fakes = tree.map(lambda x: fake(x.shape, x, mode), (params, batch))
    t0 = time.perf_counter()
    traced = trace(loss_fn, False, *map(tree.flatten, fakes), mode)
    t1 = time.perf_counter()
    cut(traced, read_nodes(traced), split=False)
    t2 = time.perf_counter()
    step = lambda state, batch: (state, {"loss": fp.value_and_grad(loss_fn)(state, batch)[0]})  # noqa: E731
    times = [b - a for a, b in ((t0, t1), (t1, t2))]
    for schedule in (fp.schedules.one_f_one_b(), fp.schedules.zb_h1()):
        start = time.perf_counter()
        run = fp.simulate(
            fp.pipelined(step, axis="pipe", microbatches=2, schedule=schedule), fp.Mesh(pipe=2)
        )
        state = run.init(lambda p: p, params, batch)
        times.append(time.perf_counter() - start)
    units = {u.code.key for u in run.plan(state, batch).calls[0].units.units.values()}
    return [*(f"{1e3 * seconds / layers:.0f}" for seconds in times), str(len(units))]


if __name__ == "__main__":
    main()
