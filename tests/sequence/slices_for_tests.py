"""A loss function proven and run on slices of the sequence, without a planner: the ranks of a mesh in this process.

Attention is done here in the plainest way: every rank writes its slices of queries, keys and values into zeros of the whole
length, a psum makes them whole on every rank, and each keeps its rows of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import funcpipe as fp
from funcpipe import tree
from funcpipe.collectives import bind_mesh, bind_rank
from funcpipe.comm.inprocess import run_ranks
from funcpipe.graph.fakes import fake
from funcpipe.sequence import hook, losses
from funcpipe.sequence.attention import Intercept, whole
from funcpipe.sequence.examine import Findings, examine, prove
from funcpipe.sequence.parts import Part

HEADS, RING = "seq", "ring"


def a_part(size: int, heads: int = 2, ring: int = 1, zigzag: bool = False) -> Part:
    """A sequence over ``ring * heads`` ranks."""
    return Part(size, (RING,) if ring > 1 else (), (HEADS,), ring, heads, zigzag)


def mesh_of(part: Part) -> fp.Mesh:
    return fp.Mesh(**({RING: part.ring} if part.ring > 1 else {}), **{HEADS: part.heads})


def sliced(x: torch.Tensor, dim: int, part: Part, member: int) -> torch.Tensor:
    """A member's positions of a tensor."""
    pieces = [x.narrow(dim, a, b - a) for a, b in part.ranges(member)]
    return torch.cat([*pieces, x.narrow(dim, 0, 0)], dim)


def splits_of(batch: Any, part: Part, dims: Any = 1) -> list[tuple[int, Part] | None]:
    """How every leaf of a batch is split: along ``dims``, a prefix of it."""
    return [None if d is None else (d, part) for d in tree.broadcast_prefix(dims, batch)]


def proven(
    loss_fn: Callable,
    params: Any,
    batch: Any,
    part: Part,
    dims: Any = 1,
    has_aux: bool = False,
    attention: bool = False,
) -> list[Findings]:
    """The findings of every member, after a proof for every kind of member."""
    mode, mesh = FakeTensorMode(), mesh_of(part)
    leaves, spec = tree.flatten(batch)
    found: dict[tuple[int, ...], Findings] = {}
    for m in range(part.members):
        if part.variant(m) in found:
            continue
        local = [
            fake((sliced(x, s[0], part, m) if s else x).shape, x, mode) if isinstance(x, torch.Tensor) else x
            for x, s in zip(leaves, splits_of(batch, part, dims), strict=True)
        ]
        fakes = tree.map_tensors(lambda x: fake(x.shape, x, mode), params)
        check = examine if attention else prove
        splits = splits_of(batch, part, dims)
        found[part.variant(m)] = check(loss_fn, has_aux, fakes, local, spec, splits, m, mode, mesh, tuple(mesh.axes))
    return [found[part.variant(m)] for m in range(part.members)]


def on_one(loss_fn: Callable, params: Any, batch: Any, has_aux: bool = False) -> list[torch.Tensor]:
    """Total, weight and gradients of the total on one device."""
    held = tree.map(lambda x: x.detach().requires_grad_(), params)
    out = loss_fn(held, batch)
    loss = out[0] if has_aux else out
    return [loss.total.detach(), loss.weight.detach(), *_grads(loss.total, held)]


def on_ranks(
    findings: list[Findings], loss_fn: Callable, params: Any, batch: Any, part: Part, dims: Any = 1, has_aux: bool = False
) -> list[torch.Tensor]:
    """The same, as sums over all ranks."""
    leaves, spec = tree.flatten(batch)
    mesh = mesh_of(part)

    def body(comm: Any) -> list[torch.Tensor]:
        m = comm.rank
        local = [
            sliced(x, s[0], part, m) if s else x for x, s in zip(leaves, splits_of(batch, part, dims), strict=True)
        ]
        with bind_rank(comm), bind_mesh(mesh, tuple(mesh.axes)), torch.autograd.set_multithreading_enabled(False):
            with torch.enable_grad(), hook.bound(ByHand(findings[m], part, m)), Intercept():
                return on_one(loss_fn, params, tree.unflatten(spec, local), has_aux)

    return [sum(xs[1:], xs[0]) for xs in zip(*run_ranks(mesh, body), strict=True)]


def _grads(total: torch.Tensor, held: Any) -> list[torch.Tensor]:
    leaves = tree.leaves(held)
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return [g.detach() for g in torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


class ByHand:
    """A `hook.Hook` for one rank of a part."""

    def __init__(self, findings: Findings, part: Part, member: int) -> None:
        self.findings, self.part = findings, part
        self.own = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in part.ranges(member))])

    def _whole(self, x: torch.Tensor, dim: int, split: bool) -> torch.Tensor:
        shape = (*x.shape[:dim], self.part.size, *x.shape[dim + 1 :])
        return fp.psum(x.new_zeros(shape).index_copy(dim, self.own, x), self.part.axes) if split else x

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: hook.Spec) -> torch.Tensor:
        held, bias = self.findings.attention(q, k, v, spec), spec.bias
        if bias is not None:
            bias = self._whole(self._whole(bias, 2, held.bias_query), 3, held.bias_key)
        q, k, v = self._whole(q, 2, held.q is not None), *(self._whole(x, 2, held.k is not None) for x in (k, v))
        with hook.bound(None):
            out = whole(q, k, v, replace(spec, bias=bias))
        return out if held.q is None else out.index_select(2, self.own)

    def positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.arange(x.shape[dim]) if self.findings.positions(x, dim) is None else self.own

    def cross_entropy(self, x: Any, head: Any, labels: Any, options: Any) -> Any:
        part = self.findings.cross_entropy(x, head, labels, options)
        assert part in (None, self.part)
        with hook.bound(None):
            return losses.compute(x, head, labels, options)
