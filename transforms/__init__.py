"""Transforms: one file each, each a function ``transform(step=None, *, axis=..., **options) -> step``."""

from funcpipe.transforms.accumulated import accumulated
from funcpipe.transforms.data_parallel import data_parallel
from funcpipe.transforms.mixed_precision import mixed_precision
from funcpipe.transforms.pipelined import pipelined
from funcpipe.transforms.remat import remat
from funcpipe.transforms.seq_all_to_all import seq_all_to_all
from funcpipe.transforms.seq_ring import seq_ring
from funcpipe.transforms.sharded_weights import sharded_weights

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
