"""Capture: a rank's whole step in one CUDA graph, optimizer, messages and collectives included.

Terms. The graph works on tensors of its own: the *home* of the state, which it updates in place, and a copy of the batch. A
state that a step was given is *donated*: its memory is the home's, and what it held is gone. A step returns the home's
tensors under new names, so that an old state is known by its names when it is used again. Graphs for other shapes of batch
share the home and one pool of memory.

In: a rank, its state and a batch on the GPU. Out: `CapturedStep`, called like the rank's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from funcpipe import tree
from funcpipe.comm import Communicator
from funcpipe.comm.wire import is_dense
from funcpipe.donation import Ledger, memory
from funcpipe.errors import StateError, TraceError
from funcpipe.runtime.execute import Bound, Slots, execute
from funcpipe.runtime.rank import Rank
from funcpipe.step import describe

_WARM_UP = 2  # eager runs before the capture: allocators, workspaces and communicators settle


class Home:
    """The state that captured steps update in place.

    Its memory is that of the first state that it takes in; a tensor that shares memory with another leaf, or has elements
    that do, is copied.
    """

    def __init__(self) -> None:
        self.leaves: list[torch.Tensor] = []
        self._spec: Any = None
        self._named: list[torch.Tensor] = []  # the home's tensors as the last step returned them

    @property
    def state(self) -> Any:
        """The state as captured steps see it."""
        return tree.unflatten(self._spec, self.leaves)

    def enter(self, state: Any) -> None:
        """Take in the values of a state.

        Raises:
            StateError: it was donated, or is another tree than before.
        """
        if self._spec is None:
            self._adopt(state)
            return
        self.check(state)
        leaves = tree.leaves(state)
        if self._is_last(leaves):
            return
        mine = {memory(x) for x in self.leaves}
        moved = [(a, b) for a, b, named in zip(self.leaves, leaves, self._named, strict=True) if b is not named]
        write([a for a, _ in moved], [b.clone() if memory(b) in mine else b for _, b in moved])

    def _adopt(self, state: Any) -> None:
        seen: set[int] = set()
        given, self._spec = tree.flatten(state)
        for x in given:
            self.leaves.append(x if is_dense(x) and memory(x) not in seen else x.clone())
            seen.add(memory(x))
        self._named = given

    def check(self, state: Any) -> None:
        """StateError if a state was donated, or does not fit."""
        if self._spec is None:
            return
        leaves, spec = tree.flatten(state)
        if spec != self._spec:
            raise StateError(
                f"the state has another structure than when the step was captured: {spec}, not {self._spec}"
            )
        if self._is_last(leaves):
            return
        valid, mine = set(map(id, self._named)), {memory(x) for x in self.leaves} - {0}
        for path, x, home in zip(tree.paths(state), leaves, self.leaves, strict=True):
            if not isinstance(x, torch.Tensor) or (x.shape, x.dtype, x.device) != (home.shape, home.dtype, home.device):
                raise StateError(
                    f"state{path} is {describe(x)}, but the step was captured with {describe(home)} on the {home.device}"
                )
            if id(x) not in valid and memory(x) in mine:
                raise StateError(
                    f"state{path} was given to an earlier step, which has updated it in place: a step that is captured into a "
                    "CUDA graph takes over the memory of its state. Pass the state that the last step returned; clone "
                    "what you want to keep"
                )

    def _is_last(self, leaves: list[Any]) -> bool:
        """Whether these are what the last step returned, all of them."""
        return all(a is b for a, b in zip(leaves, self._named, strict=True))

    def leave(self) -> Any:
        """The state after a step, under names of its own."""
        self._named = [x.detach() for x in self.leaves]
        return tree.unflatten(self._spec, self._named)


class CapturedStep:
    """A step that is replayed.

    Args:
        rank: what runs it.
        home: of the state, shared by the steps of a rank.
        state, batch: what it is captured with.
        pool: the memory pool of the rank's graphs.

    Raises:
        TraceError: the step cannot be captured: it waits for the host, or a leaf is not on the GPU.
        StateError: the state was donated.
    """

    def __init__(self, rank: Rank, home: Home, state: Any, batch: Any, pool: Any) -> None:
        check_on_gpu("state", state)
        check_on_gpu("batch", batch)
        home.enter(state)
        self.home, self.batch = home, tree.map_tensors(torch.clone, batch)
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            ledger = watched(rank, home, self.batch)
            for _ in range(1, _WARM_UP):
                rank.step(home.state, self.batch)
                rank.comm.flush()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        try:
            # The watchdog of NCCL queries events on a thread of its own, which only this mode allows.
            with torch.cuda.graph(self.graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                self.metrics = update(rank, home, self.batch, ledger)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise TraceError(
                f"the step cannot be captured into a CUDA graph: {_first_line(error)}. Something in it waits for the host "
                "(.item(), print, a copy to the CPU) or makes a tensor on the CPU; use cuda_graph=False to find it"
            ) from error

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Replay on another state or batch of the same shapes; metrics are new tensors."""
        self.home.enter(state)
        write(tree.leaves(self.batch), tree.leaves(batch))
        self.graph.replay()
        return self.home.leave(), tree.map_tensors(torch.clone, self.metrics)

    def release(self) -> None:
        """Give back the graph, also where the GPU says that its work was ended, as after another rank's failure."""
        for end in (torch.cuda.synchronize, self.graph.reset):
            with contextlib.suppress(RuntimeError):
                end()


