"""What ranks say to each other: one protocol, two implementations.

Terms. A *communicator* belongs to one rank of one mesh. Collectives run over the rank's *group* on
named axes. A *channel* is a named one-way lane from one rank to another: messages on it arrive in
the order in which they were sent, and a send never waits for its receiver. The *wire order* of a
tensor is its memory order if it is dense, else row-major (`tensor_layout.py`); both ends of a
message have the same.

In: tensors, axis names, peer ranks. Out: tensors, or an error that names the rank that failed. The
results of collectives are always new, contiguous tensors; their operands may have any strides.

- `simulated.py`: every rank of the mesh is a thread of this process, one of which runs at a time; a
  deadlock is decided exactly and reported with where each rank stands.
- `process_group.py`: torch.distributed process groups, gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from funcpipe._src.core.mesh import Axes, Mesh


class Pending(Protocol):
    """A collective under way, or a tensor."""

    def wait(self) -> torch.Tensor:
        """The collective's result, once; the tensor, when it has left."""


class Done:
    """What was over when it began."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out

    def wait(self) -> torch.Tensor:
        return self.out


class Communicator(Protocol):
    """One rank's way to the others.

    Every method raises RankError where another rank failed or is gone.
    """

    mesh: Mesh
    rank: int
    device: torch.device

    def prepare(
        self, axes_sets: Iterable[Axes], lanes: Iterable[tuple[int, int, str]] = ()
    ) -> None:
        """Make ready for collectives over these axes and for messages on these lanes ``(src, dst,
        channel)``. All ranks call it alike, with the lanes of all ranks, before the first use; what
        is ready stays so."""

    def all_reduce(self, x: torch.Tensor, axes: Axes, op: str = "sum") -> torch.Tensor:
        """The sum (or ``"max"``) of ``x`` over the group: same shape, same on every member. The sum
        of bools is "any"."""

    def all_gather(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        """Every member's ``x``, stacked in group order: shape ``(n, *x.shape)``."""

    def reduce_scatter(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        """``x`` has shape ``(n, *s)``: the sum over members of their ``x[i]``, where ``i`` is the
        own index; shape ``s``."""

    def start_all_gather(self, x: torch.Tensor, axes: Axes) -> Pending:
        """``all_gather``, waited for later; ``x`` must not be changed until then."""

    def start_reduce_scatter(self, x: torch.Tensor, axes: Axes) -> Pending:
        """``reduce_scatter``, waited for later; ``x`` must not be changed until then."""

    def all_to_all(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        """``x`` has shape ``(n, *s)``: piece ``i`` goes to member ``i``; returns what came from
        each, ``(n, *s)``."""

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> Sequence[Pending]:
        """Send tensors to rank ``dst``. Returns at once; the tensors must not be changed until they
        have left."""

    def settle(self, sent: Sequence[Pending]) -> None:
        """Wait until tensors have left, and let them go."""

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        """Receive the next message of a channel. ``outs`` are buffers of the sender's shapes,
        dtypes and wire order; they are filled and returned, or left alone where the message is
        handed over as it is."""

    def exchange(self, what: Any) -> list[Any]:
        """Every rank's picklable object, in rank order (host side, over the whole mesh)."""

    def exchange_digest(self, n: int, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
        """Every rank's 64-bit integer, in rank order: an ``exchange`` that is cheap enough for
        every step. ``meanwhile`` runs while the others' numbers are on their way."""

    def flush(self) -> None:
        """Wait until every tensor that was sent has left, and for collectives that were started;
        called at the end of a step, and where one ends in the middle of being captured."""

    def fail(self, error: BaseException) -> BaseException:
        """Tell every rank that this one failed, so that none waits for it. Returns the error to
        raise here: the given one, or a RankError that names another rank where that one failed
        first."""

    def close(self) -> None:
        """Give back what the communicator holds."""
