"""Communication between ranks: one protocol, two implementations.

In: tensors, axis names, peer ranks.
Out: tensors, or an error that names the rank that failed. The results of collectives are new,
contiguous tensors; their operands may have any strides.

A communicator belongs to one rank of one mesh. Collectives run over the rank's group on named axes.
Messages go through channels: a channel is one-way, from one rank to another, and has a name.
Messages on it arrive in the order in which they were sent, and a send never waits for its receiver.

Read in this order:

1. `tensor_layout.py`: in which order the elements of a message travel.
2. `simulated.py`: every rank is a thread of this process; `cooperative_scheduler.py` runs one at a
   time, so a deadlock is decided exactly and reported with where each rank stands.
3. `process_group.py`: torch.distributed, gloo on CPUs and NCCL on GPUs. Its parts: `groups.py`
   (process groups), `group_collectives.py`, `p2p.py` (messages), `consensus.py` (a number that all
   ranks exchange before each step), `failure_watch.py` (which rank failed first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from funcpipe._src.core.mesh import Axes, Mesh

# (source, destination, name)
Channel = tuple[int, int, str]


class Pending(Protocol):
    """A collective under way, or a tensor that is being sent."""

    def wait(self) -> torch.Tensor:
        """The collective's result, once; or the tensor, when it has left."""


class Done:
    """What was over when it began."""

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result

    def wait(self) -> torch.Tensor:
        return self.result


def nothing() -> None:
    """The default of ``meanwhile``."""


class Communicator(Protocol):
    """One rank's way to the others.

    Every method raises RankError where another rank failed or is gone.
    """

    mesh: Mesh
    rank: int
    device: torch.device

    def prepare(
        self,
        axes_sets: Iterable[Axes],
        channels: Iterable[Channel] = (),
    ) -> None:
        """Make ready for collectives over these axes and for messages on these channels.

        All ranks call it alike, with the channels of all ranks, before the first use. What is ready
        stays so.
        """

    def all_reduce(self, tensor: torch.Tensor, axes: Axes, op: str = "sum") -> torch.Tensor:
        """The sum (or ``"max"``) over the group, the same on every rank of it; same shape.

        The sum of bools is "any".
        """

    def all_gather(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """The tensors of all ranks, stacked in group order: shape ``(n, *tensor.shape)``."""

    def reduce_scatter(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """The sum over ranks of their ``tensor[i]``, where ``i`` is the own index in the group.

        ``tensor`` has shape ``(n, *s)``, the result shape ``s``.
        """

    def start_all_gather(self, tensor: torch.Tensor, axes: Axes) -> Pending:
        """``all_gather``, waited for later; the tensor must not be changed until then."""

    def start_reduce_scatter(self, tensor: torch.Tensor, axes: Axes) -> Pending:
        """``reduce_scatter``, waited for later; the tensor must not be changed until then."""

    def all_to_all(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        """``tensor[i]`` goes to rank ``i`` of the group; the result has what came from each.

        Both have shape ``(n, *s)``.
        """

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        destination: int,
        channel: str,
    ) -> Sequence[Pending]:
        """Send tensors. Returns at once; they must not be changed until they have left."""

    def settle(self, sent: Sequence[Pending]) -> None:
        """Wait until tensors have left, and let them go."""

    def recv(
        self,
        buffers: Sequence[torch.Tensor],
        source: int,
        channel: str,
    ) -> Sequence[torch.Tensor]:
        """Receive the next message of a channel.

        ``buffers`` have the sender's shapes, dtypes and order of elements. They are filled and
        returned, or left alone where the message is handed over as it is.
        """

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's picklable object, in rank order (host side, over the whole mesh)."""

    def exchange_digest(
        self,
        digest: int,
        meanwhile: Callable[[], object] = nothing,
    ) -> list[int]:
        """Every rank's 64-bit integer, in rank order: cheap enough for every step.

        ``meanwhile`` runs while the others' numbers are on their way.
        """

    def flush(self) -> None:
        """Wait until every tensor that was sent has left, and for collectives that were started.

        Called at the end of a step, and when a step ends while it is being captured.
        """

    def fail(self, error: BaseException) -> BaseException:
        """Report to all ranks that this one failed, so that none waits for it.

        Returns the error to raise here: the given one, or a RankError that names another rank which
        failed first.
        """

    def close(self) -> None:
        """Give back what the communicator holds."""
