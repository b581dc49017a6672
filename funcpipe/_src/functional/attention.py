"""Attention on whole sequences, and how an attention finds whoever computes it.

Terms. *Hook layout*: ``(batch, heads, positions, head dim)``, see `dispatch.py`. A *document* is
one of several sequences that are packed into one. *Grouped queries*: several query heads share a
head of keys and values.

In plain PyTorch, `attention` is torch's ``scaled_dot_product_attention`` with documents and packed
operands. While a loss
is planned a hook is bound: it gets every `attention`, and by way of `Intercept` every call of
    torch's own.

In: queries, keys, values, in the layout of the caller. Out: one result per query, in the same
layout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.dispatch import Spec
from funcpipe.errors import TraceError

_FLASH_DIM = 256  # the largest head dim of flash kernels
_HALF = (torch.float16, torch.bfloat16)


def attention(
    q: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot product attention, ``softmax(q k^T * scale + bias) v``.

    Args:
        q, k, v: ``(batch, positions, heads, head dim)``, or the same without ``batch``, of one
            floating dtype. Keys and values may have fewer heads, of which the number of query heads
            is a multiple, and other positions than queries; values may have another head dim. Or
            ``attention(q, kv)``: ``(batch, positions, 2, heads, head dim)``; or ``attention(qkv)``:
            ``(batch, positions, 3, heads, head dim)``.
        causal: whether a query sees no key behind its own place, both counted from the front.
        scale: of the scores; by default ``1 / sqrt(head dim)``.
        cu_seqlens: where the documents of a packed sequence begin, and the end of the last: int32
            or int64 of shape ``(documents + 1,)``, or ``(batch, documents + 1)``, ascending. A
            query sees keys of its own document only; what lies outside of all documents sees
            nothing, and gets zeros.
        bias: broadcastable to ``(batch, query heads, query positions, key positions)``: bool (True
            takes part), or floating, added to the scores.

    Returns:
        ``(batch, positions, query heads, head dim of v)``, ``batch`` as in ``q``. A query that sees
        no key gets zeros.

    Raises:
        TraceError: the operands do not fit each other.

    The layout of flash-attn (Dao 2023, "FlashAttention-2") and jax.nn.dot_product_attention. The
    kernels are torch's: documents run through ``varlen_attn`` on CUDA in half precision, and
    through a mask elsewhere.

    >>> x = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])  # three positions, one head, head dim 1
    >>> attention(0 * x, x, x, causal=True).flatten()  # no query prefers a key: running means
    tensor([1.0000, 1.5000, 2.0000])
    >>> attention(0 * x, x, x, cu_seqlens=torch.tensor([0, 1, 3])).flatten()  # two documents
    tensor([1.0000, 2.5000, 2.5000])
    """
    q, k, v = _unpacked(q, k, v)
    _check_operands(q, k, v)
    _check_documents(q, cu_seqlens)
    asked, batched = hook.current(), q.dim() == 4
    bias = _checked_bias(bias, q, None if asked is not None else k)
    compute, spec = (
        whole if asked is None else asked.attention,
        Spec(causal, scale, bias, cu_seqlens),
    )
    q, k, v = ((x if batched else x.unsqueeze(0)).transpose(1, 2) for x in (q, k, v))
    out = compute(q, k, v, spec).transpose(1, 2)
    return out if batched else out.squeeze(0)


