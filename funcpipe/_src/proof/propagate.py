"""Propagation: placements are carried from op to op, through memory that several tensors share.

A *root* is a tensor with memory of its own, its *views* lie in that memory. A view's placement
follows from its root's by the rules of the ops that made it. So where an op writes to a view, the
proof looks for a placement of the root from which that view gets the placement of the new entries.
Memory that one fill made may take any placement that agrees with the fill.

In: an alignment, placements of the tensors that came in. Out: a placement for every tensor of the
rank, and findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.proof import all_rules
from funcpipe._src.proof.aliasing import tensors_in, viewed_by, written_by
from funcpipe._src.proof.align import AlignedTensor, Alignment, OpCall
from funcpipe._src.proof.constants import Constants
from funcpipe._src.proof.custom_backward import GRADIENT
from funcpipe._src.proof.op_context import OpContext, Operand, check, varying_dims
from funcpipe._src.proof.placements import (
    ZERO,
    NoSum,
    Number,
    Partial,
    Placement,
    Refusal,
    Refused,
    Replicate,
    Shard,
    SplitContext,
    agrees,
    replicated,
)
from funcpipe._src.proof.recording import BUFFER, STATISTIC
from funcpipe._src.proof.rules import IGNORES_ENTRIES, KNOWN_CALLS, Finding, Placements, apply
from funcpipe._src.proof.rules_collectives import over_sequence
from funcpipe._src.proof.rules_gradients import check_gradient
from funcpipe.errors import SequenceError

assert all_rules  # every rule is registered
COLLECTIVE = "funcpipe::"
_SAME_ENTRIES = ("view", "unsqueeze", "squeeze", "detach", "clone", "_to_copy")
NoteFinding = Callable[[str, OpCall, Finding], None]


class Proof:
    """Placements by the number of a tensor of the rank.

    Args:
        alignment: of a rank and one device.
        split: what is split.
        note: is told of every known call.

    Attributes:
        made_by: the op that gave a tensor its placement.
        source: of a tensor that has another one's entries, in their order: that one.
        root: of a view, the tensor whose memory it shares; of any other tensor, itself.
        all_of: roots, and views of all of a root as it is.
        views: of a root: the calls that made them, and which result it is.
    """

    def __init__(
        self,
        alignment: Alignment,
        split: SplitContext,
        note: NoteFinding,
    ) -> None:
        self.alignment = alignment
        self.split = split
        self.note = note
        self.constants: Constants | None = None
        self.placements: dict[int, Placement] = {}
        self.made_by: dict[int, str] = {}
        self.source: dict[int, int] = {}
        self.pairs: dict[int, AlignedTensor] = {}
        self.root: dict[int, int] = {}
        self.all_of: set[int] = set()
        self.views: dict[int, list[tuple[OpCall, int]]] = {}

    def run(self, inputs: Sequence[Placement]) -> None:
        """Carry the placements of what came in through all calls.

        Raises:
            SequenceError: a known call cannot run on ranks, or the recordings differ.
        """
        pairs = self.alignment.inputs(len(inputs))
        for pair, placement in zip(pairs, inputs, strict=True):
            self._new(pair, placement)
        for call in self.alignment.calls():
            self._step(call)

    def varies(self, number: int) -> bool:
        """Whether a tensor has another shape on one device."""
        pair = self.pairs[number]
        return pair.local != pair.full

    def _new(self, pair: AlignedTensor, placement: Placement) -> None:
        self.placements[pair.number] = placement
        self.pairs[pair.number] = pair
        self.root.setdefault(pair.number, pair.number)
        self.all_of.add(pair.number)
        self.views.setdefault(pair.number, [])

    def _step(self, call: OpCall) -> None:
        placements = self._results(call)
        declared = call.name in (STATISTIC, BUFFER)
        if declared:
            self._write_declared(call, placements)
        written = written_by(call)
        for target in written:
            results = [out.number for out in call.outs[:1]]
            own_result = len(written) == 1 and results == [target.number]
            reshapes = torch.Tag.inplace_view in call.func.tags
            if own_result and reshapes and self._reshape_in_place(call, placements[0]):
                return
            unknown = Refused(
                f"{call.where}: nothing is known of this op in place; write its plain form"
            )
            if not own_result or reshapes:
                placements = [unknown] * len(placements)
            self._write(call, target, placements[0] if placements else unknown)
        numbers = {target.number for target in written}
        for place, (out, placement) in enumerate(zip(call.outs, placements, strict=True)):
            if out.number in numbers or (declared and out.number in self.placements):
                continue
            self._new_result(call, place, out, placement)

    def _new_result(
        self,
        call: OpCall,
        place: int,
        out: AlignedTensor,
        placement: Placement,
    ) -> None:
        self._new(out, placement)
        self.made_by[out.number] = self._maker(call, placement)
        if call.name in _SAME_ENTRIES and isinstance(call.args["self"], AlignedTensor):
            operand = call.args["self"].number
            self.source[out.number] = self.source.get(operand, operand)
        viewed = viewed_by(call)
        if viewed is None:
            return
        root = self.root[viewed.number]
        self.root[out.number] = root
        self.views[root].append((call, place))
        if call.name != "detach" or viewed.number not in self.all_of:
            self.all_of.discard(out.number)

    def _reshape_in_place(self, call: OpCall, placement: Placement) -> bool:
        """A call like ``squeeze_`` gives a tensor another shape; that is not known of its views."""
        out = call.outs[0]
        root = self.root[out.number]
        if root == out.number and self.views[root]:
            return False
        self.placements[out.number] = placement
        self.pairs[out.number] = out
        if root != out.number:
            self.all_of.discard(out.number)
            self.views[root].append((call, 0))
        return True

    def _write_declared(self, call: OpCall, placements: list[Placement]) -> None:
        """A declared batch statistic may also change what it gets."""
        for out, placement in zip(call.outs, placements, strict=True):
            if out.number in self.placements:
                self._write(call, out, placement)

    def _maker(self, call: OpCall, placement: Placement) -> str:
        """The op that first gave a placement: this one, unless an operand has it already."""
        for operand in tensors_in(call.args.values()):
            if self.placements[operand.number] == placement:
                return self.made_by.get(operand.number, call.where)
        return call.where

    # ---- one call

    def _results(self, call: OpCall) -> list[Placement]:
        placements = self._operand_placements(call)
        refused = [placement for placement in placements if isinstance(placement, Refused)]
        bad = refused[0] if refused else None
        if call.name in KNOWN_CALLS or call.name == GRADIENT:
            return self._known_call(call, bad)
        if call.name.startswith(COLLECTIVE) and over_sequence(call, self.split):
            return self._collective(call, bad)
        if self.split.rows and call.name == "mul" and self._is_zero(call):
            return [ZERO]
        if bad is not None and call.name not in IGNORES_ENTRIES:
            return [bad] * len(call.outs)
        try:
            return self._checked(call, apply(self._context(call)))
        except Refusal as refusal:
            by_value = self._by_value(call) if self.split.rows else None
            return by_value or _refused(call, refusal)

    def _by_value(self, call: OpCall) -> list[Placement] | None:
        """The results of a call, one of whose operands is a constant that lies as another one
        does."""
        operands = list(tensors_in(call.args.values()))
        splits = []
        for other in operands:
            placement = self.placements[other.number]
            if isinstance(placement, Shard):
                splits.append((other, placement))
        if not splits or call.func is None:
            return None
        for operand in operands:
            for other, placement in splits:
                extra = len(operand.local) - len(other.local)
                split = placement.at(placement.dim + extra)
                if split.dim < 0 or other.number == operand.number:
                    continue
                if self._constants().lies(operand, split, self.split):
                    found = self._results_with(call, operand.number, split)
                    if found is not None:
                        return found
        return None

    def _results_with(
        self,
        call: OpCall,
        operand: int,
        placement: Placement,
    ) -> list[Placement] | None:
        """The results of a call if an operand had another placement."""
        before = self.placements[operand]
        self.placements[operand] = placement
        try:
            return self._checked(call, apply(self._context(call)))
        except Refusal:
            return None
        finally:
            self.placements[operand] = before

    def _is_zero(self, call: OpCall) -> bool:
        """Whether a product is zero whatever else is in it."""
        if ZERO in self._operand_placements(call):
            return True
        numbers = (value for value in call.args.values() if isinstance(value, int | float))
        return any(Number(value, value) == ZERO for value in numbers)

    def _known_call(self, call: OpCall, bad: Refused | None) -> list[Placement]:
        is_gradient = call.name == GRADIENT
        if bad is not None:
            what = f"what {call.args['function']} makes" if is_gradient else _an_operand(call)
            raise SequenceError(f"{what} is not what one device has. {bad.text}")
        try:
            if is_gradient:
                check_gradient(self._context(call))
                return []
            finding, placement = KNOWN_CALLS[call.name](self._context(call))
        except Refusal as refusal:
            raise SequenceError(
                f"{refusal}" if is_gradient else f"{call.where}: {refusal}"
            ) from None
        self.note(call.name, call, finding)
        return [placement] * len(call.outs)

    def _collective(self, call: OpCall, bad: Refused | None) -> list[Placement]:
        """A collective over ranks that have other positions; refused at once, since they might not
        have tensors of equal shapes."""
        if bad is not None and self.split.rows:
            return [bad] * len(call.outs)
        if bad is not None:
            raise SequenceError(f"{_an_operand(call)} is not what one device has. {bad.text}")
        try:
            return self._checked(call, apply(self._context(call)))
        except Refusal as refusal:
            if self.split.rows:
                return _refused(call, refusal)
            raise SequenceError(f"{call.where}: {refusal}") from None

    def _checked(self, call: OpCall, placements: Placements) -> list[Placement]:
        if isinstance(placements, Sequence):
            each = list(placements)
        else:
            each = [placements] * len(call.outs)
        gives_token = call.name.endswith("_start") and call.func is not None
        if not gives_token:
            for placement, out in zip(each, call.outs, strict=True):
                check(placement, out, self.split)
        return each

    # ---- what a rule sees

    def _context(self, call: OpCall) -> OpContext:
        args = {name: self._operand(value) for name, value in call.args.items()}
        return OpContext(call, args, self.split, self._value_of)

    def _constants(self) -> Constants:
        if self.constants is None:
            self.constants = Constants(self.alignment)
        return self.constants

    def _value_of(self, tensor: AlignedTensor) -> Tensor | None:
        return self._constants().value(tensor)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._operand(item) for item in value]
        if not isinstance(value, AlignedTensor):
            return value
        number = value.number
        return Operand(
            value.local,
            value.full,
            value.dtype,
            self.placements[number],
            self.split.words,
            self.made_by.get(number, "") if self.split.rows else "",
            self.source.get(number, number),
        )

    def _operand_placements(self, call: OpCall) -> list[Placement]:
        return [self.placements[operand.number] for operand in tensors_in(call.args.values())]

    # ---- memory

    def _write(self, call: OpCall, target: AlignedTensor, placement: Placement) -> None:
        """A call writes entries of a placement to a tensor."""
        root = self.root[target.number]
        before = self.placements[target.number]
        members = [root]
        members += [view.outs[place].number for view, place in self.views[root]]
        for member in members:  # other entries than before
            self.source[member] = -1 - len(self.made_by) - member
        if any(self.pairs[member].other in self.alignment.copies for member in members):
            placement = Refused(
                f"{call.where}: it writes to a copy for one length, and to a view for another. "
                "Write to a clone"
            )
        elif target.number in self.all_of:
            self._spread(root, placement)
            return
        else:
            for candidate in self._candidates(root, placement):
                self._spread(root, candidate)
                if agrees(placement, self.placements[target.number]):
                    return
        refused = [x for x in (placement, before) if isinstance(x, Refused)]
        mixed = Refused(
            f"{call.where}: it writes {self.split.text(placement)} to a part of a tensor that has "
            "something else in it. Join parts by torch.cat"
        )
        why = refused[0] if refused else mixed
        self.placements.update(dict.fromkeys(members, why))

    def _candidates(self, root: int, new: Placement) -> Iterator[Placement]:
        """Placements that a root may have when a part of it has a new one: its own; of a fill, all
        that agree with it."""
        placement = self.placements[root]
        pair = self.pairs[root]
        varying = varying_dims(pair)
        split_dim = placement.dim if isinstance(placement, Shard) else None
        constant_along = [dim for dim in varying if dim != split_dim]
        if not constant_along or (isinstance(placement, Number) and placement == new):
            yield placement
        if not replicated(placement):
            return
        if not varying:
            yield Replicate()
            if placement == ZERO:
                yield Partial(self.split.live)
        elif len(varying) == 1:
            dim = varying[0]
            found = self.split.along(dim, pair.sizes(dim))
            if found is not None:
                yield found

    def _spread(self, root: int, placement: Placement) -> None:
        """Give a root a placement, and its views what follows."""
        self.placements[root] = placement
        for call, place in self.views[root]:
            view = call.outs[place].number
            self.placements[view] = self._results(call)[place]


def _refused(call: OpCall, refusal: Refusal) -> list[Placement]:
    refused = Refused(f"{call.where}: {refusal}", isinstance(refusal, NoSum))
    return [refused] * len(call.outs)


def _an_operand(call: OpCall) -> str:
    return f"an operand of {call.where}"
