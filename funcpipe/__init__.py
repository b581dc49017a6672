"""funcpipe: JAX-style parallel training for PyTorch.

Write a training step once, as a pure function ``(state, batch) -> (state, metrics)`` for one device; stack transforms on
it; run it on a mesh. This is the public interface, in one list.
"""

from funcpipe import checkpoint, data, errors, optim, random, testing
from funcpipe import schedule as schedules
from funcpipe.collectives import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    pmax,
    pmean,
    ppermute,
    psum,
    psum_scatter,
    vmap,
)
from funcpipe.graph.names import checkpoint_name
from funcpipe.mesh import Mesh
from funcpipe.module import buffer_means, from_module, to_module, update_buffers
from funcpipe.precision import Scaled
from funcpipe.records import compose
from funcpipe.runtime.launch import launch
from funcpipe.runtime.nonfinite import Nonfinite, find_nonfinite
from funcpipe.runtime.plan import Plan
from funcpipe.runtime.predict import Prediction
from funcpipe.runtime.profile import profile_units
from funcpipe.runtime.record import Recording
from funcpipe.runtime.simulate import simulate
from funcpipe.runtime.spmd import spmd
from funcpipe.runtime.tradeoff import RematCurve
from funcpipe.sequence import losses
from funcpipe.sequence.attention import attention
from funcpipe.sequence.positions import positions
from funcpipe.sequence.statistic import batch_statistic
from funcpipe.step import (
    Mean,
    Microbatches,
    Rows,
    clip_by_global_norm,
    global_norm,
    global_sum,
    stage_boundary,
    value_and_grad,
)
from funcpipe.transforms import (
    accumulated,
    data_parallel,
    mixed_precision,
    pipelined,
    remat,
    seq_all_to_all,
    seq_ring,
    sharded_weights,
)

__all__ = [
    "Mean",
    "Mesh",
    "Microbatches",
    "Nonfinite",
    "Plan",
    "Prediction",
    "Recording",
    "RematCurve",
    "Rows",
    "Scaled",
    "accumulated",
    "all_gather",
    "all_to_all",
    "attention",
    "axis_index",
    "axis_size",
    "batch_statistic",
    "buffer_means",
    "checkpoint",
    "checkpoint_name",
    "clip_by_global_norm",
    "compose",
    "data",
    "data_parallel",
    "errors",
    "find_nonfinite",
    "from_module",
    "global_norm",
    "global_sum",
    "launch",
    "losses",
    "mixed_precision",
    "optim",
    "pipelined",
    "pmax",
    "pmean",
    "positions",
    "ppermute",
    "profile_units",
    "psum",
    "psum_scatter",
    "random",
    "remat",
    "schedules",
    "seq_all_to_all",
    "seq_ring",
    "sharded_weights",
    "simulate",
    "spmd",
    "stage_boundary",
    "testing",
    "to_module",
    "update_buffers",
    "value_and_grad",
    "vmap",
]
__version__ = "0.1.0"
