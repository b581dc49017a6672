"""Runner: what the two runners have in common.

`simulate.py` runs every rank of a mesh in this process, `spmd.py` the rank that this process is.
Both make the same plan and run the same programs; only the communicator differs.

In: a step with its transforms, a mesh. Out: an object with ``init``, ``place``, ``unplace``,
``plan``, which is called with ``(state, batch)``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.buffer_donation import refuse_invalidated
from funcpipe._src.core.checksum import checksums
from funcpipe._src.core.containers import check_containers
from funcpipe._src.core.inference_mode import refuse_inference_mode
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.core.mixed_precision import scaled_init
from funcpipe._src.functional import random
from funcpipe._src.planning.lazy_init import LazyParams
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.planner import Planner
from funcpipe._src.runtime.profile_units import profile_units
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.record import Recording
from funcpipe._src.spec.resolve import resolve
from funcpipe.errors import StateError


class GivenParams(NamedTuple):
    """The params that ``run.init`` was given.

    Args:
        shapes: the full tree, for its shapes.
        leaf: fetches or computes a leaf by its number.
        checksums: computes a number for every leaf.
    """

    shapes: Any
    leaf: Callable[[int], torch.Tensor]
    checksums: Callable[[], list[int]]


class Runner(abc.ABC):
    """What `simulate` and `spmd` have in common."""

    _backend: Backend  # what runs units

    def __init__(self, step: Callable, mesh: Mesh) -> None:
        self.mesh = mesh
        self._resolved = resolve(step, mesh)
        self._planner: Planner | None = None
        self._recording: Recording | None = None

    def plan(self, state: Any, batch: Any) -> Plan:
        """What will run for batches like this one: see `Plan`."""
        return self._made.plan(read_batch(batch))

    def record(self) -> Recording:
        """Record the step that runs inside ``with run.record() as recording:``; see `Recording`."""
        return Recording(self)

    def _watch(self, ranks: list[Rank]) -> None:
        """Let an open recording observe ranks."""
        recording = self._recording
        for rank in ranks:
            rank.observer = None if recording is None else recording.observer(rank)

    @abc.abstractmethod
    def _collect(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What every rank has, by rank."""

    @abc.abstractmethod
    def _everywhere(
        self,
        fn: Callable[[Communicator, Backend], Any],
        together: bool,
    ) -> list[Any]:
        """``fn`` on ranks: on all of them if it needs to be ``together``."""

    def _plan_first(self, batch: Any) -> None:
        """The first plan; if the schedule is to be chosen for measured costs, those are measured
        now."""
        plan = self._made.plan(batch)
        pipe = self._resolved.pipeline
        if pipe is not None and pipe.profile and len(plan.calls) == 1:
            self._made.retime(profile_units(self, None, batch))
            self._made.plan(batch)
        if not self._rehearse():
            self._made.rehearse_everywhere()
            self._made.plan(batch)

    @abc.abstractmethod
    def _rehearse(self) -> bool:
        """Whether the step does what was planned as each rank that runs here; the same on all."""

    def _read(self, params: Any, key: torch.Tensor | int) -> GivenParams:
        """Read the params, or the function that makes them, that ``run.init`` was given."""
        refuse_inference_mode("run.init")
        if isinstance(params, torch.nn.Module):
            check_containers("params", params)  # it is callable, but makes no params
        if not callable(params):
            refuse_invalidated("params", params)
            leaves = tree.leaves(params)
            return GivenParams(params, leaves.__getitem__, lambda: checksums(leaves))
        if isinstance(key, int):
            key = random.key(key)
        lazy = LazyParams(params, key)

        def leaf(number: int) -> torch.Tensor:
            return lazy.leaf(number).to(self.device)

        return GivenParams(lazy.fakes, leaf, lazy.digests)

    @abc.abstractmethod
    def _about_to_load(self) -> None:
        """Called alike by all ranks before they make a state of a checkpoint."""

    def _scaled(self, init_state: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """An ``init_state`` whose state has room for what `mixed_precision` keeps there."""
        precision = self._resolved.precision
        if precision is None or not precision.dynamic:
            return init_state
        return scaled_init(init_state, self.device)

    @abc.abstractmethod
    def _check_state(self, state: Any, what: str = "use a state") -> None:
        """Check that a state is this runner's, and was not donated.

        Args:
            what: what is to be done with it.

        Raises:
            StateError: it is not, or it was.
        """

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where ranks compute."""

    @property
    def _made(self) -> Planner:
        """The planner that ``init`` made."""
        if self._planner is None:
            raise StateError("call run.init(init_state, params, batch) first: it makes the plan")
        return self._planner

    @property
    def _placement(self) -> StatePlacement:
        placement = self._made.placement
        assert placement is not None
        return placement
