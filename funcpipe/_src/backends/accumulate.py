"""Accumulate: how a backend adds gradients and outputs up over microbatches.

A compiled backend holds the sums of gradients with fewer bits than `Backend.accumulate_dtype` in
that dtype, until the last summand is in.

In: ADD instructions of a program, a backend. Out: for each a function from what the sum holds (None
at first) and a summand to what the sum holds then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.backends.backend import Backend
from funcpipe._src.backends.grad_accumulation import GradientGemm
from funcpipe._src.graph.ids import OfArg, ValueId
from funcpipe._src.program import ADD, Instruction, Program

Adder = Callable[[Any, Any], Tensor]


def additions(program: Program) -> Iterator[tuple[int, Instruction]]:
    """The ADD instructions of a program, with their numbers."""
    for number, instruction in enumerate(program.instructions):
        if instruction.op == ADD:
            yield number, instruction


def last_summands(program: Program) -> dict[ValueId, int]:
    """For every sum the number of its last summand."""
    found = {}
    for _, add in additions(program):
        found[add.writes[0]] = add.nth
    return found


def is_gradient(total: ValueId) -> bool:
    """Whether a sum is that of a partial gradient."""
    is_sum = total.kind in ("sum", "unsharded")
    return is_sum and isinstance(total.name, OfArg)


def sum_dtype(
    add: Instruction,
    last: int,
    backend: Backend,
    program: Program,
) -> torch.dtype | None:
    """The dtype in which summands up to the ``last`` one are added up; None for that of the first,
    as it comes."""
    (summand,) = add.reads
    (total,) = add.writes
    own = add.dtype
    if own is None and summand.kind == "value":
        own = program.tensors[summand].dtype
    widens = backend.fuses and last and is_gradient(total)
    if widens and own is not None and own.is_floating_point:
        return torch.promote_types(own, backend.accumulate_dtype)
    return own if add.dtype or backend.fuses else None


def final_dtype(
    add: Instruction,
    last: int,
    backend: Backend,
    program: Program,
) -> torch.dtype | None:
    """The dtype to which the last summand casts a sum that was held in another one; else None."""
    if add.nth != last:
        return None
    held = sum_dtype(add, last, backend, program)
    own = sum_dtype(add, 0, backend, program)
    return None if held == own else own


def adders(
    program: Program,
    backend: Backend,
    gradient_gemms: frozenset[ValueId],
) -> Mapping[int, Adder]:
    """By number of the instruction, how every ADD adds."""
    lasts = last_summands(program)
    found: dict[int, Adder] = {}
    for number, add in additions(program):
        last = lasts[add.writes[0]]
        dtype = sum_dtype(add, last, backend, program)
        takes = add_gemm if add.reads[0] in gradient_gemms else add_nth
        found[number] = takes(add.nth, dtype)
        final = final_dtype(add, last, backend, program)
        if final is not None:
            found[number] = _then_cast(found[number], final)
    return found


def add_nth(nth: int, dtype: torch.dtype | None) -> Adder:
    """Adds the nth tensor. The second makes a new tensor: the first may be shared."""
    add = (_take, torch.add, Tensor.add_)[min(nth, 2)]
    if dtype is None:
        return add

    def cast_and_add(total: Any, summand: Tensor) -> Tensor:
        return add(total, summand.to(dtype))

    return cast_and_add


def _take(_: None, summand: Tensor) -> Tensor:
    return summand


def add_gemm(nth: int, dtype: torch.dtype | None) -> Adder:
    """Adds the nth gradient GEMM."""
    assert dtype is not None

    def first(_: None, gemm: GradientGemm) -> Tensor:
        return gemm.materialize(dtype)

    def later(total: Tensor, gemm: GradientGemm) -> Tensor:
        return gemm.accumulate_into(total)

    return later if nth else first


def _then_cast(add: Adder, dtype: torch.dtype) -> Adder:
    def add_and_cast(total: Any, summand: Any) -> Tensor:
        return add(total, summand).to(dtype)

    return add_and_cast
