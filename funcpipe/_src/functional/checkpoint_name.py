"""Names: what a loss function calls the values that a policy may speak of.

A named value leaves a node in a trace, ``funcpipe::named(x, name)``, that makes nothing;
`graph/node_labels.py` notes it and takes it out again. Everywhere else a name is nothing.

In: values of a loss function. Out: the same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import current
from funcpipe._src.core.describe_value import describe
from funcpipe.errors import TraceError

_LIB = torch.library.Library("funcpipe", "FRAGMENT")
_LIB.define("named(Tensor x, str name) -> ()")


def _nothing(tensor: Tensor, name: str) -> None:
    """What the op computes."""


_LIB.impl("named", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake("funcpipe::named", _nothing, lib=_LIB)
NAMED = torch.ops.funcpipe.named.default
fx.has_side_effect(NAMED)  # else it is removed as dead code


def _vmap(info: Any, in_dims: Any, tensor: Tensor, name: str) -> tuple[None, None]:
    """Under vmap the value that is named is that of all rows."""
    NAMED(tensor, name)
    return None, None


torch.library.register_vmap("funcpipe::named", _vmap, lib=_LIB)


def checkpoint_name(x: Any, name: str) -> Any:
    """Give a value of a loss function a name, so that `remat` can say whether it is saved for the
    backward half.

    Args:
        x: any pytree; its tensors get the name. They may have any shape and dtype.
        name: several values may share it, such as one of every block.

    Returns:
        ``x``.

    Raises:
        TraceError: the name is no text.

    JAX's ``checkpoint_name`` (``jax.ad_checkpoint``).

    >>> checkpoint_name({"x": 1}, "hidden")
    {'x': 1}
    """
    if not (isinstance(name, str) and name):
        raise TraceError(
            f"checkpoint_name: the name is {describe(name)}; write a text such as 'attention'"
        )
    mark = current().checkpoint_name
    tree.map_tensors(lambda leaf: mark(leaf, name), x)
    return x
