"""Captured steps: the CUDA graphs of a rank, one per program and per Python values that it read.

A graph repeats the numbers that it was captured with. So there is one for each set of values that
all ranks read from Python, and the oldest are released. All graphs of a rank share one pool of
memory. See `cuda_graph.py` for how a step is captured.

In: ranks under their plans. Out: `CapturedStep`, captured on all ranks or on none.
"""

from __future__ import annotations

from typing import Any

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.runtime.agreement import AgreedError
from funcpipe._src.runtime.cuda_graph import CapturedStep, new_pool, pool_bytes
from funcpipe._src.runtime.mismatch_text import too_large
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.state_buffers import Given, StateBuffers
from funcpipe.errors import DeviceMemoryError, FuncpipeError, MismatchError, TraceError

MOST_GRAPHS = 4  # of one plan, for other Python values

Version = tuple[int, ...]  # the numbers of what all ranks read from Python
Key = tuple[int, Version]  # the id of a `Rank`, and a version


class CapturedSteps:
    """The captured steps of this rank.

    Args:
        comm: the rank's communicator.
        pool: the memory that its graphs share.
    """

    def __init__(self, comm: Communicator, pool: Any) -> None:
        self.comm = comm
        self.pool = pool
        self.steps: dict[Key, CapturedStep] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that graphs hold for values of their own."""
        return pool_bytes(self.pool) if self.steps else 0

    def step_of(self, rank: Rank, version: Version, buffers: StateBuffers) -> CapturedStep:
        """The step for what all ranks read from Python now."""
        key = id(rank), version
        if key not in self.steps:
            others = self._keys_of(rank)
            too_many = max(len(others) + 1 - MOST_GRAPHS, 0)
            for old in others[:too_many]:
                self.drop(old)
            self.steps[key] = CapturedStep(rank, buffers, self.pool)
        return self.steps[key]

    def _keys_of(self, rank: Rank) -> list[Key]:
        return [key for key in self.steps if key[0] == id(rank)]

    def drop(self, key: Key) -> None:
        """Release a step."""
        self.steps.pop(key).release()

    def drop_rank(self, rank: Rank) -> None:
        """Release the steps of a rank whose plan is no longer kept."""
        for key in self._keys_of(rank):
            self.drop(key)

    def release(self) -> None:
        """Release all steps."""
        while self.steps:
            _, step = self.steps.popitem()
            step.release()

    def wait(self) -> None:
        """Wait for graphs, before operations of NCCL outside of them: see `cuda_graph.py`."""
        if self.steps:
            torch.cuda.synchronize()

    def capture(self, step: CapturedStep, given: Given) -> None:
        """Every rank captures its step, or none does: then all are where they were, and may go
        on.

        Raises:
            AgreedError, on every rank: one of them failed.
        """
        problem = _capture(step, given)
        texts = self.comm.exchange(None if problem is None else str(problem))
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return
        step.release()
        self._renew_pool()
        first = failed[0]
        raise AgreedError(
            problem or MismatchError(f"rank {first} failed to capture its step: {texts[first]}")
        )

    def _renew_pool(self) -> None:
        """Take another pool if no graph has this one: torch does not take such a one up again."""
        if any(step.graph for step in self.steps.values()):
            return
        self.pool = new_pool()
        for step in self.steps.values():
            step.pool = self.pool


def _capture(step: CapturedStep, given: Given) -> FuncpipeError | None:
    """Capture a step; why it failed."""
    try:
        step.capture()
    except torch.OutOfMemoryError as error:
        return DeviceMemoryError(too_large(step.rank, given.state, error))
    except TraceError as error:
        return error
    return None
