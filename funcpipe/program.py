"""Programs: the units of a loss and a schedule, lowered to what one rank does.

Terms. An *instruction* is an action with its inputs, outputs and peers filled in: run a unit, send or receive a message,
add to an accumulator. It reads and writes *slots*, the numbered places of one list. The first slots hold what a step
brings (params, constants, the batch); the others are planned: a slot is free again after the last instruction that
reads it, so there are as many as values live at once, not one per microbatch. An *accumulator* is a slot that holds a
sum over microbatches: of the total, the weight, a partial gradient. Sums are taken in microbatch order, whatever the
schedule: a value that comes early waits.

In: for every microbatch its `Cut`, the segments of every stage, a checked schedule with its sends and receives, and the
place of this rank on the pipe axis. Out: `Program`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from funcpipe.errors import CutError
from funcpipe.graph.code import Value
from funcpipe.graph.cut import Cut, Unit
from funcpipe.schedule.actions import Action, Edge, Schedule

RUN, SEND, RECV, ADD = "run", "send", "recv", "add"


@dataclass(frozen=True, eq=False)
class Instruction:
    """One thing a rank does.

    Args:
        op: RUN, SEND, RECV or ADD.
        action: the action of the schedule that it belongs to.
        unit: for RUN: what runs.
        values: for SEND and RECV: what is moved, in order.
        peer: for SEND and RECV: the place on the pipe axis at the other end.
        reads, writes: slots, in the order of the unit's inputs and outputs, or of the values. ADD adds ``reads[0]`` to
            ``writes[0]``.
        turn: for ADD: how many summands the accumulator holds already.
        frees: slots that no later instruction reads.
    """

    op: str
    action: Action
    unit: Unit | None = None
    values: tuple[Value, ...] = ()
    peer: int = -1
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    turn: int = 0
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """What one rank does for one ``value_and_grad``.

    Args:
        place: the rank's place on the pipe axis.
        instructions: in order.
        params, batch, constants: the slots of what comes in: by leaf, by (microbatch, leaf), by folded value.
        heads: the slots of the sums of total, weight and averaged aux tensors, by number (those this rank makes).
        rows: the slots of aux tensors that are not summed, by (number, microbatch).
        partials: the slots of partial gradients, by (leaf of params, number of the partial).
        slots: the length of the list.
        peak_bytes: predicted: the most that activations, residuals and a unit's own intermediates take at once.
        kept_bytes: of that, what is held between units.
        grad_bytes: of the accumulators.
    """

    place: int
    instructions: tuple[Instruction, ...]
    params: dict[int, int]
    batch: dict[tuple[int, int], int]
    constants: dict[Value, int]
    heads: dict[int, int]
    rows: dict[tuple[int, int], int]
    partials: dict[tuple[int, int], int]
    slots: int
    peak_bytes: int
    kept_bytes: int
    grad_bytes: int


def stage_edges(cuts: Sequence[Cut], stages: Sequence[Sequence[int]]) -> frozenset[Edge]:
    """What depends on what between stages, read off the values that units exchange."""
    stage_of = {segment: s for s, segments in enumerate(stages) for segment in segments}
    edges: set[Edge] = set()
    for cut in set(cuts):
        made = {v: (_half(u), stage_of[u.segment]) for u in cut.units.values() for v in u.outputs}
        for u in cut.units.values():
            here = (_half(u), stage_of[u.segment])
            edges |= {(made[v], here) for v in u.inputs if v in made and made[v][1] != here[1]}
    return frozenset(edges)


def _half(unit: Unit) -> str:
    return "F" if unit.kind == "F" else "B"


def owners(cut: Cut, stages: Sequence[Sequence[int]], placement: Sequence[int]) -> list[set[int]]:
    """For every leaf of params the places on the pipe axis whose units read it or make a partial gradient of it."""
    out: list[set[int]] = [set() for _ in cut.grads]
    stage_of = {segment: s for s, segments in enumerate(stages) for segment in segments}
    partial = {v: i for i, partials in enumerate(cut.grads) for v in partials}
    for u in cut.units.values():
        place = placement[stage_of[u.segment]]
        for v in u.inputs:
            if v.kind == "param":
                out[v.index].add(place)
        for v in u.outputs:
            if v in partial:
                out[partial[v]].add(place)
    for i, partials in enumerate(cut.grads):  # one value may be the gradient of several leaves
        for v in partials:
            out[i] |= out[partial[v]] if v in partial else set()
    return out


def partial_segments(cut: Cut) -> tuple[tuple[int, ...], ...]:
    """For every leaf of params the segments that make its partial gradients."""
    made = {v: u.segment for u in cut.units.values() for v in u.outputs}
    return tuple(tuple(made[v] for v in partials) for partials in cut.grads)


def check_alike(cuts: Sequence[Cut]) -> None:
    """Microbatches of different shapes must have the same segments, partial gradients and aux.

    Raises:
        CutError: they do not.
    """
    first = cuts[0]
    for m, cut in enumerate(cuts):
        same = cut.segments == first.segments and partial_segments(cut) == partial_segments(first)
        if not same or len(cut.heads) != len(first.heads):
            raise CutError(
                f"microbatch {m} takes another way through the loss function than microbatch 0: it has {cut.segments} "
                f"segments instead of {first.segments}, or its segments use other params. Shapes may differ between "
                "microbatches, the path may not"
            )


def lower(
    cuts: Sequence[Cut],
    stages: Sequence[Sequence[int]],
    schedule: Schedule,
    place: int,
    summed: frozenset[int],
) -> Program:
    """The program of the ranks at one place on the pipe axis.

    Args:
        cuts: for every microbatch.
        stages: for every stage its segments, in order.
        schedule: checked, with its sends and receives.
        place: on the pipe axis.
        summed: the numbers of the heads that are summed over microbatches; the others are kept as rows.
    """
    return _Lowering(cuts, stages, schedule, place, summed).lower()


# What a slot holds while the program is being written: ("param", leaf), ("batch", m, leaf), ("const", value),
# ("value", value, m), or ("sum", "head" | "grad", ...).
_Name = tuple


@dataclass
class _Lowering:
    cuts: Sequence[Cut]
    stages: Sequence[Sequence[int]]
    schedule: Schedule
    place: int
    summed: frozenset[int]
    rows: list[tuple] = field(default_factory=list)  # instructions with names in place of slots
    turns: dict[_Name, int] = field(default_factory=lambda: defaultdict(int))
    early: dict[_Name, dict[int, tuple[_Name, Action]]] = field(default_factory=lambda: defaultdict(dict))
    kept: dict[_Name, None] = field(default_factory=dict)
    messages: dict[tuple, tuple[Value, ...]] = field(default_factory=dict)

    def lower(self) -> Program:
        self.stage_of = {segment: s for s, segments in enumerate(self.stages) for segment in segments}
        made = {id(cut): {v: u for u in cut.units.values() for v in u.outputs} for cut in self.cuts}
        self.made = [made[id(cut)] for cut in self.cuts]
        self.finals = [_finals(cut) for cut in self.cuts]
        for action in self.schedule.ranks[self.place]:
            if action.kind.startswith(("SEND", "RECV")):
                self._move(action)
            else:
                self._run(action)
        return _allocate(self)

    def _run(self, action: Action) -> None:
        cut, m = self.cuts[action.microbatch], action.microbatch
        segments = self.stages[action.stage]
        if action.segment is not None:
            segments = [segments[action.segment]]
        for segment in segments if action.kind == "F" else reversed(segments):
            unit = cut.units[action.kind, segment]
            reads = tuple(self._name(v, m) for v in unit.inputs)
            writes = tuple(("value", v, m) for v in unit.outputs)
            self.rows.append((RUN, action, unit, (), -1, reads, writes, 0))
            for v in unit.outputs:
                for name in self.finals[m].get(v, ()):
                    self._final(name, v, action)

    def _final(self, name: _Name, value: Value, action: Action) -> None:
        m = action.microbatch
        if name[0] == "head" and name[1] not in self.summed:
            self.kept["row", name[1], m] = None
            self.rows.append((ADD, action, None, (), -1, (("value", value, m),), (("row", name[1], m),), 0))
            return
        self.early[name][m] = (("value", value, m), action)
        while self.turns[name] in self.early[name]:  # in microbatch order
            source, origin = self.early[name].pop(self.turns[name])
            self.kept[name] = None
            self.rows.append((ADD, origin, None, (), -1, (source,), (name,), self.turns[name]))
            self.turns[name] += 1

    def _move(self, action: Action) -> None:
        assert action.peer is not None
        m, peer = action.microbatch, self.schedule.placement[action.peer]
        sends = action.kind.startswith("SEND")
        source, target = (action.stage, peer) if sends else (action.peer, self.place)
        values = self._message(action.kind[-1], source, target, m)
        names = tuple(("value", v, m) for v in values)
        if sends:
            self.rows.append((SEND, action, None, values, peer, names, (), 0))
        else:
            self.rows.append((RECV, action, None, values, peer, (), names, 0))

    def _message(self, half: str, source: int, target: int, m: int) -> tuple[Value, ...]:
        """What a stage makes that any stage at a place reads: the same on both ends, in the same order."""
        key = (id(self.cuts[m]), half, source, target)
        if key not in self.messages:
            values: dict[Value, None] = {}
            for u in self.cuts[m].units.values():
                if self.schedule.placement[self.stage_of[u.segment]] == target:
                    values.update((v, None) for v in u.inputs if self._made_by(v, m) == (half, source))
            self.messages[key] = tuple(values)
        return self.messages[key]

    def _made_by(self, v: Value, m: int) -> tuple[str, int] | None:
        maker = self.made[m].get(v)
        return maker and (_half(maker), self.stage_of[maker.segment])

    def _name(self, v: Value, m: int) -> _Name:
        return {"param": ("param", v.index), "batch": ("batch", m, v.index), "const": ("const", v)}.get(
            v.kind, ("value", v, m)
        )


def _finals(cut: Cut) -> dict[Value, list[_Name]]:
    out: dict[Value, list[_Name]] = {}
    for h, v in enumerate(cut.heads):
        out.setdefault(v, []).append(("head", h))
    for i, partials in enumerate(cut.grads):
        for k, v in enumerate(partials):
            out.setdefault(v, []).append(("grad", i, k))
    return out


def _allocate(low: _Lowering) -> Program:
    """Names become slots; a slot is used again after the last instruction that reads it."""
    last: dict[_Name, int] = {}
    for i, row in enumerate(low.rows):
        for name in (*row[5], *row[6]):
            if name[0] == "value":
                last[name] = i
    slots: dict[_Name, int] = {}
    for row in low.rows:
        for name in row[5]:
            if name[0] in ("param", "batch", "const"):
                slots.setdefault(name, len(slots))
    for name in low.kept:
        slots[name] = len(slots)
    free: list[int] = []
    size = len(slots)
    memory = _Memory()
    out = []
    for i, (op, action, unit, values, peer, reads, writes, turn) in enumerate(low.rows):
        for name in writes:
            if name not in slots:
                slots[name] = heapq.heappop(free) if free else size
                size = max(size, slots[name] + 1)
        frees = [n for n in dict.fromkeys((*reads, *writes)) if n[0] == "value" and last[n] == i]
        out.append(
            Instruction(
                op,
                action,
                unit,
                values,
                peer,
                tuple(slots[n] for n in reads),
                tuple(slots[n] for n in writes),
                turn,
                tuple(slots[n] for n in frees),
            )
        )
        memory.step(op, unit, reads, writes, frees)
        for name in frees:
            heapq.heappush(free, slots.pop(name))
    pick = lambda kind: {n[1:]: s for n, s in slots.items() if n[0] == kind}  # noqa: E731
    return Program(
        low.place,
        tuple(out),
        {i: s for (i,), s in pick("param").items()},
        {(m, i): s for (m, i), s in pick("batch").items()},
        {v: s for (v,), s in pick("const").items()},
        {h: s for (h,), s in pick("head").items()},
        {(h, m): s for (h, m), s in pick("row").items()},
        {(i, k): s for (i, k), s in pick("grad").items()},
        size,
        memory.peak,
        memory.kept,
        memory.sums,
    )


class _Memory:
    """Bytes of the values that are live, each piece of memory counted once however many values share it."""

    def __init__(self) -> None:
        self.users: dict[tuple, int] = defaultdict(int)
        self.now = self.peak = self.kept = self.sums = 0

    def step(self, op: str, unit: Unit | None, reads: tuple, writes: tuple, frees: list) -> None:
        if unit is not None:
            self.peak = max(self.peak, self.now + unit.code.peak)
        for name in writes:
            if name[0] == "value":
                self._hold(name)
            elif op == ADD and name not in self.users:
                self.users[name] = 1
                self.sums += reads[0][1].nbytes
        for name in frees:
            self._drop(name)
        self.kept = max(self.kept, self.now)
        self.peak = max(self.peak, self.now)

    def _hold(self, name: _Name) -> None:
        _, v, m = name
        self.users[v.storage, m] += 1
        if self.users[v.storage, m] == 1:
            self.now += v.nbytes

    def _drop(self, name: _Name) -> None:
        _, v, m = name
        self.users[v.storage, m] -= 1
        if self.users[v.storage, m] == 0:
            self.now -= v.nbytes
