"""Transforms: one file each, each a function ``transform(step=None, *, axis=..., **options) -> step``."""

from funcpipe.transforms.accumulated import accumulated
from funcpipe.transforms.data_parallel import data_parallel
from funcpipe.transforms.pipelined import pipelined
from funcpipe.transforms.sharded_weights import sharded_weights

__all__ = ["accumulated", "data_parallel", "pipelined", "sharded_weights"]
