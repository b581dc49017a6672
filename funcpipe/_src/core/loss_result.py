"""Reads what a loss function returned, and refuses what is not a loss.

In: the value that a loss function returned. Out: its total, weight and aux, or a TraceError.
"""

from __future__ import annotations

from typing import Any

import torch

from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import Mean, Rows, aux_nodes
from funcpipe.errors import TraceError


def read_loss(out: Any, has_aux: bool) -> tuple[Any, Any, Any]:
    """What a loss function returned, as ``(total, weight or None, aux)``.

    Raises:
        TraceError: the loss is not a real 0-d tensor or a `Mean` of such, or aux cannot be read.
    """
    if has_aux and not (isinstance(out, tuple) and len(out) == 2 and not isinstance(out, Mean)):
        raise TraceError(
            "with has_aux=True the loss function returns (loss, aux); this one returned "
            f"{describe(out)}"
        )
    loss, aux = out if has_aux else (out, None)
    if isinstance(loss, Mean):
        total, weight = loss
        _check_scalar("Mean.total", total)
        _check_scalar("Mean.weight", weight)
    else:
        total, weight = loss, None
        _check_scalar("loss", total)
    if not total.is_floating_point():
        raise TraceError(
            f"the loss has dtype {total.dtype}; gradients need a real floating-point loss"
        )
    if aux is not None:
        _check_aux(aux)
    return total, weight, aux


def _check_scalar(name: str, value: Any) -> None:
    if not (isinstance(value, torch.Tensor) and value.dim() == 0):
        raise TraceError(
            f"the {name} that the loss function returned is {describe(value)}; {_instead(value)}"
        )


def _instead(value: Any) -> str:
    if isinstance(value, int | float):
        return (
            f"it has to be a 0-d tensor: write torch.tensor({value!r}), on the device of the batch"
        )
    if isinstance(value, tuple):
        return "it has to be a 0-d tensor or fp.Mean(total, weight); with has_aux=True, (loss, aux)"
    return "it has to be a 0-d tensor: sum it, and return Mean(total, weight) for an average"


def _check_aux(aux: Any) -> None:
    """TraceError when a `Mean` or `Rows` in aux holds what cannot be averaged or concatenated."""
    for path, node in aux_nodes(aux):
        if isinstance(node, Mean):
            _check_tensors(path, node, node)
        elif isinstance(node, Rows):
            _check_tensors(path, node, (node.x,))
            if not -node.x.dim() <= node.dim < node.x.dim():
                raise TraceError(
                    f"aux{path} is fp.Rows of {describe(node.x)} along dim {node.dim}, which it "
                    "lacks"
                )


def _check_tensors(path: str, node: Any, held: tuple[Any, ...]) -> None:
    if not all(isinstance(value, torch.Tensor) for value in held):
        raise TraceError(
            f"aux{path} is a {type(node).__name__} of {', '.join(map(describe, held))}; it takes "
            "tensors: write torch.tensor(...)"
        )
