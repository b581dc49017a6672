"""Ranks inside this process: one thread a rank, exactly one of which runs at a time
(`cooperative_scheduler.py`).

In: a mesh and ``body(comm) -> result``. Out: the results in rank order, or the first error. Both
are the same
in every run: the interleaving depends on nothing but the program.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from funcpipe._src.comm import Done, Pending
from funcpipe._src.comm import tensor_layout as wire
from funcpipe._src.comm.cooperative_scheduler import DONE, READY, Call, Combine, World
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import FuncpipeError, MismatchError

T = TypeVar("T")
_CPU = torch.device("cpu")


class InProcessCommunicator:
    """One rank's way to the others, as ``funcpipe._src.comm.Communicator`` describes it. ``Ranks``
    makes them.

    Messages and exchanged objects are handed over by reference, so nobody may change them
    afterwards; the results of collectives are new tensors that no two ranks share. Sums are taken
    in group order.
    """

    def __init__(self, world: World, rank: int) -> None:
        self.mesh, self.rank, self.device = world.mesh, rank, world.device
        self._world = world

    def _collective(self, kind: str, x: torch.Tensor, axes: Axes, combine: Combine) -> torch.Tensor:
        group = self.mesh.group(self.rank, axes)
        if len(group) == 1:
            return combine([x])[0]
        return self._world.meet(
            self.rank, Call(kind, axes, tuple(x.shape), x.dtype), group, x, combine
        )

    def all_reduce(self, x: torch.Tensor, axes: Axes, op: str = "sum") -> torch.Tensor:
        wire.check_op(op)
        return self._collective(
            f"all_reduce({op})", x, axes, lambda xs: _copies(wire.fold(xs, op), len(xs))
        )

    def all_gather(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        return self._collective("all_gather", x, axes, lambda xs: _copies(torch.stack(xs), len(xs)))

    def reduce_scatter(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        wire.check_pieces("reduce_scatter", x, axes, self.mesh.axis_size(axes))
        return self._collective(
            "reduce_scatter",
            x,
            axes,
            lambda xs: [wire.fold([x[i] for x in xs], "sum") for i in range(len(xs))],
        )

    def start_all_gather(self, x: torch.Tensor, axes: Axes) -> Done:
        return Done(self.all_gather(x, axes))

    def start_reduce_scatter(self, x: torch.Tensor, axes: Axes) -> Done:
        return Done(self.reduce_scatter(x, axes))

    def all_to_all(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        wire.check_pieces("all_to_all", x, axes, self.mesh.axis_size(axes))
        return self._collective(
            "all_to_all",
            x,
            axes,
            lambda xs: [torch.stack([x[i] for x in xs]) for i in range(len(xs))],
        )

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> Sequence[Done]:
        world = self._world
        if world.error is not None:
            raise world.stopped()
        box = world.box(self.rank, dst, channel)
        box.messages.append(xs)
        if world.waits[dst] is box:
            world.wake(dst)
        return [Done(x) for x in xs]

    def settle(self, sent: Sequence[Pending]) -> None:
        pass

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        world = self._world
        if world.error is not None:
            raise world.stopped()
        box = world.box(src, self.rank, channel)
        if not box.messages:
            box.expects = outs
            world.block(self.rank, box)
        xs = box.messages.popleft()
        if not wire.same_layout(xs, outs):
            raise MismatchError(
                f"rank {src} sent {wire.specs(xs, strides=True)} on channel {channel!r}, but rank "
                f"{self.rank} receives {wire.specs(outs, strides=True)}; both ends need the same "
                "shapes, dtypes and strides"
            )
        return xs

    def exchange(self, what: Any) -> list[Any]:
        return self._exchange("exchange", what)

    def exchange_digest(self, n: int, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
        meanwhile()
        return self._exchange("exchange_digest", n)

    def _exchange(self, kind: str, what: Any) -> list[Any]:
        everyone = tuple(range(self.mesh.size))
        return self._world.meet(
            self.rank, Call(kind), everyone, what, lambda xs: [list(xs) for _ in xs]
        )

    def prepare(
        self, axes_sets: Iterable[Axes], lanes: Iterable[tuple[int, int, str]] = ()
    ) -> None:
        for axes in axes_sets:
            self.mesh.check(axes, "prepare")

    def flush(self) -> None:
        pass

    def fail(self, error: BaseException) -> BaseException:
        world = self._world
        world.stop(self.rank, error)
        return error if world.error is None or world.error[1] is error else world.stopped()

    def close(self) -> None:
        pass


@torch.no_grad()
def _copies(x: torch.Tensor, n: int) -> list[torch.Tensor]:
    return [x, *(x.clone() for _ in range(n - 1))]


def _serve(world: World, rank: int) -> None:
    """A rank's thread: sleep until the floor comes, run the job, hand the floor on; no job means
    the end."""
    gate = world.gates[rank]
    while True:
        gate.acquire()
        if world.job is None:
            return
        world.job(rank)
        world.finish(rank)


def _dismiss(world: World, threads: list[threading.Thread]) -> None:
    world.job = None
    for gate in world.gates if threads else ():
        gate.release()
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
        self._world = World(mesh, torch.device(device))
        self.communicators = [InProcessCommunicator(self._world, r) for r in range(mesh.size)]
        self._threads: list[threading.Thread] = []
        self._busy = threading.Lock()
        self._closer = weakref.finalize(self, _dismiss, self._world, self._threads)

    def run(self, body: Callable[[InProcessCommunicator], T]) -> list[T]:
        """Run ``body(comm)`` once per rank, without gradients, in a copy of the caller's context
        variables.

        Returns:
            the results in rank order.

        Raises:
            DeadlockError: every unfinished rank waits for another one; says where each of them
            stands.
            MismatchError: members of a group called different collectives, a message is not what
                its receiver expects, or nobody received it.
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
            self._world.reset()
            self._busy.release()

    def _run(self, body: Callable[[InProcessCommunicator], T]) -> list[T]:
        world, size = self._world, self.mesh.size
        results: list[Any] = [None] * size
        contexts = [contextvars.copy_context() for _ in range(size)]
        threads = torch.get_num_threads()

        def job(rank: int) -> None:
            try:
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                with torch.no_grad(), _on(world.device):
                    results[rank] = contexts[rank].run(body, self.communicators[rank])
            except BaseException as error:
                world.stop(rank, error)

        world.job = job
        world.state[:] = bytes([READY]) * size
        self._start()
        world.gates[0].release()
        _wait(world)
        world.job = None
        _raise_first(world)
        return results

    def _start(self) -> None:
        if not self._threads:
            names = [f"funcpipe-rank-{r}" for r in range(self.mesh.size)]
            self._threads += [
                threading.Thread(target=_serve, args=(self._world, r), name=name, daemon=True)
                for r, name in enumerate(names)
            ]
            for thread in self._threads:
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


def _wait(world: World) -> None:
    """Sleep until every rank has finished; an interrupt stops them at their next call of the
    communicator."""
    while world.state.count(DONE) < world.mesh.size:
        try:
            world.home.acquire()
        except BaseException as error:
            world.stop(None, error)


def _raise_first(world: World) -> None:
    if world.error is not None:
        rank, error = world.error
        world.error = None
        if rank is not None:
            error.add_note(f"raised by rank {rank} of {world.mesh!r}")
        raise error
    for box in world.boxes.values():
        if box.messages:
            raise MismatchError(f"rank {box.dst} finished without receiving {box.unread()}")


def run_ranks(
    mesh: Mesh, body: Callable[[InProcessCommunicator], T], device: torch.device | str = _CPU
) -> list[T]:
    """Run ``body(comm)`` once per rank of the mesh in this process; ``Ranks.run`` for a single run.

    >>> run_ranks(Mesh(seq=3), lambda comm: comm.exchange(comm.rank * 10))
    [[0, 10, 20], [0, 10, 20], [0, 10, 20]]
    """
    with Ranks(mesh, device) as ranks:
        return ranks.run(body)
