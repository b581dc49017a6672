"""Print what a change of the code must not change, to compare before and after with `diff`.

    python .ci/same_bits.py > before.txt      (about half a minute on one core)
    ... change the code ...
    python .ci/same_bits.py | diff before.txt -

For a grid of stacks it prints the plan, every instruction, the losses in hexadecimal and a hash of
the state after two steps; for random programs the losses, and hashes of the rest. `--short` prints
hashes in place of plans and instructions. An error is printed in place of what it kept from coming.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
import torch.nn.functional as F

import funcpipe as fp
from funcpipe.testing import Layer, Model

RANDOM_PROGRAMS = 50
STEPS = 2
LAYER_LEAVES = {"linear": "MV", "gated": "MM", "norm": "VV", "mix": "M", "scale": "S"}

Case = tuple[str, Callable, fp.Mesh, Callable, Any, list[Any]]


# ---- the grid: one loss function, every kind of stack


def attention_loss(params: Any, batch: Any) -> fp.Mean:
    """Blocks with a boundary after each, then attention over positions."""
    x = batch["x"]
    for weight in params["blocks"]:
        x = fp.stage_boundary(torch.tanh(x @ weight))
    heads = x[:, None] * params["scale"]
    x = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)[:, 0]
    return fp.Mean((x**2).sum(), torch.tensor(float(batch["x"].numel())))


def training(loss_fn: Callable, has_aux: bool = False) -> tuple[Callable, Callable]:
    """A step with clipping and AdamW, and its ``init_state``."""
    optimizer = fp.optim.adamw(1e-3)

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        out, grads = fp.value_and_grad(loss_fn, has_aux=has_aux)(params, batch)
        grads, norm = fp.clip_by_global_norm(grads, 1.0)
        params, moments = optimizer.update(grads, moments, params)
        loss, aux = out if has_aux else (out, None)
        return (params, moments), {"loss": loss, "norm": norm, "aux": aux}

    return step, lambda params: (params, optimizer.init(params))


def stacks(step: Callable) -> Iterator[tuple[str, Callable, fp.Mesh]]:
    """Every kind of stack, by name."""
    schedules = fp.schedules

    def pipelined(schedule: Any = None) -> Callable:
        return fp.pipelined(step, axis="pipe", microbatches=4, schedule=schedule)

    one_f_one_b, pipe = pipelined(), fp.Mesh(pipe=2)
    yield "accumulated", fp.accumulated(step, microbatches=4), fp.Mesh()
    yield "1F1B", one_f_one_b, fp.Mesh(pipe=4)
    yield "ZB-H1", pipelined(schedules.zb_h1()), pipe
    yield "ZB-V", pipelined(schedules.zb_v()), pipe
    yield "auto", pipelined(schedules.auto()), pipe
    yield "interleaved", pipelined(schedules.interleaved_1f1b(2)), pipe
    data = fp.data_parallel(one_f_one_b, axis="data")
    yield "FSDP + data + pipe", fp.sharded_weights(data, axis="data"), fp.Mesh(pipe=2, data=2)
    ulysses = fp.seq_all_to_all(one_f_one_b, axis="seq", dims=1)
    uneven = fp.sharded_weights(ulysses, axis="seq")
    yield "Ulysses, uneven + FSDP", uneven, fp.Mesh(pipe=2, seq=3)
    yield "ring", fp.seq_ring(step, axis="ring", dims=1), fp.Mesh(ring=2)
    yield "remat", fp.remat(one_f_one_b, policy="block"), pipe
    yield "bfloat16", fp.mixed_precision(one_f_one_b, compute="bfloat16"), pipe


def grid() -> Iterator[Case]:
    """The cases of the grid."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(8, 8, generator=generator) for _ in range(8)]
    params = {"scale": torch.ones(1), "blocks": blocks}
    batches = [{"x": torch.randn(16, 8, 8, generator=generator)} for _ in range(STEPS)]
    step, init_state = training(attention_loss)
    for name, stacked, mesh in stacks(step):
        yield name, stacked, mesh, init_state, params, batches


# ---- random programs, drawn by a seed alone: Hypothesis also draws from the source code


