"""Tools to test transforms, schedules and steps of your own: public as ``fp.testing``.

`assert_equivalent` compares a transformed step with the same step on one device. The strategies
draw random models, meshes, microbatch counts and schedules for it; they need Hypothesis (``pip
install 'funcpipe[test]'``), which is imported when one of them is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from funcpipe._src.testing.equivalence import Report, assert_equivalent
from funcpipe._src.testing.model import Layer, Model

if TYPE_CHECKING:
    from funcpipe._src.testing.strategies import (
        RandomTable,
        meshes,
        microbatch_counts,
        models,
        schedules,
    )

__all__ = [
    "Layer",
    "Model",
    "RandomTable",
    "Report",
    "assert_equivalent",
    "meshes",
    "microbatch_counts",
    "models",
    "schedules",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from funcpipe._src.testing import strategies

    return getattr(strategies, name)
