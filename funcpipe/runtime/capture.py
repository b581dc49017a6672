"""Capture: a rank's whole step in one CUDA graph, optimizer, messages and collectives included.

The graph works on tensors of its own: the state, which it updates in place, and a copy of the batch. So the state that a
step returns is the one it was given, and what it held before is gone (*donated*).

In: a rank, its state and a batch on the GPU. Out: `CapturedStep`, called like the rank's step.
"""

from __future__ import annotations

from typing import Any

import torch

from funcpipe import tree
from funcpipe.errors import TraceError
from funcpipe.runtime.rank import Rank

_WARM_UP = 2  # eager runs before the capture: allocators, workspaces and communicators settle


class CapturedStep:
    """A step that is replayed.

    Raises:
        TraceError: the step cannot be captured: it waits for the host, or a leaf is not on the GPU.
    """

    def __init__(self, rank: Rank, state: Any, batch: Any) -> None:
        _check_on_gpu("state", state)
        _check_on_gpu("batch", batch)
        self.state, self.batch = state, tree.map_tensors(torch.clone, batch)
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(_WARM_UP):
                rank.step(self.state, self.batch)
                rank.comm.flush()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        try:
            # The watchdog of NCCL queries events on a thread of its own, which only this mode allows.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                new, self.metrics = rank.step(self.state, self.batch)
                rank.comm.flush()
                _write(self.state, new)
        except RuntimeError as error:
            raise TraceError(
                f"the step cannot be captured into a CUDA graph: {_first_line(error)}. Something in it waits for the host "
                "(.item(), print, a copy to the CPU) or makes a tensor on the CPU; use cuda_graph=False to find it"
            ) from error

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Replay on another state or batch of the same shapes; metrics are new tensors."""
        if state is not self.state:
            _write(self.state, state)
        _write(self.batch, batch)
        self.graph.replay()
        return self.state, tree.map_tensors(torch.clone, self.metrics)

    def release(self) -> None:
        """Give back the graph."""
        torch.cuda.synchronize()
        self.graph.reset()


def _check_on_gpu(name: str, x: Any) -> None:
    for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
        if not isinstance(leaf, torch.Tensor):
            raise TraceError(
                f"{name}{path} is a {type(leaf).__name__}: a CUDA graph would repeat its value for ever; make it a tensor"
            )
        if leaf.device.type != "cuda":
            raise TraceError(
                f"{name}{path} is on the {leaf.device}: what a CUDA graph reads lies on the GPU; move it there"
            )


def _write(old: Any, new: Any) -> None:
    """Copy a tree's tensors into those of another."""
    pairs = [(a, b) for a, b in zip(tree.leaves(old), tree.leaves(new), strict=True) if a is not b]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs], non_blocking=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
