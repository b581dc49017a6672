"""Collectives by axis name: differentiable, on a mesh or inside `vmap`; no-ops in plain PyTorch.

Read in this order:

1. `api.py`: what loss functions call: ``psum``, ``pmean``, ``pmax``, ``all_gather``,
   ``psum_scatter``, ``all_to_all``, ``ppermute`` and ``axis_index``.
   `over_spans.py`: what they do with one tensor over several axes.
2. `axis_scope.py`: what an axis name is bound to: ``bind_mesh``, ``one_rank``; `mapped_axis.py`:
   ``vmap``.
3. `batching_rules.py`: how each collective is differentiated and mapped.
4. `ops.py`: the ops that a traced graph holds, what they do on a rank (``bind_rank``), and what a
   graph needs of a communicator.
"""

from funcpipe._src.collectives.api import (
    all_gather,
    all_to_all,
    axis_index,
    pmax,
    pmean,
    ppermute,
    psum,
    psum_scatter,
)
from funcpipe._src.collectives.axis_scope import axis_size, bind_mesh, one_rank
from funcpipe._src.collectives.mapped_axis import vmap
from funcpipe._src.collectives.ops import (
    axes_of,
    bind_rank,
    channels_of,
    collectives_of,
    names_axes,
    received,
)

__all__ = [
    "all_gather",
    "all_to_all",
    "axes_of",
    "axis_index",
    "axis_size",
    "bind_mesh",
    "bind_rank",
    "channels_of",
    "collectives_of",
    "names_axes",
    "one_rank",
    "pmax",
    "pmean",
    "ppermute",
    "psum",
    "psum_scatter",
    "received",
    "vmap",
]
