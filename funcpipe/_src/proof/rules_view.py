"""Rules of ops that rearrange: views, joins and padding.

In: op contexts. Out: placements, with positions along the dim to which they went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from funcpipe._src.proof.align import Differs
from funcpipe._src.proof.op_context import (
    OpContext,
    Operand,
    all_replicated,
    elementwise,
    refuse_mixing,
    varying_dims,
)
from funcpipe._src.proof.placements import (
    ZERO,
    Average,
    Number,
    Partial,
    Placement,
    Refusal,
    Replicate,
    Shard,
    as_partial,
    replicated,
)
from funcpipe._src.proof.rules import kept, rule


def moved(operand: Operand, dim: int) -> Placement:
    """The placement of an operand whose split dim, if it has one, has become ``dim``."""
    if operand.shard:
        return operand.shard.at(dim)
    return operand.placement


def split_dim(operand: Operand) -> int:
    """The split dim; -1 if there is none."""
    return operand.shard.dim if operand.shard else -1


# ---- dims go elsewhere


@rule("detach", "view_as_complex", "view_as_real", "_conj", "_neg_view")
def _itself(op: OpContext) -> Placement:
    return op.operand().placement


@rule("permute")
def _permute(op: OpContext) -> Placement:
    operand = op.operand()
    dims = [dim % operand.ndim for dim in op.value("dims")]
    split = split_dim(operand)
    if split >= 0:
        return moved(operand, dims.index(split))
    return operand.placement


@rule("transpose", "t")
def _transpose(op: OpContext) -> Placement:
    operand = op.operand()
    if operand.ndim < 2:
        return operand.placement
    first, second = (op.dim("dim0"), op.dim("dim1")) if "dim0" in op.args else (0, 1)
    split = split_dim(operand)
    return moved(operand, {first: second, second: first}.get(split, split))


@rule("unsqueeze")
def _unsqueeze(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.value("dim") % (operand.ndim + 1)
    split = split_dim(operand)
    return moved(operand, split + 1 if split >= dim else split)


@rule("squeeze")
def _squeeze(op: OpContext) -> Placement:
    operand = op.operand()
    dims = [dim for dim in op.dims() if dim < operand.ndim]
    gone = [dim for dim in dims if operand.local[dim] == 1]
    if gone != [dim for dim in dims if operand.full[dim] == 1]:
        raise Refusal(
            f"it removes a dim of a tensor of shape {operand.local} that has size 1 "
            f"{op.words.at_owner} alone: name the dims to remove"
        )
    split = split_dim(operand)
    return moved(operand, split - sum(dim < split for dim in gone))


@rule("expand")
def _expand(op: OpContext) -> Placement:
    operand = op.operand()
    return moved(operand, split_dim(operand) + len(op.out.local) - operand.ndim)


@rule("repeat")
def _repeat(op: OpContext) -> Placement:
    operand = op.operand()
    placement = op.operand().placement
    extra = len(op.out.local) - operand.ndim
    for dim in range(operand.ndim):
        local, full = (times[dim + extra] for times in both(op.args["repeats"]))
        rows = _rows_of_repeat(op, operand, dim, (local, full))
        if rows is not None:
            placement = rows.at(dim + extra)
            continue
        once = operand.local[dim] == operand.full[dim] == 1
        if local != full and not once and not isinstance(placement, Number):
            raise Refusal(
                f"it repeats dim {dim} of {operand} as often as a {op.words.owner} has "
                f"{op.words.items}"
            )
        if isinstance(placement, Shard) and operand.split_at(dim):
            outer = placement.outer * local
            placement = Shard(dim + extra, placement.layout, outer, placement.inner)
    return placement


def _rows_of_repeat(
    op: OpContext,
    operand: Operand,
    dim: int,
    times: tuple[int, int],
) -> Shard | None:
    """How rows lie in a tensor that is repeated for each row; None if it is not."""
    varies = times[0] != times[1] and operand.local[dim] != 1
    if not varies or not op.split.rows:
        return None
    if not all_replicated([operand]):
        return None
    found = op.split.factor(times)
    if found is None:
        return None
    return Shard(dim, found[0], 1, found[1] * operand.local[dim])


@rule("view")
def _view(op: OpContext) -> Placement:
    operand = op.operand()
    out = op.out
    same_shape = operand.local == out.local and operand.full == out.full
    if same_shape or isinstance(operand.placement, Number):
        return operand.placement
    varying = varying_dims(out)
    if not operand.varying and not varying:
        return operand.placement
    old = _as_split(op, operand)
    before = math.prod(operand.local[: old.dim]) * old.outer
    after = math.prod(operand.local[old.dim + 1 :]) * old.inner
    if len(varying) != 1 or len(operand.varying) != 1 or not before * after:
        raise Refusal(_cuts_apart(op, " or joins them to others"))
    dim = varying[0]
    outer, rest_before = divmod(before, math.prod(out.local[:dim]))
    inner, rest_after = divmod(after, math.prod(out.local[dim + 1 :]))
    if rest_before or rest_after:
        raise Refusal(_cuts_apart(op, ""))
    return Shard(dim, old.layout, outer, inner)


def _cuts_apart(op: OpContext, how: str) -> str:
    return (
        f"it makes shape {op.out.local} of {op.operand()}, which cuts {op.words.items} apart{how}. "
        f"{op.words.keep_apart}"
    )


def _as_split(op: OpContext, operand: Operand) -> Shard:
    """The placement of a split operand, or of one that is constant along a dim that varies."""
    if operand.shard:
        return operand.shard
    found = None
    if len(operand.varying) == 1:
        dim = operand.varying[0]
        found = op.split.along(dim, operand.sizes(dim))
    if found is None or not isinstance(operand.placement, Replicate):
        raise Refusal(
            f"it makes shape {op.out.local} of {operand}; that is made from {op.words.length}"
        )
    return found


# ---- some entries


def choosing(op: OpContext, operand: Operand, dim: int, entries: str) -> str:
    """Why entries along positions cannot be chosen by number."""
    words = op.words
    return (
        f"it takes entries {entries} along dim {dim} of a tensor of shape {operand.local}, along "
        f"which a {words.owner} has {operand.local[dim]} of {operand.full[dim]} {words.items}: "
        f"those have other numbers on one device. {words.choose_advice}"
    )


@rule("select")
def _select(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    if operand.split_at(dim):
        raise Refusal(choosing(op, operand, dim, f"{both(op.args['index'])[0]}"))
    if not operand.constant_along(dim):
        op.value("index")
    return _without(operand, dim)


def _without(operand: Operand, dim: int) -> Placement:
    """The placement of an operand that loses a dim in which it is not split."""
    split = split_dim(operand)
    return moved(operand, split - 1 if split > dim else split)


@rule("slice")
def _slice(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    local, full = taken(op, operand, dim)
    if local == range(operand.local[dim]) and full == range(operand.full[dim]):
        return operand.placement
    if operand.split_at(dim):
        raise Refusal(choosing(op, operand, dim, _written(local)))
    constant = operand.constant_along(dim) or isinstance(operand.placement, Number)
    if local != full and not constant:
        raise Refusal(
            f"it takes entries {_written(local)} of a tensor of shape {operand.local}, as many as "
            f"a {op.words.owner} has {op.words.items}: {op.words.cut_advice}"
        )
    return operand.placement


def taken(op: OpContext, operand: Operand, dim: int) -> tuple[range, range]:
    """The entries that a slice takes, on a rank and on one device."""
    starts, ends, steps = (both(op.args[name]) for name in ("start", "end", "step"))
    local = range(operand.local[dim])[starts[0] : ends[0] : steps[0]]
    full = range(operand.full[dim])[starts[1] : ends[1] : steps[1]]
    return local, full


def both(value: Any) -> tuple[Any, Any]:
    """An argument on a rank and on one device."""
    if isinstance(value, Differs):
        return (value.local, value.full)
    return (value, value)


def _written(entries: range) -> str:
    step = f":{entries.step}" if entries.step != 1 else ""
    return f"{entries.start}:{entries.stop}{step}"


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(op: OpContext) -> Placement:
    operand = op.operand()
    if len(op.outs) == 1 and op.out.local == operand.local and op.out.full == operand.full:
        return operand.placement
    refuse_mixing(operand, [op.dim()], "cuts pieces")
    op.check_values()
    return operand.placement


@rule("unbind")
def _unbind(op: OpContext) -> Placement:
    operand = op.operand()
    dim = op.dim()
    refuse_mixing(operand, [dim], "takes one entry after another")
    return _without(operand, dim)


@rule("diagonal")
def _diagonal(op: OpContext) -> Placement:
    operand = op.operand()
    dims = (op.dim("dim1"), op.dim("dim2"))
    refuse_mixing(operand, dims, "takes the diagonal")
    op.check_values()
    split = split_dim(operand)
    return moved(operand, split - sum(dim < split for dim in dims))


@rule("unfold")
def _unfold(op: OpContext) -> Placement:
    refuse_mixing(op.operand(), [op.dim("dimension")], "takes windows")
    op.check_values()
    return op.operand().placement


# ---- joins


@rule("cat")
def _cat(op: OpContext) -> Placement:
    ndim = len(op.out.local)
    dim = op.value("dim") % ndim
    operands = []
    for operand in op.args["tensors"]:
        if operand.local != (0,) or ndim == 1:  # torch leaves empty 1-d tensors out
            operands.append(operand)
    if not any(operand.varies(dim) for operand in operands):
        return _beside(op, operands)
    splits = [_joined_dim(op, operand, dim) for operand in operands]
    first = splits[0]
    if any((other.layout, other.inner) != (first.layout, first.inner) for other in splits):
        raise Refusal(f"it joins {_listed(operands)} along dim {dim}")
    return Shard(dim, first.layout, sum(split.outer for split in splits), first.inner)


def _listed(operands: Sequence[Operand]) -> str:
    return " and ".join(map(str, operands))


def _joined_dim(op: OpContext, operand: Operand, dim: int) -> Shard:
    """How positions lie in an operand along a dim that is joined."""
    words = op.words
    if not operand.varies(dim):
        raise Refusal(
            f"it puts {operand} before or behind {words.share}, along dim {dim}: every "
            f"{words.owner} would have it, and one device has it once. {words.join_advice}"
        )
    split = operand.split_at(dim)
    if split is not None:
        return split
    found = op.split.along(dim, operand.sizes(dim))
    is_number = isinstance(operand.placement, Number) and operand.placement.constant
    if found is None or not is_number:
        refuse_mixing(operand, [dim], "joins")
    assert found is not None
    return found


def _beside(op: OpContext, operands: Sequence[Operand]) -> Placement:
    """The placement of operands that are joined along a dim in which none of them has positions."""
    placements = [operand.placement for operand in operands]
    if any(isinstance(placement, Shard) for placement in placements):
        return elementwise(op, operands, len(op.out.local))
    if all(map(replicated, placements)):
        return Replicate()
    sums = {as_partial(op.split, placement) for placement in placements if placement != ZERO}
    first = next(iter(sums))
    if len(sums) == 1 and isinstance(first, Partial | Average):
        return first
    raise Refusal(f"it joins {_listed(operands)}")


@rule("stack")
def _stack(op: OpContext) -> Placement:
    operands = op.args["tensors"]
    dim = op.value("dim") % len(op.out.local)
    if any(operand.shard for operand in operands):
        placement = elementwise(op, operands, operands[0].ndim)
        return placement.at(placement.dim + (placement.dim >= dim))
    return _beside(op, operands)


@rule("constant_pad_nd")
def _pad(op: OpContext) -> Placement:
    operand = op.operand()
    pad = op.value("pad")
    changed = [operand.ndim - 1 - k // 2 for k in range(len(pad)) if pad[k]]
    refuse_mixing(operand, changed, "puts padding")
    with_zeros = op.value("value") == 0
    if isinstance(operand.placement, Partial | Average) and with_zeros:
        return operand.placement
    return kept(operand)
