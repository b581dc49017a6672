"""Simulate: every rank of a mesh in this process.

In: a step with its transforms, a mesh. Out: a runner, whose state is a list with the state of every
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.simulated import Ranks
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.buffer_donation import refuse_invalidated
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.inference_mode import refuse_inference_mode
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.planner import Planner
from funcpipe._src.planning.variants import StaleValues
from funcpipe._src.runtime import replicas
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.runner import Runner
from funcpipe.errors import MismatchError, StateError

Result = tuple[Any, Any]  # state and metrics


class Simulation(Runner):
    """Every rank of a mesh in this process; see `simulate`."""

    def __init__(self, step: Callable, mesh: Mesh) -> None:
        super().__init__(step, mesh)
        self._ranks = Ranks(mesh)
        self._backend = Backend()
        self._bound: dict[int, list[Rank]] = {}

    def init(
        self,
        init_state: Callable[[Any], Any],
        params: Any,
        batch: Any,
        *,
        key: torch.Tensor | int = 0,
    ) -> list[Any]:
        """Make the plan, and every rank's state: ``init_state`` of the leaves that the rank holds.

        Args:
            init_state: a pure function from params to the state.
            params: the full params; or a pure function ``params_fn(key)`` that makes them (with
                `fp.random`), of which a rank computes only the leaves that it holds.
            batch: a global batch like those to come, with its data.
            key: what ``params_fn`` gets; a seed or a key.
        """
        shapes, leaf, _ = self._read(params, key)
        batch = read_batch(batch)
        self._move_to_device_of(shapes)
        init_state = self._scaled(init_state)
        self._planner = Planner(self._resolved, init_state, shapes)
        self._bound.clear()
        self._plan_first(batch)
        placement = self._placement
        states, held = [], []
        for rank in range(self.mesh.size):
            with torch.no_grad():
                state = init_state(placement.params(leaf, rank))
            states.append(state)
            held.append(replicas.of_state(state, placement, rank))
        paths = {"state": placement.analysis.state_paths}
        replicas.check(held, paths, self._resolved.local)
        return states

    def _rehearse(self) -> bool:
        pipeline_ranks = range(self._resolved.ranks)
        return self._made.rehearse(pipeline_ranks)

    def _move_to_device_of(self, params: Any) -> None:
        """Let the ranks compute where params are."""
        for leaf in tree.leaves(params):
            if isinstance(leaf, torch.Tensor):
                if leaf.device != self.device:
                    self._ranks.close()
                    self._ranks = Ranks(self.mesh, leaf.device)
                return

    @property
    def device(self) -> torch.device:
        """Where the ranks compute: where the params were."""
        return self._ranks.communicators[0].device

    def __call__(self, state: list[Any], batch: Any) -> tuple[list[Any], Any]:
        """One step of every rank."""
        refuse_inference_mode("a step")
        self._check_state(state)
        batch = read_batch(batch)
        try:
            results = self._run(state, batch)
        except StaleValues:
            self._made.of(batch).forget()
            try:
                results = self._run(state, batch)
            except StaleValues as problem:
                raise StateError(problem.again) from None
        _, first = results[0]
        for rank, (_, metrics) in enumerate(results):
            check_same(first, metrics, rank)
        return [new_state for new_state, _ in results], first

    def _run(self, state: list[Any], batch: Any) -> list[Result]:
        """One step of every rank, under the plan for what is read from Python now."""
        ranks = self._ranks_of(self._made.plan(batch))
        self._watch(ranks)

        def step(comm: Communicator) -> Result:
            rank = ranks[comm.rank]
            return rank.step(state[comm.rank], batch)

        return self._ranks.run(step)

    def _ranks_of(self, plan: Plan) -> list[Rank]:
        """The ranks under a plan; those of plans that are no longer kept are dropped."""
        key = id(plan)
        if key not in self._bound:
            kept = set(map(id, self._made.plans))
            for old in self._bound.keys() - kept:
                del self._bound[old]
            communicators = self._ranks.communicators
            self._bound[key] = [Rank(plan, comm) for comm in communicators]
        return self._bound[key]

    def _collect(self, mine: dict[int, Any]) -> dict[int, Any]:
        return mine

    def _everywhere(
        self,
        fn: Callable[[Communicator, Backend], Any],
        together: bool,
    ) -> list[Any]:
        if not together:
            return [fn(self._ranks.communicators[0], self._backend)]
        return self._ranks.run(lambda comm: fn(comm, self._backend))

    def _about_to_load(self) -> None:
        """Its ranks load together."""

    def _check_state(self, state: Any, what: str = "use a state") -> None:
        if not isinstance(state, list) or len(state) != self.mesh.size:
            raise StateError(
                f"a simulated state is a list with one state for each of {self.mesh.size} ranks, "
                f"as run.init or run.place returned it; this is {describe(state)}. Use "
                "run.place(full) for a single-device state"
            )
        refuse_invalidated("state", state)

    def place(self, full: Any) -> list[Any]:
        """What every rank holds of a single-device state."""
        refuse_invalidated("state", full)
        return [self._placement.place(full, rank) for rank in range(self.mesh.size)]

    def unplace(self, state: list[Any]) -> Any:
        """The single-device state again."""
        self._check_state(state)
        leaves = [self._placement.state_leaves(own, "unplace") for own in state]
        return self._placement.unplace(lambda rank, number: leaves[rank][number])


def check_same(first: Any, other: Any, rank: int) -> None:
    """Check that the metrics of two ranks are equal, bit by bit.

    Raises:
        MismatchError: they are not.
    """
    leaves, structure = tree.flatten(first)
    other_leaves, other_structure = tree.flatten(other)
    if structure != other_structure:
        raise MismatchError(
            f"metrics are {structure} on rank 0 and {other_structure} on rank {rank}: every rank "
            "returns the same metrics"
        )
    for path, leaf, other_leaf in zip(tree.paths(first), leaves, other_leaves, strict=True):
        if not _is_same(leaf, other_leaf):
            raise MismatchError(
                f"metrics{path} is {leaf} on rank 0 and {other_leaf} on rank {rank}: a metric has "
                "to be the same on all"
            )


def _is_same(leaf: Any, other: Any) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return leaf == other
    if leaf.is_floating_point():
        return torch.allclose(leaf, other, rtol=0, atol=0, equal_nan=True)
    return torch.equal(leaf, other)


def simulate(step: Callable, mesh: Mesh) -> Simulation:
    """Run a transformed step on every rank of a mesh in this process.

    Programs and interface are those of `spmd`.

    Args:
        step: a step with transforms on it.
        mesh: with every axis that they name.

    Returns:
        a runner. Its state is a list with the state of every rank; every step checks that metrics
        are the same on all ranks.

    Raises:
        MeshError, StackError: the transforms do not fit the mesh or each other.
    """
    return Simulation(step, mesh)
