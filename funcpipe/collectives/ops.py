"""Collectives as ops of a graph, and what they do on a rank.

Terms. A *start* op begins a collective and hands out its result, which may be read after ``funcpipe::wait``; passes may
move the two apart. So far a start does all the work, and wait is the identity. Ops name axes (``"data,seq"``) and carry
no process group, rank number or size, so one graph serves every rank.

In: a tensor of a rank, axes, and the rank's communicator, which the runner binds (`bind_rank`) where it runs a graph.
Out: a new contiguous tensor. Pieces for, or from, every rank of a group lie along dim 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from funcpipe.collectives.binding import bound_mesh
from funcpipe.comm import Communicator
from funcpipe.errors import AxisError
from funcpipe.mesh import Axes, Mesh

_rank: ContextVar[Communicator | None] = ContextVar("funcpipe_rank", default=None)
CHANNEL = "ppermute"  # of messages between two ranks


@contextlib.contextmanager
def bind_rank(comm: Communicator) -> Iterator[None]:
    """Run graphs as the rank of a communicator.

    It binds no axis names. To call collectives on a rank directly, add `bind_mesh`; their backward then has to run on
    this thread, too, which it does on CPUs.

    >>> from funcpipe.comm.inprocess import run_ranks
    >>> def body(comm):
    ...     with bind_rank(comm):
    ...         return axis_index("data", torch.device("cpu")).item()
    >>> run_ranks(Mesh(pipe=2, data=2), body)
    [0, 1, 0, 1]
    """
    token = _rank.set(comm)
    try:
        yield
    finally:
        _rank.reset(token)


def _comm(op: str) -> Communicator:
    comm = _rank.get()
    if comm is None:
        raise AxisError(f"funcpipe::{op} runs outside of a rank: wrap the call in bind_rank(communicator)")
    return comm


def _axes(text: str) -> Axes:
    return tuple(text.split(","))


def _size(axes: str) -> int:
    comm, mesh = _rank.get(), bound_mesh()
    if mesh is None and comm is not None:
        mesh = comm.mesh
    if mesh is None:
        raise AxisError(
            f"the size of {_axes(axes)} is not known: wrap what looks at the graph in bind_mesh(mesh, axes)"
        )
    return mesh.axis_size(_axes(axes))


# ---- on a rank


def _psum(x: torch.Tensor, axes: str) -> torch.Tensor:
    return _comm("psum_start").all_reduce(x, _axes(axes))


def _pmax(x: torch.Tensor, axes: str) -> torch.Tensor:
    return _comm("pmax_start").all_reduce(x, _axes(axes), "max")


def _all_gather(x: torch.Tensor, axes: str) -> torch.Tensor:
    return _comm("all_gather_start").all_gather(x, _axes(axes))


def _psum_scatter(x: torch.Tensor, axes: str) -> torch.Tensor:
    return _comm("psum_scatter_start").reduce_scatter(x, _axes(axes))


def _all_to_all(x: torch.Tensor, axes: str) -> torch.Tensor:
    return _comm("all_to_all_start").all_to_all(x, _axes(axes))


def _ppermute(x: torch.Tensor, axes: str, perm: Sequence[int]) -> torch.Tensor:
    comm = _comm("ppermute_start")
    group, me = comm.mesh.group(comm.rank, _axes(axes)), comm.mesh.index(comm.rank, _axes(axes))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    source = next((s for s, d in _pairs(perm) if d == me), None)
    for s, d in _pairs(perm):
        if s == me != d:
            comm.send([x.contiguous()], group[d], CHANNEL)
    if source is None:
        return out.zero_()
    if source == me:
        return out.copy_(x)
    (got,) = comm.recv([out], group[source], CHANNEL)
    return out if got is out else out.copy_(got)  # in one process it is the sender's own tensor


def _axis_index(axes: str, device: torch.device) -> torch.Tensor:
    comm = _comm("axis_index")
    own = comm.device if comm.device.type == device.type else device
    return torch.tensor(comm.mesh.index(comm.rank, _axes(axes)), device=own)


def _pairs(perm: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(perm[::2], perm[1::2], strict=True))


# ---- as shapes


def _same(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


_LIB = torch.library.Library("funcpipe", "FRAGMENT")


def _op(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    name = schema.split("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"funcpipe::{name}", fake, lib=_LIB)
    return getattr(torch.ops.funcpipe, name).default


STARTS = {
    "psum": _op("psum_start(Tensor x, str axes) -> Tensor", _psum, _same),
    "pmax": _op("pmax_start(Tensor x, str axes) -> Tensor", _pmax, _same),
    "all_gather": _op(
        "all_gather_start(Tensor x, str axes) -> Tensor",
        _all_gather,
        lambda x, axes: x.new_empty((_size(axes), *x.shape)),
    ),
    "psum_scatter": _op(
        "psum_scatter_start(Tensor x, str axes) -> Tensor", _psum_scatter, lambda x, axes: x.new_empty(x.shape[1:])
    ),
    "all_to_all": _op("all_to_all_start(Tensor x, str axes) -> Tensor", _all_to_all, _same),
    "ppermute": _op("ppermute_start(Tensor x, str axes, int[] perm) -> Tensor", _ppermute, _same),
}
WAIT = _op("wait(Tensor x) -> Tensor", lambda x: x, _same)
AXIS_INDEX = _op(
    "axis_index(str axes, Device device) -> Tensor",
    _axis_index,
    lambda axes, device: torch.empty((), dtype=torch.int64, device=device),
)


def collective(kind: str, x: torch.Tensor, axes: Axes, perm: Sequence[int] = ()) -> torch.Tensor:
    """A start and its wait."""
    extra = (perm,) if kind == "ppermute" else ()
    return WAIT(STARTS[kind](x, ",".join(axes), *extra))


def axis_index(axes: str | Axes, device: torch.device) -> torch.Tensor:
    """The place of a rank in its group: a 0-d int64 tensor. A constant of the rank, not of the graph."""
    return AXIS_INDEX(axes if isinstance(axes, str) else ",".join(axes), device)


# ---- what a graph needs of a communicator


def names_axes(graph: fx.Graph) -> bool:
    """Whether what a graph computes depends on the rank that runs it, other than by its inputs."""
    return any(node.target in (*STARTS.values(), AXIS_INDEX) for node in graph.nodes)


def axes_of(graph: fx.Graph) -> set[Axes]:
    """The axes over which a graph communicates, for ``Communicator.prepare``."""
    return {_axes(node.args[1]) for node in graph.nodes if node.target in STARTS.values()}


def lanes_of(graph: fx.Graph, mesh: Mesh) -> set[tuple[int, int, str]]:
    """The lanes on which the ranks of a mesh send messages when all of them run a graph."""
    out = set()
    for node in graph.nodes:
        if node.target is STARTS["ppermute"]:
            groups = {mesh.group(r, _axes(node.args[1])) for r in range(mesh.size)}
            out |= {(g[s], g[d], CHANNEL) for g in groups for s, d in _pairs(node.args[2]) if s != d}
    return out
