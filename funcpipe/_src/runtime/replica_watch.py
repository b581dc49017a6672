"""Watch: when ranks compare what they hold (`replicas.py`) and what their steps compute
(`analysis/outside_ops.py`).

In: the communicator of a rank, its params, states and batches. Out: nothing, or a MismatchError on
every rank that names leaves and ranks. All ranks call the methods alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Watch:
    """What this rank compares with the others.

    Args:
        comm: its communicator.
        resolved: the transforms.
        every: how many steps lie between two comparisons; None: only the first ones are made.

    Attributes:
        due: what the next step compares. Ranks tell each other, so that it is the same on all.
    """

    def __init__(self, comm: Communicator, resolved: ResolvedStep, every: int | None) -> None:
        self.due = 0
        self._comm, self._every, self._steps = comm, every, 0
        self._local = resolved.local
        # The number of the rows that this rank brings, the same on ranks that bring the same.
        self._rows = comm.mesh.index(comm.rank, resolved.row_axes) if self._local else None

    def given(self, params: Any, checksums: Sequence[int], batch: Any) -> None:
        """Compare what ranks make a plan of: params by their checksums, and a batch."""
        sums = replicas.of_params(checksums) | replicas.of_batch(batch, self._rows)
        self._compare(sums, {"params": tree.paths(params), "batch": tree.paths(batch)})

    def made(self, state: Any, placement: StatePlacement) -> None:
        """Compare the first state."""
        sums = replicas.of_state(state, placement, self._comm.rank)
        self._compare(sums, {"state": placement.analysis.state_paths})
        self.due, self._steps = BATCH, 0

    def before_step(self, state: Any, batch: Any, planner: Planner) -> None:
        """Compare what is due."""
        if self.due:
            self._compare_due(state, batch, planner)
        self.due, self._steps = 0, self._steps + 1
        if self._every and self._steps % self._every == 0:
            self.due = BATCH | STATE | STEP

    def _compare_due(self, state: Any, batch: Any, planner: Planner) -> None:
        placement = planner.placement
        assert placement is not None
        sums = replicas.of_batch(batch, self._rows)
        if self.due & STATE:
            sums = replicas.of_state(state, placement, self._comm.rank) | sums
        self._compare(sums, {"state": placement.analysis.state_paths, "batch": tree.paths(batch)})
        if self.due & STEP:
            self.step(planner.outside(batch))

    def _compare(self, sums: replicas.Sums, paths: Mapping[str, Sequence[str]]) -> None:
        replicas.compare(self._comm, sums, paths, self._local)

    def step(self, ops: Sequence[Op]) -> None:
        """Compare what steps compute outside ``value_and_grad``."""
        said = self._comm.exchange_digest(text_sum(repr([op for op, _ in ops])))
        if len(set(said)) > 1:
            most, odd = majority(said)
            found = self._comm.exchange(ops if self._comm.rank in (most, odd[0]) else None)
            raise MismatchError(other_step(found[most], found[odd[0]], most, odd))