def random_model(draw: random.Random) -> Model:
    """A model of one to five segments; some leaves are tied, some values skip segments."""
    sizes = dict.fromkeys("MVSP", 0)
    segments = []
    for number in range(draw.randint(1, 5)):
        layers = [_random_layer(draw, number, sizes) for _ in range(draw.randint(0, 3))]
        segments.append(tuple(layers))
    carry = draw.choice(["tensor", "dict", "tuple"])
    return Model(
        segments=tuple(segments),
        width=draw.choice([4, 6]),
        carry=carry,
        carried=None if carry == "tensor" else draw.randrange(len(segments)),
        tied_head=draw.random() < 0.5,
        top=draw.choice(["none", "scale"]),
        aux=draw.choice([None, draw.randrange(len(segments))]),
        unused=draw.random() < 0.5,
        zero_rows=draw.random() < 0.5,
    )


def _random_layer(draw: random.Random, segment: int, sizes: dict[str, int]) -> Layer:
    if segment > 1 and draw.random() < 0.2:
        return Layer("skip", (draw.randrange(segment - 1),))
    kind = draw.choice(list(LAYER_LEAVES))
    leaves = []
    for pool in LAYER_LEAVES[kind]:
        tied = sizes[pool] > 0 and draw.random() < 0.25
        leaves.append(draw.randrange(sizes[pool]) if tied else sizes[pool])
        sizes[pool] += not tied
    return Layer(kind, tuple(leaves))


def random_stack(draw: random.Random, step: Callable, segments: int) -> tuple[Callable, fp.Mesh]:
    """A pipeline or a loop over microbatches, perhaps on data ranks with sharded weights."""
    axes: dict[str, int] = {}
    microbatches = draw.randint(1, 3)
    pipe = draw.randint(1, min(3, segments))
    if pipe > 1:
        axes["pipe"] = pipe
        names = ["1f1b", "gpipe", "zb_h1", *(["zb_v"] if segments >= 2 * pipe else [])]
        schedule, stages = draw.choice(names), draw.choice(["balanced", "even"])
        step = fp.pipelined(
            step, axis="pipe", microbatches=microbatches, schedule=schedule, stages=stages
        )
    else:
        step = fp.accumulated(step, microbatches=microbatches)
    if draw.random() < 0.5:
        axes["data"] = 2
        dims = {"ids": 0, "labels": 0, "mask": 0, "weight": 0, "t": None, "shift": None}
        step = fp.data_parallel(step, axis="data", dims=dims)
        if draw.random() < 0.5:
            options = {
                "regather": draw.choice(["microbatch", "step"]),
                "prefetch": draw.choice([0, 1]),
            }
            step = fp.sharded_weights(step, axis="data", **options)
    if draw.random() < 0.3:
        step = fp.remat(step, policy=draw.choice(["block", "products"]))
    return step, fp.Mesh(**axes)


def random_programs(count: int) -> Iterator[Case]:
    """Cases by number; each is drawn by its own seed."""
    for number in range(count):
        draw = random.Random(number)
        model = random_model(draw)
        step, init_state = training(model.loss_fn, model.has_aux)
        stacked, mesh = random_stack(draw, step, len(model.segments) + 1)
        batches = [model.batch(seed, rows=12) for seed in range(STEPS)]
        yield f"random {number}", stacked, mesh, init_state, model.init(number), batches


# ---- what is printed


def digest(*chunks: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(b"".join(chunks)).hexdigest()[:16]


def tensor_bytes(tree: Any) -> list[bytes]:
    """The bytes of every tensor of a tree."""
    tensors = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in tensors]


def described(case: Case, short: bool) -> Iterator[str]:
    """What a case plans and computes, line by line."""
    _, step, mesh, init_state, params, batches = case
    run = fp.simulate(step, mesh)
    state = run.init(init_state, params, batches[0])
    plan = run.plan(state, batches[0])
    programs = [program for call in plan.calls for program in call.programs]
    plan_lines = str(plan).splitlines()
    program_lines = [str(i) for program in programs for i in program.instructions]
    for what, lines in (("plan", plan_lines), ("program", program_lines)):
        yield f"{what} {digest(chr(10).join(lines).encode())}"
        yield from [] if short else (f"  {line}" for line in lines)
    for batch in batches:
        state, metrics = run(state, batch)
        yield f"loss {float(metrics['loss']).hex()} metrics {digest(*tensor_bytes(metrics))}"
    yield f"state {digest(*tensor_bytes(run.unplace(state)))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="hashes in place of texts")
    parser.add_argument("--random", type=int, default=RANDOM_PROGRAMS, help="how many programs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for cases, short in ((grid(), options.short), (random_programs(options.random), True)):
        for case in cases:
            print(f"== {case[0]}")
            try:
                for line in described(case, short):
                    print(line)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
