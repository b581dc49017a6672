"""Checkpoints: save a state, load it on any mesh."""

from funcpipe._src.checkpoint import (
    Info,
    Saving,
    export,
    load,
    save,
    save_async,
    steps,
)

__all__ = [
    "Info",
    "Saving",
    "export",
    "load",
    "save",
    "save_async",
    "steps",
]
