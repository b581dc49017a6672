"""Packing of sequences of unequal length into rows."""

from funcpipe._src.data.buckets import Buckets
from funcpipe._src.data.documents import Document
from funcpipe._src.data.packing import Packed, local_rows, pack

__all__ = [
    "Buckets",
    "Document",
    "Packed",
    "local_rows",
    "pack",
]
