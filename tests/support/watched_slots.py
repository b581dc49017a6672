"""What the slots of ranks hold while a step runs: for tests of predicted memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import optree
import pytest
import torch

from funcpipe._src.comm import Done
from funcpipe._src.runtime import bound_call


def held(tree: Any) -> int:
    """Bytes of all memory that a tree keeps alive."""
    return sum(
        {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in optree.tree_leaves(tree)
        }.values()
    )


class Watched(list):
    """Slots that measure, whenever one is written, what values and sums they hold."""

    def __init__(self, slots: list[Any], program: Any, peaks: dict[str, int]) -> None:
        super().__init__(slots)
        brought = {program.slot_of[value] for value in program.inputs}
        results = (*program.outputs, *program.partial_grads)
        taken = {program.slot_of[value] for value in results}
        self.values = {i for i in range(len(slots)) if i not in brought and i not in taken}
        self.taken, self.peaks = taken, peaks

    def __setitem__(self, i: Any, x: Any) -> None:
        if x is not None:
            for name, places in (("values", self.values), ("sums", self.taken)):
                if i in places:  # what is there before is let go after
                    alive = [
                        y.result if isinstance(y, Done) else y
                        for y in (*(self[k] for k in places), x)
                    ]
                    self.peaks[name] = max(
                        self.peaks[name], held([y for y in alive if torch.is_tensor(y)])
                    )
        super().__setitem__(i, x)


@contextlib.contextmanager
def slots_seen() -> Iterator[dict[int, dict[str, int]]]:
    """By rank the peaks of what slots hold."""
    peaks: dict[int, dict[str, int]] = defaultdict(lambda: {"values": 0, "sums": 0})
    slots = bound_call.BoundCall._slots

    def watched(self: Any, *args: Any) -> Watched:
        return Watched(slots(self, *args), self.program, peaks[self.rank.comm.rank])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_call.BoundCall, "_slots", watched)
        yield peaks
