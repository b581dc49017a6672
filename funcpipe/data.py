"""Packing of sequences of unequal length into rows."""

from funcpipe._src.data.packing import (
    Buckets,
    Document,
    Packed,
    local_rows,
    pack,
)

__all__ = [
    "Buckets",
    "Document",
    "Packed",
    "local_rows",
    "pack",
]
