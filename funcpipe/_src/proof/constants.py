"""Constants: tensors that a loss function makes of numbers alone, such as tables of relative
positions, have their values.

Where the ops that made one do not tell how its entries go with those of rows beside it, its values
do.

In: two tapes. Out: whether a constant of a part is what one device has for the part's rows, in some
layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from funcpipe._src.proof.align import Pair, Walk
from funcpipe._src.proof.op_recorder import CONSTANT, Entry, Ref, Tape, refs, writes
from funcpipe._src.proof.placements import Shard, World

_LARGEST = 1 << 20  # numbers in a tensor that is computed


class Constants:
    """The values of what two tapes make of numbers alone."""

    def __init__(self, walk: Walk) -> None:
        self.a, self.b = _Values(walk.a), _Values(walk.b)

    def value(self, x: Pair) -> torch.Tensor | None:
        """The value of a tensor of numbers alone that a part and one device have alike."""
        a, b = self.a.of(x.number), self.b.of(x.other)
        return a if a is not None and b is not None and torch.equal(a, b) else None

    def lies(self, x: Pair, state: Shard, world: World) -> bool:
        """Whether a tensor is made of numbers alone, and is split by rows in a layout."""
        own, whole = world.lengths[state.part]
        if any(math.prod(shape) > _LARGEST for shape in (x.a, x.b)) or not own:
            return False
        rest = state.outer * state.inner
        if (x.a[state.dim], x.b[state.dim]) != (own * rest, whole * rest):
            return False
        a, b = self.a.of(x.number), self.b.of(x.other)
        if a is None or b is None:
            return False
        part, all_rows = (
            v.unflatten(state.dim, (state.outer, n, state.inner)) for v, n in ((a, own), (b, whole))
        )
        return all(torch.equal(part, rows) for rows in all_rows.split(own, state.dim + 1))


class _Values:
    """Values of one tape."""

    def __init__(self, tape: Tape) -> None:
        self.maker: dict[int, tuple[Entry, int]] = {}
        self.known: dict[int, torch.Tensor | None] = {}
        for e in tape.entries:
            for k, out in enumerate(e.outs):
                self.maker.setdefault(out.number, (e, k))
            if writes(e):
                self.known |= dict.fromkeys(
                    (r.number for r in (*refs(e.args.values()), *e.outs)), None
                )

    def of(self, number: int) -> torch.Tensor | None:
        """The value of a tensor; None if it comes from params, the batch or a rank, or changes."""
        if number not in self.known:
            self.known[number] = (
                self._computed(*self.maker[number]) if number in self.maker else None
            )
        return self.known[number]

    def _computed(self, e: Entry, k: int) -> torch.Tensor | None:
        if e.name == CONSTANT:
            return e.args["value"]
        tags = getattr(e.func, "tags", ())
        if (
            not hasattr(e.func, "_schema")
            or e.func.namespace != "aten"
            or torch.Tag.nondeterministic_seeded in tags
        ):
            return None
        values = {r.number: self.of(r.number) for r in refs(e.args.values())}
        if None in values.values() or math.prod(e.outs[k].shape) > _LARGEST:
            return None
        args = tree_map_only(Ref, lambda r: values[r.number], e.args) | (
            {"device": "cpu"} if "device" in e.args else {}
        )
        return _called(e.func, args, k)


def _called(func: Any, args: dict[str, Any], k: int) -> torch.Tensor:
    names = func._schema.arguments
    given: Sequence[Any] = [args[p.name] for p in names if not p.kwarg_only]
    out = func(*given, **{p.name: args[p.name] for p in names if p.kwarg_only})
    return out if isinstance(out, torch.Tensor) else out[k]
