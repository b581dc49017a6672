"""Sequence parallelism on real GPUs: torch's fused kernels, documents, rings; over NCCL; captured
into a CUDA graph."""

from __future__ import annotations

import os
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.gpu import one_gpu, two_gpus

import funcpipe as fp

pytestmark = pytest.mark.gpu
HALF = 3e-2  # bfloat16 beside float64, relative to the largest number
SINGLE = 1e-4

VOCAB, HEADS, KV, D, N, LAYERS = 64, 4, 2, 64, 256, 2


# ---- attention alone


def attended(q: Any, k: Any, v: Any, w: Any, **options: Any) -> list[torch.Tensor]:
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    out = fp.attention(*x, **options)
    return [out.detach(), *torch.autograd.grad(out, x, w)]


@one_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("documents", [None, [0, 192], [0, 50, 50, 192], [3, 60, 61, 100]], ids=str)
@pytest.mark.parametrize("bias", [None, "float", "bool"])
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels(
    dtype: torch.dtype, kv: int, causal: bool, documents: Any, bias: str | None, batch: int
) -> None:
    g = torch.Generator().manual_seed(0)
    n = 192
    q, k, v, w = (torch.randn(batch, n, h, D, generator=g) for h in (4, kv, kv, 4))
    b = {
        None: None,
        "float": torch.randn(1, 1, n, n, generator=g),
        "bool": torch.rand(batch, 1, n, n) > 0.3,
    }[bias]
    cu = None if documents is None else torch.tensor(documents)
    wide = b.double() if bias == "float" else b  # type: ignore[union-attr]
    want = attended(*(t.double() for t in (q, k, v, w)), causal=causal, bias=wide, cu_seqlens=cu)
    on = lambda t: None if t is None else t.cuda().to(dtype) if t.is_floating_point() else t.cuda()  # noqa: E731
    got = attended(*(on(t) for t in (q, k, v, w)), causal=causal, bias=on(b), cu_seqlens=on(cu))
    for a, c in zip(got, want, strict=True):
        assert float((a.double().cpu() - c).abs().max() / c.abs().max()) < (
            HALF if dtype == torch.bfloat16 else SINGLE
        )


# ---- a model


def init(dtype: torch.dtype) -> Any:
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return (
            (torch.randn(shape, generator=g, dtype=torch.float64) * shape[-1] ** -0.5)
            .to(dtype)
            .cuda()
        )

    width = HEADS * D
    block = lambda: {"qkv": rand((HEADS + 2 * KV) * D, width), "out": rand(width, width)}  # noqa: E731
    return {"embed": rand(VOCAB, width) * 8, "blocks": [block() for _ in range(LAYERS)]}


def make_batch(length: int = N) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1)).cuda()
    return {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def loss_fn(p: Any, b: Any) -> fp.Mean:
    x = F.embedding(b["tokens"], p["embed"])
    for block in p["blocks"]:
        qkv = F.linear(F.rms_norm(x, x.shape[-1:]), block["qkv"]).unflatten(-1, (-1, D))
        q, k, v = qkv.split([HEADS, KV, KV], 2)
        x = fp.stage_boundary(
            x + F.linear(fp.attention(q, k, v, causal=True).flatten(2), block["out"])
        )
    return fp.losses.cross_entropy(x, p["embed"], b["labels"], chunk_tokens=64)


def step(state: Any, batch: Any) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(state[0], batch)
    return (optree.tree_map(lambda p, g: p - 0.1 * g, state[0], grads), grads), {"loss": loss}


def init_state(params: Any) -> Any:
    return params, optree.tree_map(torch.zeros_like, params)


def run_steps(
    run: Any, dtype: torch.dtype, lengths: tuple[int, ...] = (N, N)
) -> tuple[Any, list[float]]:
    state, seen = run.init(init_state, init(dtype), make_batch(lengths[0])), []
    for length in lengths:
        state, metrics = run(state, make_batch(length))
        seen.append(float(metrics["loss"]))
    return run.unplace(state), seen


def reference(lengths: tuple[int, ...] = (N, N)) -> tuple[Any, list[float]]:
    state, seen = init_state(init(torch.float64)), []
    for length in lengths:
        state, metrics = step(state, make_batch(length))
        seen.append(float(metrics["loss"]))
    return state, seen


def error(got: Any, want: Any) -> float:
    pairs = zip(optree.tree_leaves(got), optree.tree_leaves(want), strict=True)
    norm = lambda x: torch.as_tensor(x, dtype=torch.float64).cpu().norm()  # noqa: E731
    return max(
        float(norm(torch.as_tensor(a).double().cpu() - torch.as_tensor(b).double().cpu()) / norm(b))
        for a, b in pairs
    )


STACKS = {
    "heads": (("seq",), [fp.seq_all_to_all(axis="seq")]),
    "ring": (("ring",), [fp.seq_ring(axis="ring")]),
    "ring, in order": (("ring",), [fp.seq_ring(axis="ring", zigzag=False)]),
    "ISP": (("seq",), [fp.seq_all_to_all(axis="seq"), fp.sharded_weights(axis="seq")]),
}


@one_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_simulated_on_one_gpu(name: str, dtype: torch.dtype) -> None:
    axes, stack = STACKS[name]
    run = fp.simulate(fp.compose(*stack)(step), fp.Mesh(**dict.fromkeys(axes, 2)))
    assert error(run_steps(run, dtype), reference()) <= (1e-10 if dtype == torch.float64 else HALF)


# ---- two GPUs

LENGTHS = (N, 250, N)


def work() -> dict[str, float]:
    torch.cuda.set_device(int(os.environ["RANK"]))
    found = {}
    want = reference(LENGTHS)
    for name, (axes, stack) in STACKS.items():
        for dtype, options in (
            (torch.float64, {}), (torch.bfloat16, {}), (torch.bfloat16, {"backend": "inductor", "cuda_graph": True})
        ):  # fmt: skip
            lengths = LENGTHS if not options else (N, N, N)
            run = fp.spmd(fp.compose(*stack)(step), fp.Mesh(**dict.fromkeys(axes, 2)), **options)
            got = run_steps(run, dtype, lengths)
            against = want if lengths == LENGTHS else reference(lengths)
            found[f"{name} {dtype} {'captured' if options else 'eager'}"] = error(got, against)
            run.close()
    return found


@two_gpus
def test_over_nccl() -> None:
    for rank, found in enumerate(fp.launch(work, 2)):
        for name, off in found.items():
            assert off <= (1e-10 if "float64" in name else HALF), (rank, name, off)
