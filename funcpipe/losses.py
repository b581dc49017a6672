"""Losses that may run on a part of the sequence or of the vocabulary."""

from funcpipe._src.functional.losses import (
    Options,
    compute,
    cross_entropy,
)

__all__ = [
    "Options",
    "compute",
    "cross_entropy",
]
