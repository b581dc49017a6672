"""Simulate: every rank of a mesh in this process.

In: a step with its transforms, a mesh. Out: a runner; its state is a list with every rank's own.
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
from funcpipe._src.planning.planner import Planner
from funcpipe._src.planning.variants import StaleValues
from funcpipe._src.runtime import replicas
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.runner import Runner
from funcpipe.errors import MismatchError, StateError


class Simulation(Runner):
    """Every rank of a mesh in this process; see `simulate`."""

    def __init__(self, step: Callable, mesh: Mesh) -> None:
        super().__init__(step, mesh)
        self._ranks, self._backend = Ranks(mesh), Backend()
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
        device = next(
            (x.device for x in tree.leaves(shapes) if isinstance(x, torch.Tensor)), self.device
        )
        if device != self.device:
            self._ranks.close()
            self._ranks = Ranks(self.mesh, device)
        init_state = self._scaled(init_state)
        self._planner = Planner(self._resolved, init_state, shapes)
        self._bound.clear()
        self._plan_first(batch)
        with torch.no_grad():
            states = [init_state(self._placement.params(leaf, r)) for r in range(self.mesh.size)]
        held = [replicas.of_state(state, self._placement, r) for r, state in enumerate(states)]
        replicas.check(held, {"state": self._placement.analysis.state_paths}, self._resolved.local)
        return states

    def _rehearse(self) -> bool:
        return self._made.rehearse(range(self._resolved.ranks))

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
            out = self._run(state, batch)
        except StaleValues:
            self._made.of(batch).forget()
            try:
                out = self._run(state, batch)
            except StaleValues as problem:
                raise StateError(problem.again) from None
        for r, (_, metrics) in enumerate(out):
            check_same(out[0][1], metrics, r)
        return [s for s, _ in out], out[0][1]

    def _run(self, state: list[Any], batch: Any) -> list[tuple[Any, Any]]:
        """One step of every rank, under the plan for what is read from Python now."""
        plan = self._made.plan(batch)
        ranks = self._bound.get(id(plan))
        if ranks is None:
            kept = set(map(id, self._made.plans))
            self._bound = {key: some for key, some in self._bound.items() if key in kept}
            ranks = self._bound[id(plan)] = [Rank(plan, comm) for comm in self._ranks.communicators]
        self._watch(ranks)
        return self._ranks.run(lambda comm: ranks[comm.rank].step(state[comm.rank], batch))

    def _collect(self, mine: dict[int, Any]) -> dict[int, Any]:
        return mine

    def _everywhere(self, fn: Callable[[Communicator, Backend], Any], together: bool) -> list[Any]:
        if together:
            return self._ranks.run(lambda comm: fn(comm, self._backend))
        return [fn(self._ranks.communicators[0], self._backend)]

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
        return [self._placement.place(full, r) for r in range(self.mesh.size)]

    def unplace(self, state: list[Any]) -> Any:
        """The single-device state again."""
        self._check_state(state)
        leaves = [self._placement.state_leaves(s, "unplace") for s in state]
        return self._placement.unplace(lambda rank, j: leaves[rank][j])


def check_same(first: Any, other: Any, rank: int) -> None:
    """MismatchError unless two ranks' metrics are equal, bit by bit."""
    names, structures = tree.paths(first), [tree.flatten(x)[1] for x in (first, other)]
    if structures[0] != structures[1]:
        raise MismatchError(
            f"metrics are {structures[0]} on rank 0 and {structures[1]} on rank {rank}: every rank "
            "returns the same metrics"
        )
    for path, a, b in zip(names, tree.leaves(first), tree.leaves(other), strict=True):
        if isinstance(a, torch.Tensor):
            same = (
                torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
                if a.is_floating_point()
                else torch.equal(a, b)
            )
        else:
            same = a == b
        if not same:
            raise MismatchError(
                f"metrics{path} is {a} on rank 0 and {b} on rank {rank}: a metric has to be the "
                "same on all"
            )


def simulate(step: Callable, mesh: Mesh) -> Simulation:
    """Run a transformed step on every rank of a mesh in this process: the same programs, the same
    interface as `spmd`.

    Args:
        step: a step with transforms on it.
        mesh: with every axis that they name.

    Returns:
        a runner. Its state is a list with every rank's own; every step checks that metrics are the
        same everywhere.

    Raises:
        MeshError, StackError: the transforms do not fit the mesh or each other.
    """
    return Simulation(step, mesh)
