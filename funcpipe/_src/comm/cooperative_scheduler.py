"""Whose turn it is among the ranks of one process, and what they say to each other.

Terms. The *floor* belongs to one rank at a time: it runs until it blocks (in a receive, or in a
collective that others have not reached), then hands the floor to the next rank, in cyclic order,
that can go on. A rank's *gate* is the lock that its thread sleeps on. A *box* holds the messages of
one (source, destination, channel) in order. Ranks *meet* in a collective: the last one to arrive
computes everybody's result, so no rank can change an operand that others still read.

In: what ranks call. Out: who goes on, with what; or the first error, after which every rank is
stopped.

Why so: the interleaving depends on nothing but the program, so results and errors are the same in
every run; and since only the floor's holder touches what is shared, nothing needs a lock and "no
rank can go on" is a
plain fact: a deadlock is reported exactly when it happens.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from funcpipe._src.comm import tensor_layout as wire
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import DeadlockError, MismatchError, RankError

READY, BLOCKED, DONE = 1, 2, 3
Combine = Callable[[list], list]  # the operands of a group -> the result of each member


class Call(NamedTuple):
    """What a rank calls; every member of a group must call the same."""

    kind: str
    axes: Axes | None = None  # None: over the whole mesh, host side
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        if self.axes is None:
            return self.kind
        return f"{self.kind} of {wire.spec(self.shape, self.dtype)} over {self.axes}"


class Meeting:
    """A collective that some members of a group have reached."""

    def __init__(self, call: Call, group: tuple[int, ...], first: int) -> None:
        self.call, self.group, self.first = call, group, first
        self.operands: dict[int, Any] = {}
        self.results: list[Any] = []

    def __str__(self) -> str:
        missing = [r for r in self.group if r not in self.operands]
        return f"in {self.call}; not there yet: {ranks(missing)}"


class Box:
    """The messages on one channel from one rank to another, and what a blocked receiver expects."""

    def __init__(self, src: int, dst: int, channel: str) -> None:
        self.src, self.dst, self.channel = src, dst, channel
        self.messages: deque[Sequence[torch.Tensor]] = deque()
        self.expects: Sequence[torch.Tensor] = ()

    def __str__(self) -> str:
        return (
            f"to receive {wire.specs(self.expects)} from rank {self.src} on channel "
            f"{self.channel!r}"
        )

    def unread(self) -> str:
        n = len(self.messages)
        return f"{n} message{'s' * (n != 1)} from rank {self.src} on channel {self.channel!r}"


def ranks(ranks: Iterable[int]) -> str:
    names = [str(r) for r in ranks]
    return ("rank " if len(names) == 1 else "ranks ") + ", ".join(names)


class World:
    """What the threads of one ``Ranks`` share; touched only by the holder of the floor."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device
        self.gates = [_shut() for _ in range(mesh.size)]
        self.home = _shut()  # the gate of the caller of run
        self.state = bytearray(mesh.size)
        self.job: Callable[[int], None] | None = None
        self.reset()

    def reset(self) -> None:
        self.waits: list[Meeting | Box | None] = [None] * self.mesh.size
        self.boxes: dict[tuple[int, int, str], Box] = {}
        self.meetings: dict[tuple[int, ...], Meeting] = {}
        self.error: tuple[int | None, BaseException] | None = None

    # --- the floor --------------------------------------------------------------------------------

    def block(self, rank: int, wait: Meeting | Box) -> None:
        """Give the floor away until another rank says that ``wait`` is over."""
        self.waits[rank] = wait
        self.state[rank] = BLOCKED
        after = self.next(rank)
        if after != rank:
            self.gates[after].release()
            self.gates[rank].acquire()
        self.waits[rank] = None
        if self.error is not None:
            raise self.stopped()

    def next(self, rank: int) -> int:
        """The next rank that can go on, or -1 when all have finished. If none can, all are
        stopped."""
        after = self.state.find(READY, rank + 1)
        if after < 0:
            after = self.state.find(READY)
        if after < 0 and self.state.find(BLOCKED) >= 0:
            self.stop(
                None, DeadlockError(self.standstill()) if self.error is None else self.error[1]
            )
            return self.next(rank)
        return after

    def wake(self, rank: int) -> None:
        self.state[rank] = READY

    def finish(self, rank: int) -> None:
        """The end of a rank's body: hand the floor on, at last to the caller of run."""
        self.state[rank] = DONE
        after = self.next(rank)
        (self.home if after < 0 else self.gates[after]).release()

    def stop(self, rank: int | None, error: BaseException) -> None:
        """The first error counts; every blocked rank wakes up to raise."""
        if self.error is None:
            self.error = (rank, error)
        for r, state in enumerate(self.state):
            if state == BLOCKED:
                self.state[r] = READY

    def stopped(self) -> RankError:
        """What a rank raises that stops because of another one's error."""
        assert self.error is not None
        rank, error = self.error
        who = "the ranks were stopped" if rank is None else f"rank {rank} failed"
        return RankError(f"{who}: {type(error).__name__}: {error}")

    # --- words ------------------------------------------------------------------------------------

    def standstill(self) -> str:
        """Where every rank stands, for a deadlock."""
        lines = ["every rank that has not finished waits for another one:"]
        for rank in range(self.mesh.size):
            stands = f"waits {self.waits[rank]}" if self.state[rank] == BLOCKED else "has finished"
            lines.append(f"  rank {rank} {stands}{self.unread(rank)}")
        return "\n".join(lines)

    def unread(self, rank: int) -> str:
        boxes = [b for b in self.boxes.values() if b.dst == rank and b.messages]
        words = ", ".join(b.unread() for b in boxes)
        return f"; unread: {words}" if words else ""

    # --- what ranks say ---------------------------------------------------------------------------

    def box(self, src: int, dst: int, channel: str) -> Box:
        key = (src, dst, channel)
        box = self.boxes.get(key)
        if box is None:
            box = self.boxes[key] = Box(src, dst, channel)
        return box

    def meet(self, rank: int, call: Call, group: tuple[int, ...], x: Any, combine: Combine) -> Any:
        """Enter a collective; returns this rank's result once the whole group has entered."""
        if self.error is not None:
            raise self.stopped()
        # Looked up as a set: the same ranks under other axes are then a mismatch that can be named,
        # not a deadlock.
        key = tuple(sorted(group))
        meeting = self.meetings.get(key)
        if meeting is None:
            meeting = self.meetings[key] = Meeting(call, group, rank)
        elif meeting.call != call:
            raise MismatchError(
                f"rank {meeting.first} called {meeting.call}, but rank {rank} called {call}; "
                f"{ranks(key)} form a group and must make the same calls in the same order"
            )
        meeting.operands[rank] = x
        if len(meeting.operands) < len(group):
            self.block(rank, meeting)
        else:
            del self.meetings[key]
            meeting.results = combine([meeting.operands[r] for r in group])
            for r in group:
                self.wake(r)
        return meeting.results[group.index(rank)]


def _shut() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