def watched(rank: Rank, home: Home, batch: Any) -> Ledger:
    """Run a step once, to see which leaves of the state its optimizers may write to."""
    ledger = Ledger(home.leaves)

    def observe(bound: list[Bound], slots: Slots, comm: Communicator) -> None:
        ledger.read(slots)  # compiled units run kernels that are no ops
        execute(bound, slots, comm)

    rank.observer = observe
    try:
        with ledger.watch():
            out = rank.step(home.state, batch)
            ledger.read(out)
            rank.comm.flush()
    finally:
        rank.observer = None
    return ledger


def update(rank: Rank, home: Home, batch: Any, ledger: Ledger) -> Any:
    """Run a step that leaves the new state where the old one was; returns the metrics."""
    with ledger.donate():
        new, metrics = rank.step(home.state, batch)
    rank.comm.flush()
    mine = {memory(x): k for k, x in enumerate(home.leaves)}
    moved = [(x, y) for x, y in zip(home.leaves, tree.leaves(new), strict=True) if x is not y]
    # What lies in the memory of another leaf is read before that is written.
    write([x for x, _ in moved], [y.clone() if memory(y) in mine else y for _, y in moved])
    return metrics


def pool_bytes(pool: Any) -> int:
    """Bytes of the memory that the graphs of a pool hold."""
    return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))


def feeder(device: torch.device) -> Callable[[Any], Any]:
    """A function that moves a batch to a GPU on a stream of its own, beside the step that runs there; what lies there already
    stays. Pinned memory does not make the host wait."""
    stream: list[torch.cuda.Stream] = []

    def move(batch: Any) -> Any:
        if not any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree.leaves(batch)):
            return batch
        stream[:] = stream or [torch.cuda.Stream(device)]
        now = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream[0]):
            out = tree.map_tensors(lambda x: x.to(device, non_blocking=True), batch)
        now.wait_stream(stream[0])
        tree.map_tensors(lambda x: x.record_stream(now), out)
        return out

    return move if device.type == "cuda" else lambda batch: batch


def check_on_gpu(name: str, x: Any) -> None:
    """TraceError where a leaf is not a tensor on the GPU."""
    for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
        if not isinstance(leaf, torch.Tensor):
            raise TraceError(
                f"{name}{path} is a {type(leaf).__name__}: a CUDA graph would repeat its value for ever; make it a tensor"
            )
        if leaf.device.type != "cuda":
            raise TraceError(
                f"{name}{path} is on the {leaf.device}: what a CUDA graph reads lies on the GPU; move it there"
            )


def write(old: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    """Copy tensors into others."""
    if old:
        torch._foreach_copy_(old, new, non_blocking=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
