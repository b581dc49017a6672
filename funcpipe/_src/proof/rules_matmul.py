"""Rules of products of matrices, which are written with letters as in einsum.

In: op contexts. Out: placements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from funcpipe._src.proof.op_context import OpContext, Operand, elementwise
from funcpipe._src.proof.placements import (
    Number,
    Partial,
    Placement,
    Refusal,
    Shard,
    add,
    mul,
    replicated,
)
from funcpipe._src.proof.rules import kept, rule

_LETTERS = {
    "mm": ("ik", "kj", "ij"),
    "bmm": ("bik", "bkj", "bij"),
    "mv": ("ik", "k", "i"),
    "dot": ("k", "k", ""),
    "vdot": ("k", "k", ""),
    "addmm": ("ik", "kj", "ij"),
    "baddbmm": ("bik", "bkj", "bij"),
    "addmv": ("ik", "k", "i"),
    "addbmm": ("bik", "bkj", "ij"),
}
_NAMES = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
}
_WITH_BIAS = ("addmm", "baddbmm", "addmv", "addbmm")


@dataclass(frozen=True)
class _Factor:
    """A factor, and a letter for each of its dims."""

    operand: Operand
    letters: str


@rule(*_LETTERS)
def _product(op: OpContext) -> Placement:
    left, right = (op.operand(name) for name in _NAMES[op.call.name])
    of_left, of_right, of_out = _LETTERS[op.call.name]
    placement = _contracted(op, _Factor(left, of_left), _Factor(right, of_right), of_out)
    if op.call.name not in _WITH_BIAS:
        return placement
    op.value("alpha")
    op.value("beta")
    bias = op.operand()
    if isinstance(placement, Shard):
        product = replace(left, local=op.out.local, full=op.out.full, placement=placement)
        return elementwise(op, [product, bias], len(op.out.local))
    if bias.shard:
        raise Refusal(f"it adds {bias} to {op.split.text(placement)}")
    return add(op.split, placement, bias.placement)


@rule("einsum")
def _einsum(op: OpContext) -> Placement:
    terms, _, of_out = op.value("equation").partition("->")
    of_left, of_right = terms.split(",")
    left, right = _Factor(op.operand(), of_left), _Factor(op.operand("other"), of_right)
    return _contracted(op, left, right, of_out)


def _contracted(
    op: OpContext,
    left: _Factor,
    right: _Factor,
    of_out: str,
) -> Placement:
    """The placement of the sum of products over all letters that the result lacks."""
    splits: list[tuple[str, Shard]] = []
    varying: set[str] = set()
    for factor in (left, right):
        varying.update(factor.letters[dim] for dim in factor.operand.varying)
        if isinstance(factor.operand.placement, Shard):
            letter = factor.letters[factor.operand.placement.dim]
            splits.append((letter, factor.operand.placement))
    if not splits:
        _check_sizes(op, left, right, varying - set(of_out))
        return mul(op.split, _summand(left.operand), _summand(right.operand))
    letter, placement = splits[0]
    for factor in (left, right):
        other = factor.operand.placement
        if not isinstance(other, Shard) and not replicated(other):
            raise Refusal(f"it multiplies {op.split.text(placement)} by {factor.operand}")
    _check_same_positions(op, left, right, splits)
    _check_sizes(op, left, right, varying - {letter} - set(of_out))
    if letter in of_out:
        return placement.at(of_out.index(letter))
    return Partial(op.split.axes(placement.layout))


def _check_same_positions(
    op: OpContext,
    left: _Factor,
    right: _Factor,
    splits: list[tuple[str, Shard]],
) -> None:
    letter, placement = splits[0]
    words = op.words
    if any(other != letter for other, _ in splits):
        attention = "" if op.split.rows else ": F.scaled_dot_product_attention, or fp.attention"
        raise Refusal(
            f"it multiplies {words.pairs} ({left.operand} with {right.operand}). "
            f"{words.keep_apart}{attention}"
        )
    if any(other.at(0) != placement.at(0) for _, other in splits):
        raise Refusal(
            f"its operands have {words.items} in different order, or not the same {words.items}"
        )


def _check_sizes(
    op: OpContext,
    left: _Factor,
    right: _Factor,
    summed: set[str],
) -> None:
    """Refuse sums along dims, without positions, whose size varies."""
    if summed:
        raise Refusal(
            f"it adds up products of {left.operand} and {right.operand} along a dim whose size is "
            f"made from {op.words.length}"
        )


def _summand(operand: Operand) -> Placement:
    """A factor's placement where a sum along it follows: a number is the same everywhere."""
    return kept(operand) if isinstance(operand.placement, Number) else operand.placement
