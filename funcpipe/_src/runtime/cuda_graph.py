"""Capture: a rank's whole step in one CUDA graph, optimizer, messages and collectives included.

Terms. The graph works on tensors of its own: the *home* of the state (`state_buffers.py`), which it
updates in place, and a copy of the batch. Graphs for other shapes of batch share the home and one
pool of memory.

In: a rank, its state and a batch on the GPU. Out: `CapturedStep`, called like the rank's step.

NCCL adds an event and an edge to a graph for every operation, so that others of the same
communicator outside the graph may run beside it. 229 of them, those of a sharded step, took the
host 0.7 ms at every launch. A runner turns that off (`MIXING`), and waits for its graphs before it
runs a step that is not captured. Where NCCL was started earlier, all is right, and the launch as
slow.

How a capture fails. Nothing runs on the GPU while a step is captured, so one that fails has lost
nothing: ranks tell each other, and all of them are where they were. Nobody gives up a communicator
for that: NCCL was seen to hang in it, after a capture with its operations that CUDA had given up
half-way. So that a capture ends as a valid one, an op that needs the host is refused before it runs
(`HostOps`), and what is on its way is joined first (``comm.flush``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.buffer_donation import invalidate, memory
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.runtime.cuda_graph_memsets import as_kernels
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.state_buffers import Given, StateBuffers, write
from funcpipe.errors import TraceError

MIXING = "NCCL_GRAPH_MIXING_SUPPORT"  # in the environment, which NCCL reads once
_ATEN = torch.ops.aten
_SHAPED_BY_DATA = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN._foreach_copy_.default)


class CapturedStep:
    """A step that runs as it is when it is called for the first time (allocators, workspaces and
    communicators settle), is then captured, and replayed from then on.

    Args:
        rank: what runs it.
        home: of the state, shared by the steps of a rank.
        pool: the memory pool of the rank's graphs.
    """

    def __init__(self, rank: Rank, home: StateBuffers, pool: Any) -> None:
        self.rank, self.home, self.pool = rank, home, pool
        self.free = rank.plan.placement.free(rank.comm.rank)
        self.stream = torch.cuda.Stream()
        self.batch: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def ready(self) -> bool:
        """Whether it has run once, and is not captured."""
        return self.batch is not None and self.graph is None

    def __call__(self, given: Given, batch: Any) -> tuple[Any, Any]:
        """One step, the first or of the graph; metrics are new tensors.

        Raises:
            TraceError: a leaf is not on the GPU.
            StateError: the state has another structure than ``init_state`` made.
        """
        if self.batch is None:
            return self._first(given, batch)
        assert self.graph is not None
        self.home.enter(given)
        write(tree.leaves(self.batch), tree.leaves(batch))
        self.graph.replay()
        return self.home.leave(), tree.map_tensors(torch.clone, self.metrics)

    def _first(self, given: Given, batch: Any) -> tuple[Any, Any]:
        self.rank.plan.placement.state_leaves(given.state, "step")  # refuses another structure
        check_on_gpu("state", given.state)
        check_on_gpu("batch", batch)
        self.home.enter(given)
        self.batch = tree.map_tensors(torch.clone, batch)
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream), self.home.kept():
            metrics = update(self.rank, self.home, self.batch, self.free)
        now.wait_stream(self.stream)
        tree.map_tensors(lambda x: x.record_stream(now), metrics)
        return self.home.leave(), metrics

    def capture(self) -> None:
        """Capture the step that ran first.

        Raises:
            TraceError: it waits for the host.
        """
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            self._record(self.graph)
        except BaseException:
            self.release()  # an error may be kept for long, and what its frames hold with it
            raise

    def _record(self, graph: torch.cuda.CUDAGraph) -> None:
        """The step into a graph; see above for how it ends where the step fails."""
        try:
            # The watchdog of NCCL queries events on a thread of its own, which only this mode
            # allows.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                try:
                    with HostOps("cuda"):
                        self.metrics = update(self.rank, self.home, self.batch, self.free)
                except BaseException:
                    self.rank.comm.flush()
                    raise
        except (TraceError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise TraceError(
                cannot_capture(str(error).strip().splitlines()[0].rstrip("."), _UNSEEN)
            ) from error
        as_kernels(graph)
        graph.instantiate()

    def release(self) -> None:
        """Give back the graph, also where the GPU says that its work was ended, as after another
        rank's failure."""
        for end in (torch.cuda.synchronize, *([self.graph.reset] if self.graph else [])):
            with contextlib.suppress(RuntimeError):
                end()
        self.graph = None


