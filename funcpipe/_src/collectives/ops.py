"""Collectives as ops of a graph, and what they do on a rank.

Terms. A *start* op begins a collective and hands out a *token*, a tensor without elements;
``funcpipe::wait`` takes it, and the operand, which must live until then, and hands out the result.
Passes may move the two apart. Where the communicator has no asynchronous form, the start does all
the work. Ops name axes (``"data,seq"``) and carry no process group, rank number or axis size, so
one graph serves every rank.

In: a tensor of a rank, axes, and the rank's communicator, which the runner binds (`bind_rank`)
where it runs a graph.
Out: a new contiguous tensor. Pieces for, or from, every rank of a group lie along dim 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from funcpipe._src.comm import Communicator, Done, Pending
from funcpipe._src.comm import tensor_layout as wire
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import AxisError

_rank: ContextVar[Communicator | None] = ContextVar("funcpipe_rank", default=None)
CHANNEL = "ppermute"  # of messages between two ranks


@contextlib.contextmanager
def bind_rank(comm: Communicator) -> Iterator[None]:
    """Run graphs as the rank of a communicator.

    It binds no axis names. To call collectives on a rank directly, add `bind_mesh`; their backward
    then has to run on this thread, too, which it does on CPUs.

    >>> from funcpipe._src.comm.simulated import run_ranks
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
        raise AxisError(
            f"funcpipe::{op} runs outside of a rank: wrap the call in bind_rank(communicator)"
        )
    return comm


def _axes(text: str) -> Axes:
    return tuple(text.split(","))


# ---- on a rank


def _psum(comm: Communicator, x: torch.Tensor, axes: Axes) -> Pending:
    return Done(comm.all_reduce(x, axes))


def _pmax(comm: Communicator, x: torch.Tensor, axes: Axes) -> Pending:
    return Done(comm.all_reduce(x, axes, "max"))


def _all_gather(comm: Communicator, x: torch.Tensor, axes: Axes) -> Pending:
    return comm.start_all_gather(x, axes)


def _psum_scatter(comm: Communicator, x: torch.Tensor, axes: Axes) -> Pending:
    return comm.start_reduce_scatter(x, axes)


def _all_to_all(comm: Communicator, x: torch.Tensor, axes: Axes) -> Pending:
    return Done(comm.all_to_all(x, axes))


def _ppermute(comm: Communicator, x: torch.Tensor, axes: Axes, perm: Sequence[int]) -> Pending:
    group, me = comm.mesh.group(comm.rank, axes), comm.mesh.index(comm.rank, axes)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    source = next((s for s, d in _pairs(perm) if d == me), None)
    for s, d in _pairs(perm):
        if s == me != d:
            comm.send(
                [wire.fresh(x)], group[d], CHANNEL
            )  # a copy: x's memory may be used again before it has left
    if source is None:
        return Done(out.zero_())
    if source == me:
        return Done(out.copy_(x))
    (got,) = comm.recv([out], group[source], CHANNEL)
    return Done(got)


def _pairs(perm: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(perm[::2], perm[1::2], strict=True))


