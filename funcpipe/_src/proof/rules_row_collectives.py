"""Rules of collectives over the axes that split rows, which a loss function calls by name.

One device has one rank on every axis, and all rows. So a sum over ranks, of sums over their rows,
is there the sum over all rows. But a tensor that comes neither from params nor from the batch is
every rank's own, and the collective adds it up as often as there are ranks.

In: op contexts, where the rows of a batch are split. Out: placements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcpipe._src.proof.align import AlignedTensor, Differs
from funcpipe._src.proof.op_context import OpContext, Operand
from funcpipe._src.proof.placements import (
    Average,
    Local,
    Number,
    Partial,
    Placement,
    Refusal,
    Replicate,
    Shard,
    as_partial,
    replicated,
)
from funcpipe._src.proof.recording import NAMED
from funcpipe._src.proof.rules import rule
from funcpipe._src.proof.rules_collectives import summed_over
from funcpipe._src.proof.rules_edges import RankIndex, Shuffled, handed_on
from funcpipe._src.proof.rules_row_reductions import Largest


@rule(NAMED, rows=True)
def _collective(op: OpContext) -> Placement:
    kind, names = op.value("kind"), op.value("axes").split(",")
    own = tuple(axis for axis in names if axis in op.split.live)
    if kind == "axis_index":
        return RankIndex(own) if own else Replicate()
    if not own:
        return _over_others(kind, op.operand("x"))
    if len(own) < len(names):
        raise Refusal(
            f"it names {_listed(own)}, which split the rows, and other axes: call it for each of "
            "them"
        )
    of = _of_constant if op.value("free") else _of_rows
    return of(op, kind, own)


def _over_others(kind: str, operand: Operand) -> Placement:
    """Over axes that have as many ranks on one device."""
    placement = operand.placement
    if kind in ("psum", "pmean") or replicated(placement):
        return placement
    if kind == "pmax" and isinstance(placement, Shard):
        return placement
    raise Refusal(f"its operand is {operand}, which goes to other ranks")


# ---- of tensors that come from params and batch


def _of_rows(op: OpContext, kind: str, own: Sequence[str]) -> Placement:
    operand = op.operand("x")
    if kind == "psum":
        return _sum(op, operand, own)
    if kind == "pmean":
        return _mean(op, operand, own)
    if kind == "all_gather":
        return _gathered(op, operand, own)
    found = None
    if kind == "pmax":
        found = _maximum(operand, own)
    elif tuple(own) == op.split.live:
        found = _moved(op, kind, operand, own)
    if found is None:
        raise Refusal(
            f"its operand is {operand}, and what it makes of the rows of other ranks cannot be "
            "proven to be what one device computes"
        )
    return found


def _sum(op: OpContext, operand: Operand, own: Sequence[str]) -> Placement:
    placement = as_partial(op.split, operand.placement)
    if isinstance(placement, Partial) and set(own) <= set(placement.axes):
        return summed_over(placement, own)
    if replicated(placement):
        raise Refusal(
            f"its operand is {op.split.text(placement)}, so the sum over {_listed(own)} would hold "
            "it once for every rank"
        )
    raise Refusal(f"its operand is {operand}: take the sum over rows first, and psum that")


def _mean(op: OpContext, operand: Operand, own: Sequence[str]) -> Placement:
    placement, live = as_partial(op.split, operand.placement), set(op.split.live)
    if replicated(placement) and not operand.varying:
        return Replicate()
    if set(own) == live:
        if isinstance(placement, Average) and set(placement.layout.axes) == live:
            return Replicate()
        if isinstance(placement, Partial) and set(placement.axes) == live:
            return placement  # every rank has its share of the sum
    raise Refusal(
        f"its operand is {operand}: one device has the mean over ranks of means over all their "
        "rows, and of nothing else"
    )


def _maximum(operand: Operand, own: Sequence[str]) -> Placement | None:
    placement = operand.placement
    if replicated(placement):
        return None if operand.varying else Replicate()
    if not isinstance(placement, Largest) or placement.how != "max":
        return None
    if not set(own) <= set(placement.axes):
        return None
    left = tuple(axis for axis in placement.axes if axis not in own)
    return Largest(left, "max") if left else Replicate()


def _moved(
    op: OpContext,
    kind: str,
    operand: Operand,
    own: Sequence[str],
) -> Placement | None:
    """Last rows that go to the next rank; columns of sums, or rows for columns and back."""
    options, ranks = op.args["options"], op.value("ranks")
    if kind == "ppermute":
        if isinstance(options, Differs):
            perm = Differs(options.local["perm"], options.full["perm"])
        else:
            perm = options["perm"]
        return handed_on(operand.placement, perm, ranks)
    if isinstance(options, Differs) or not options["tiled"]:
        return None
    if kind == "psum_scatter":
        return _scattered(op, operand, options["dim"] % operand.ndim, own)
    if kind == "all_to_all":
        dims = options["split_dim"] % operand.ndim, options["concat_dim"] % operand.ndim
        return _exchanged(operand, dims, own, ranks)
    return None


def _scattered(
    op: OpContext,
    operand: Operand,
    dim: int,
    own: Sequence[str],
) -> Shard | None:
    placement = operand.placement
    if not isinstance(placement, Partial) or set(placement.axes) != set(own) or operand.varying:
        return None
    for layout in op.split.lengths:
        if layout.axes == tuple(own):
            return Shard(dim, layout, 1, operand.local[dim] // op.value("ranks"))
    return None


def _exchanged(
    operand: Operand,
    dims: tuple[int, int],
    own: Sequence[str],
    ranks: int,
) -> Shard | None:
    """Rows, along the second of the dims, become columns, along the first."""
    cut, joined = dims
    placement = operand.split_at(joined)
    if placement is None or placement.outer != 1 or operand.varying != [joined]:
        return None
    if placement.layout.axes != tuple(own) or cut == joined:
        return None
    return Shard(cut, placement.layout, 1, operand.local[cut] // ranks)


def _gathered(op: OpContext, operand: Operand, own: Sequence[str]) -> Placement:
    options = op.value("options")
    dim = options["dim"] % operand.ndim
    placement, live = operand.split_at(dim), op.split.live
    has_rows = placement is not None and placement.outer == 1 and operand.varying == [dim]
    if placement is None or not has_rows or not options["tiled"]:
        raise Refusal(
            f"its operand is {operand}: gather a tensor that has rows, along their dim, tiled"
        )
    if placement.layout.axes == live:
        if tuple(own) == live:
            return Replicate()
        if set(own) == set(live):
            return Shuffled(dim)
    raise Refusal(
        f"it joins the rows of the ranks of {_listed(own)}, but the batch is split over "
        f"{' and '.join(map(_axis, live))}"
    )


# ---- of what every rank has by itself


def _of_constant(op: OpContext, kind: str, own: Sequence[str]) -> Placement:
    operand, ranks = op.operand("x"), op.value("ranks")
    placement = operand.placement
    is_index = isinstance(placement, RankIndex) and set(placement.axes) <= set(own)
    if isinstance(placement, Local) and not is_index:
        raise Refusal(f"its operand is {operand}")
    if not operand.varying:
        if kind in ("pmax", "pmean", "all_gather"):
            return Replicate() if is_index else placement
        if kind == "psum" and isinstance(placement, Number):
            if placement.constant:
                return Number(placement.local * ranks, placement.full * ranks)
            if op.split.counted(placement) is not None:
                return Number(placement.local * ranks, placement.full)
        if kind == "psum" and (is_index or isinstance(placement, Replicate)):
            return Replicate()
    tensor = op.call.args["x"]
    value = op.value_of(tensor) if isinstance(tensor, AlignedTensor) else None
    if value is not None and _same_for_all(op, kind, value, ranks):
        return Replicate()
    raise Refusal(
        f"its operand is {operand}: ranks get different parts of it, and one device has one"
    )


def _same_for_all(op: OpContext, kind: str, value: Tensor, ranks: int) -> bool:
    """Whether every rank gets the same of what all ranks have."""
    options = op.value("options")
    if kind == "ppermute":
        return len(options["perm"]) == ranks
    dim = options["dim" if kind == "psum_scatter" else "split_dim"]
    pieces = value.chunk(ranks, dim)
    return len(pieces) == ranks and all(torch.equal(piece, pieces[0]) for piece in pieces)


def _listed(axes: Sequence[str]) -> str:
    return ", ".join(map(repr, axes))


def _axis(name: str) -> str:
    return repr(name) if name.isidentifier() else "microbatches"
