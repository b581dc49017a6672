"""Local batch: one microbatch as a rank sees it, in fakes.

In: a `BatchSplit`, the number of a ready microbatch, a sequence rank. Out: `LocalBatch`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from funcpipe._src.core import pytree
from funcpipe._src.core.loss_types import Microbatches
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.planning.batch_split import BatchSplit, signature
from funcpipe._src.planning.compile_inputs import CallInputs


@dataclass(frozen=True, eq=False)
class LocalBatch:
    """One microbatch of a rank.

    Args:
        leaves: fakes of the local shapes; leaves that are no tensors as they are.
        spec: the structure.
        sequences: for every leaf the dim along which its positions are split, and how; None where
            they are not.
        sequence_rank: the first of the sequence ranks that have these shapes.
        is_part: whether it is a part of the step's batch.
    """

    leaves: list[Any]
    spec: Any
    sequences: tuple[tuple[int, SequenceLayout] | None, ...]
    sequence_rank: int
    is_part: bool

    @property
    def key(self) -> Hashable:
        """All that a graph of it depends on."""
        shapes = signature(pytree.unflatten(self.spec, self.leaves))
        return shapes, self.sequences, self.sequence_rank, self.is_part

    @property
    def splits_positions(self) -> bool:
        """Whether some leaf holds a part of its positions only."""
        layouts = [found[1] for found in self.sequences if found is not None]
        return any(layout.members > 1 for layout in layouts)


def local_batch(
    inputs: CallInputs, split: BatchSplit, ready: int, sequence_rank: int
) -> LocalBatch:
    """A rank's share of a ready microbatch (of the batch, if it brings none)."""
    microbatch = ready_microbatches(inputs.call.batch)[ready]
    whole, spec = pytree.flatten(microbatch)
    leaves, sequences = [], []
    for number, leaf in enumerate(whole):
        sequences.append(split.sequence(ready, number))
        if isinstance(leaf, torch.Tensor):
            shape = split.shape(ready, number, tuple(leaf.shape), sequence_rank)
            leaf = inputs.step.fake_like(leaf, shape)
        leaves.append(leaf)
    is_split = bool(inputs.resolved.splits)
    return LocalBatch(
        leaves=leaves,
        spec=spec,
        sequences=tuple(sequences),
        sequence_rank=sequence_rank,
        is_part=is_split or split.microbatches > 1,
    )


def ready_microbatches(batch: Any) -> list[Any]:
    """The microbatches that a batch brings; the batch alone where it brings none."""
    if isinstance(batch, Microbatches):
        return list(batch.parts)
    return [batch]


def tensor_leaves(batch: Any) -> tuple[int, ...]:
    """The numbers of the leaves that are tensors."""
    found = []
    for number, leaf in enumerate(pytree.leaves(batch)):
        if isinstance(leaf, torch.Tensor):
            found.append(number)
    return tuple(found)
