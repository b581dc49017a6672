"""What every collective must return, as plain loops over the ranks of a mesh."""

from __future__ import annotations

import torch

from funcpipe._src.core.mesh import Axes, Mesh

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64]
KINDS = ["all_reduce", "all_reduce_max", "all_gather", "reduce_scatter", "all_to_all"]
KINDS += ["start_all_gather", "start_reduce_scatter"]


def expected(kind: str, xs: list[torch.Tensor], mesh: Mesh, axes: Axes) -> list[torch.Tensor]:
    """Every rank's result, given every rank's operand. Sums are taken in the order of the group."""
    out = []
    kind = kind.removeprefix("start_")
    for rank in range(mesh.size):
        members = [xs[r] for r in mesh.group(rank, axes)]
        out.append(_result(kind, members, mesh.index(rank, axes)))
    return out


def _result(kind: str, members: list[torch.Tensor], i: int) -> torch.Tensor:
    if kind == "all_reduce":
        return _sum(members)
    if kind == "all_reduce_max":
        out = members[0]
        for x in members[1:]:
            out = torch.maximum(out, x)
        return out
    if kind == "all_gather":
        return torch.stack(members)
    if kind == "reduce_scatter":
        return _sum([x[i] for x in members])
    assert kind == "all_to_all"
    return torch.stack([x[i] for x in members])


def _sum(xs: list[torch.Tensor]) -> torch.Tensor:
    out = xs[0]
    for x in xs[1:]:
        out = out + x
    return out


def operand(
    kind: str, rank: int, shape: tuple[int, ...], dtype: torch.dtype, n: int
) -> torch.Tensor:
    """A rank's operand, for a group of n: the same in every process that asks."""
    if kind in ("reduce_scatter", "start_reduce_scatter", "all_to_all"):
        shape = (n, *shape)
    numbers = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) * 8
    )
    if dtype == torch.bool:
        return numbers > 0
    return numbers.abs().to(dtype) if dtype == torch.uint8 else numbers.to(dtype)


def call(comm, kind: str, x: torch.Tensor, axes: Axes) -> torch.Tensor:
    """The collective that ``expected`` describes."""
    if kind == "all_reduce_max":
        return comm.all_reduce(x, axes, op="max")
    out = getattr(comm, kind)(x, axes)
    return out.wait() if kind.startswith("start_") else out


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bitwise equal, and contiguous as results of collectives are."""
    return x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous() and torch.equal(x, y)