class HostOps(TorchDispatchMode):
    """Refuses the ops inside that a CUDA graph cannot hold, with their lines, before they run.

    Args:
        device: the type of device whose values the host is not to wait for.

    Raises:
        TraceError: from the op.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        why = self._why_host(func, args, kwargs)
        if why is not None:
            raise TraceError(cannot_capture(f"{func}{user_line() or ''} {why}"))
        return func(*args, **kwargs)

    def _why_host(self, func: Any, args: Any, kwargs: Any) -> str | None:
        """Why an op with these arguments needs the host, if it does."""
        used = [x for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # Elsewhere a number on the CPU becomes an argument of a kernel.
        devices = {x.device.type for x in used if func in _COPIES or x.dim() or not x.is_cpu}
        if func in _COPIES and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if len(devices) > 1 and self.device in devices:
            return f"copies between {' and '.join(sorted(devices))}"
        if any(x.device.type == self.device for x in used) and _reads(func, args, kwargs):
            return "waits for a value that the host reads"
        return None


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op reads what its arguments hold before it is done: a number, or how large its
    result is."""
    if func is _ATEN.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if func is _ATEN.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return func is _ATEN.equal.default or any(tag in func.tags for tag in _SHAPED_BY_DATA)


_REMEDY = (
    "Keep it out of the step: return what the host wants to see as a metric, make tensors on the "
    "GPU"
)
_UNSEEN = "Something in it waits for the host: torch.cuda.synchronize, or an op of your own"


def cannot_capture(what: str, why: str = "") -> str:
    """What is said of a step that cannot be captured.

    Args:
        what: the op, its line and its fault; or what CUDA said.
        why: where CUDA alone said something: what it may come from.

    >>> cannot_capture("aten.equal.default at train.py:7 waits for a value that the host reads")[:47]
    'the step cannot be captured into a CUDA graph: '
    """
    reasons = filter(None, (f"the step cannot be captured into a CUDA graph: {what}", why, _REMEDY))
    return ". ".join(reasons) + "; or use cuda_graph=False"


def update(rank: Rank, home: StateBuffers, batch: Any, free: Iterable[int]) -> Any:
    """Run a step that leaves the new state where the old one was; returns the metrics.

    Args:
        free: the places of the leaves that optimizers may write to.
    """
    new, metrics = rank.step(home.state, batch, [home.leaves[k] for k in free])
    rank.comm.flush()
    mine = {memory(x) for x in home.leaves}
    moved = [(x, y) for x, y in zip(home.leaves, tree.leaves(new), strict=True) if x is not y]
    invalidate(x for x, _ in moved)
    # What lies in the memory of another leaf is read before that is written.
    write([x for x, _ in moved], [y.clone() if memory(y) in mine else y for _, y in moved])
    return metrics


def new_pool() -> Any:
    """A memory pool for graphs, where there are GPUs."""
    return torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None


def pool_bytes(pool: Any) -> int:
    """Bytes of the memory that the graphs of a pool hold."""
    return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))


def feeder(device: torch.device) -> Callable[[Any], Any]:
    """A function that reads a batch, and moves it to a GPU on a stream of its own, beside the step
    that runs there; what lies there already stays. Pinned memory does not make the host wait."""
    stream: list[torch.cuda.Stream] = []

    def move(batch: Any) -> Any:
        batch = read_batch(batch)
        if not any(
            isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in tree.leaves(batch)
        ):
            return batch
        stream[:] = stream or [torch.cuda.Stream(device)]
        now = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream[0]):
            out = tree.map_tensors(lambda x: x.to(device, non_blocking=True), batch)
        now.wait_stream(stream[0])
        tree.map_tensors(lambda x: x.record_stream(now), out)
        return out

    return move if device.type == "cuda" else read_batch


def check_on_gpu(name: str, x: Any) -> None:
    """TraceError where a leaf is not a tensor on the GPU."""
    for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
        if not isinstance(leaf, torch.Tensor):
            raise TraceError(
                f"{name}{path} is a {type(leaf).__name__}: a CUDA graph would repeat its value for "
                "ever; make it a tensor"
            )
        if leaf.device.type != "cuda":
            raise TraceError(
                f"{name}{path} is on the {leaf.device}: what a CUDA graph reads lies on the GPU; "
                "move it there"
            )
