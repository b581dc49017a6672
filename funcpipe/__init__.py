"""funcpipe: JAX-style parallel training for PyTorch.

Write a training step once, as a pure function ``(state, batch) -> (state, metrics)`` for one
device; stack transforms on it; run it on a mesh. This is the public interface, in one list.
"""

from funcpipe import checkpoint, data, errors, extend, losses, optim, random, schedules, testing
from funcpipe._src.collectives import (
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
from funcpipe._src.core.loss_types import Mean, Microbatches, Rows
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.core.mixed_precision import Scaled
from funcpipe._src.core.primitives.stage_boundary import stage_boundary
from funcpipe._src.core.primitives.value_and_grad import value_and_grad
from funcpipe._src.core.reductions import clip_by_global_norm, global_norm, global_sum
from funcpipe._src.functional.attention import attention
from funcpipe._src.functional.batch_statistic import batch_statistic
from funcpipe._src.functional.checkpoint_name import checkpoint_name
from funcpipe._src.functional.positions import positions
from funcpipe._src.modules.buffers import buffer_means, update_buffers
from funcpipe._src.modules.from_module import from_module, to_module
from funcpipe._src.planning.lower import lower
from funcpipe._src.planning.lowered import Lowered
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.predict import Prediction
from funcpipe._src.planning.remat_curve import RematCurve
from funcpipe._src.runtime.launch import launch
from funcpipe._src.runtime.nonfinite import find_nonfinite
from funcpipe._src.runtime.nonfinite_watch import Nonfinite
from funcpipe._src.runtime.profile_units import profile_units
from funcpipe._src.runtime.record import Recording
from funcpipe._src.runtime.simulate import simulate
from funcpipe._src.runtime.spmd import spmd
from funcpipe._src.spec.transform_spec import compose

try:
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
except ModuleNotFoundError as error:  # they lie beside the package in a checkout
    if error.name != "funcpipe.transforms":
        raise
    raise ModuleNotFoundError(
        "funcpipe is not installed: run `pip install -e .` in its checkout"
    ) from error

__all__ = [
    "Lowered",
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
    "extend",
    "find_nonfinite",
    "from_module",
    "global_norm",
    "global_sum",
    "launch",
    "losses",
    "lower",
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
__version__ = "0.2.0"

# Tracebacks and pickles name public classes as users import them.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
