"""Narrowing: where a loss function goes on in fewer bits than came in.

In: a planned ``value_and_grad``. Out: the lines at which an op turns a floating tensor into one of
fewer bits, with both dtypes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from funcpipe._src.analysis.call_results import with_values
from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis
from funcpipe._src.collectives import one_rank
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import Microbatches
from funcpipe._src.core.source_lines import Line, user_line
from funcpipe._src.graph.fake_tensors import fake, looking
from funcpipe._src.graph.restore import restored

_MOST = 3  # lines that are named
_ROUNDINGS = 2.0**12  # so many of a dtype may add up


def rounded_inside(call: PrimitiveCall, analysis: StepAnalysis, error: float) -> str:
    """What to say of a relative error that is no larger than the roundings of a dtype inside the
    loss.

    Args:
        call, dyed: as planned.
        error: what was found.

    Returns:
        a sentence with the lines; nothing where the loss keeps its bits, or the error is larger.
    """
    found = [
        (wide, narrow, line)
        for wide, narrow, line in _narrowed(call, analysis)
        if error <= _allowed(narrow)
    ]
    if not found:
        return ""
    places = [f"{_name(wide)} becomes {_name(narrow)}{line or ''}" for wide, narrow, line in found]
    more = f" and {len(places) - _MOST} more" * (len(places) > _MOST)
    worst = max((narrow for _, narrow, _ in found), key=lambda dtype: torch.finfo(dtype).eps)
    rtol = 10.0 ** math.ceil(math.log10(_allowed(worst) / 100))
    return (
        ". The loss function computes in fewer bits than came in: "
        f"{', '.join(places[:_MOST])}{more}. There it rounds, and sums of other parts round "
        f"otherwise: keep to {_name(found[0][0])}, or allow rtol={rtol:.0e}"
    )


def _allowed(dtype: torch.dtype) -> float:
    return _ROUNDINGS * torch.finfo(dtype).eps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Narrowed = tuple[torch.dtype, torch.dtype, Line | None]


def _narrowed(call: PrimitiveCall, analysis: StepAnalysis) -> list[Narrowed]:
    mode = FakeTensorMode()
    fakes = []
    for param, dtype in zip(call.params, call.dtypes, strict=True):
        fakes.append(fake(analysis.shapes[param], torch.empty(0, dtype=dtype), mode))
    params = tree.unflatten(call.params_spec, fakes)
    batch = call.batch.parts[0] if isinstance(call.batch, Microbatches) else call.batch
    batch, _ = with_values(batch, range(len(tree.leaves(batch))))
    batch = tree.map_tensors(torch.Tensor.cpu, batch)
    noted = _Narrowing()
    # What is wrong is said already: a loss that cannot be looked at has nothing to add.
    with (
        contextlib.suppress(Exception),
        restored(call.loss_fn),
        looking(params, mode) as seen,
        one_rank(),
        noted,
    ):
        call.loss_fn(seen, batch)
    return list(noted.found)


class _Narrowing(TorchDispatchMode):
    """Notes every line at which an op gives fewer bits than it gets, once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Narrowed, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        widest = max(_dtypes((args, kwargs)), key=_bits, default=None)
        made = min(_dtypes(out), key=_bits, default=None)
        if widest is not None and made is not None and _bits(made) < _bits(widest):
            self.found[widest, made, user_line()] = None
        return out


def _dtypes(x: Any) -> Iterator[torch.dtype]:
    for leaf in tree_leaves(x):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf.dtype


def _bits(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps
