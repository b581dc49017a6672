"""The proof: states are carried from call to call, through memory that several tensors share.

Terms. A *root* is a tensor with memory of its own, its *views* are what lies in that. A view's state follows from its root's
by the rules of the ops that made it; so where an op writes to a view, the proof looks for a state of the root from which
that view gets the state of what is written. Memory that one fill made may take any state that agrees with the fill.

In: a walk over two tapes, states of the tensors that came in. Out: a state for every tensor of tape A, and findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from funcpipe.errors import SequenceError
from funcpipe.sequence import known, reductions, shapes
from funcpipe.sequence.backward import GRADIENT
from funcpipe.sequence.pairs import Call, Pair, Walk
from funcpipe.sequence.rules import States, apply
from funcpipe.sequence.site import Operand, Site, check
from funcpipe.sequence.states import (
    ZERO,
    Number,
    Partial,
    Refusal,
    Refused,
    Split,
    State,
    Whole,
    World,
    agrees,
    plain,
)

COLLECTIVE = "funcpipe::"
_RULES = (reductions, shapes, known)  # their rules are registered
# Of an operand these want the shape alone, or write over it.
_BLIND = (
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full", "zero", "fill",
)  # fmt: skip
Found = Callable[[str, Call, known.Finding], None]


class Proof:
    """States by the number of a tensor on tape A.

    Args:
        walk: the tapes.
        world: what is known beforehand.
        found: is told of every known call.
    """

    def __init__(self, walk: Walk, world: World, found: Found) -> None:
        self.walk, self.world, self.found = walk, world, found
        self.states: dict[int, State] = {}
        self.pairs: dict[int, Pair] = {}
        self.root: dict[int, int] = {}
        self.all_of: set[int] = set()  # roots, and views of all of a root as it is
        self.views: dict[
            int, list[tuple[Call, int]]
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

    def _step(self, call: Call) -> None:
        states = self._results(call)
        written = _written(call)
        for arg in written:
            alone = len(written) == 1 and call.outs and call.outs[0].number == arg.number
            if not alone or torch.Tag.inplace_view in call.func.tags:
                no = Refused(f"{call.where}: nothing is known of this op in place; write its plain form")
                states = [no] * len(states)
            self._write(call, arg, states[0] if states else no)
        for k, (pair, state) in enumerate(zip(call.outs, states, strict=True)):
            if any(pair.number == w.number for w in written):
                continue
            self._new(pair, state)
            source = _viewed(call)
            if source is not None:
                self.root[pair.number] = root = self.root[source.number]
                self.views[root].append((call, k))
                if call.name != "detach" or source.number not in self.all_of:
                    self.all_of.discard(pair.number)

    def moves(self, number: int) -> bool:
        """Whether a tensor has another shape on one device."""
        return self.pairs[number].a != self.pairs[number].b

    # ---- one call

    def _results(self, call: Call) -> list[State]:
        bad = next((s for s in self._operand_states(call.args) if isinstance(s, Refused)), None)
        if call.name in known.FINDERS or call.name == GRADIENT:
            return self._known(call, bad)
        if call.name.startswith(COLLECTIVE) and known.over_sequence(call, self.world):
            return self._collective(call, bad)
        if bad is not None and call.name not in _BLIND:
            return [bad] * len(call.outs)
        try:
            return self._checked(call, apply(self._site(call)))
        except Refusal as refusal:
            return [Refused(f"{call.where}: {refusal}")] * len(call.outs)

    def _known(self, call: Call, bad: Refused | None) -> list[State]:
        if bad is not None:
            what = f"an operand of {call.where}"
            if call.name == GRADIENT:
                what = f"what the backward of autograd.Function {call.args['function']} makes"
            raise SequenceError(f"{what} is not what one device has. {bad.text}")
        try:
            if call.name == GRADIENT:
                known.check_gradient(self._site(call))
                return []
            finding, state = known.FINDERS[call.name](self._site(call))
        except Refusal as refusal:
            raise SequenceError(f"{refusal}" if call.name == GRADIENT else f"{call.where}: {refusal}") from None
        self.found(call.name, call, finding)
        return [state] * len(call.outs)

    def _collective(self, call: Call, bad: Refused | None) -> list[State]:
        """A collective over ranks that have other positions; at once, since they might not have tensors of equal shapes."""
        if bad is not None:
            raise SequenceError(f"an operand of {call.where} is not what one device has. {bad.text}")
        try:
            return self._checked(call, apply(self._site(call)))
        except Refusal as refusal:
            raise SequenceError(f"{call.where}: {refusal}") from None

    def _checked(self, call: Call, states: States) -> list[State]:
        each = list(states) if isinstance(states, Sequence) else [states] * len(call.outs)
        if not call.name.endswith("_start") or call.func is None:  # what a start gives is a token
            for state, out in zip(each, call.outs, strict=True):
                check(state, out, self.world)
        return each

    def _site(self, call: Call) -> Site:
        return Site(call, {k: self._operand(v) for k, v in call.args.items()}, self.world)

    def _operand(self, v: Any) -> Any:
        if isinstance(v, Pair):
            return Operand(v.a, v.b, v.dtype, self.states[v.number])
        return [self._operand(x) for x in v] if isinstance(v, list) else v

    def _operand_states(self, args: Any) -> Iterator[State]:
        for v in args.values() if isinstance(args, dict) else args:
            if isinstance(v, Pair):
                yield self.states[v.number]
            elif isinstance(v, list):
                yield from self._operand_states(v)

    # ---- memory

    def _write(self, call: Call, target: Pair, state: State) -> None:
        """A call writes what has a state to a tensor."""
        root, before = self.root[target.number], self.states[target.number]
        members = [root, *(c.outs[k].number for c, k in self.views[root])]
        if any(self.pairs[n].other in self.walk.copies for n in members):
            state = Refused(
                f"{call.where}: it writes to a copy for one length, and to a view for another. Write to a clone"
            )
        elif target.number in self.all_of:
            self._spread(root, state)
            return
        else:
            for candidate in self._candidates(root, state):
                self._spread(root, candidate)
                if agrees(state, self.states[target.number]):
                    return
        text = f"{call.where}: it writes {state} to a part of a tensor that has something else in it. Join parts by torch.cat"
        why = next((x for x in (state, before) if isinstance(x, Refused)), Refused(text))
        self.states.update(dict.fromkeys(members, why))

    def _candidates(self, root: int, new: State) -> Iterator[State]:
        """States that a root may have when a part of it has a new one: its own; of a fill, all that agree with it."""
        state, pair = self.states[root], self.pairs[root]
        moving = [d for d in range(len(pair.a)) if pair.a[d] != pair.b[d]]
        free = [d for d in moving if not (isinstance(state, Split) and state.dim == d)]  # constant along them, till now
        if not free or (isinstance(state, Number) and state == new):
            yield state
        if not plain(state):
            return
        if not moving:
            yield Whole()
            if state == ZERO:
                yield Partial(self.world.live)
        elif len(moving) == 1:
            found = self.world.factor((pair.a[moving[0]], pair.b[moving[0]]))
            if found is not None:
                yield Split(moving[0], found[0], found[1])

    def _spread(self, root: int, state: State) -> None:
        """Give a root a state, and its views what follows."""
        self.states[root] = state
        for call, k in self.views[root]:
            self.states[call.outs[k].number] = self._results(call)[k]


def _written(call: Call) -> list[Pair]:
    """The operands that a call writes to."""
    if call.func is None or not hasattr(call.func, "_schema"):
        return []
    names = [a.name for a in call.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for n in names for x in _pairs(call.args[n])]


def _pairs(x: Any) -> list[Pair]:
    return [x] if isinstance(x, Pair) else [p for y in x for p in _pairs(y)] if isinstance(x, list) else []


def _viewed(call: Call) -> Pair | None:
    """The operand in whose memory the results of a call lie."""
    if call.func is None or not hasattr(call.func, "_schema"):
        return None
    if call.func is torch.ops.aten._unsafe_view.default:  # shares memory, though its schema does not say so
        return call.args["self"]
    for a in call.func._schema.arguments:
        if a.alias_info is not None and not a.alias_info.is_write:
            return call.args[a.name]
    return None
