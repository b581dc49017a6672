"""Tensors on the wire: how they are laid out there, what both communicators refuse, how errors name
them.

Terms. A tensor is *dense* when its elements fill its storage range without gaps or overlaps, in any
order of dims. Its *wire order* is the order in which its elements travel: memory order when it is
dense, row-major otherwise. The wire carries elements only, so both ends must have the same wire
order.

In: tensors. Out: flat views of them, yes or no, words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from funcpipe._src.core.mesh import Axes


def wire_strides(x: torch.Tensor) -> tuple[int, ...]:
    """The strides of the wire order, with 0 for dims that have one element.

    >>> wire_strides(torch.empty(2, 1, 3).permute(2, 1, 0)), wire_strides(torch.empty(4, 9)[:, :3])
    ((1, 0, 3), (3, 1))
    """
    strides = x.stride() if is_dense(x) else _row_major(x.shape)
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape, strides, strict=True))


def is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill their storage range without gaps or overlaps, in any order of dims.

    >>> is_dense(torch.empty(2, 3).T), is_dense(torch.empty(2, 3)[:, :2]), is_dense(torch.empty(1).expand(3))
    (True, False, False)
    """
    if x.is_contiguous():
        return True
    expected = 1
    for stride, n in sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= n
    return True


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def flat(x: torch.Tensor) -> torch.Tensor:
    """The elements in wire order as a 1-d tensor: a view where the tensor is dense, a copy
    otherwise.

    >>> flat(torch.arange(6).view(2, 3).T).tolist(), flat(torch.arange(6).view(2, 3)[:, 1:]).tolist()
    ([0, 1, 2, 3, 4, 5], [1, 2, 4, 5])
    """
    if x.is_contiguous():
        return x.view(-1)
    return x.as_strided((x.numel(),), (1,)) if is_dense(x) else x.contiguous().view(-1)


@torch.no_grad()
def fresh(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy."""
    return x.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def fold(xs: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The sum (``"sum"``) or maximum (``"max"``) of tensors of one shape, in the given order: a new
    tensor.

    >>> fold([torch.tensor([1, 5]), torch.tensor([2, 3])], "max")
    tensor([2, 5])
    """
    out = fresh(xs[0])
    for x in xs[1:]:
        if op == "sum":
            out.add_(x)
        else:
            torch.maximum(out, x, out=out)
    return out


def same_layout(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> bool:
    """Whether the two ends of a message agree in number, shapes, dtypes and wire order."""
    if len(xs) != len(ys):
        return False
    for x, y in zip(xs, ys, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        if x.stride() != y.stride() and x.numel() and wire_strides(x) != wire_strides(y):
            return False
    return True


def spec(shape: Sequence[int], dtype: torch.dtype | None) -> str:
    """A shape and dtype in words.

    >>> spec((2, 3), torch.float32)
    'float32[2, 3]'
    """
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def specs(xs: Sequence[torch.Tensor], strides: bool = False) -> str:
    """The tensors of a message in words.

    >>> specs([torch.empty(2, 3).T, torch.empty(())], strides=True)
    '(float32[3, 2] with strides (1, 3), float32[] with strides ())'
    """
    tails = [f" with strides {x.stride()}" if strides else "" for x in xs]
    return (
        f"({', '.join(spec(x.shape, x.dtype) + tail for x, tail in zip(xs, tails, strict=True))})"
    )


def check_op(op: str) -> None:
    """ValueError unless a reduction of that name exists."""
    if op not in ("sum", "max"):
        raise ValueError(f"all_reduce takes op='sum' or op='max', not {op!r}")


def check_pieces(kind: str, x: torch.Tensor, axes: Axes, n: int) -> None:
    """ValueError unless ``x`` has one piece for every member along dim 0."""
    if x.dim() == 0 or x.shape[0] != n:
        what = spec(x.shape, x.dtype)
        raise ValueError(
            f"{kind} over {axes} takes one piece for each of {n} ranks along dim 0, not {what}"
        )
