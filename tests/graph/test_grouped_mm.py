"""Grouped products: fakes as the kernels give them, steps in every dtype, and what is said where
there is no kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from support.models import refused
from torch._subclasses.fake_tensor import FakeTensorMode

import funcpipe as fp
from funcpipe.errors import TraceError
from funcpipe.testing import assert_equivalent

DIM, EXPERTS = 16, 4
OFFSETS = torch.tensor([3, 8], dtype=torch.int32)


# ---- fakes


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Tensors of a shape by rows, by columns, expanded, with gaps between rows, between columns."""
    *first, rows, columns = shape
    yield torch.ones(shape, dtype=dtype)
    yield torch.ones((*first, columns, rows), dtype=dtype).mT
    yield torch.ones((), dtype=dtype).expand(shape)
    yield torch.ones((*first, rows, 2 * columns), dtype=dtype)[..., :columns]
    yield torch.ones((*first, rows, 2 * columns), dtype=dtype)[..., ::2]


def outcome(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None) -> Any:
    try:
        out = F.grouped_mm(a, b, offs=offs)
    except RuntimeError:
        return "refused"
    return tuple(out.shape), out.stride(), out.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("inner", "columns"), [(16, 32), (12, 20), (16, 5), (1, 1)])
def test_a_fake_is_what_the_kernel_gives(dtype: torch.dtype, inner: int, columns: int) -> None:
    """Shape, strides and dtype, or a refusal, for all layouts of both operands."""
    kinds = [
        ((8, inner), (2, inner, columns), OFFSETS),
        ((2, columns, inner), (inner, 8), OFFSETS),
        ((columns, 8), (8, inner), OFFSETS),
        ((2, 8, inner), (2, inner, columns), None),
    ]
    kinds += [
        (shape_a, shape_b, None if offs is not None else OFFSETS)
        for shape_a, shape_b, offs in kinds
    ]
    for shape_a, shape_b, offs in kinds:
        for a, b in itertools.product(layouts(shape_a, dtype), layouts(shape_b, dtype)):
            with FakeTensorMode() as mode:
                fakes = [None if x is None else mode.from_tensor(x) for x in (a, b, offs)]
                found = outcome(*fakes)  # type: ignore[arg-type]
            assert found == outcome(a, b, offs), (shape_a, a.stride(), shape_b, b.stride())


# ---- steps


def params(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * 0.3).to(dtype)

    return {
        "embed": normal(11, DIM),
        "router": normal(EXPERTS, DIM),
        "up": normal(EXPERTS, DIM, 2 * DIM),
        "down": normal(EXPERTS, 2 * DIM, DIM),
    }


TOKENS = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))


def loss_fn(p: Any, tokens: torch.Tensor) -> fp.Mean:
    """Tokens sorted by expert, two grouped products, and back."""
    x = F.embedding(tokens, p["embed"]).flatten(0, 1)
    best, expert = F.linear(x, p["router"]).softmax(-1).max(-1)
    order = expert.argsort(stable=True)
    ends = F.one_hot(expert, EXPERTS).sum(0).cumsum(0).to(torch.int32)
    y = F.grouped_mm(F.grouped_mm(x[order], p["up"], offs=ends).tanh(), p["down"], offs=ends)
    y = torch.zeros_like(x).index_copy(0, order, y * best[order][:, None])
    x = fp.stage_boundary((x + y).view(*tokens.shape, DIM))
    return fp.Mean(
        F.linear(x, p["embed"]).logsumexp(-1).sum().float(), torch.tensor(float(tokens.numel()))
    )


def step(p: Any, tokens: torch.Tensor) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(p, tokens)
    return optree.tree_map(lambda x, g: x - 0.1 * g, p, grads), {"loss": loss}


STACKS: dict[str, tuple[Callable, fp.Mesh]] = {
    "microbatches": (fp.accumulated(microbatches=2), fp.Mesh()),
    "sharded": (
        fp.compose(fp.data_parallel(axis="data"), fp.sharded_weights(axis="data")),
        fp.Mesh(data=2),
    ),
    "pipeline": (fp.pipelined(axis="pipe", microbatches=2), fp.Mesh(pipe=2)),
}


@pytest.mark.parametrize("stack", STACKS)
def test_float32(stack: str) -> None:
    transform, mesh = STACKS[stack]
    assert_equivalent(
        step, transform(step), mesh, lambda p: p, params(torch.float32), [TOKENS], rtol=1e-5
    )


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(stack: str, dtype: str) -> None:
    """Products in few bits, masters in float32: as on one device, to the roundings of the compute
    dtype."""
    transform, mesh = STACKS[stack]
    masters = params(torch.float32)

    def low(p: Any, tokens: torch.Tensor) -> fp.Mean:
        return loss_fn({name: x.to(getattr(torch, dtype)) for name, x in p.items()}, tokens)

    want, _ = fp.value_and_grad(low)(masters, TOKENS)
    run = fp.simulate(fp.mixed_precision(transform(step), compute=dtype), mesh)
    state, metrics = run(run.init(lambda p: p, masters, TOKENS), TOKENS)
    assert abs(metrics["loss"] - want) < 1e-2 * want
    full = run.unplace(state)
    after = full.state if isinstance(full, fp.Scaled) else full
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in after.values())


# ---- refusals


@pytest.mark.parametrize("has_aux", [False, True])
def test_no_kernel_for_float64(has_aux: bool) -> None:
    def loss(p: Any, tokens: torch.Tensor) -> Any:
        mean = loss_fn(p, tokens)
        return (mean, mean) if has_aux else mean

    def wide(p: Any, tokens: torch.Tensor) -> Any:
        out, grads = fp.value_and_grad(loss, has_aux=has_aux)(p, tokens)
        return optree.tree_map(torch.sub, p, grads), {"loss": out}

    run = fp.simulate(fp.accumulated(wide, microbatches=2), fp.Mesh())
    with refused(
        TraceError,
        "calls grouped_mm at test_grouped_mm.py:",
        "`y = F.grouped_mm(F.grouped_mm(",
        "with torch.float64: there are kernels for bfloat16, float16 and float32",
        'fp.mixed_precision(compute="bfloat16")',
        'config._experts_implementation = "batched_mm"',
    ):
        run.init(lambda p: p, params(torch.float64), TOKENS)


def test_an_expanded_gradient() -> None:
    """Plain PyTorch refuses it too."""

    def loss(p: Any, x: torch.Tensor) -> fp.Mean:
        offs = torch.full((2,), len(x), dtype=torch.int32)
        return fp.Mean(F.grouped_mm(x, p, offs=offs).sum(), torch.tensor(float(len(x))))

    def summed(p: Any, x: torch.Tensor) -> Any:
        out, grad = fp.value_and_grad(loss)(p, x)
        return p - grad, {"loss": out}

    weights, x = torch.ones(2, 16, 16), torch.ones(4, 16)
    with pytest.raises(RuntimeError, match="strides"):
        summed(weights, x)
    run = fp.simulate(fp.accumulated(summed, microbatches=2), fp.Mesh())
    with refused(
        TraceError,
        "grouped_mm",
        "Invalid strides/sizes",
        "Make it contiguous (an expanded gradient",
    ):
        run.init(lambda p: p, weights, x)
