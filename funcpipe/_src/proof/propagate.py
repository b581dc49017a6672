"""The proof: states are carried from call to call, through memory that several tensors share.

Terms. A *root* is a tensor with memory of its own, its *views* are what lies in that. A view's
state follows from its root's by the rules of the ops that made it; so where an op writes to a view,
the proof looks for a state of the root from which that view gets the state of what is written.
Memory that one fill made may take any state that agrees with the fill.

In: a walk over two tapes, states of the tensors that came in. Out: a state for every tensor of tape
A, and findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from funcpipe._src.proof import row_numbers as places
from funcpipe._src.proof import rules_bags as bags
from funcpipe._src.proof import rules_batched as batched
from funcpipe._src.proof import rules_intrinsic as known
from funcpipe._src.proof import rules_named_axes as named
from funcpipe._src.proof import rules_reduction as reductions
from funcpipe._src.proof import rules_view as shapes
from funcpipe._src.proof.align import OpCall, Pair, Walk
from funcpipe._src.proof.constants import Constants
from funcpipe._src.proof.custom_backward import GRADIENT
from funcpipe._src.proof.op_context import OpContext, Operand, check
from funcpipe._src.proof.op_recorder import BUFFER, NAMED, STATISTIC
from funcpipe._src.proof.placements import (
    ZERO,
    Local,
    NoSum,
    Number,
    Partial,
    Refusal,
    Refused,
    Replicate,
    Shard,
    State,
    World,
    agrees,
    plain,
)
from funcpipe._src.proof.rules_pointwise import States, apply
from funcpipe.errors import SequenceError

COLLECTIVE = "funcpipe::"
_RULES = (reductions, shapes, known, places, bags, batched, named)  # their rules are registered
# Of an operand these want the shape alone, or write over it.
_BLIND = (
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full", "zero", "fill",
    BUFFER,
)  # fmt: skip
_SAME_ENTRIES = ("view", "unsqueeze", "squeeze", "detach", "clone", "_to_copy")
Found = Callable[[str, OpCall, known.Finding], None]


class Proof:
    """States by the number of a tensor on tape A.

    Args:
        walk: the tapes.
        world: what is known beforehand.
        found: is told of every known call.
    """

    def __init__(self, walk: Walk, world: World, found: Found) -> None:
        self.walk, self.world, self.found = walk, world, found
        self.constants: Constants | None = None
        self.states: dict[int, State] = {}
        self.made: dict[int, str] = {}  # by which op a tensor came to its state
        self.source: dict[
            int, int
        ] = {}  # of a tensor that has another one's entries, in their order: that one
        self.pairs: dict[int, Pair] = {}
        self.root: dict[int, int] = {}
        self.all_of: set[int] = set()  # roots, and views of all of a root as it is
        self.views: dict[
            int, list[tuple[OpCall, int]]
        ] = {}  # of a root: the calls that made them, and which result it is

    def run(self, inputs: Sequence[State]) -> None:
        """Carry the states of what came in through all calls.

        Raises:
            SequenceError: a known call cannot run on ranks, or the tapes differ.
        """
        for pair, state in zip(self.walk.inputs(len(inputs)), inputs, strict=True):
            self._new(pair, state)
        for call in self.walk.calls():
            self._step(call)

    def _new(self, pair: Pair, state: State) -> None:
        self.states[pair.number], self.pairs[pair.number] = state, pair
        self.root.setdefault(pair.number, pair.number)
        self.all_of.add(pair.number)
        self.views.setdefault(pair.number, [])

    def _step(self, call: OpCall) -> None:
        states = self._results(call)
        if call.name in (STATISTIC, BUFFER):
            self._declared(call, states)
        written = _written(call)
        for arg in written:
            alone = len(written) == 1 and call.outs and call.outs[0].number == arg.number
            if alone and torch.Tag.inplace_view in call.func.tags and self._turned(call, states[0]):
                return
            if not alone or torch.Tag.inplace_view in call.func.tags:
                no = Refused(
                    f"{call.where}: nothing is known of this op in place; write its plain form"
                )
                states = [no] * len(states)
            self._write(call, arg, states[0] if states else no)
        for k, (pair, state) in enumerate(zip(call.outs, states, strict=True)):
            if any(pair.number == w.number for w in written) or (
                call.name in (STATISTIC, BUFFER) and pair.number in self.states
            ):
                continue
            self._new(pair, state)
            self.made[pair.number] = self._maker(call, state)
            if call.name in _SAME_ENTRIES and isinstance(call.args["self"], Pair):
                number = call.args["self"].number
                self.source[pair.number] = self.source.get(number, number)
            source = _viewed(call)
            if source is not None:
                self.root[pair.number] = root = self.root[source.number]
                self.views[root].append((call, k))
                if call.name != "detach" or source.number not in self.all_of:
                    self.all_of.discard(pair.number)

    def _turned(self, call: OpCall, state: State) -> bool:
        """A call like ``squeeze_`` gives a tensor another shape; no view of it knows of that."""
        pair = call.outs[0]
        root = self.root[pair.number]
        if root == pair.number and self.views[root]:
            return False
        self.states[pair.number], self.pairs[pair.number] = state, pair
        if root != pair.number:
            self.all_of.discard(pair.number)
            self.views[root].append((call, 0))
        return True

    def _declared(self, call: OpCall, states: list[State]) -> None:
        """A declared batch statistic may also change what it gets."""
        for pair, state in zip(call.outs, states, strict=True):
            if pair.number in self.states:
                self._write(call, pair, state)

    def _maker(self, call: OpCall, state: State) -> str:
        """By which op a state came: by a call, unless an operand has it already."""
        had = (x.number for x in _operands(call.args.values()) if self.states[x.number] == state)
        return self.made.get(next(had, -1), call.where)

    def moves(self, number: int) -> bool:
        """Whether a tensor has another shape on one device."""
        return self.pairs[number].a != self.pairs[number].b

    # ---- one call

    def _results(self, call: OpCall) -> list[State]:
        bad = next((s for s in self._operand_states(call.args) if isinstance(s, Refused)), None)
        if call.name in known.FINDERS or call.name == GRADIENT:
            return self._known(call, bad)
        if call.name.startswith(COLLECTIVE) and known.over_sequence(call, self.world):
            return self._collective(call, bad)
        if self.world.rows and call.name == "mul" and self._by_zero(call):
            return [ZERO]
        if bad is not None and call.name not in _BLIND:
            return [bad] * len(call.outs)
        try:
            return self._checked(call, self._applied(call))
        except Refusal as refusal:
            found = self._by_value(call) if self.world.rows else None
            return found or [Refused(f"{call.where}: {refusal}", isinstance(refusal, NoSum))] * len(
                call.outs
            )

    def _by_value(self, call: OpCall) -> list[State] | None:
        """The results of a call, one of whose operands is a constant that lies as another one
        does."""
        pairs = list(_operands(call.args.values()))
        layouts = [(p, s) for p in pairs if isinstance(s := self.states[p.number], Shard)]
        if not layouts or call.func is None:
            return None
        self.constants = self.constants or Constants(self.walk)
        for x in pairs:
            for other, state in layouts:
                at = state.at(state.dim - len(other.a) + len(x.a))
                if (
                    at.dim < 0
                    or other.number == x.number
                    or not self.constants.lies(x, at, self.world)
                ):
                    continue
                before, self.states[x.number] = self.states[x.number], at
                try:
                    return self._checked(call, self._applied(call))
                except Refusal:
                    pass
                finally:
                    self.states[x.number] = before
        return None

    def _by_zero(self, call: OpCall) -> bool:
        """Whether a product is zero whatever else is in it."""
        numbers = [Number(v, v) for v in call.args.values() if isinstance(v, int | float)]
        return ZERO in (*numbers, *self._operand_states(call.args))

    def _applied(self, call: OpCall) -> States:
        site = self._site(call)
        local = any(isinstance(x.state, Local) for x in site.operands)
        return places.apply(site) if local and call.name not in (*_BLIND, NAMED) else apply(site)

    def _known(self, call: OpCall, bad: Refused | None) -> list[State]:
        if bad is not None:
            what = f"an operand of {call.where}"
            if call.name == GRADIENT:
                what = f"what {call.args['function']} makes"
            raise SequenceError(f"{what} is not what one device has. {bad.text}")
        try:
            if call.name == GRADIENT:
                known.check_gradient(self._site(call))
                return []
            finding, state = known.FINDERS[call.name](self._site(call))
        except Refusal as refusal:
            raise SequenceError(
                f"{refusal}" if call.name == GRADIENT else f"{call.where}: {refusal}"
            ) from None
        self.found(call.name, call, finding)
        return [state] * len(call.outs)

    def _collective(self, call: OpCall, bad: Refused | None) -> list[State]:
        """A collective over ranks that have other positions; at once, since they might not have
        tensors of equal shapes."""
        if bad is not None and self.world.rows:
            return [bad] * len(call.outs)
        if bad is not None:
            raise SequenceError(
                f"an operand of {call.where} is not what one device has. {bad.text}"
            )
        try:
            return self._checked(call, self._applied(call))
        except Refusal as refusal:
            if self.world.rows:
                return [Refused(f"{call.where}: {refusal}", isinstance(refusal, NoSum))] * len(
                    call.outs
                )
            raise SequenceError(f"{call.where}: {refusal}") from None

    def _checked(self, call: OpCall, states: States) -> list[State]:
        each = list(states) if isinstance(states, Sequence) else [states] * len(call.outs)
        if not call.name.endswith("_start") or call.func is None:  # what a start gives is a token
            for state, out in zip(each, call.outs, strict=True):
                check(state, out, self.world)
        return each

    def _site(self, call: OpCall) -> OpContext:
        return OpContext(
            call, {k: self._operand(v) for k, v in call.args.items()}, self.world, self._value_of
        )

    def _value_of(self, x: Pair) -> torch.Tensor | None:
        self.constants = self.constants or Constants(self.walk)
        return self.constants.value(x)

    def _operand(self, v: Any) -> Any:
        if isinstance(v, Pair):
            made = self.made.get(v.number, "") if self.world.rows else ""
            return Operand(
                v.a, v.b, v.dtype, self.states[v.number], made, self.source.get(v.number, v.number)
            )
        return [self._operand(x) for x in v] if isinstance(v, list) else v

    def _operand_states(self, args: dict[str, Any]) -> list[State]:
        return [self.states[x.number] for x in _operands(args.values())]

    # ---- memory

    def _write(self, call: OpCall, target: Pair, state: State) -> None:
        """A call writes what has a state to a tensor."""
        root, before = self.root[target.number], self.states[target.number]
        members = [root, *(c.outs[k].number for c, k in self.views[root])]
        self.source |= {n: -1 - len(self.made) - n for n in members}  # other entries than before
        if any(self.pairs[n].other in self.walk.copies for n in members):
            state = Refused(
                f"{call.where}: it writes to a copy for one length, and to a view for another. "
                "Write to a clone"
            )
        elif target.number in self.all_of:
            self._spread(root, state)
            return
        else:
            for candidate in self._candidates(root, state):
                self._spread(root, candidate)
                if agrees(state, self.states[target.number]):
                    return
        text = (
            f"{call.where}: it writes {state} to a part of a tensor that has something else in it. "
            "Join parts by torch.cat"
        )
        why = next((x for x in (state, before) if isinstance(x, Refused)), Refused(text))
        self.states.update(dict.fromkeys(members, why))

    def _candidates(self, root: int, new: State) -> Iterator[State]:
        """States that a root may have when a part of it has a new one: its own; of a fill, all that
        agree with it."""
        state, pair = self.states[root], self.pairs[root]
        moving = [d for d in range(len(pair.a)) if pair.a[d] != pair.b[d]]
        free = [
            d for d in moving if not (isinstance(state, Shard) and state.dim == d)
        ]  # constant along them, till now
        if not free or (isinstance(state, Number) and state == new):
            yield state
        if not plain(state):
            return
        if not moving:
            yield Replicate()
            if state == ZERO:
                yield Partial(self.world.live)
        elif len(moving) == 1:
            found = self.world.along(moving[0], (pair.a[moving[0]], pair.b[moving[0]]))
            if found is not None:
                yield found

    def _spread(self, root: int, state: State) -> None:
        """Give a root a state, and its views what follows."""
        self.states[root] = state
        for call, k in self.views[root]:
            self.states[call.outs[k].number] = self._results(call)[k]


def _written(call: OpCall) -> list[Pair]:
    """The operands that a call writes to."""
    if call.func is None or not hasattr(call.func, "_schema"):
        return []
    names = [
        a.name
        for a in call.func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return [x for n in names for x in _pairs(call.args[n])]


def _pairs(x: Any) -> list[Pair]:
    return (
        [x]
        if isinstance(x, Pair)
        else [p for y in x for p in _pairs(y)]
        if isinstance(x, list)
        else []
    )


def _operands(values: Any) -> Iterator[Pair]:
    for v in values:
        if isinstance(v, Pair):
            yield v
        elif isinstance(v, list):
            yield from _operands(v)


def _viewed(call: OpCall) -> Pair | None:
    """The operand in whose memory the results of a call lie."""
    if call.func is None or not hasattr(call.func, "_schema"):
        return None
    if (
        call.func is torch.ops.aten._unsafe_view.default
    ):  # shares memory, though its schema does not say so
        return call.args["self"]
    for a in call.func._schema.arguments:
        if a.alias_info is not None and not a.alias_info.is_write:
            return call.args[a.name]
    return None
