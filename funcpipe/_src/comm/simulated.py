"""Simulated ranks: each is a thread of this process, and exactly one of them runs at a time.

In: a mesh and ``body(comm) -> result``.
Out: the results in rank order, or the first error. Both are the same in every run, since the
interleaving depends on nothing but the program (`cooperative_scheduler.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from funcpipe._src.comm import Channel, Done, Pending, nothing, tensor_layout
from funcpipe._src.comm.cooperative_scheduler import (
    DONE,
    READY,
    CollectiveCall,
    Combine,
    Scheduler,
)
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import FuncpipeError, MismatchError

T = TypeVar("T")
_CPU = torch.device("cpu")


class InProcessCommunicator:
    """One rank's way to the others, as ``funcpipe._src.comm.Communicator`` describes it.

    ``Ranks`` makes them. Messages and exchanged objects are handed over by reference, so nobody may
    change them afterwards. The results of collectives are new tensors that no two ranks share. Sums
    are taken in group order.
    """

    def __init__(self, scheduler: Scheduler, rank: int) -> None:
        self.mesh = scheduler.mesh
        self.rank = rank
        self.device = scheduler.device
        self._scheduler = scheduler

    def _collective(
        self,
        kind: str,
        tensor: torch.Tensor,
        axes: Axes,
        combine: Combine,
    ) -> torch.Tensor:
        group = self.mesh.group(self.rank, axes)
        if len(group) == 1:
            return combine([tensor])[0]
        call = CollectiveCall(kind, axes, tuple(tensor.shape), tensor.dtype)
        return self._scheduler.meet(self.rank, call, group, tensor, combine)

    def all_reduce(self, tensor: torch.Tensor, axes: Axes, op: str = "sum") -> torch.Tensor:
        tensor_layout.check_op(op)

        def combine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return _copies(tensor_layout.fold(tensors, op), len(tensors))

        return self._collective(f"all_reduce({op})", tensor, axes, combine)

    def all_gather(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        def combine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return _copies(torch.stack(tensors), len(tensors))

        return self._collective("all_gather", tensor, axes, combine)

    def reduce_scatter(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        tensor_layout.check_shards("reduce_scatter", tensor, axes, self.mesh.axis_size(axes))

        def combine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [tensor_layout.fold(shards, "sum") for shards in _for_each_rank(tensors)]

        return self._collective("reduce_scatter", tensor, axes, combine)

    def start_all_gather(self, tensor: torch.Tensor, axes: Axes) -> Done:
        return Done(self.all_gather(tensor, axes))

    def start_reduce_scatter(self, tensor: torch.Tensor, axes: Axes) -> Done:
        return Done(self.reduce_scatter(tensor, axes))

    def all_to_all(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        tensor_layout.check_shards("all_to_all", tensor, axes, self.mesh.axis_size(axes))

        def combine(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.stack(shards) for shards in _for_each_rank(tensors)]

        return self._collective("all_to_all", tensor, axes, combine)

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        destination: int,
        channel: str,
    ) -> Sequence[Done]:
        scheduler = self._scheduler
        scheduler.check_running()
        mailbox = scheduler.mailbox((self.rank, destination, channel))
        mailbox.messages.append(tensors)
        if scheduler.waits[destination] is mailbox:
            scheduler.wake(destination)
        return [Done(tensor) for tensor in tensors]

    def settle(self, sent: Sequence[Pending]) -> None:
        pass

    def recv(
        self,
        buffers: Sequence[torch.Tensor],
        source: int,
        channel: str,
    ) -> Sequence[torch.Tensor]:
        scheduler = self._scheduler
        scheduler.check_running()
        mailbox = scheduler.mailbox((source, self.rank, channel))
        if not mailbox.messages:
            mailbox.expected = buffers
            scheduler.block(self.rank, mailbox)
        tensors = mailbox.messages.popleft()
        if not tensor_layout.same_layout(tensors, buffers):
            sent = tensor_layout.specs(tensors, strides=True)
            expected = tensor_layout.specs(buffers, strides=True)
            raise MismatchError(
                f"rank {source} sent {sent} on channel {channel!r}, but rank {self.rank} receives "
                f"{expected}; both ends need the same shapes, dtypes and strides"
            )
        return tensors

    def exchange(self, value: Any) -> list[Any]:
        return self._exchange("exchange", value)

    def exchange_digest(
        self,
        digest: int,
        meanwhile: Callable[[], object] = nothing,
    ) -> list[int]:
        meanwhile()
        return self._exchange("exchange_digest", digest)

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        everyone = tuple(range(self.mesh.size))

        def combine(values: list[Any]) -> list[list[Any]]:
            return [list(values) for _ in values]

        return self._scheduler.meet(self.rank, CollectiveCall(kind), everyone, value, combine)

    def prepare(
        self,
        axes_sets: Iterable[Axes],
        channels: Iterable[Channel] = (),
    ) -> None:
        for axes in axes_sets:
            self.mesh.check(axes, "prepare")

    def flush(self) -> None:
        pass

    def fail(self, error: BaseException) -> BaseException:
        scheduler = self._scheduler
        scheduler.stop(self.rank, error)
        assert scheduler.error is not None
        _, first = scheduler.error
        return error if first is error else scheduler.stopped()

    def close(self) -> None:
        pass


@torch.no_grad()
def _copies(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    copies = [tensor.clone() for _ in range(count - 1)]
    return [tensor, *copies]


def _for_each_rank(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """For each rank its shards of all operands, in group order."""
    of_operands = [list(tensor) for tensor in tensors]
    return [list(shards) for shards in zip(*of_operands, strict=True)]


def _serve(scheduler: Scheduler, rank: int) -> None:
    """A rank's thread: sleep until it may run, run the job, let others run; no job is the end."""
    lock = scheduler.locks[rank]
    while True:
        lock.acquire()
        if scheduler.job is None:
            return
        scheduler.job(rank)
        scheduler.finish(rank)


