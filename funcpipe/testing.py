"""Tools for tests: equality with one device, random models and meshes."""

from funcpipe._src.testing import (
    Layer,
    Model,
    RandomTable,
    Report,
    assert_equivalent,
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
