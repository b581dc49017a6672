"""Train a Hugging Face Llama, as its makers wrote it, over a pipeline with sharded weights.

    python examples/finetune_hf.py                       on four GPUs, or else in four processes
    python examples/finetune_hf.py --simulate            the same mesh inside this one process
    python examples/finetune_hf.py --check --short       first compare the step with one device
    python examples/finetune_hf.py --mesh pipe=4 --gradient_accumulation_steps 16
    python examples/finetune_hf.py --gradient_checkpointing
    torchrun --nproc-per-node 4 examples/finetune_hf.py  in processes that torchrun starts

`fp.from_module` makes a pure function of the model, cut after every decoder layer; the step is
written for one device; `parallel` says how it is spread; `fp.to_module` puts the trained weights
back, for ``model.generate``. Options have the names that they have in
transformers.TrainingArguments. The text is that of train_lm.py, its bytes are the tokens, and the
model is a small one made from a config, so that there is nothing to download: put
AutoModelForCausalLM.from_pretrained and a tokenizer of your own in `make_model` and `batches`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import optree
import torch
import torch.nn.functional as F
from train_lm import TrainState, batches, enough_gpus, mesh, positive, printable, rank
from transformers import LlamaConfig, LlamaForCausalLM

import funcpipe as fp
from funcpipe.testing import assert_equivalent

# Seconds in all, for CI.
SHORT = {
    "layers": 3,
    "width": 64,
    "length": 64,
    "per_device_train_batch_size": 2,
    "steps": 30,
}
PROMPT = b"def "
BOUNDARIES = ["model.layers.*"]
DIMS = {"tokens": 0, "labels": 0, "buffers": None}  # buffers are not split: every rank has all


# ---- the model, the step for one device, and how it is spread


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=8 * args.width // 3 // 16 * 16,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        max_position_embeddings=max(args.length, 256),
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).train()
    if args.gradient_checkpointing:
        enable = model.gradient_checkpointing_enable
        if hasattr(model, "activation_checkpointing_enable"):  # renamed within transformers 5
            enable = model.activation_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def make_step(
    apply_fn: Callable, buffers: Any, args: argparse.Namespace
) -> tuple[Callable, Callable]:
    """The step, and ``params -> state``."""
    warmup = int(args.warmup_ratio * args.steps)
    schedule = fp.optim.warmup_cosine(args.learning_rate, warmup, args.steps)
    optimizer = fp.optim.adamw(schedule, weight_decay=args.weight_decay)

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        if args.bf16:  # the state keeps float32
            params = optree.tree_map(torch.Tensor.bfloat16, params)
        out, _ = apply_fn(params, batch["buffers"], input_ids=batch["tokens"], use_cache=False)
        logits = out.logits.flatten(0, 1)
        if args.bf16:
            logits = logits.float()
        total = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
        return fp.Mean(total, weight=torch.ones_like(batch["labels"]).sum())

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, torch.Tensor]]:
        loss, grads = fp.value_and_grad(loss_fn)(state.params, {**batch, "buffers": buffers})
        grads, norm = fp.clip_by_global_norm(grads, args.max_grad_norm)
        params, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(params, opt_state), {"loss": loss, "grad_norm": norm}

    return step, lambda params: TrainState(params, optimizer.init(params))


def parallel(step: Callable, args: argparse.Namespace) -> Callable:
    step = fp.pipelined(step, axis="pipe", microbatches=args.gradient_accumulation_steps, dims=DIMS)
    data = tuple(name for name in args.mesh.axes if name != "pipe")
    if not data:
        return step
    return fp.sharded_weights(fp.data_parallel(step, axis=data, dims=DIMS), axis=data)


# ---- one rank's work


def work(args: argparse.Namespace) -> list[float]:
    """What every process does; in a simulation, what the one process does.

    Returns:
        the loss of every step.
    """
    torch.set_num_threads(1)  # the ranks share the cores
    model = make_model(args)
    apply_fn, params, buffers = fp.from_module(model, boundaries=BOUNDARIES)
    on_cpu = args.simulate or not enough_gpus(args)
    device = torch.device("cpu")
    if not on_cpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    params, buffers = optree.tree_map(lambda tensor: tensor.to(device), (params, buffers))
    step, init_state = make_step(apply_fn, buffers, args)
    step = parallel(step, args)
    if args.simulate:
        run = fp.simulate(step, args.mesh)
    else:
        run = fp.spmd(step, args.mesh, device="cpu" if on_cpu else None)

    batch = batches(args, device)
    state = run.init(init_state, params, batch(0))
    state, losses = train(run, state, batch, args)
    params = run.unplace(state).params
    if rank() == 0:
        parameters = sum(param.numel() for param in params.values())
        bubble = run.plan(state, batch(0)).bubble
        print(f"{parameters:,} parameters; bubble {bubble:.1%}, by FLOPs")
        text = write(fp.to_module(model, params)).decode("ascii", errors="replace")
        print("What it writes now:\n" + printable(text))
    if not args.simulate:
        run.close()
    return losses


def train(
    run: Any,
    state: Any,
    batch: Callable[[int], Any],
    args: argparse.Namespace,
) -> tuple[Any, list[float]]:
    losses: list[float] = []
    start = time.perf_counter()
    for number in range(args.steps):
        state, metrics = run(state, batch(number))
        losses.append(float(metrics["loss"]))
        is_last = number == args.steps - 1
        if rank() == 0 and (is_last or number % max(args.steps // 10, 1) == 0):
            seconds = time.perf_counter() - start
            print(
                f"step {number + 1:4}  loss {losses[-1]:.3f}  after {seconds:.1f} s",
                flush=True,
            )
    return state, losses


def write(model: LlamaForCausalLM, count: int = 160) -> bytes:
    """``count`` more bytes, drawn by Hugging Face's own ``generate``."""
    torch.manual_seed(0)
    prompt = torch.tensor([list(PROMPT)])
    tokens = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=True,
        temperature=0.7,
    )
    return bytes(tokens[0].tolist())


