"""What funcpipe does about ``torch.inference_mode``, in which autograd records nothing.

In: the name of a function, or a tree. Out: an error, or the tree with copies of inference tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from funcpipe._src.core import pytree as tree
from funcpipe.errors import TraceError


def refuse_inference_mode(who: str) -> None:
    """TraceError in ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        raise TraceError(
            f"{who} is called in torch.inference_mode(), in which PyTorch records nothing to take "
            "gradients of: leave it before, or use torch.no_grad(), in which value_and_grad and "
            "runners work"
        )


def without_inference(value: Any) -> Any:
    """A tree with copies of the tensors that were made in inference mode: autograd refuses them."""
    if any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in tree.leaves(value)):
        return tree.map_tensors(_usual, value)
    return value


def _usual(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.clone() if leaf.is_inference() else leaf
