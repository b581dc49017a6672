"""Transforms: one file each, each a function ``transform(step=None, *, axis=..., **options) ->
step``."""

from .accumulated import accumulated
from .data_parallel import data_parallel
from .mixed_precision import mixed_precision
from .pipelined import pipelined
from .remat import remat
from .seq_all_to_all import seq_all_to_all
from .seq_ring import seq_ring
from .sharded_weights import sharded_weights

__all__ = [
    "accumulated",
    "data_parallel",
    "mixed_precision",
    "pipelined",
    "remat",
    "seq_all_to_all",
    "seq_ring",
    "sharded_weights",
]
