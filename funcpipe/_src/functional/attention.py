"""Attention on whole sequences, and the checks of what `fp.attention` is given.

A *document* is one of several sequences that are packed into one. With *grouped queries* several
query heads share a head of keys and values. *Hook layout* is that of `dispatch.py`: ``(batch,
heads, positions, head dim)``.

In plain PyTorch, `attention` is torch's ``scaled_dot_product_attention`` with documents and packed
operands. While funcpipe plans a loss, the hook that is bound gets every `attention`;
`intercept.py` hands it torch's own calls, too.

In: queries, keys, values, in the layout of the caller. Out: one result per query, in the same
layout.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.dispatch import Spec
from funcpipe.errors import TraceError

_FLASH_DIM = 256  # the largest head dim of flash kernels
_HALF = (torch.float16, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
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
    asked = hook.current()
    compute: Callable[..., Tensor] = whole if asked is None else asked.attention
    # With a hook, the bias may have the positions of all ranks.
    bias = _checked_bias(bias, q, k if asked is None else None)
    spec = Spec(causal, scale, bias, cu_seqlens)
    batched = q.dim() == 4
    q, k, v = ((x if batched else x.unsqueeze(0)).transpose(1, 2) for x in (q, k, v))
    out = compute(q, k, v, spec).transpose(1, 2)
    return out if batched else out.squeeze(0)


def _unpacked(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one number of dims, 3 or 4."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) and (x is not None or name == "q"):
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


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """TraceError when sizes, dtypes or devices do not fit."""
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-3] != v.shape[:-3]:
        raise TraceError(f"attention: batch sizes differ: {_shapes(q, k, v)}; expand them to one")
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
            f"and values: {_shapes(q, k, v)}; the layout is (batch, positions, heads, head dim)"
        )
    if q.shape[-1] != k.shape[-1]:
        raise TraceError(
            f"attention: the head dims of q and k differ, {q.shape[-1]} and {k.shape[-1]}: "
            f"{_shapes(q, k, v)}"
        )
    if not q.is_floating_point():
        raise TraceError(f"attention: q has dtype {q.dtype}; it takes floating-point numbers")
    dtypes = {narrowed(x).dtype for x in (q, k, v)}
    if not q.dtype == k.dtype == v.dtype and len(dtypes) > 1:
        raise TraceError(
            f"attention: dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one"
        )
    if not q.device == k.device == v.device:
        raise TraceError(
            f"attention: devices differ: q on {q.device}, k on {k.device}, v on {v.device}"
        )


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def narrowed(operand: Tensor) -> Tensor:
    """As autocast, where it is on, hands it to torch's attention."""
    kind = operand.device.type
    if operand.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return operand
    if not torch.is_autocast_enabled(kind):
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


def _check_documents(q: Tensor, cu: Tensor | None) -> None:
    """TraceError when documents have another form than the contract's."""
    if cu is None:
        return
    if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64):
        what = cu.dtype if isinstance(cu, Tensor) else repr(cu)
        raise TraceError(
            f"attention: cu_seqlens is {what}; it takes a tensor of dtype torch.int32 or "
            "torch.int64"
        )
    batch = q.shape[:-3]
    fits = cu.dim() in (1, 2) and cu.shape[-1] >= 2
    if not fits or (cu.dim() == 2 and cu.shape[:1] != batch):
        rows = f" or ({batch[0]}, documents + 1)" if batch else ""
        raise TraceError(
            f"attention: cu_seqlens has shape {tuple(cu.shape)} beside q of shape "
            f"{tuple(q.shape)}; it takes (documents + 1,){rows}: where each document begins, and "
            "the end of the last"
        )


def _checked_bias(bias: Tensor | None, q: Tensor, k: Tensor | None) -> Tensor | None:
    """The bias with four dims. Without ``k`` its positions are not checked: they may be those of
    all ranks."""
    if bias is None:
        return None
    is_tensor = isinstance(bias, Tensor)
    if not is_tensor or not (bias.dtype == torch.bool or bias.is_floating_point()):
        raise TraceError(
            f"attention: bias is {bias.dtype if is_tensor else repr(bias)}; it takes a tensor, "
            "bool (True takes part) or floating-point"
        )
    wanted = [q.shape[0] if q.dim() == 4 else 1, q.shape[-2]]
    if k is not None:
        wanted += [q.shape[-3], k.shape[-3]]
    if bias.dim() <= 4:
        bias = bias[(None,) * (4 - bias.dim())]
    fits = all(own in (1, size) for own, size in zip(bias.shape, wanted, strict=False))
    if bias.dim() > 4 or not fits:
        sizes = ", ".join(map(str, wanted))
        if k is None:
            sizes += ", query positions, key positions"
        raise TraceError(
            f"attention: bias of shape {tuple(bias.shape)} cannot be broadcast to ({sizes}), that "
            "is (batch, query heads, query positions, key positions)"
        )
    return bias


