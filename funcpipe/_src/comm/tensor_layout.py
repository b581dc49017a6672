"""Tensor layout: in which order the elements of a message travel, and what errors call tensors.

In: tensors.
Out: flat views of them, yes or no, words.

A tensor is dense when its elements fill its storage range without gaps or overlaps, in any order of
dims. Its elements travel in memory order when it is dense, else in row-major order. A message is
the elements alone, so both ends must have the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from funcpipe._src.core.mesh import Axes


def message_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of the order in which elements travel, with 0 for dims that have one element.

    >>> message_strides(torch.empty(2, 1, 3).permute(2, 1, 0))
    (1, 0, 3)
    >>> message_strides(torch.empty(4, 9)[:, :3])
    (3, 1)
    """
    strides = tensor.stride() if is_dense(tensor) else _row_major(tensor.shape)
    dims = zip(tensor.shape, strides, strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in dims)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their storage range without gaps or overlaps, in any order of dims.

    >>> is_dense(torch.empty(2, 3).T), is_dense(torch.empty(2, 3)[:, :2])
    (True, False)
    >>> is_dense(torch.empty(1).expand(3))
    False
    """
    if tensor.is_contiguous():
        return True
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    expected = 1
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in the order in which they travel, as a 1-d tensor.

    A view where the tensor is dense, a copy otherwise.

    >>> flat(torch.arange(6).view(2, 3).T).tolist()
    [0, 1, 2, 3, 4, 5]
    >>> flat(torch.arange(6).view(2, 3)[:, 1:]).tolist()
    [1, 2, 4, 5]
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.contiguous().view(-1)


@torch.no_grad()
def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy."""
    return tensor.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def fold(tensors: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The sum (``"sum"``) or maximum (``"max"``) of tensors of one shape, in the given order.

    The result is a new tensor.

    >>> fold([torch.tensor([1, 5]), torch.tensor([2, 3])], "max")
    tensor([2, 5])
    """
    folded = fresh(tensors[0])
    for tensor in tensors[1:]:
        if op == "sum":
            folded.add_(tensor)
        else:
            torch.maximum(folded, tensor, out=folded)
    return folded


def same_layout(sent: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether the two ends of a message agree in number, shapes, dtypes and order of elements."""
    if len(sent) != len(expected):
        return False
    for one, other in zip(sent, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.stride() == other.stride() or not one.numel():
            continue
        if message_strides(one) != message_strides(other):
            return False
    return True


def spec(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    """A shape and dtype in words.

    >>> spec((2, 3), torch.float32)
    'float32[2, 3]'
    """
    name = str(dtype).removeprefix("torch.")
    sizes = ", ".join(map(str, shape))
    return f"{name}[{sizes}]"


def specs(tensors: Sequence[torch.Tensor], strides: bool = False) -> str:
    """The tensors of a message in words.

    >>> specs([torch.empty(2, 3).T, torch.empty(())], strides=True)
    '(float32[3, 2] with strides (1, 3), float32[] with strides ())'
    """
    texts = []
    for tensor in tensors:
        text = spec(tensor.shape, tensor.dtype)
        if strides:
            text += f" with strides {tensor.stride()}"
        texts.append(text)
    return f"({', '.join(texts)})"


def check_op(op: str) -> None:
    """ValueError unless a reduction of that name exists."""
    if op not in ("sum", "max"):
        raise ValueError(f"all_reduce takes op='sum' or op='max', not {op!r}")


def check_shards(
    kind: str,
    tensor: torch.Tensor,
    axes: Axes,
    ranks: int,
) -> None:
    """ValueError unless a tensor has one shard for every rank along dim 0."""
    if tensor.dim() == 0 or tensor.shape[0] != ranks:
        found = spec(tensor.shape, tensor.dtype)
        raise ValueError(
            f"{kind} over {axes} takes one shard for each of {ranks} ranks along dim 0, not {found}"
        )