# ---- the command


def check(args: argparse.Namespace) -> None:
    """The parallel step against the plain one, in float64, on the batches of the first steps."""
    batch = batches(args, torch.device("cpu"))
    start = time.perf_counter()
    model = make_model(args).double()
    apply_fn, params, buffers = fp.from_module(model, boundaries=BOUNDARIES)
    in_float64 = argparse.Namespace(**vars(args) | {"bf16": False})
    step, init_state = make_step(apply_fn, buffers, in_float64)
    try:
        found = assert_equivalent(
            step,
            parallel(step, args),
            args.mesh,
            init_state,
            params,
            [batch(0), batch(1)],
        )
    except AssertionError as error:
        sys.exit(f"finetune_hf: the parallel step computes something else: {error}")
    seconds = time.perf_counter() - start
    print(
        f"check: two steps equal one device, largest error {found.error:.0e} at {found.where} "
        f"({seconds:.1f} s)"
    )


# Option, name in `args`, default, meaning.
COUNTS = (
    ("max_steps", "steps", 100, "training steps"),
    (
        "per_device_train_batch_size",
        "per_device_train_batch_size",
        4,
        "rows that go through the pipeline at once, for each data rank",
    ),
    (
        "gradient_accumulation_steps",
        "gradient_accumulation_steps",
        4,
        "microbatches of a step",
    ),
    ("block_size", "length", 128, "bytes in a row"),
    ("num_hidden_layers", "layers", 6, "decoder layers"),
    (
        "hidden_size",
        "width",
        128,
        "model width, a multiple of 32: each attention head has 32",
    ),
)
NUMBERS = (
    ("learning_rate", 4e-3, "at its peak"),
    ("warmup_ratio", 0.1, "part of the steps until the peak; a cosine follows"),
    ("weight_decay", 0.1, "of matrices"),
    ("max_grad_norm", 1.0, "gradients are scaled down to it"),
)
FLAGS = (
    ("simulate", "run all ranks of the mesh in this process"),
    ("check", "first compare with a single device, in float64"),
    ("bf16", "compute in bfloat16; weights and optimizer state stay float32"),
    ("gradient_checkpointing", "recompute every layer in the backward pass"),
    ("short", "a small model and few steps: some seconds in all"),
)
MESH = "pipe, and axes to split the batch and weights over"


def parse(argv: list[str]) -> argparse.Namespace:
    text, rest = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=text,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--mesh", type=mesh, default=fp.Mesh(pipe=2, data=2), help=MESH)
    for option, name, count, meaning in COUNTS:
        help = f"{meaning} ({count})"
        add(f"--{option}", dest=name, type=positive, default=count, metavar="N", help=help)
    for option, number, meaning in NUMBERS:
        help = f"{meaning} ({number})"
        add(f"--{option}", type=float, default=number, metavar="X", help=help)
    for option, meaning in FLAGS:
        add(f"--{option}", action="store_true", help=meaning)
    add("--seed", type=int, default=0, metavar="N", help="of the first weights (0)")
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)
    if args.width % 32:
        parser.error(f"--hidden_size {args.width} is not a multiple of 32")
    if "pipe" not in args.mesh.axes:
        parser.error(f"--mesh {args.mesh}: it has no axis pipe")
    shards = args.mesh.size // args.mesh.axis_size("pipe")
    args.rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * shards
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.check and rank() == 0:
        check(args)
    if args.simulate or "RANK" in os.environ:  # torchrun has started this process, and the others
        work(args)
    else:
        devices = "GPUs" if enough_gpus(args) else "processes, over gloo"
        print(f"{args.mesh!r}: {args.mesh.size} {devices}", flush=True)
        fp.launch(work, args.mesh.size, args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except fp.errors.FuncpipeError as error:
        sys.exit(f"finetune_hf: {error}")