def _unpacked(q: Any, k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one number of dims, 3 or 4."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) and (x is not None or name == "q"):
            raise TraceError(f"attention: {name} is {x!r}, not a tensor")
    if k is None and v is not None:
        raise TraceError(
            "attention: got v but no k; pass attention(q, k, v), attention(q, kv) or attention(qkv)"
        )
    if k is None:
        if q.dim() not in (4, 5) or q.shape[-3] != 3:
            raise TraceError(
                "attention: q alone holds queries, keys and values, (batch, positions, 3, heads, "
                f"head dim), but has shape {tuple(q.shape)}; stack them along dim -3, or pass "
                "attention(q, k, v)"
            )
        return q.unbind(-3)
    if q.dim() not in (3, 4):
        raise TraceError(
            f"attention: q has shape {tuple(q.shape)}; it takes (batch, positions, heads, head "
            "dim), batch optional"
        )
    if v is None:
        if k.dim() != q.dim() + 1 or k.shape[-3] != 2:
            raise TraceError(
                "attention: without v, k holds keys and values, (batch, positions, 2, heads, head "
                f"dim), but has shape {tuple(k.shape)} beside q of shape {tuple(q.shape)}; stack "
                "them along dim -3, or pass attention(q, k, v)"
            )
        return (q, *k.unbind(-3))
    for name, x in (("k", k), ("v", v)):
        if x.dim() != q.dim():
            raise TraceError(
                f"attention: {name} has shape {tuple(x.shape)} and q {tuple(q.shape)}: both have a "
                "batch dim, or neither"
            )
    return q, k, v


def _check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """TraceError when sizes, dtypes or devices do not fit."""
    shapes = lambda: f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"  # noqa: E731
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-3] != v.shape[:-3]:
        raise TraceError(f"attention: batch sizes differ: {shapes()}; expand them to one")
    if k.shape[-3] != v.shape[-3]:
        raise TraceError(
            f"attention: k and v have {k.shape[-3]} and {v.shape[-3]} positions; every key has one "
            "value"
        )
    if k.shape[-2] != v.shape[-2]:
        raise TraceError(
            f"attention: k and v have {k.shape[-2]} and {v.shape[-2]} heads; every key has one "
            "value"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise TraceError(
            f"attention: {q.shape[-2]} query heads are no multiple of {k.shape[-2]} heads of keys "
            f"and values: {shapes()}; the layout is (batch, positions, heads, head dim)"
        )
    if q.shape[-1] != k.shape[-1]:
        raise TraceError(
            f"attention: the head dims of q and k differ, {q.shape[-1]} and {k.shape[-1]}: "
            f"{shapes()}"
        )
    if not q.is_floating_point():
        raise TraceError(f"attention: q has dtype {q.dtype}; it takes floating-point numbers")
    if not q.dtype == k.dtype == v.dtype and len({narrowed(x).dtype for x in (q, k, v)}) > 1:
        raise TraceError(
            f"attention: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one"
        )
    if not q.device == k.device == v.device:
        raise TraceError(
            f"attention: devices differ: q on {q.device}, k on {k.device}, v on {v.device}"
        )


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """As autocast, where it is on, hands it to torch's attention."""
    kind = x.device.type
    if (
        x.dtype == torch.float64
        or not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
    ):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _check_documents(q: torch.Tensor, cu: torch.Tensor | None) -> None:
    """TraceError when documents have another form than the contract's."""
    if cu is None:
        return
    if not isinstance(cu, torch.Tensor) or cu.dtype not in (torch.int32, torch.int64):
        what = cu.dtype if isinstance(cu, torch.Tensor) else repr(cu)
        raise TraceError(
            f"attention: cu_seqlens is {what}; it takes a tensor of dtype torch.int32 or "
            "torch.int64"
        )
    batch = q.shape[:-3]
    if cu.dim() not in (1, 2) or cu.shape[-1] < 2 or (cu.dim() == 2 and cu.shape[:1] != batch):
        rows = f" or ({batch[0]}, documents + 1)" if batch else ""
        raise TraceError(
            f"attention: cu_seqlens has shape {tuple(cu.shape)} beside q of shape "
            f"{tuple(q.shape)}; it takes (documents + 1,){rows}: where each document begins, and "
            "the end of the last"
        )


def _checked_bias(
    bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor | None
) -> torch.Tensor | None:
    """The bias with four dims. Without ``k`` its positions are not checked: they may be those of
    all ranks."""
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or not (
        bias.dtype == torch.bool or bias.is_floating_point()
    ):
        what = bias.dtype if isinstance(bias, torch.Tensor) else repr(bias)
        raise TraceError(
            f"attention: bias is {what}; it takes a tensor, bool (True takes part) or "
            "floating-point"
        )
    batch = q.shape[0] if q.dim() == 4 else 1
    want = (batch, q.shape[-2], *(() if k is None else (q.shape[-3], k.shape[-3])))
    if bias.dim() <= 4:
        bias = bias[(None,) * (4 - bias.dim())]
    if bias.dim() > 4 or any(n not in (1, m) for n, m in zip(bias.shape, want, strict=False)):
        sizes = ", ".join(map(str, want)) + (
            ", query positions, key positions" if k is None else ""
        )
        raise TraceError(
            f"attention: bias of shape {tuple(bias.shape)} cannot be broadcast to ({sizes}), that "
            "is (batch, query heads, query positions, key positions)"
        )
    return bias


# ---- on whole sequences


def whole(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over all keys, by torch's kernels; operands and result in hook layout.

    Args:
        rows: the places of the queries, int64, ``(query positions,)``; None: in order, from the
            front.

    Raises:
        TraceError: documents, and not as many queries as keys.
    """
    if spec.cu_seqlens is None:
        return _dense(q, k, v, spec, rows)
    if rows is None and q.shape[2] != k.shape[2]:
        raise TraceError(
            "attention: cu_seqlens divides one sequence into documents, but there are "
            f"{q.shape[2]} queries and {k.shape[2]} keys; say who sees whom with a bool bias "
            "instead"
        )
    q, k, v = narrowed(q), narrowed(k), narrowed(v)
    out = _varlen(q, k, v, spec) if _fits_varlen(q, v, spec, rows) else _dense(q, k, v, spec, rows)
    number = _document(spec.cu_seqlens, _range(q) if rows is None else rows)
    outside = (number == 0) | (
        number == spec.cu_seqlens.shape[-1]
    )  # up to here, these were documents like any other
    return out.masked_fill(outside.unsqueeze(1).unsqueeze(3), 0)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec, rows: torch.Tensor | None
) -> torch.Tensor:
    mask, seen = spec.bias, _seen(q, k, spec, rows)
    if mask is None or seen is None:
        mask = seen if mask is None else mask
    else:
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not _shares_heads(q, v, mask):
        k, v, grouped = _spread(k, q), _spread(v, q), False
    causal = spec.causal and seen is None
    run = functools.partial(
        F.scaled_dot_product_attention, is_causal=causal, scale=spec.scale, enable_gqa=grouped
    )
    if mask is None or not q.is_cuda:
        return run(q, k, v, mask)
    with _without_cudnn():
        return run(q, k, v, mask)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """With a mask, cuDNN's attention (9.19, in torch 2.11) is wrong without a word: for a query
    that sees no key, and in the gradients where that of the result has another memory order than
    the result."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _seen(
    q: torch.Tensor, k: torch.Tensor, spec: Spec, rows: torch.Tensor | None
) -> torch.Tensor | None:
    """Which keys a query sees by order and documents, broadcastable to the scores; None where a
    kernel knows."""
    if spec.cu_seqlens is None and not (
        spec.causal and (rows is not None or spec.bias is not None)
    ):
        return None
    rows, keys = _range(q) if rows is None else rows, _range(k)
    seen = rows.unsqueeze(1) >= keys if spec.causal else None
    if spec.cu_seqlens is None:
        return seen
    own, other = _document(spec.cu_seqlens, rows), _document(spec.cu_seqlens, keys)
    same = (own.unsqueeze(2) == other.unsqueeze(1)).unsqueeze(1)
    return same if seen is None else same & seen


def _document(cu: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The number of the document at each place, from 1; 0 in front of all, one more than there are
    behind them."""
    cu = cu.long().reshape(-1, cu.shape[-1])
    return torch.searchsorted(
        cu.contiguous(), places.expand(cu.shape[0], -1).contiguous(), right=True
    )


def _range(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[2], device=x.device)


def _shares_heads(q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a fused kernel takes grouped queries; on CUDA flash alone does, and the others want
    heads of their own."""
    if not q.is_cuda:
        return True
    return mask is None and q.dtype in _HALF and q.shape[-1] == v.shape[-1] <= _FLASH_DIM


def _spread(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Keys or values with one head for every query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _fits_varlen(q: torch.Tensor, v: torch.Tensor, spec: Spec, rows: torch.Tensor | None) -> bool:
    d = q.shape[-1]
    alike = q.dtype in _HALF and d == v.shape[-1] and d % 8 == 0 and d <= _FLASH_DIM
    return q.is_cuda and alike and spec.bias is None and rows is None and q.numel() > 0


@functools.cache
def _kernel() -> tuple[Callable[..., Any], bool]:
    """torch's kernel for documents, and whether it takes grouped queries (torch 2.12). Importing it
    takes a second."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Documents of all rows of the batch, one after another, by a flash kernel.

    What is outside of documents becomes documents, too: the kernel leaves memory that belongs to
    none as it was.
    """
    (kernel, groups), (batch, heads, n, _) = _kernel(), q.shape
    if not groups and heads != k.shape[1]:
        k, v = _spread(k, q), _spread(v, q)
    cu: Any = spec.cu_seqlens
    ends = F.pad(F.pad(cu.clamp(0, n), (1, 0)), (0, 1), value=n)  # 0, cu_seqlens, n
    ends = (ends + n * torch.arange(batch, device=q.device).unsqueeze(1)).flatten().int()
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    window, grouped = (-1, 0 if spec.causal else -1), {"enable_gqa": True} if groups else {}
    out = kernel(*packed, ends, ends, n, n, scale=spec.scale, window_size=window, **grouped)
    return out.unflatten(0, (batch, n)).transpose(1, 2)


# ---- torch's own attention


class Intercept(TorchFunctionMode):
    """While it is active, calls of torch's ``scaled_dot_product_attention`` go to the hook that is
    bound, if one is.

    `torch.nn.MultiheadAttention` (with ``need_weights=False``) and every model that calls torch's
    function run through it.

    Raises:
        TraceError: a call with dropout.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked, kwargs = hook.current(), kwargs or {}
        if asked is not None and func is F.scaled_dot_product_attention:
            return _caught(asked, *args, **kwargs)
        if asked is not None and func is F.multi_head_attention_forward:
            with self:
                return _open(func)(*args, **kwargs)
        return func(*args, **kwargs)


def _open(function: Any) -> Callable:
    """A Python function of torch of which a mode sees the body.

    torch hands such a function to a mode as one call, and has the mode off while its body runs.
    This is a copy that does not ask whether there is a mode.
    """
    silent = {
        name: lambda *_: False
        for name in function.__globals__
        if name.startswith("has_torch_function")
    }
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **silent},
        function.__name__,
        function.__defaults__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _caught(
    asked: hook.Hook,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A call of torch's function, its leading dims folded into one; the last of them counts
    heads."""
    if dropout_p > 0:
        raise TraceError(
            f"scaled_dot_product_attention with dropout_p={dropout_p} cannot be split over the "
            "sequence: every rank would drop other scores than one device does. Set attention "
            "dropout to 0"
        )
    dims = max(query.dim(), key.dim(), value.dim())
    q, k, v = (_with_dims(x, max(dims, 4)) for x in (query, key, value))
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    q, k, v = _heads_fit([_folded(x, batch) for x in (q, k, v)], enable_gqa)
    if attn_mask is not None:
        attn_mask = _with_dims(attn_mask, max(dims, 4))
        leading = batch if any(n > 1 for n in attn_mask.shape[:-3]) else attn_mask.shape[:-3]
        attn_mask = _folded(attn_mask, leading)
    out = asked.attention(q, k, v, Spec(is_causal, scale, attn_mask))
    return out if dims == 4 else out.reshape((*batch, *out.shape[1:])[-dims:])


def _with_dims(x: torch.Tensor, dims: int) -> torch.Tensor:
    return x[(None,) * (dims - x.dim())] if x.dim() < dims else x


def _folded(x: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """Expanded to a batch shape, which becomes one dim."""
    x = x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:])
    return x if len(batch) == 1 else x.flatten(0, -4)


def _heads_fit(operands: list[torch.Tensor], grouped: bool) -> list[torch.Tensor]:
    """Operands in hook layout, of which keys and values have equally many heads; torch broadcasts
    heads, too."""
    counts = [x.shape[1] for x in operands]
    if grouped and counts[1] == counts[2] and counts[0] % max(counts[1], 1) == 0:
        return operands
    heads = max(counts)
    if grouped or any(n not in (1, heads) for n in counts):
        raise TraceError(
            f"scaled_dot_product_attention: q, k and v have {', '.join(map(str, counts))} heads "
            f"(dim -3), with enable_gqa={grouped}. Give all of them equally many; or, with "
            "enable_gqa=True, k and v fewer, of which q has a multiple"
        )
    wanted = (heads, 1, 1) if counts[1:] == [1, 1] else (heads, heads, heads)
    return [
        x if x.shape[1] == n else x.expand(-1, n, -1, -1)
        for x, n in zip(operands, wanted, strict=True)
    ]
