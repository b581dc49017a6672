"""Grouped products: ``F.grouped_mm`` on fakes in every dtype that its kernels take.

Torch's own fake takes bfloat16 alone, while the kernels take float32 and float16 too; and without
CUDA it leaves out the padding of the rows that the kernels make (2.13).

In: fakes of the operands. Out: a fake of the product; or an error as the kernel raises it, which
`explain_grouped` puts into words with the user's line. And what experts take that do without them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx
from torch._subclasses import fake_impls

from funcpipe._src.core.source_lines import line_of
from funcpipe._src.graph.ops import base_of
from funcpipe.errors import TraceError

GROUPED = torch.ops.aten._grouped_mm.default
_TAKES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED = 16  # bytes
_DTYPE = "Expected inputs of BF16 type"  # so torch's fake begins
_STRIDES = ("Invalid strides/sizes, got", "strides should be multiple of 16 bytes")


def _product(
    mode: Any,
    func: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Any:
    """A fake of a grouped product; left to torch where it knows better."""
    known = (
        a.dtype in _DTYPES and b.dtype == a.dtype and bias is None and out_dtype in (None, a.dtype)
    )
    if not known or a.dim() not in (2, 3) or b.dim() not in (2, 3):
        return NotImplemented
    for name, x in (("mat_a", a), ("mat_b", b)):
        _check_strides(name, x)
    two_dims = (a.dim() == 2, b.dim() == 2)
    if (offs is None) != (two_dims == (False, False)):
        raise RuntimeError("grouped_mm takes offs where an operand has two dims, and only there")
    if two_dims != (True, True) and a.shape[-1] != b.shape[-2]:
        raise RuntimeError("contraction dimension of mat_a and mat_b must match")
    groups = {(True, True): offs, (True, False): b, (False, True): a, (False, False): a}[
        two_dims
    ].shape[:1]
    if offs is not None and offs.shape != groups:
        raise RuntimeError("matrix batch sizes have to match")
    rows, columns = a.shape[-2], b.shape[-1]
    shape = (rows, columns) if two_dims[0] != two_dims[1] else (*groups, rows, columns)
    aligned = 1 if torch.version.hip else _ALIGNED // a.itemsize
    padded = -(-columns // aligned) * aligned
    stride = (rows * padded, padded, 1)[-len(shape) :]
    with mode:
        return torch.empty_strided(shape, stride, dtype=a.dtype, device=a.device)


def _check_strides(name: str, x: torch.Tensor) -> None:
    """RuntimeError unless the kernel takes the layout: rows or columns dense, the other stride
    aligned."""
    (rows, columns), (down, right) = x.shape[-2:], x.stride()[-2:]
    if down == 1 and right >= max(1, rows):
        stride = right
    elif right == 1 and down >= max(1, columns):
        stride = down
    else:
        raise RuntimeError(
            f"Invalid strides/sizes, got {x.stride()} for strides of {name} and {tuple(x.shape)} "
            "for sizes"
        )
    if stride * x.itemsize % _ALIGNED:
        raise RuntimeError(
            f"strides should be multiple of 16 bytes, but one of {name} is {stride} of {x.dtype}"
        )


if GROUPED not in fake_impls.op_implementations_dict:
    fake_impls.register_op_impl(GROUPED)(_product)


def copied_experts(graph: fx.Graph, params: int) -> int:
    """Bytes of weights of experts that are copied for every token, as ``batched_mm`` does before
    its product.

    Args:
        graph: of a loss function, whose first ``params`` placeholders are the params'.
    """
    weights = set(itertools.islice((x for x in graph.nodes if x.op == "placeholder"), params))
    found = 0
    for node in graph.nodes:
        if node.target not in _TAKES or base_of(node.args[0]) not in weights:
            continue
        copies, source = node.meta["val"], node.args[0].meta["val"]
        if copies.dim() == source.dim() == 3 and copies.numel() > source.numel():
            found += copies.nbytes
    return found


def explain_grouped(error: BaseException) -> TraceError | None:
    """The error of a grouped product on fakes in words; None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    text, where = str(error), line_of(error) or ""
    if text.startswith(_DTYPE):
        got = text.partition("mat_a.dtype=")[2].split(" ")[0] or "another dtype"
        return TraceError(
            f"the loss function calls grouped_mm{where} with {got}: there are kernels for "
            "bfloat16, float16 and "
            'float32. Compute in one of them (fp.mixed_precision(compute="bfloat16")); experts '
            "of transformers "
            'compute in any dtype with config._experts_implementation = "batched_mm"'
        )
    if any(sign in text for sign in _STRIDES):
        return TraceError(
            f"the loss function calls grouped_mm{where}, whose kernel does not take an operand, or "
            f"the gradient of its result, as it lies in memory: {text.rstrip('.')}. Make it "
            "contiguous (an expanded gradient, as of a plain sum(), is not), and pad its last "
            "dims to multiples of 16 bytes"
        )
    return None
