"""Replica watch: when ranks compare what they hold (`replicas.py`) and what their steps compute.

All ranks call the methods of `Watch` alike.

In: the communicator of a rank, its params, states and batches. Out: nothing, or a MismatchError on
every rank that names leaves and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from funcpipe._src.analysis.outside_ops import Op
from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.checksum import text_sum
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.planning.planner import Planner
from funcpipe._src.runtime import replicas
from funcpipe._src.runtime.mismatch_text import majority, other_step
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import MismatchError

BATCH, STATE, STEP = 1, 2, 4  # what is due


@dataclass
class Watch:
    """What this rank compares with the others.

    Args:
        comm: its communicator.
        resolved: the transforms.
        every: how many steps lie between two comparisons; None: only the first ones are made.
        due: what the next step compares. Ranks exchange it, so that it is the same on all.
        steps: how many there were.
    """

    comm: Communicator
    resolved: ResolvedStep
    every: int | None
    due: int = 0
    steps: int = 0

    @property
    def _rows(self) -> int | None:
        """A number that ranks share which bring the same rows; None for a global batch."""
        if not self.resolved.local:
            return None
        return self.comm.mesh.index(self.comm.rank, self.resolved.row_axes)

    def given(self, params: Any, checksums: Sequence[int], batch: Any) -> None:
        """Compare what ranks make a plan of: params by their checksums, and a batch."""
        sums = replicas.of_params(checksums)
        sums |= replicas.of_batch(batch, self._rows)
        paths = {
            "params": tree.paths(params),
            "batch": tree.paths(batch),
        }
        self._compare(sums, paths)

    def made(self, state: Any, placement: StatePlacement) -> None:
        """Compare the first state."""
        sums = replicas.of_state(state, placement, self.comm.rank)
        paths = {"state": placement.analysis.state_paths}
        self._compare(sums, paths)
        self.due = BATCH
        self.steps = 0

    def before_step(self, state: Any, batch: Any, planner: Planner) -> None:
        """Compare what is due."""
        if self.due:
            self._compare_due(state, batch, planner)
        self.due = 0
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.due = BATCH | STATE | STEP

    def _compare_due(self, state: Any, batch: Any, planner: Planner) -> None:
        placement = planner.placement
        assert placement is not None
        sums: replicas.Sums = {}
        if self.due & STATE:
            sums |= replicas.of_state(state, placement, self.comm.rank)
        sums |= replicas.of_batch(batch, self._rows)
        paths = {
            "state": placement.analysis.state_paths,
            "batch": tree.paths(batch),
        }
        self._compare(sums, paths)
        if self.due & STEP:
            self.step(planner.outside(batch))

    def _compare(self, sums: replicas.Sums, paths: replicas.Paths) -> None:
        replicas.compare(self.comm, sums, paths, self.resolved.local)

    def step(self, ops: Sequence[Op]) -> None:
        """Compare what steps compute outside ``value_and_grad``."""
        text = repr([op for op, _ in ops])
        digests = self.comm.exchange_digest(text_sum(text))
        if len(set(digests)) == 1:
            return
        most, odd = majority(digests)
        first_odd = odd[0]
        shows = self.comm.rank in (most, first_odd)
        found = self.comm.exchange(ops if shows else None)
        text = other_step(found[most], found[first_odd], most, odd)
        raise MismatchError(text)
