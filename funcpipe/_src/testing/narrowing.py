"""Narrowing: where a loss function goes on in fewer bits than came in.

In: a planned ``value_and_grad``.
Out: the lines at which an op turns a floating tensor into one of fewer bits, with both dtypes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from funcpipe._src.analysis.call_results import with_values
from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis
from funcpipe._src.collectives import one_rank
from funcpipe._src.core import pytree
from funcpipe._src.core.loss_types import Microbatches
from funcpipe._src.core.source_lines import Line, user_line
from funcpipe._src.graph.fake_tensors import fake, looking
from funcpipe._src.graph.restore import restored

_MOST = 3  # lines that are named
_ROUNDINGS = 2.0**12  # so many of a dtype may add up


class Narrowed(NamedTuple):
    """An op that turns a floating tensor into one of fewer bits."""

    wide: torch.dtype
    narrow: torch.dtype
    line: Line | None

    def __str__(self) -> str:
        return f"{_name(self.wide)} becomes {_name(self.narrow)}{self.line or ''}"


def rounded_inside(
    call: PrimitiveCall,
    analysis: StepAnalysis,
    error: float,
) -> str:
    """An explanation of a relative error that roundings inside the loss account for.

    Args:
        call, analysis: as planned.
        error: the error that was found.

    Returns:
        a sentence with the lines; nothing if the loss keeps its bits, or the error is larger.
    """
    found = [each for each in _narrowed(call, analysis) if error <= _allowed(each.narrow)]
    if not found:
        return ""
    lines = ", ".join(map(str, found[:_MOST]))
    if len(found) > _MOST:
        lines += f" and {len(found) - _MOST} more"
    worst = max(torch.finfo(each.narrow).eps for each in found)
    rtol = 10.0 ** math.ceil(math.log10(_ROUNDINGS * worst / 100))
    return (
        f". The loss function computes in fewer bits than came in: {lines}. There it rounds, and "
        "sums of other parts round otherwise: keep to "
        f"{_name(found[0].wide)}, or allow rtol={rtol:.0e}"
    )


def _allowed(dtype: torch.dtype) -> float:
    return _ROUNDINGS * torch.finfo(dtype).eps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _narrowed(call: PrimitiveCall, analysis: StepAnalysis) -> list[Narrowed]:
    mode = FakeTensorMode()
    fakes = []
    for param, dtype in zip(call.params, call.dtypes, strict=True):
        fakes.append(fake(analysis.shapes[param], torch.empty(0, dtype=dtype), mode))
    params = pytree.unflatten(call.params_spec, fakes)
    batch = call.batch.parts[0] if isinstance(call.batch, Microbatches) else call.batch
    batch, _ = with_values(batch, range(len(pytree.leaves(batch))))
    batch = pytree.map_tensors(Tensor.cpu, batch)
    recorder = _NarrowingRecorder()
    # The error itself is reported anyway: a loss that does not run on fakes has nothing to add.
    with (
        contextlib.suppress(Exception),
        restored(call.loss_fn),
        looking(params, mode) as seen,
        one_rank(),
        recorder,
    ):
        call.loss_fn(seen, batch)
    return list(recorder.found)


class _NarrowingRecorder(TorchDispatchMode):
    """Records every line at which an op gives fewer bits than it gets, once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Narrowed, None] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        widest = max(_dtypes((args, kwargs)), key=_precision, default=None)
        narrowest = min(_dtypes(out), key=_precision, default=None)
        if widest is None or narrowest is None:
            return out
        if _precision(narrowest) < _precision(widest):
            self.found[Narrowed(widest, narrowest, user_line())] = None
        return out


def _dtypes(value: Any) -> Iterator[torch.dtype]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf.dtype


def _precision(dtype: torch.dtype) -> float:
    """A number to compare dtypes by: larger for more bits."""
    return -torch.finfo(dtype).eps