def _dismiss(scheduler: Scheduler, threads: list[threading.Thread]) -> None:
    scheduler.job = None
    for lock in scheduler.locks if threads else ():
        lock.release()
    for thread in threads:
        thread.join()
    threads.clear()


class Ranks:
    """The ranks of a mesh as threads of this process, for any number of runs; a context manager.

    Args:
        mesh: a thread is kept for each of its ranks, from the first run to ``close`` (or garbage
            collection).
        device: what the communicators say their device is.

    >>> with Ranks(Mesh(pipe=2, data=2)) as ranks:
    ...     ranks.run(lambda comm: comm.all_reduce(torch.tensor(comm.rank), ("data",)).item())
    [1, 1, 5, 5]
    """

    def __init__(self, mesh: Mesh, device: torch.device | str = _CPU) -> None:
        self.mesh = mesh
        self._scheduler = Scheduler(mesh, torch.device(device))
        ranks = range(mesh.size)
        self.communicators = [InProcessCommunicator(self._scheduler, rank) for rank in ranks]
        self._threads: list[threading.Thread] = []
        self._busy = threading.Lock()
        self._closer = weakref.finalize(self, _dismiss, self._scheduler, self._threads)

    def run(self, body: Callable[[InProcessCommunicator], T]) -> list[T]:
        """Run ``body(comm)`` once per rank, without gradients.

        Each rank has a copy of the caller's context variables.

        Returns:
            the results in rank order.

        Raises:
            DeadlockError: every unfinished rank waits for another one; the text says where each
                of them stands.
            MismatchError: ranks of a group called different collectives, a message is not what its
                receiver expects, or no rank received it.
            Exception: the first error that a rank raised, with a note that names the rank; the
                others were stopped.
        """
        if not self._closer.alive:
            raise FuncpipeError("these ranks are closed; make new ones with Ranks(mesh)")
        if not self._busy.acquire(blocking=False):
            raise FuncpipeError(
                "these ranks are running already; give each thread its own Ranks(mesh)"
            )
        try:
            return self._run(body)
        finally:
            self._scheduler.reset()
            self._busy.release()

    def _run(self, body: Callable[[InProcessCommunicator], T]) -> list[T]:
        scheduler, size = self._scheduler, self.mesh.size
        results: list[Any] = [None] * size
        contexts = [contextvars.copy_context() for _ in range(size)]
        threads = torch.get_num_threads()

        def job(rank: int) -> None:
            try:
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                with torch.no_grad(), _on(scheduler.device):
                    results[rank] = contexts[rank].run(body, self.communicators[rank])
            except BaseException as error:
                scheduler.stop(rank, error)

        scheduler.job = job
        scheduler.state[:] = bytes([READY]) * size
        self._start()
        scheduler.locks[0].release()
        _wait(scheduler)
        scheduler.job = None
        _raise_first(scheduler)
        return results

    def _start(self) -> None:
        if not self._threads:
            for rank in range(self.mesh.size):
                thread = threading.Thread(
                    target=_serve,
                    args=(self._scheduler, rank),
                    name=f"funcpipe-rank-{rank}",
                    daemon=True,
                )
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """End the threads. Does nothing the second time."""
        self._closer()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    # The current CUDA device is a thread's own; a rank's thread would start on device 0.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _wait(scheduler: Scheduler) -> None:
    """Sleep until every rank has finished.

    An interrupt stops them at their next call of the communicator.
    """
    while scheduler.state.count(DONE) < scheduler.mesh.size:
        try:
            scheduler.caller_lock.acquire()
        except BaseException as error:
            scheduler.stop(None, error)


def _raise_first(scheduler: Scheduler) -> None:
    if scheduler.error is not None:
        rank, error = scheduler.error
        scheduler.error = None
        if rank is not None:
            error.add_note(f"raised by rank {rank} of {scheduler.mesh!r}")
        raise error
    for mailbox in scheduler.mailboxes.values():
        if mailbox.messages:
            raise MismatchError(
                f"rank {mailbox.destination} finished without receiving {mailbox.unread()}"
            )


def run_ranks(
    mesh: Mesh,
    body: Callable[[InProcessCommunicator], T],
    device: torch.device | str = _CPU,
) -> list[T]:
    """Run ``body(comm)`` once per rank of the mesh in this process; ``Ranks.run`` for a single run.

    >>> run_ranks(Mesh(seq=3), lambda comm: comm.exchange(comm.rank * 10))
    [[0, 10, 20], [0, 10, 20], [0, 10, 20]]
    """
    with Ranks(mesh, device) as ranks:
        return ranks.run(body)
