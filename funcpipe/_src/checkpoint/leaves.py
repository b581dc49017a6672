"""What a rank holds of every leaf of the state, and whether it fits the run and the checkpoint.

A rank holds the elements from ``start`` to ``end`` of a leaf's row-major order: its shard. Of a
leaf that is not sharded, or that is not a tensor, each of its ranks holds all.

In: a runner that has made its plan.
Out: shards, leaves of a state checked against them, or errors that name a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.checkpoint.files import Leaf, leaf_of
from funcpipe._src.core import pytree
from funcpipe._src.program.shard_shapes import extent, shard_shape
from funcpipe._src.runtime.simulate import Simulation
from funcpipe._src.runtime.spmd_runner import Spmd
from funcpipe.errors import CheckpointError

_INSTEAD = (
    "Load it with the model, optimizer and dtypes that it was saved with; for anything else, "
    "fp.checkpoint.export it and hand run.place the state that you make of it"
)


@dataclass(frozen=True)
class LeafShard:
    """What a rank holds of a leaf.

    Args:
        name: the path of the leaf, such as ``state['params']['w']``.
        leaf: shape and dtype of the unsharded leaf.
        start, end: which elements these are.
        shape: of the shard; None for a leaf that is not a tensor.
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
        """Elements of the unsharded leaf."""
        return torch.Size(self.leaf.shape or ()).numel()


def unsharded(name: str, leaf: Leaf) -> LeafShard:
    """All of a leaf, on the CPU."""
    if leaf.shape is None:
        return LeafShard(name, leaf)
    return LeafShard(name, leaf, 0, torch.Size(leaf.shape).numel(), leaf.shape)


class Leaves:
    """The leaves of a run's state, as its ``init_state`` makes them.

    They are found by running ``init_state`` on fakes, so no memory is needed for a state to load
    into.
    """

    def __init__(self, run: Simulation | Spmd) -> None:
        planner, self.placement = run._made, run._placement

        def fake_like(param: Tensor) -> Tensor:
            return torch.empty(param.shape, dtype=param.dtype, device=run.device)

        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs = planner.inputs
            state = inputs.init_state(pytree.map_tensors(fake_like, inputs.params))
        self.fakes = pytree.leaves(state)
        self.names = [f"state{path}" for path in self.placement.analysis.state_paths]
        self.leaves = [_leaf_like(fake) for fake in self.fakes]

    def shards(self, rank: int) -> Iterator[LeafShard | None]:
        """What a rank holds of every leaf; None where it holds nothing."""
        pipeline_rank = self.placement.pipeline_rank(rank)
        for index, is_present in enumerate(self.placement.present[pipeline_rank]):
            yield self._shard(index, rank) if is_present else None

    def _shard(self, index: int, rank: int) -> LeafShard:
        name, leaf, mesh = self.names[index], self.leaves[index], self.placement.mesh
        if leaf.shape is None:
            return LeafShard(name, leaf)
        param = self.placement.analysis.state[index]
        axes = () if param is None else self.placement.layouts[param].axes
        start, end = extent(
            torch.Size(leaf.shape).numel(),
            mesh.axis_size(axes),
            mesh.index(rank, axes),
        )
        shape = shard_shape(leaf.shape, end - start) if axes else leaf.shape
        return LeafShard(name, leaf, start, end, shape, self.fakes[index].device)

    def held(self, state: Any, rank: int) -> list[tuple[LeafShard, Any]]:
        """The leaves of a rank's state, each with the shard that it is.

        Raises:
            StateError: the state has another structure.
            CheckpointError: a leaf is not what ``init_state`` makes it, so that no run could load
                it.
        """
        values = self.placement.state_leaves(state, "fp.checkpoint.save")
        held = []
        for shard, value in zip(self.shards(rank), values, strict=True):
            if shard is None:
                continue
            found = "None" if value is None else str(_leaf_like(value))
            wanted = str(shard.leaf._replace(shape=shard.shape))
            if found != wanted:
                raise CheckpointError(
                    f"{shard.name} on rank {rank} is {found}, but init_state makes it {wanted}: it "
                    "could not be loaded again. Let the step keep shapes and dtypes, and save "
                    "what it returned"
                )
            held.append((shard, value))
        return held

    def state(self, leaves: list[Any]) -> Any:
        """A rank's state of its leaves, None where it holds nothing."""
        return pytree.unflatten(self.placement.analysis.state_spec, leaves)

    def check(self, where: str, saved: Mapping[str, Leaf]) -> None:
        """CheckpointError unless a checkpoint has these leaves, with these shapes and dtypes."""
        wanted = dict(zip(self.names, self.leaves, strict=True))
        for name, leaf in wanted.items():
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
            if name not in wanted:
                raise CheckpointError(
                    f"{where} has a leaf {name} ({leaf}), which the state of this run lacks. "
                    f"{_INSTEAD}"
                )


def _leaf_like(value: Any) -> Leaf:
    """A leaf with the shape of this value."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return leaf_of(value, shape)
