"""Which leaves of the state and which metrics a rank has, as far as that follows from one run of
the step.

A leaf that belongs to a parameter is where the parameter is. Any other leaf is on every rank,
unless ``init_state`` or the step makes it by going over the params, which skips those that a rank
does not hold. Such a leaf is told by its place: ``optree.tree_map`` keeps the last step of a path,
such as ``['w']``. Whether the guess holds is seen when the step is rehearsed (`rehearsal.py`).

In: the paths of params, state and metrics. Out: whether a guess is to be made, and the guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree

from funcpipe._src.analysis.state import StepAnalysis
from funcpipe._src.core import pytree as tree


def is_predictable(
    analysis: StepAnalysis,
    params: Any,
    state: Any,
    metrics: Any,
) -> bool:
    """Whether no leaf beside those of params looks as if it were made by going over them.

    Args:
        params, state, metrics: the full trees, of any leaves.
    """
    others = _last_entries(metrics)
    for entry, param in zip(_last_entries(state), analysis.state, strict=True):
        if param is None:
            others.append(entry)
    return set(_last_entries(params)).isdisjoint(others)


def predicted_state(
    analysis: StepAnalysis,
    leaves: Sequence[Any],
    held: Callable[[int], bool],
) -> Any:
    """The state of a rank that holds some params, of the leaves of the full state."""
    present = []
    for leaf, param in zip(leaves, analysis.state, strict=True):
        here = param is None or held(param)
        present.append(leaf if here else None)
    return tree.unflatten(analysis.state_spec, present)


def _last_entries(values: Any) -> list[Any]:
    """The last step of the path of every leaf, with its kind of container; None where the tree is
    a leaf."""
    paths = optree.tree_accessors(values, namespace=tree.NAMESPACE)
    return [path[-1] if len(path) else None for path in paths]
