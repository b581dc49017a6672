"""Aliasing: the operands that a call writes to, and the one in whose memory its results lie.

In: a call. Out: tensors among its operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from funcpipe._src.proof.align import AlignedTensor, OpCall


def written_by(call: OpCall) -> list[AlignedTensor]:
    """The operands that a call writes to."""
    found: list[AlignedTensor] = []
    if call.func is None or not hasattr(call.func, "_schema"):
        return found
    for parameter in call.func._schema.arguments:
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            found += tensors_in([call.args[parameter.name]])
    return found


def tensors_in(values: Any) -> Iterator[AlignedTensor]:
    """The tensors among arguments."""
    for value in values:
        if isinstance(value, AlignedTensor):
            yield value
        elif isinstance(value, list):
            yield from tensors_in(value)


def viewed_by(call: OpCall) -> AlignedTensor | None:
    """The operand in whose memory the results of a call lie."""
    if call.func is None:
        return None
    if not hasattr(call.func, "_schema"):
        return None
    if call.func is torch.ops.aten._unsafe_view.default:
        return call.args["self"]  # it shares memory, though its schema does not say so
    for parameter in call.func._schema.arguments:
        if parameter.alias_info is not None and not parameter.alias_info.is_write:
            return call.args[parameter.name]
    return None
