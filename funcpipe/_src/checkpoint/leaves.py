"""What a rank holds of every leaf of the state, and whether that fits the run and the checkpoint.

Terms. A *part* is what a rank holds of a leaf: the elements from ``start`` to ``end`` of its
row-major order. A leaf that is not sharded is one whole part on each of its ranks; a leaf that is
not a tensor is one too.

In: a runner that has made its plan. Out: parts, leaves of a state checked against them, or errors
that name a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.checkpoint.files import Leaf, leaf_of
from funcpipe._src.core import pytree as tree
from funcpipe._src.planning.placement import extent, shard_shape
from funcpipe._src.runtime.simulate import Simulation
from funcpipe._src.runtime.spmd import Spmd
from funcpipe.errors import CheckpointError


@dataclass(frozen=True)
class Part:
    """What a rank holds of a leaf.

    Args:
        name: the path of the leaf, such as ``state['params']['w']``.
        leaf: what the leaf is.
        start, end: which elements these are.
        shape: theirs; None for a leaf that is not a tensor.
        device: where they are to lie; None: on the CPU.
    """

    name: str
    leaf: Leaf
    start: int = 0
    end: int = 0
    shape: tuple[int, ...] | None = None
    device: torch.device | None = None

    @property
    def numel(self) -> int:
        """Of the whole leaf."""
        return torch.Size(self.leaf.shape or ()).numel()


def whole(name: str, leaf: Leaf) -> Part:
    """All of a leaf, on the CPU."""
    return (
        Part(name, leaf)
        if leaf.shape is None
        else Part(name, leaf, 0, torch.Size(leaf.shape).numel(), leaf.shape)
    )


class Leaves:
    """The leaves of a run's state, as its ``init_state`` makes them.

    They are found by running ``init_state`` on fakes, so no memory is needed for a state to load
    into.
    """

    def __init__(self, run: Simulation | Spmd) -> None:
        planner, self.placement = run._made, run._placement
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            like = lambda x: torch.empty(x.shape, dtype=x.dtype, device=run.device)  # noqa: E731
            inputs = planner.inputs
            state = inputs.init_state(tree.map_tensors(like, inputs.params))
        self.found = tree.leaves(state)
        self.names = [f"state{path}" for path in self.placement.analysis.state_paths]
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else () for x in self.found]
        self.leaves = [leaf_of(x, shape) for x, shape in zip(self.found, shapes, strict=True)]

    def parts(self, rank: int) -> Iterator[Part | None]:
        """What a rank holds of every leaf; None where it holds nothing."""
        for j, here in enumerate(self.placement.present[self.placement.pipeline_rank(rank)]):
            yield self._part(j, rank) if here else None

    def _part(self, j: int, rank: int) -> Part:
        name, leaf, mesh = self.names[j], self.leaves[j], self.placement.mesh
        if leaf.shape is None:
            return Part(name, leaf)
        param = self.placement.analysis.state[j]
        axes = () if param is None else self.placement.layouts[param].axes
        start, end = extent(
            torch.Size(leaf.shape).numel(), mesh.axis_size(axes), mesh.index(rank, axes)
        )
        shape = shard_shape(leaf.shape, end - start) if axes else leaf.shape
        return Part(name, leaf, start, end, shape, self.found[j].device)

    def held(self, state: Any, rank: int) -> list[tuple[Part, Any]]:
        """The leaves of a rank's state with the parts that they are.

        Raises:
            StateError: the state has another structure.
            CheckpointError: a leaf is not what ``init_state`` makes it, so that no run could load
            it.
        """
        values = self.placement.state_leaves(state, "fp.checkpoint.save")
        held = [
            (part, x) for part, x in zip(self.parts(rank), values, strict=True) if part is not None
        ]
        for part, x in held:
            got = (
                "None"
                if x is None
                else str(leaf_of(x, tuple(x.shape) if isinstance(x, torch.Tensor) else ()))
            )
            want = str(part.leaf._replace(shape=part.shape))
            if got != want:
                raise CheckpointError(
                    f"{part.name} on rank {rank} is {got}, but init_state makes it {want}: it "
                    "could not be loaded again. Let the step keep shapes and dtypes, and save "
                    "what it returned"
                )
        return held

    def state(self, leaves: list[Any]) -> Any:
        """A rank's state of its leaves, None where it holds nothing."""
        return tree.unflatten(self.placement.analysis.state_spec, leaves)

    def check(self, where: str, saved: Mapping[str, Leaf]) -> None:
        """CheckpointError unless a checkpoint has these leaves, no others, and with these shapes
        and dtypes."""
        here = dict(zip(self.names, self.leaves, strict=True))
        for name, leaf in here.items():
            if name not in saved:
                raise CheckpointError(
                    f"{where} has no leaf {name}, which the state of this run has ({leaf}). "
                    f"{_INSTEAD}"
                )
            if str(saved[name]) != str(leaf):
                raise CheckpointError(
                    f"{where}: {name} was saved as {saved[name]}, but this run has {leaf}. "
                    f"{_INSTEAD}"
                )
        for name, leaf in saved.items():
            if name not in here:
                raise CheckpointError(
                    f"{where} has a leaf {name} ({leaf}), which the state of this run lacks. "
                    f"{_INSTEAD}"
                )


_INSTEAD = (
    "Load it with the model, optimizer and dtypes that it was saved with; for anything else, "
    "fp.checkpoint.export it and hand run.place the state that you make of it"
)
