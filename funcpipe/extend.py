"""What a transform of one's own imports: its spec, and the records that it answers with.

A transform is a function from a step to a step with one more `TransformSpec` on it. The spec
overrides the requests that the transform has; stages ask every spec, in mesh order.
"""

from funcpipe._src.core.mesh import as_axes
from funcpipe._src.spec.requests import (
    MicrobatchSplit,
    Pipeline,
    PositionSplit,
    Remat,
    RowSplit,
    WeightSharding,
)
from funcpipe._src.spec.transform_spec import TransformSpec, with_spec

__all__ = [
    "MicrobatchSplit",
    "Pipeline",
    "PositionSplit",
    "Remat",
    "RowSplit",
    "TransformSpec",
    "WeightSharding",
    "as_axes",
    "with_spec",
]
