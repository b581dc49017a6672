"""How calls of torch's own attention reach the hook that is bound.

In: ``scaled_dot_product_attention`` with any leading dims. Out: its result, from the hook.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.dispatch import Spec
from funcpipe.errors import TraceError


class Intercept(TorchFunctionMode):
    """While it is active, calls of torch's ``scaled_dot_product_attention`` go to the hook that is
    bound, if one is.

    `torch.nn.MultiheadAttention` (with ``need_weights=False``) and every model that calls torch's
    function run through it.

    Raises:
        TraceError: a call with dropout.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        asked = hook.current()
        kwargs = kwargs or {}
        if asked is not None and func is F.scaled_dot_product_attention:
            return _ask(asked, *args, **kwargs)
        if asked is not None and func is F.multi_head_attention_forward:
            with self:
                return _with_visible_body(func)(*args, **kwargs)
        return func(*args, **kwargs)


def _no_torch_function(*_: Any) -> bool:
    return False


def _with_visible_body(function: Any) -> Callable:
    """A Python function of torch of which a mode sees the body.

    torch hands such a function to a mode as one call, and has the mode off while its body runs.
    This is a copy that does not ask whether there is a mode.
    """
    names = dict(function.__globals__)
    for name in names:
        if name.startswith("has_torch_function"):
            names[name] = _no_torch_function
    copy = types.FunctionType(
        function.__code__,
        names,
        function.__name__,
        function.__defaults__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _ask(
    asked: hook.Hook,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A call of torch's function, its leading dims folded into one; the last of them counts
    heads."""
    if dropout_p > 0:
        raise TraceError(
            f"scaled_dot_product_attention with dropout_p={dropout_p} cannot be split over the "
            "sequence: every rank would drop other scores than one device does. Set attention "
            "dropout to 0"
        )
    ndim = max(query.dim(), key.dim(), value.dim())
    operands = [_with_dims(operand, max(ndim, 4)) for operand in (query, key, value)]
    batch = torch.broadcast_shapes(*(operand.shape[:-3] for operand in operands))
    operands = _expand_heads([_folded(operand, batch) for operand in operands], enable_gqa)
    if attn_mask is not None:
        attn_mask = _with_dims(attn_mask, max(ndim, 4))
        leading = attn_mask.shape[:-3]
        differs = any(size > 1 for size in leading)
        attn_mask = _folded(attn_mask, batch if differs else leading)
    query, key, value = operands
    out = asked.attention(query, key, value, Spec(is_causal, scale, attn_mask))
    if ndim == 4:
        return out
    return out.reshape((*batch, *out.shape[1:])[-ndim:])


def _with_dims(tensor: Tensor, ndim: int) -> Tensor:
    missing = ndim - tensor.dim()
    if missing > 0:
        return tensor[(None,) * missing]
    return tensor


def _folded(tensor: Tensor, batch: torch.Size) -> Tensor:
    """Expanded to a batch shape, which becomes one dim."""
    if tensor.shape[:-3] != batch:
        tensor = tensor.expand(*batch, *tensor.shape[-3:])
    if len(batch) == 1:
        return tensor
    return tensor.flatten(0, -4)


def _expand_heads(operands: list[Tensor], grouped: bool) -> list[Tensor]:
    """Operands in hook layout, of which keys and values have equally many heads; torch broadcasts
    heads, too."""
    counts = [operand.shape[1] for operand in operands]
    of_queries, of_keys, of_values = counts
    if grouped and of_keys == of_values and of_queries % max(of_keys, 1) == 0:
        return operands
    heads = max(counts)
    if grouped or any(count not in (1, heads) for count in counts):
        raise TraceError(
            f"scaled_dot_product_attention: q, k and v have {', '.join(map(str, counts))} heads "
            f"(dim -3), with enable_gqa={grouped}. Give all of them equally many; or, with "
            "enable_gqa=True, k and v fewer, of which q has a multiple"
        )
    wanted = (heads, 1, 1) if of_keys == of_values == 1 else (heads, heads, heads)
    found = []
    for operand, count in zip(operands, wanted, strict=True):
        alike = operand.shape[1] == count
        found.append(operand if alike else operand.expand(-1, count, -1, -1))
    return found
