"""Lower: units and a schedule become rows, then slots."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from funcpipe._src.collectives import collectives_of
from funcpipe._src.graph.partition import Unit, Units
from funcpipe._src.graph.unit_code import Value
from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    RECV,
    REDUCE,
    RUN,
    SEND,
    Name,
    Program,
    Row,
)
from funcpipe._src.program.output_broadcast import Head, messages
from funcpipe._src.program.slots import allocate
from funcpipe._src.program.verify import verify
from funcpipe._src.program.weight_sharding import Sharding, shard
from funcpipe._src.schedule.actions import Action, Edge, Schedule
from funcpipe._src.schedule.communication import arrivals
from funcpipe.errors import CutError


def stage_edges(cuts: Sequence[Units], stages: Sequence[Sequence[int]]) -> frozenset[Edge]:
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


def owners(cut: Units, stages: Sequence[Sequence[int]], placement: Sequence[int]) -> list[set[int]]:
    """For every leaf of params the places on the pipe axis whose units read it or make a partial
    gradient of it."""
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


def partial_segments(cut: Units) -> tuple[tuple[int, ...], ...]:
    """For every leaf of params the segments that make its partial gradients."""
    made = {v: u.segment for u in cut.units.values() for v in u.outputs}
    return tuple(tuple(made[v] for v in partials) for partials in cut.grads)


def check_alike(cuts: Sequence[Units]) -> None:
    """Microbatches of different shapes must have the same segments, partial gradients and aux.

    Raises:
        CutError: they do not.
    """
    first = cuts[0]
    for m, cut in enumerate(cuts):
        same = cut.segments == first.segments and partial_segments(cut) == partial_segments(first)
        if not same or len(cut.heads) != len(first.heads):
            raise CutError(
                f"microbatch {m} takes another way through the loss function than microbatch 0: it "
                f"has {cut.segments} segments instead of {first.segments}, or its segments use "
                "other params. Shapes may differ between microbatches, the path may not"
            )


def check_same_order(programs: Sequence[Sequence[Program]]) -> None:
    """Ranks that hold other numbers of positions communicate in the same order, so that none waits
    for another.

    Args:
        programs: for every such kind of rank, for every place on the pipe axis.

    Raises:
        CutError: they do not.
    """
    first, *others = [[_communication(p) for p in some] for some in programs]
    for other in others:
        for place, (a, b) in enumerate(zip(first, other, strict=True)):
            for x, y in itertools.zip_longest(a, b, fillvalue="nothing more"):
                if x != y:
                    raise CutError(
                        "ranks whose slices of the sequence differ in length take other ways "
                        f"through the loss function: at place {place} of the pipeline one does "
                        f"{x!r} where another does {y!r}. What the loss function does must not "
                        "depend on the number of positions"
                    )


def _communication(program: Program) -> list[str]:
    out = []
    for i in program.instructions:
        if i.op == RUN:
            assert i.unit is not None
            out += [f"{i.action} {x}" for x in collectives_of(i.unit.code.module.graph)]
        elif i.op in (GATHER, REDUCE):
            out.append(f"{i.action} {i.op} {i.bucket}")
    return out


def lower(
    cuts: Sequence[Units],
    stages: Sequence[Sequence[int]],
    schedule: Schedule,
    place: int,
    summed: frozenset[int],
    sharding: Sharding,
    dtypes: Mapping[int, torch.dtype] | None = None,
) -> Program:
    """The program of the ranks at one place on the pipe axis.

    Args:
        cuts: for every microbatch.
        stages: for every stage its segments, in order.
        schedule: checked, with its sends and receives.
        place: on the pipe axis.
        summed: the numbers of the heads that are summed over microbatches; the others are kept as
            rows.
        sharding: the leaves that are sharded.
        dtypes: for other leaves, the dtype in which their gradients are added up where that is not
            the units' own.
    """
    rows = _Lowering(cuts, stages, schedule, place, summed, dtypes or {}).lower()
    program = allocate(place, shard(rows, sharding))
    verify(program)
    return program


@dataclass
class _Lowering:
    cuts: Sequence[Units]
    stages: Sequence[Sequence[int]]
    schedule: Schedule
    place: int
    summed: frozenset[int]
    dtypes: Mapping[int, torch.dtype]
    rows: list[Row] = field(default_factory=list)
    turns: dict[Name, int] = field(default_factory=lambda: defaultdict(int))
    early: dict[Name, dict[int, tuple[Name, Action]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    moved: dict[tuple, tuple[Value, ...]] = field(default_factory=dict)

    def lower(self) -> list[Row]:
        self.stage_of = {
            segment: s for s, segments in enumerate(self.stages) for segment in segments
        }
        made = {id(cut): {v: u for u in cut.units.values() for v in u.outputs} for cut in self.cuts}
        self.made = [made[id(cut)] for cut in self.cuts]
        finals = {id(cut): _finals(cut) for cut in self.cuts}
        self.finals = [finals[id(cut)] for cut in self.cuts]
        self.arrivals = arrivals(self.schedule, self.place)
        self.told = {send for sends in self.arrivals.values() for send in sends}
        actions = self.schedule.ranks[self.place]
        told = messages(self.schedule, self.place, self._heads())
        for k, action in enumerate(actions):
            self.rows += told.get(k, ())
            if action.kind.startswith(("SEND", "RECV")):
                self._move(action)
            else:
                self._run(action)
        return [*self.rows, *told.get(len(actions), ())]

    def _heads(self) -> dict[Name, Head]:
        """What all ranks need: sums over microbatches, and rows of each."""
        out: dict[Name, Head] = {}
        for m, cut in enumerate(self.cuts):
            for h, v in enumerate(cut.heads):
                stage = self.stage_of[self.made[m][v].segment]
                out[("head", h) if h in self.summed else ("row", h, m)] = Head(stage, v)
        return out

    def _run(self, action: Action) -> None:
        cut, m = self.cuts[action.microbatch], action.microbatch
        segments = self.stages[action.stage]
        if action.segment is not None:
            segments = [segments[action.segment]]
        for segment in segments if action.kind == "F" else reversed(segments):
            unit = cut.units[action.kind, segment]
            reads = tuple(_name(v, m) for v in unit.inputs)
            writes = tuple(("value", v, m) for v in unit.outputs)
            self.rows.append(Row(RUN, action, reads, writes, unit=unit))
            for v in unit.outputs:
                for name in self.finals[m].get(v, ()):
                    self._final(name, v, action)

    def _final(self, name: Name, value: Value, action: Action) -> None:
        m = action.microbatch
        if name[0] == "head" and name[1] not in self.summed:
            self.rows.append(Row(ADD, action, (("value", value, m),), (("row", name[1], m),)))
            return
        self.early[name][m] = (("value", value, m), action)
        while self.turns[name] in self.early[name]:  # in microbatch order
            source, origin = self.early[name].pop(self.turns[name])
            dtype = self.dtypes.get(name[1]) if name[0] == "grad" else None
            self.rows.append(
                Row(ADD, origin, (source,), (name,), turn=self.turns[name], dtype=dtype)
            )
            self.turns[name] += 1

    def _move(self, action: Action) -> None:
        assert action.peer is not None
        m, peer = action.microbatch, self.schedule.placement[action.peer]
        if action.kind.startswith("SEND"):
            values = self._message(action.kind[-1], action.stage, peer, m)
            kept = self._sent(action) if action in self.told else ()
            self.rows.append(
                Row(
                    SEND,
                    action,
                    tuple(("value", v, m) for v in values),
                    kept,
                    values=values,
                    peer=peer,
                )
            )
        else:
            values = self._message(action.kind[-1], action.peer, self.place, m)
            arrived = tuple(name for send in self.arrivals[action] for name in self._sent(send))
            self.rows.append(
                Row(
                    RECV,
                    action,
                    arrived,
                    tuple(("value", v, m) for v in values),
                    values=values,
                    peer=peer,
                )
            )

    def _sent(self, send: Action) -> tuple[Name, ...]:
        """What holds the values of a message until it has arrived."""
        assert send.peer is not None
        peer = self.schedule.placement[send.peer]
        values = self._message(send.kind[-1], send.stage, peer, send.microbatch)
        return tuple(("sent", v, send.microbatch, peer) for v in values)

    def _message(self, half: str, source: int, target: int, m: int) -> tuple[Value, ...]:
        """What a stage makes that any stage at a place reads: the same on both ends, in the same
        order."""
        key = (id(self.cuts[m]), half, source, target)
        if key not in self.moved:
            values: dict[Value, None] = {}
            for u in self.cuts[m].units.values():
                if self.schedule.placement[self.stage_of[u.segment]] == target:
                    values.update(
                        (v, None) for v in u.inputs if self._made_by(v, m) == (half, source)
                    )
            self.moved[key] = tuple(values)
        return self.moved[key]

    def _made_by(self, v: Value, m: int) -> tuple[str, int] | None:
        maker = self.made[m].get(v)
        return None if maker is None else (_half(maker), self.stage_of[maker.segment])


def _name(v: Value, m: int) -> Name:
    if v.kind == "param":
        return ("param", v.index)
    if v.kind == "batch":
        return ("batch", m, v.index)
    return ("const", v) if v.kind == "const" else ("value", v, m)


def _finals(cut: Units) -> dict[Value, list[Name]]:
    out: dict[Value, list[Name]] = {}
    for h, v in enumerate(cut.heads):
        out.setdefault(v, []).append(("head", h))
    for i, partials in enumerate(cut.grads):
        for k, v in enumerate(partials):
            out.setdefault(v, []).append(("grad", i, k))
    return out