# ---- on whole sequences


def whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    rows: Tensor | None = None,
) -> Tensor:
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
    q = narrowed(q)
    k = narrowed(k)
    v = narrowed(v)
    if rows is None and _fits_varlen(q, v, spec):
        out = _varlen(q, k, v, spec)
    else:
        out = _dense(q, k, v, spec, rows)
    places = _range(q) if rows is None else rows
    document = _document(spec.cu_seqlens, places)
    behind_all = spec.cu_seqlens.shape[-1]
    outside = (document == 0) | (document == behind_all)  # so far treated as documents
    return out.masked_fill(outside.unsqueeze(1).unsqueeze(3), 0)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    rows: Tensor | None,
) -> Tensor:
    seen = _seen(q, k, spec, rows)
    mask = _mask(spec.bias, seen)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not _shares_heads(q, v, mask):
        k = _one_head_each(k, q)
        v = _one_head_each(v, q)
        grouped = False
    run = functools.partial(
        F.scaled_dot_product_attention,
        is_causal=spec.causal and seen is None,
        scale=spec.scale,
        enable_gqa=grouped,
    )
    if mask is None or not q.is_cuda:
        return run(q, k, v, mask)
    with _without_cudnn():
        return run(q, k, v, mask)


def _mask(bias: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """A bias, and which keys a query sees, as one mask."""
    if bias is None or seen is None:
        return seen if bias is None else bias
    if bias.dtype == torch.bool:
        return bias & seen
    return bias.masked_fill(~seen, -torch.inf)


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


def _seen(q: Tensor, k: Tensor, spec: Spec, rows: Tensor | None) -> Tensor | None:
    """Which keys a query sees by order and documents, broadcastable to the scores; None where a
    kernel knows."""
    kernel_knows_order = rows is None and spec.bias is None
    if spec.cu_seqlens is None and (kernel_knows_order or not spec.causal):
        return None
    rows = _range(q) if rows is None else rows
    keys = _range(k)
    before = rows.unsqueeze(1) >= keys if spec.causal else None
    if spec.cu_seqlens is None:
        return before
    of_query = _document(spec.cu_seqlens, rows)
    of_key = _document(spec.cu_seqlens, keys)
    same = (of_query.unsqueeze(2) == of_key.unsqueeze(1)).unsqueeze(1)
    return same if before is None else same & before


def _document(cu: Tensor, places: Tensor) -> Tensor:
    """The number of the document at each place, from 1; 0 in front of all, one more than there are
    behind them."""
    ends = cu.long().reshape(-1, cu.shape[-1])
    ends = ends.contiguous()
    places = places.expand(ends.shape[0], -1).contiguous()
    return torch.searchsorted(ends, places, right=True)


def _range(operand: Tensor) -> Tensor:
    return torch.arange(operand.shape[2], device=operand.device)


def _shares_heads(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes grouped queries; on CUDA flash alone does, and the others want
    heads of their own."""
    if not q.is_cuda:
        return True
    fits_flash = q.dtype in _HALF and q.shape[-1] == v.shape[-1] <= _FLASH_DIM
    return mask is None and fits_flash


def _one_head_each(operand: Tensor, q: Tensor) -> Tensor:
    """Keys or values with one head for every query head."""
    return operand.repeat_interleave(q.shape[1] // operand.shape[1], 1)


def _fits_varlen(q: Tensor, v: Tensor, spec: Spec) -> bool:
    dim = q.shape[-1]
    fits_flash = q.dtype in _HALF and dim == v.shape[-1] and dim <= _FLASH_DIM
    return q.is_cuda and fits_flash and dim % 8 == 0 and spec.bias is None and q.numel() > 0


@functools.cache
def _kernel() -> tuple[Callable[..., Any], bool]:
    """torch's kernel for documents, and whether it takes grouped queries (torch 2.12). Importing it
    takes a second."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """Documents of all rows of the batch, one after another, by a flash kernel.

    What is outside of documents becomes documents, too: the kernel leaves memory that belongs to
    none as it was.
    """
    kernel, groups = _kernel()
    batch, heads, length, _ = q.shape
    if not groups and heads != k.shape[1]:
        k = _one_head_each(k, q)
        v = _one_head_each(v, q)
    cu: Any = spec.cu_seqlens
    ends = F.pad(cu.clamp(0, length), (1, 0))
    ends = F.pad(ends, (0, 1), value=length)  # 0, cu_seqlens, length
    offsets = length * torch.arange(batch, device=q.device).unsqueeze(1)
    ends = (ends + offsets).flatten().int()
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    options: dict[str, Any] = {"enable_gqa": True} if groups else {}
    options["window_size"] = (-1, 0 if spec.causal else -1)
    out = kernel(*packed, ends, ends, length, length, scale=spec.scale, **options)
    return out.unflatten(0, (batch, length)).transpose(1, 2)
