"""Ops: collectives as a graph holds them, and what they do on a rank.

In: a tensor of a rank, axes, and the rank's communicator, which the runner binds (`bind_rank`)
where it runs a graph.
Out: a new contiguous tensor. What goes to, or comes from, every rank of a group lies along dim 0.

A start op begins a collective and returns a token, a tensor without elements. ``funcpipe::wait``
takes the token, and the operand, which must live until then, and returns the result. Passes may
move the two apart. If the communicator has no asynchronous form, the start does all the work. Ops
name axes (``"data,seq"``) and carry no process group, rank number or axis size, so one graph serves
every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from funcpipe._src.comm import Channel, Communicator, Done, Pending, tensor_layout
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import AxisError

_rank: ContextVar[Communicator | None] = ContextVar("funcpipe_rank", default=None)
CHANNEL = "ppermute"  # the name of the channels on which its messages go


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


def _psum(
    comm: Communicator,
    operand: torch.Tensor,
    axes: Axes,
) -> Pending:
    return Done(comm.all_reduce(operand, axes))


def _pmax(
    comm: Communicator,
    operand: torch.Tensor,
    axes: Axes,
) -> Pending:
    return Done(comm.all_reduce(operand, axes, "max"))


def _all_gather(
    comm: Communicator,
    operand: torch.Tensor,
    axes: Axes,
) -> Pending:
    return comm.start_all_gather(operand, axes)


def _psum_scatter(
    comm: Communicator,
    operand: torch.Tensor,
    axes: Axes,
) -> Pending:
    return comm.start_reduce_scatter(operand, axes)


def _all_to_all(
    comm: Communicator,
    operand: torch.Tensor,
    axes: Axes,
) -> Pending:
    return Done(comm.all_to_all(operand, axes))


def _ppermute(
    comm: Communicator,
    operand: torch.Tensor,
    axes: Axes,
    perm: Sequence[int],
) -> Pending:
    group = comm.mesh.group(comm.rank, axes)
    own = comm.mesh.index(comm.rank, axes)
    source = None
    for start, end in _pairs(perm):
        if end == own:
            source = start
        elif start == own:
            # A copy: the operand's memory may be used again before it has left.
            comm.send([tensor_layout.fresh(operand)], group[end], CHANNEL)
    result = torch.empty_like(operand, memory_format=torch.contiguous_format)
    if source is None:
        return Done(result.zero_())
    if source == own:
        return Done(result.copy_(operand))
    (received,) = comm.recv([result], group[source], CHANNEL)
    return Done(received)


def _pairs(perm: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(perm[::2], perm[1::2], strict=True))


def _wait(
    token: torch.Tensor,
    operand: torch.Tensor,
    shape: Sequence[int],
) -> torch.Tensor:
    result = token.pending.wait()  # type: ignore[attr-defined]
    token.pending = Done(result)  # type: ignore[attr-defined]
    return result


def _axis_index(axes: str, device: torch.device) -> torch.Tensor:
    comm = _comm("axis_index")
    own = comm.device if comm.device.type == device.type else device
    index = comm.mesh.index(comm.rank, _axes(axes))
    return torch.tensor(index, device=own)


# ---- the ops

_LIB = torch.library.Library("funcpipe", "FRAGMENT")


def _op(
    schema: str,
    run: Callable,
    fake: Callable,
) -> torch._ops.OpOverload:
    name = schema.split("(")[0]
    _LIB.define(schema)
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"funcpipe::{name}", fake, lib=_LIB)
    return getattr(torch.ops.funcpipe, name).default


def _start(begin: Callable[..., Pending], extra: str = "") -> torch._ops.OpOverload:
    name = begin.__name__[1:] + "_start"

    def run(operand: torch.Tensor, axes: str, *rest: Any) -> torch.Tensor:
        token = operand.new_empty(0)
        pending = begin(_comm(name), operand, _axes(axes), *rest)
        token.pending = pending  # type: ignore[attr-defined]
        return token

    def fake(operand: torch.Tensor, *_: Any) -> torch.Tensor:
        return operand.new_empty(0)

    return _op(f"{name}(Tensor x, str axes{extra}) -> Tensor", run, fake)


def _fake_wait(
    token: torch.Tensor,
    operand: torch.Tensor,
    shape: Sequence[int],
) -> torch.Tensor:
    return token.new_empty(shape)


def _fake_axis_index(axes: str, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


STARTS = {
    "psum": _start(_psum),
    "pmax": _start(_pmax),
    "all_gather": _start(_all_gather),
    "psum_scatter": _start(_psum_scatter),
    "all_to_all": _start(_all_to_all),
    "ppermute": _start(_ppermute, ", int[] perm"),
}
_KINDS = {op: kind for kind, op in STARTS.items()}
WAIT = _op(
    "wait(Tensor token, Tensor x, int[] shape) -> Tensor",
    _wait,
    _fake_wait,
)
AXIS_INDEX = _op(
    "axis_index(str axes, Device device) -> Tensor",
    _axis_index,
    _fake_axis_index,
)


def collective(
    kind: str,
    operand: torch.Tensor,
    axes: Axes,
    shape: Sequence[int],
    perm: Sequence[int] | None = None,
) -> torch.Tensor:
    """A start and its wait.

    Args:
        kind: one of ``STARTS``.
        shape: of the result.
        perm: of a ppermute: source, destination, source, destination, …
    """
    operand = _variable(operand)
    options = () if perm is None else (perm,)
    token = STARTS[kind](operand, ",".join(axes), *options)
    return WAIT(token, operand, shape)


def _variable(operand: torch.Tensor) -> torch.Tensor:
    """The operand of an op, as one that tracing takes for a variable.

    A fake whose number is known would be computed with on the spot, on no rank.
    """
    if not isinstance(operand, FakeTensor) or operand.constant is None:
        return operand
    always = torch.ones((), dtype=torch.bool, device=operand.device)
    return torch.where(always, operand, operand)


def axis_index(axes: str | Axes, device: torch.device) -> torch.Tensor:
    """The index of a rank in its group: a 0-d int64 tensor.

    It is a constant of the rank, not of the graph.
    """
    return AXIS_INDEX(axes if isinstance(axes, str) else ",".join(axes), device)


# ---- what a graph needs of a communicator


def names_axes(graph: fx.Graph) -> bool:
    """Whether what a graph computes depends on the rank that runs it, other than by its inputs."""
    return any(node.target in (*STARTS.values(), AXIS_INDEX) for node in graph.nodes)


def collectives_of(graph: fx.Graph) -> list[str]:
    """The collectives of a graph in order: kind and axes."""
    return [f"{node.target.__name__} over {node.args[1]}" for node in _starts(graph)]


def received(graph: fx.Graph, mesh: Mesh) -> dict[Axes, int]:
    """Bytes that a rank receives where a graph runs, by axes.

    They are counted as rings do: ``n - 1`` of ``n`` parts for a gather, a reduce-scatter or an
    all-to-all, twice that for an all-reduce; of a ppermute, the operand.
    """
    by_axes: dict[Axes, int] = {}
    for node in _starts(graph):
        axes = _axes(node.args[1])
        operand = node.args[0].meta["val"]
        nbytes = operand.numel() * operand.element_size()
        operands = _operands_received(_KINDS[node.target], mesh.axis_size(axes))
        by_axes[axes] = by_axes.get(axes, 0) + round(nbytes * operands)
    return by_axes


def _operands_received(kind: str, ranks: int) -> float:
    """How many times the size of its operand a rank receives."""
    others = ranks - 1
    if kind in ("psum", "pmax"):
        return 2 * others / ranks
    if kind == "all_gather":
        return others
    if kind == "ppermute":
        return 1
    return others / ranks


def axes_of(graph: fx.Graph) -> set[Axes]:
    """The axes over which a graph communicates, for ``Communicator.prepare``."""
    return {_axes(node.args[1]) for node in _starts(graph)}


def channels_of(graph: fx.Graph, mesh: Mesh) -> set[Channel]:
    """The channels on which the ranks of a mesh send messages when all of them run a graph."""
    channels = set()
    for node in _starts(graph):
        if node.target is not STARTS["ppermute"]:
            continue
        axes = _axes(node.args[1])
        for rank in range(mesh.size):
            group = mesh.group(rank, axes)
            for source, destination in _pairs(node.args[2]):
                if source != destination:
                    channels.add((group[source], group[destination], CHANNEL))
    return channels


def _starts(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if node.target in _KINDS]
