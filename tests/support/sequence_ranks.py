"""A loss function proven and run on slices of the sequence, without a planner: the ranks of a mesh
in this process.

Attention is done here in the plainest way: every rank writes its slices of queries, keys and values
into zeros of the whole length, a psum makes them whole on every rank, and each keeps its rows of
the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import funcpipe as fp
from funcpipe._src.collectives import bind_mesh, bind_rank
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.core import pytree as tree
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional import losses
from funcpipe._src.functional.attention import whole
from funcpipe._src.functional.intercept import Intercept
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.proof.sequence_proof import SequenceProof
from funcpipe._src.proof.verify import Task, prove, prove_sequence

HEADS, RING = "seq", "ring"
Splits = dict[
    str, tuple[int, SequenceLayout] | None
]  # of the leaves of a batch: along which dim, and how; those not named: whole


def a_part(size: int, heads: int = 2, ring: int = 1, zigzag: bool = False) -> SequenceLayout:
    """A sequence over ``ring * heads`` ranks."""
    return SequenceLayout(size, (RING,) if ring > 1 else (), (HEADS,), ring, heads, zigzag)


def mesh_of(splits: Splits) -> fp.Mesh:
    part = parts_of(splits)[0]
    return fp.Mesh(**({RING: part.ring} if part.ring > 1 else {}), **{HEADS: part.heads})


def parts_of(splits: Splits) -> list[SequenceLayout]:
    return [s[1] for s in splits.values() if s is not None]


def sliced(x: Any, split: tuple[int, SequenceLayout] | None, member: int) -> Any:
    """A member's positions of a tensor."""
    if split is None:
        return x
    dim, part = split
    return torch.cat(
        [x.narrow(dim, 0, 0), *(x.narrow(dim, a, b - a) for a, b in part.ranges(member))], dim
    )


def proven(
    loss_fn: Callable,
    params: Any,
    batch: dict[str, Any],
    splits: Splits,
    has_aux: bool = False,
    attention: bool = False,
) -> list[SequenceProof]:
    """The findings of every member, after a proof for every kind of member."""
    mode, mesh = FakeTensorMode(), mesh_of(splits)
    spec = tree.flatten(batch)[1]
    each = [splits.get(k) for k in sorted(batch)]
    fakes = tree.map_tensors(lambda x: fake(x.shape, x, mode), params)
    found: dict[Any, SequenceProof] = {}
    kinds = [
        tuple(p.variant(m) for p in parts_of(splits)) for m in range(parts_of(splits)[0].members)
    ]
    for m, kind in enumerate(kinds):
        if kind not in found:
            local = {k: sliced(x, splits.get(k), m) for k, x in batch.items()}
            leaves = tree.leaves(tree.map_tensors(lambda x: fake(x.shape, x, mode), local))
            task = Task(
                loss_fn, has_aux, fakes, leaves, spec, each, m, mode, mesh, tuple(mesh.axes)
            )
            found[kind] = prove_sequence(**vars(task)) if attention else prove(task)
    return [found[kind] for kind in kinds]


def on_one(
    loss_fn: Callable, params: Any, batch: dict[str, Any], has_aux: bool = False
) -> list[torch.Tensor]:
    """Total, weight and gradients of the total on one device."""
    held = tree.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), params)
    out = loss_fn(held, batch)
    loss = out[0] if has_aux else out
    return [loss.total.detach(), loss.weight.detach(), *_grads(loss.total, held)]


def on_ranks(
    found: list[SequenceProof],
    loss_fn: Callable,
    params: Any,
    batch: dict[str, Any],
    splits: Splits,
    has_aux: bool = False,
) -> list[torch.Tensor]:
    """The same, as sums over all ranks."""
    mesh = mesh_of(splits)

    def body(comm: Any) -> list[torch.Tensor]:
        m = comm.rank
        local = {k: sliced(x, splits.get(k), m) for k, x in batch.items()}
        with (
            bind_rank(comm),
            bind_mesh(mesh, tuple(mesh.axes)),
            torch.autograd.set_multithreading_enabled(False),
            torch.enable_grad(),
            hook.bound(ByHand(found[m], m)),
            Intercept(),
        ):
            return on_one(loss_fn, params, local, has_aux)

    return [sum(xs[1:], xs[0]) for xs in zip(*run_ranks(mesh, body), strict=True)]


def _grads(total: torch.Tensor, held: Any) -> list[torch.Tensor]:
    leaves = [x for x in tree.leaves(held) if x.requires_grad]
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    engine = (
        torch.autograd.graph._engine_run_backward
    )  # as in graph/trace.py: a checkpoint recomputes with the same modes
    grads = engine(
        (total,),
        (torch.ones_like(total),),
        False,
        False,
        tuple(leaves),
        True,
        accumulate_grad=False,
    )
    return [
        torch.zeros_like(x) if g is None else g.detach() for g, x in zip(grads, leaves, strict=True)
    ]


def far(one: list[torch.Tensor], many: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    size = max(1.0, *(float(x.abs().max()) for x in one))
    return (
        max(float((x.double() - y.double()).abs().max()) for x, y in zip(one, many, strict=True))
        / size
    )


class ByHand:
    """A `hook.Hook` for one rank."""

    def __init__(self, found: SequenceProof, member: int) -> None:
        self.found, self.member = found, member

    def _own(self, part: SequenceLayout) -> torch.Tensor:
        return torch.cat(
            [torch.arange(0), *(torch.arange(a, b) for a, b in part.ranges(self.member))]
        )

    def _whole(self, x: torch.Tensor, dim: int, part: SequenceLayout | None) -> torch.Tensor:
        if part is None:
            return x
        zeros = x.new_zeros((*x.shape[:dim], part.size, *x.shape[dim + 1 :]))
        return fp.psum(zeros.index_copy(dim, self._own(part), x), part.axes).to(x.dtype)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: hook.Spec
    ) -> torch.Tensor:
        held, bias = self.found.attention(q, k, v, spec), spec.bias
        if bias is not None:
            bias = self._whole(bias, 2, held.queries if held.bias_query else None)
            bias = self._whole(bias, 3, held.keys if held.bias_key else None)
        q, k, v = (
            self._whole(q, 2, held.queries),
            self._whole(k, 2, held.keys),
            self._whole(v, 2, held.keys),
        )
        with hook.bound(None):
            out = whole(q, k, v, replace(spec, bias=bias))
        return out if held.queries is None else out.index_select(2, self._own(held.queries))

    def positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        part = self.found.positions(x, dim)
        return torch.arange(x.shape[dim]) if part is None else self._own(part)

    def cross_entropy(self, x: Any, head: Any, labels: Any, options: Any) -> Any:
        self.found.cross_entropy(x, head, labels, options)
        with hook.bound(None):
            return losses.compute(x, head, labels, options)

    def dropout(self, x: torch.Tensor, rate: float, key: torch.Tensor) -> torch.Tensor:
        split = self.found.dropout(x, rate, key)
        return fp.random.dropped(
            x, rate, key, {} if split is None else {split[0]: self._own(split[1])}
        )
