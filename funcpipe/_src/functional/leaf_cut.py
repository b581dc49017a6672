"""Leaf cuts: how one leaf of a batch is cut along one dim.

In: a dim, mesh axes. Out: data that the planner makes, and that proofs read.
"""

from __future__ import annotations

from dataclasses import dataclass

from funcpipe._src.core.mesh import Axes
from funcpipe._src.functional.sequence_layout import SequenceLayout


@dataclass(frozen=True)
class LeafCut:
    """One split of one leaf: into how many pieces along which dim; over mesh axes, or (no axes)
    into microbatches. With a ``part``, of its positions."""

    dim: int
    pieces: int
    axes: Axes
    part: SequenceLayout | None = None
