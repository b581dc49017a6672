"""Cooperative scheduler: which rank of one process runs, and what the ranks hand to each other.

In: what ranks call.
Out: which rank goes on, with what; or the first error, after which every rank is stopped.

One rank runs at a time, until it blocks in a receive or in a collective that others have not
reached. Then the next rank that can go on runs, in cyclic order. Every rank's thread sleeps on a
lock of its own. A mailbox holds the messages of one channel in order. Ranks of a collective come
together in a rendezvous: the last one to arrive computes everybody's result, so no rank can change
an operand that others still read.

So the interleaving depends on nothing but the program, and results and errors are the same in every
run. Only the running rank touches what is shared: nothing of it needs a lock, and "no rank can go
on" is a plain fact. A deadlock is reported exactly when it happens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from funcpipe._src.comm import Channel, tensor_layout
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import DeadlockError, MismatchError, RankError

READY, BLOCKED, DONE = 1, 2, 3
# The operands of a group -> the result of each of its ranks.
Combine = Callable[[list], list]


class CollectiveCall(NamedTuple):
    """What a rank calls; every rank of a group must call the same.

    Args:
        axes: None for a call on the host side, over the whole mesh.
    """

    kind: str
    axes: Axes | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        if self.axes is None:
            return self.kind
        return f"{self.kind} of {tensor_layout.spec(self.shape, self.dtype)} over {self.axes}"


class Rendezvous:
    """A collective that some ranks of a group have reached; ``first`` was the first of them."""

    def __init__(self, call: CollectiveCall, group: tuple[int, ...], first: int) -> None:
        self.call = call
        self.group = group
        self.first = first
        self.operands: dict[int, Any] = {}
        self.results: list[Any] = []

    def __str__(self) -> str:
        missing = [rank for rank in self.group if rank not in self.operands]
        return f"in {self.call}; not there yet: {ranks_text(missing)}"


class Mailbox:
    """The messages of one channel, and the buffers of a receiver that is blocked."""

    def __init__(self, channel: Channel) -> None:
        self.source, self.destination, self.name = channel
        self.messages: deque[Sequence[torch.Tensor]] = deque()
        self.expected: Sequence[torch.Tensor] = ()

    def __str__(self) -> str:
        expected = tensor_layout.specs(self.expected)
        return f"to receive {expected} from rank {self.source} on channel {self.name!r}"

    def unread(self) -> str:
        count = len(self.messages)
        messages = "message" if count == 1 else "messages"
        return f"{count} {messages} from rank {self.source} on channel {self.name!r}"


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks in words.

    >>> ranks_text([3]), ranks_text([0, 2])
    ('rank 3', 'ranks 0, 2')
    """
    names = [str(rank) for rank in ranks]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


class Scheduler:
    """What the threads of one ``Ranks`` share; touched only by the rank that runs."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.device = device
        self.locks = [_acquired_lock() for _ in range(mesh.size)]
        self.caller_lock = _acquired_lock()  # on which the caller of ``Ranks.run`` sleeps
        self.state = bytearray(mesh.size)
        self.job: Callable[[int], None] | None = None
        self.reset()

    def reset(self) -> None:
        self.waits: list[Rendezvous | Mailbox | None] = [None] * self.mesh.size
        self.mailboxes: dict[Channel, Mailbox] = {}
        self.rendezvous: dict[tuple[int, ...], Rendezvous] = {}
        self.error: tuple[int | None, BaseException] | None = None

    # --- which rank runs ----------------------------------------------------------------------

    def block(self, rank: int, wait: Rendezvous | Mailbox) -> None:
        """Let others run until one of them says that ``wait`` is over."""
        self.waits[rank] = wait
        self.state[rank] = BLOCKED
        after = self.next(rank)
        if after != rank:
            self.locks[after].release()
            self.locks[rank].acquire()
        self.waits[rank] = None
        self.check_running()

    def next(self, rank: int) -> int:
        """The next rank that can go on, or -1 when all have finished.

        If no rank can, all of them are stopped.
        """
        after = self.state.find(READY, rank + 1)
        if after < 0:
            after = self.state.find(READY)
        if after < 0 and self.state.find(BLOCKED) >= 0:
            if self.error is None:
                self.stop(None, DeadlockError(self.standstill()))
            else:
                self.stop(*self.error)
            return self.next(rank)
        return after

    def wake(self, rank: int) -> None:
        self.state[rank] = READY

    def finish(self, rank: int) -> None:
        """The end of a rank's body: let the next rank run, or at last the caller of ``run``."""
        self.state[rank] = DONE
        after = self.next(rank)
        lock = self.caller_lock if after < 0 else self.locks[after]
        lock.release()

    def stop(self, rank: int | None, error: BaseException) -> None:
        """Stop all ranks. The first error counts; every blocked rank wakes up to raise."""
        if self.error is None:
            self.error = (rank, error)
        for other, state in enumerate(self.state):
            if state == BLOCKED:
                self.wake(other)

    def check_running(self) -> None:
        """Raise where the ranks are stopped."""
        if self.error is not None:
            raise self.stopped()

    def stopped(self) -> RankError:
        """What a rank raises that stops because of another one's error."""
        assert self.error is not None
        rank, error = self.error
        what = "the ranks were stopped" if rank is None else f"rank {rank} failed"
        return RankError(f"{what}: {type(error).__name__}: {error}")

    def standstill(self) -> str:
        """Where every rank stands, for a deadlock."""
        lines = ["every rank that has not finished waits for another one:"]
        for rank in range(self.mesh.size):
            blocked = self.state[rank] == BLOCKED
            stands = f"waits {self.waits[rank]}" if blocked else "has finished"
            lines.append(f"  rank {rank} {stands}{self._unread(rank)}")
        return "\n".join(lines)

    def _unread(self, rank: int) -> str:
        unread = []
        for mailbox in self.mailboxes.values():
            if mailbox.destination == rank and mailbox.messages:
                unread.append(mailbox.unread())
        return f"; unread: {', '.join(unread)}" if unread else ""

    # --- what ranks hand to each other --------------------------------------------------------

    def mailbox(self, channel: Channel) -> Mailbox:
        mailbox = self.mailboxes.get(channel)
        if mailbox is None:
            mailbox = self.mailboxes[channel] = Mailbox(channel)
        return mailbox

    def meet(
        self,
        rank: int,
        call: CollectiveCall,
        group: tuple[int, ...],
        operand: Any,
        combine: Combine,
    ) -> Any:
        """Enter a collective; returns this rank's result once the whole group has entered."""
        self.check_running()
        # The key is a set of ranks: the same ranks under other axes are then a mismatch that can be
        # named, not a deadlock.
        key = tuple(sorted(group))
        rendezvous = self.rendezvous.get(key)
        if rendezvous is None:
            rendezvous = self.rendezvous[key] = Rendezvous(call, group, rank)
        elif rendezvous.call != call:
            raise MismatchError(
                f"rank {rendezvous.first} called {rendezvous.call}, but rank {rank} called {call}; "
                f"{ranks_text(key)} form a group and must make the same calls in the same order"
            )
        rendezvous.operands[rank] = operand
        if len(rendezvous.operands) < len(group):
            self.block(rank, rendezvous)
        else:
            del self.rendezvous[key]
            operands = [rendezvous.operands[member] for member in group]
            rendezvous.results = combine(operands)
            for member in group:
                self.wake(member)
        return rendezvous.results[group.index(rank)]


def _acquired_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
