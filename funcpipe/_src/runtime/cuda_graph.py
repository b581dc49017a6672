"""CUDA graphs: a rank's whole step in one graph, optimizer, messages and collectives included.

The graph works on tensors of its own: the state buffers (`state_buffers.py`), which it updates in
place, and a copy of the batch. Graphs for other shapes of batch share the buffers and one pool of
memory.

In: a rank, its state and a batch on the GPU. Out: `CapturedStep`, called like the rank's step.

NCCL adds an event and an edge to a graph for every operation, so that other operations of the same
communicator may run beside the graph. 229 of them, those of a sharded step, took the host 0.7 ms at
every launch. A runner turns that off (`MIXING`), and waits for its graphs before it runs a step
that is not captured. Where NCCL was started earlier, the results are right, and the launch is as
slow as before.

How a capture fails. Nothing runs on the GPU while a step is captured, so a capture that fails has
lost nothing: ranks tell each other, and all of them are where they were. No rank gives up a
communicator for that: NCCL was seen to hang in it, after CUDA had given up a capture with NCCL's
operations half-way. So that a capture ends as a valid one, an op that needs the host is refused
before it runs (`HostOps`), and collectives under way are joined first (``comm.flush``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.buffer_donation import invalidate
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.runtime.cuda_graph_memsets import as_kernels
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.state_buffers import Given, StateBuffers, write
from funcpipe.errors import TraceError

MIXING = "NCCL_GRAPH_MIXING_SUPPORT"  # in the environment, which NCCL reads once
_ATEN = torch.ops.aten
_SHAPED_BY_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COPIES = (
    _ATEN._to_copy.default,
    _ATEN.copy_.default,
    _ATEN._foreach_copy_.default,
)


class CapturedStep:
    """A step that runs as it is when it is called for the first time (allocators, workspaces and
    communicators settle), is then captured, and replayed from then on.

    Args:
        rank: what runs it.
        buffers: of the state, shared by the steps of a rank.
        pool: the memory pool of the rank's graphs.
    """

    def __init__(
        self,
        rank: Rank,
        buffers: StateBuffers,
        pool: Any,
    ) -> None:
        self.rank, self.buffers = rank, buffers
        self.pool = pool
        placement = rank.plan.placement
        self.free = placement.free(rank.comm.rank)
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
        self.buffers.load(given)
        write(tree.leaves(self.batch), tree.leaves(batch))
        self.graph.replay()
        state = self.buffers.release()
        return state, tree.map_tensors(torch.clone, self.metrics)

    def _first(self, given: Given, batch: Any) -> tuple[Any, Any]:
        placement = self.rank.plan.placement
        placement.state_leaves(given.state, "step")  # refuses another structure
        check_on_gpu("state", given.state)
        check_on_gpu("batch", batch)
        self.buffers.load(given)
        self.batch = tree.map_tensors(torch.clone, batch)
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream), self.buffers.kept():
            metrics = self._update()
        now.wait_stream(self.stream)
        _record_stream(metrics, now)
        return self.buffers.release(), metrics

    def _update(self) -> Any:
        return update(self.rank, self.buffers, self.batch, self.free)

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
                graph,
                pool=self.pool,
                stream=self.stream,
                capture_error_mode="thread_local",
            ):
                try:
                    with HostOps("cuda"):
                        self.metrics = self._update()
                except BaseException:
                    self.rank.comm.flush()
                    raise
        except (TraceError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            first_line, *_ = str(error).strip().splitlines()
            said = cannot_capture(first_line.rstrip("."), _UNSEEN)
            raise TraceError(said) from error
        as_kernels(graph)
        graph.instantiate()

    def release(self) -> None:
        """Give back the graph, also where the GPU says that its work was ended, as after another
        rank's failure."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        if self.graph is not None:
            with contextlib.suppress(RuntimeError):
                self.graph.reset()
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

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        why = self._why_host(func, args, kwargs)
        if why is not None:
            raise TraceError(cannot_capture(f"{func}{user_line() or ''} {why}"))
        return func(*args, **kwargs)

    def _why_host(self, func: Any, args: Any, kwargs: Any) -> str | None:
        """Why an op with these arguments needs the host, if it does."""
        tensors = _tensors((args, kwargs))
        copies = func in _COPIES
        devices = set()
        for tensor in tensors:
            # Elsewhere a number on the CPU becomes an argument of a kernel.
            number = tensor.is_cpu and not tensor.dim()
            if copies or not number:
                devices.add(tensor.device.type)
        if copies and kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
            devices.add(target.type)
        if len(devices) > 1 and self.device in devices:
            return f"copies between {' and '.join(sorted(devices))}"
        on_device = any(tensor.device.type == self.device for tensor in tensors)
        if on_device and _reads(func, args, kwargs):
            return "waits for a value that the host reads"
        return None


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree.leaves(values) if isinstance(leaf, torch.Tensor)]


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op reads what its arguments hold before it is done: a number, or how large its
    result is."""
    if func is _ATEN.index.Tensor:
        masks = (torch.bool, torch.uint8)
        return any(index is not None and index.dtype in masks for index in args[1])
    if func is _ATEN.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is _ATEN.equal.default:
        return True
    return not _SHAPED_BY_DATA.isdisjoint(func.tags)


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
    fault = f"the step cannot be captured into a CUDA graph: {what}"
    reasons = filter(None, (fault, why, _REMEDY))
    return ". ".join(reasons) + "; or use cuda_graph=False"


def update(
    rank: Rank,
    buffers: StateBuffers,
    batch: Any,
    free: Iterable[int],
) -> Any:
    """Run a step that leaves the new state where the old one was; returns the metrics.

    Args:
        free: the numbers of the leaves that optimizers may write to.
    """
    overwritable = [buffers.leaves[number] for number in free]
    new, metrics = rank.step(buffers.state, batch, overwritable)
    rank.comm.flush()
    moved = []
    for buffer, leaf in zip(buffers.leaves, tree.leaves(new), strict=True):
        if buffer is not leaf:
            moved.append((buffer, leaf))
    invalidate(buffer for buffer, _ in moved)
    buffers.overwrite(moved)
    return metrics


def new_pool() -> Any:
    """A memory pool for graphs, where there are GPUs."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.graph_pool_handle()


def pool_bytes(pool: Any) -> int:
    """Bytes of the memory that the graphs of a pool hold."""
    segments = torch.cuda.memory_snapshot(pool)
    return sum(segment["total_size"] for segment in segments)


def feeder(device: torch.device) -> Callable[[Any], Any]:
    """A function that reads a batch, and moves it to a GPU on a stream of its own, beside the step
    that runs there; what lies there already stays. Pinned memory does not make the host wait."""
    if device.type != "cuda":
        return read_batch
    stream: torch.cuda.Stream | None = None  # made when the first batch comes from the CPU

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    def move(batch: Any) -> Any:
        nonlocal stream
        batch = read_batch(batch)
        if not any(tensor.is_cpu for tensor in _tensors(batch)):
            return batch
        stream = stream or torch.cuda.Stream(device)
        now = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            moved = tree.map_tensors(to_device, batch)
        now.wait_stream(stream)
        _record_stream(moved, now)
        return moved

    return move


def _record_stream(values: Any, stream: torch.cuda.Stream) -> None:
    """Keep the memory of tensors until a stream has used them."""
    for tensor in _tensors(values):
        tensor.record_stream(stream)


def check_on_gpu(name: str, values: Any) -> None:
    """TraceError where a leaf is not a tensor on the GPU."""
    for path, leaf in zip(tree.paths(values), tree.leaves(values), strict=True):
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
