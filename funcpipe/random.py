"""Randomness as data: keys and dropout."""

from funcpipe._src.functional.random import (
    constant,
    dropout,
    dropped,
    fold_in,
    init,
    key,
    keys,
    normal,
    scaled_normal,
    uniform,
)

__all__ = [
    "constant",
    "dropout",
    "dropped",
    "fold_in",
    "init",
    "key",
    "keys",
    "normal",
    "scaled_normal",
    "uniform",
]
