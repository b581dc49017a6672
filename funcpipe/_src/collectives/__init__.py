"""Collectives by axis name: differentiable, on a mesh or inside `vmap`, and nothing at all in plain
PyTorch.

- `api.py`: ``psum``, ``pmean``, ``pmax``, ``all_gather``, ``psum_scatter``, ``all_to_all``,
  ``ppermute`` and ``axis_index``.
- `axis_scope.py`: what a name is bound to: ``vmap``, ``bind_mesh``, ``one_rank``, ``axis_size``.
- `batching_rules.py`: how each is differentiated and mapped.
- `ops.py`: the ops that a traced graph holds, and what they do on a rank: ``bind_rank``,
  ``names_axes``, ``axes_of``, ``lanes_of``, ``collectives_of``, ``received``.
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
from funcpipe._src.collectives.axis_scope import axis_size, bind_mesh, one_rank, vmap
from funcpipe._src.collectives.ops import (
    axes_of,
    bind_rank,
    collectives_of,
    lanes_of,
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
    "collectives_of",
    "lanes_of",
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
