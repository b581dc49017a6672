"""Grouped products: ``F.grouped_mm`` on fakes in every dtype that its kernels take.

Torch's own fake takes bfloat16 alone, while the kernels take float32 and float16 too. Without CUDA
it also leaves out the padding of rows that the kernels make (2.13).

In: fakes of the operands. Out: a fake of the product, or an error as the kernel raises it, which
`explain_grouped` puts into words with the user's line. `copied_experts` counts what a loss function
copies that uses no grouped product.
"""

from __future__ import annotations

import itertools
import re
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
# So torch's fake begins; the second is that of 2.14.
_DTYPE = ("Expected inputs of BF16 type", "Expected mat_a to be BFloat16")
_STRIDES = ("Invalid strides/sizes, got", "strides should be multiple of 16 bytes")


def _product(
    mode: Any,
    func: Any,
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Any:
    """A fake of a grouped product; left to torch in cases that torch knows better."""
    dtype = mat_a.dtype
    dtypes_known = dtype in _DTYPES and mat_b.dtype == dtype and out_dtype in (None, dtype)
    dims_known = mat_a.dim() in (2, 3) and mat_b.dim() in (2, 3)
    if not dtypes_known or not dims_known or bias is not None:
        return NotImplemented
    _check_strides("mat_a", mat_a)
    _check_strides("mat_b", mat_b)
    groups = _groups(mat_a, mat_b, offs)
    rows, columns = mat_a.shape[-2], mat_b.shape[-1]
    shape = (*groups, rows, columns) if mat_a.dim() == mat_b.dim() else (rows, columns)
    aligned = 1 if torch.version.hip else _ALIGNED // mat_a.itemsize
    padded = -(-columns // aligned) * aligned
    stride = (rows * padded, padded, 1)[-len(shape) :]
    with mode:
        return torch.empty_strided(shape, stride, dtype=dtype, device=mat_a.device)


def _groups(mat_a: torch.Tensor, mat_b: torch.Tensor, offs: Any) -> torch.Size:
    """The number of groups as a shape.

    Raises:
        RuntimeError: the shapes of the operands do not fit, as the kernel says it.
    """
    dims = mat_a.dim(), mat_b.dim()
    if (offs is None) != (dims == (3, 3)):
        raise RuntimeError("grouped_mm takes offs where an operand has two dims, and only there")
    if dims != (2, 2) and mat_a.shape[-1] != mat_b.shape[-2]:
        raise RuntimeError("contraction dimension of mat_a and mat_b must match")
    grouped = mat_a if mat_a.dim() == 3 else mat_b
    if dims == (2, 2):
        grouped = offs
    groups = grouped.shape[:1]
    if offs is not None and offs.shape != groups:
        raise RuntimeError("matrix batch sizes have to match")
    return groups


def _check_strides(name: str, matrix: torch.Tensor) -> None:
    """Check that the kernel takes a layout: rows or columns dense, the other stride aligned.

    Raises:
        RuntimeError: it does not.
    """
    rows, columns = matrix.shape[-2:]
    down, right = matrix.stride()[-2:]
    if down == 1 and right >= max(1, rows):
        stride = right
    elif right == 1 and down >= max(1, columns):
        stride = down
    else:
        raise RuntimeError(
            f"Invalid strides/sizes, got {matrix.stride()} for strides of {name} and "
            f"{tuple(matrix.shape)} for sizes"
        )
    if stride * matrix.itemsize % _ALIGNED:
        raise RuntimeError(
            f"strides should be multiple of 16 bytes, but one of {name} is {stride} of "
            f"{matrix.dtype}"
        )


if GROUPED not in fake_impls.op_implementations_dict:
    fake_impls.register_op_impl(GROUPED)(_product)


def copied_experts(graph: fx.Graph, params: int) -> int:
    """Bytes of weights of experts that are copied for every token, as ``batched_mm`` does before
    its product.

    Args:
        graph: of a loss function, whose first ``params`` placeholders are the params'.
    """
    placeholders = graph.find_nodes(op="placeholder")
    weights = set(itertools.islice(placeholders, params))
    copied = 0
    for node in graph.nodes:
        if node.target not in _TAKES or base_of(node.args[0]) not in weights:
            continue
        copies = node.meta["val"]
        source = node.args[0].meta["val"]
        if copies.dim() == source.dim() == 3 and copies.numel() > source.numel():
            copied += copies.nbytes
    return copied


def explain_grouped(error: BaseException) -> TraceError | None:
    """The error of a grouped product on fakes in words; None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    where = line_of(error) or ""
    if text.startswith(_DTYPE):
        named = re.search(r"(?:mat_a\.dtype=|got )(torch\.\w+)", text)
        dtype = named[1] if named else "another dtype"
        return TraceError(
            f"the loss function calls grouped_mm{where} with {dtype}: there are kernels for "
            "bfloat16, float16 and float32. Compute in one of them "
            '(fp.mixed_precision(compute="bfloat16")); experts of transformers compute in any '
            'dtype with config._experts_implementation = "batched_mm"'
        )
    if any(sign in text for sign in _STRIDES):
        return TraceError(
            f"the loss function calls grouped_mm{where}, whose kernel does not take an operand, or "
            f"the gradient of its result, as it lies in memory: {text.rstrip('.')}. Make it "
            "contiguous (an expanded gradient, as of a plain sum(), is not), and pad its last "
            "dims to multiples of 16 bytes"
        )
    return None