def _wait(token: torch.Tensor, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    out = token.pending.wait()  # type: ignore[attr-defined]
    token.pending = Done(out)  # type: ignore[attr-defined]
    return out


def _axis_index(axes: str, device: torch.device) -> torch.Tensor:
    comm = _comm("axis_index")
    own = comm.device if comm.device.type == device.type else device
    return torch.tensor(comm.mesh.index(comm.rank, _axes(axes)), device=own)


# ---- the ops

_LIB = torch.library.Library("funcpipe", "FRAGMENT")


def _op(schema: str, run: Callable, fake: Callable) -> torch._ops.OpOverload:
    name = schema.split("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"funcpipe::{name}", fake, lib=_LIB)
    return getattr(torch.ops.funcpipe, name).default


def _start(begin: Callable[..., Pending], extra: str = "") -> torch._ops.OpOverload:
    name = begin.__name__[1:] + "_start"

    def run(x: torch.Tensor, axes: str, *rest: Any) -> torch.Tensor:
        token = x.new_empty(0)
        token.pending = begin(_comm(name), x, _axes(axes), *rest)  # type: ignore[attr-defined]
        return token

    return _op(f"{name}(Tensor x, str axes{extra}) -> Tensor", run, lambda x, *_: x.new_empty(0))


STARTS = {
    f.__name__[1:]: _start(f) for f in (_psum, _pmax, _all_gather, _psum_scatter, _all_to_all)
}
STARTS["ppermute"] = _start(_ppermute, ", int[] perm")
_KINDS = {op: kind for kind, op in STARTS.items()}
WAIT = _op(
    "wait(Tensor token, Tensor x, int[] shape) -> Tensor",
    _wait,
    lambda token, x, shape: token.new_empty(shape),
)
AXIS_INDEX = _op(
    "axis_index(str axes, Device device) -> Tensor",
    _axis_index,
    lambda axes, device: torch.empty((), dtype=torch.int64, device=device),
)


def collective(
    kind: str, x: torch.Tensor, axes: Axes, shape: Sequence[int], perm: Sequence[int] | None = None
) -> torch.Tensor:
    """A start and its wait.

    Args:
        shape: of the result.
        perm: of a ppermute: source, destination, source, destination, …
    """
    x = _variable(x)
    token = STARTS[kind](x, ",".join(axes), *(() if perm is None else (perm,)))
    return WAIT(token, x, shape)


def _variable(x: torch.Tensor) -> torch.Tensor:
    """The operand of an op that is traced as such: a fake whose number is known would be computed
    with on the spot, on no rank."""
    if not isinstance(x, FakeTensor) or x.constant is None:
        return x
    return torch.where(torch.ones((), dtype=torch.bool, device=x.device), x, x)


def axis_index(axes: str | Axes, device: torch.device) -> torch.Tensor:
    """The place of a rank in its group: a 0-d int64 tensor. A constant of the rank, not of the
    graph."""
    return AXIS_INDEX(axes if isinstance(axes, str) else ",".join(axes), device)


# ---- what a graph needs of a communicator


def names_axes(graph: fx.Graph) -> bool:
    """Whether what a graph computes depends on the rank that runs it, other than by its inputs."""
    return any(node.target in (*STARTS.values(), AXIS_INDEX) for node in graph.nodes)


def collectives_of(graph: fx.Graph) -> list[str]:
    """The collectives of a graph in order: kind and axes."""
    return [
        f"{n.target.__name__} over {n.args[1]}" for n in graph.nodes if n.target in STARTS.values()
    ]


def received(graph: fx.Graph, mesh: Mesh) -> dict[Axes, int]:
    """Bytes that a rank receives where a graph runs, by axes: counted as rings do, ``n - 1`` of
    ``n`` parts for a gather, a reduce-scatter or an all-to-all, twice that for an all-reduce; a
    ppermute's operand."""
    out: dict[Axes, int] = {}
    for node in graph.nodes:
        kind = _KINDS.get(node.target)
        if kind is None:
            continue
        axes, x = _axes(node.args[1]), node.args[0].meta["val"]
        n, nbytes = mesh.axis_size(axes), x.numel() * x.element_size()
        parts = {
            "psum": 2 * (n - 1) / n,
            "pmax": 2 * (n - 1) / n,
            "all_gather": n - 1,
            "ppermute": 1,
        }
        out[axes] = out.get(axes, 0) + round(nbytes * parts.get(kind, (n - 1) / n))
    return out


def axes_of(graph: fx.Graph) -> set[Axes]:
    """The axes over which a graph communicates, for ``Communicator.prepare``."""
    return {_axes(node.args[1]) for node in graph.nodes if node.target in STARTS.values()}


def lanes_of(graph: fx.Graph, mesh: Mesh) -> set[tuple[int, int, str]]:
    """The lanes on which the ranks of a mesh send messages when all of them run a graph."""
    out = set()
    for node in graph.nodes:
        if node.target is STARTS["ppermute"]:
            groups = {mesh.group(r, _axes(node.args[1])) for r in range(mesh.size)}
            out |= {
                (g[s], g[d], CHANNEL) for g in groups for s, d in _pairs(node.args[2]) if s != d
            }
    return out
