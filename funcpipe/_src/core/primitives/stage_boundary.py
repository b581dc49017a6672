"""Marks where a loss function may be cut into the stages of a pipeline.

In: what goes on from one stage to the next. Out: the same.
"""

from __future__ import annotations

from typing import Any

from funcpipe._src.core.context import current


def stage_boundary(value: Any) -> Any:
    """Mark a place where the loss function may be cut, typically after every block.

    Args:
        value: any pytree of what goes on from here: tensors of any shape and dtype, and anything
            else.

    Returns:
        ``value``; the identity unless a pipeline is being cut.

    >>> stage_boundary({"x": 1, "mask": None})
    {'x': 1, 'mask': None}
    """
    return current().stage_boundary(value)
