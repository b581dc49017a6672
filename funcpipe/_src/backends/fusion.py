"""Fuse: what a compiled backend does with the units of a program beyond running them one after
another.

- A gradient that is a matrix product (or an embedding's) and that nothing but its accumulator reads
  is never made: its unit hands out a `Product`, and ADD takes that into the accumulator in one
  pass. One that is reduced is made in the dtype in which it travels.
- F and B (or I) of a segment that run back to back, as in the last stage, are compiled as one: what
  only the second reads of the first is then no value that has to be kept, as the log-probabilities
  of a cross entropy.
- Sums of gradients with fewer bits than `Backend.accumulate_dtype` are held in that dtype, until
  the last summand is in.

In: a program, a backend. Out: for RUN and ADD instructions what runs, in place of the plain
function of the unit and the plain addition, and what that changes about memory. Instructions keep
their places and slots.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import fx

from funcpipe._src.backends.backend import Backend, Run
from funcpipe._src.backends.grad_accumulation import form_of, outputs_of
from funcpipe._src.graph.unit_code import Code, compile_unit
from funcpipe._src.program import ADD, GATHER, REDUCE, RUN, Change, Changes, Program, ended
from funcpipe._src.program.instructions import Name, Row

# From what an accumulator holds (None at first) and a summand to what it holds then.
Sum = Callable[[Any, Any], torch.Tensor]


class Work(NamedTuple):
    """What an instruction runs.

    Args:
        run: a function of what the slots in ``reads`` hold, that makes what goes to ``writes``.
        reads, writes, frees: slots.
    """

    run: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]


def fused(program: Program, backend: Backend) -> tuple[dict[int, Work], dict[int, Sum]]:
    """What runs, by the place of the instruction: for every RUN its unit, for every ADD how it
    adds."""
    products = _products(program, backend) if backend.fuses else set()
    work = _joined(program, backend, products) if backend.fuses else {}
    for k, (row, i) in enumerate(zip(program.rows, program.instructions, strict=True)):
        if row.op == RUN and k not in work:
            assert row.unit is not None
            work[k] = Work(
                backend(row.unit.code, _at(row.writes, products)), i.reads, i.writes, i.frees
            )
    return work, _sums(program, backend, products)


def changes(program: Program, backend: Backend) -> Changes | None:
    """What that changes about memory; None for nothing."""
    if not backend.fuses:
        return None
    products = _products(program, backend)
    last = {row.writes[0]: row.turn for row in program.rows if row.op == ADD}
    ends = [dead for _, dead in ended(program)]
    out: dict[int, Change] = {}
    for k, row in enumerate(program.rows):
        if row.unit is not None:
            at = _at(row.writes, products)
            out[k] = Change(backend.peak(row.unit.code, at), row.writes, tuple(ends[k]))
        elif row.op == ADD:
            turns = last[row.writes[0]]
            dtype, own = _dtype(row, turns, backend), _dtype(row, 0, backend)
            out[k] = Change(dtype=dtype, last=own if row.turn == turns and dtype != own else None)
    for k, j, code, kept in _merged(program):
        first, second = program.rows[k], program.rows[j]
        writes = (*kept, *second.writes)
        gone = [n for n in first.writes if n not in kept]
        early = tuple(n for n in ends[j] if n in second.reads)
        out[k] = Change(backend.peak(code, _at(writes, products)), writes, (*ends[k], *early))
        out[j] = Change(0, (), tuple(n for n in ends[j] if n not in (*early, *gone)))
    return Changes(out, frozenset(products))


def _at(names: tuple[Name, ...], products: set[Name]) -> tuple[int, ...]:
    return tuple(k for k, name in enumerate(names) if name in products)


# ---- sums


def _sums(program: Program, backend: Backend, products: set[Name]) -> dict[int, Sum]:
    last = {row.writes[0]: row.turn for row in program.rows if row.op == ADD}
    out: dict[int, Sum] = {}
    for k, row in enumerate(program.rows):
        if row.op == ADD:
            turns = last[row.writes[0]]
            dtype = _dtype(row, turns, backend)
            add = _taken(row.turn, dtype) if row.reads[0] in products else _plain(row.turn, dtype)
            own = _dtype(row, 0, backend)
            out[k] = _then(add, own) if row.turn == turns and dtype != own else add
    return out


def _dtype(row: Row, turns: int, backend: Backend) -> torch.dtype | None:
    """The dtype in which so many summands and one are added up; None for that of the first, as it
    comes."""
    value = row.reads[0][1].dtype if row.reads[0][0] == "value" else None
    own: torch.dtype | None = row.dtype or value
    gradient = row.writes[0][0] in ("grad", "whole")
    if own is not None and own.is_floating_point and gradient and turns and backend.fuses:
        return torch.promote_types(own, backend.accumulate_dtype)
    return own if row.dtype or backend.fuses else None


def _plain(turn: int, dtype: torch.dtype | None) -> Sum:
    """The second summand makes a new tensor, since the first may be anybody's; after that it is
    ours."""
    cast = (lambda x: x) if dtype is None else (lambda x: x.to(dtype))
    if turn == 0:
        return lambda sums, x: cast(x)
    return (lambda sums, x: sums + cast(x)) if turn == 1 else (lambda sums, x: sums.add_(cast(x)))


def _taken(turn: int, dtype: torch.dtype | None) -> Sum:
    assert dtype is not None
    return (lambda sums, x: x.onto(sums)) if turn else (lambda sums, x: x.first(dtype))


def _then(add: Sum, dtype: torch.dtype | None) -> Sum:
    assert dtype is not None
    return lambda sums, x: add(sums, x).to(dtype)


def _products(program: Program, backend: Backend) -> set[Name]:
    """The values that are handed out as products: those that a reduction alone reads, or an
    accumulator, all of whose summands are such."""
    makers = {
        name: (row.unit.code, k)
        for row in program.rows
        if row.unit
        for k, name in enumerate(row.writes)
    }
    readers = Counter(name for row in program.rows for name in row.reads)
    rows: dict[Name, list[Row]] = defaultdict(list)
    for row in program.rows:
        if row.op == ADD and row.writes[0][0] in ("grad", "whole"):
            rows[row.writes[0]].append(row)
    known: dict[tuple[str, int], Any] = {}

    def fits(source: Name, dtype: torch.dtype | None) -> bool:
        if source not in makers or readers[source] > 1 or dtype is None:
            return False
        code, k = makers[source]
        if (code.key, k) not in known:
            known[code.key, k] = form_of(outputs_of(code.module.graph)[k])
        form = known[code.key, k]
        return form is not None and form.sums(dtype)

    def adds(row: Row) -> bool:
        return fits(row.reads[0], _dtype(row, len(rows[row.writes[0]]) - 1, backend))

    reduced = {
        n
        for row in program.rows
        if row.op == REDUCE and row.bucket
        for n in row.reads
        if fits(n, row.bucket.dtype)
    }
    return reduced | {
        row.reads[0] for some in rows.values() if all(map(adds, some)) for row in some
    }


# ---- units that run back to back


def _merged(program: Program) -> Iterator[tuple[int, int, Code, tuple[Name, ...]]]:
    """The places of two units that are one, its code, and what it keeps of the outputs of the
    first."""
    readers = Counter(name for row in program.rows for name in row.reads)
    codes: dict[str, Code] = {}
    made: dict[tuple, Code] = {}
    for k, j in pairs(program):
        first, second = program.rows[k], program.rows[j]
        own, reads = set(first.writes), _reads(first, second)
        kept = tuple(n for n in first.writes if readers[n] > (n in second.reads))
        assert first.unit is not None and second.unit is not None
        wires = tuple(
            (n in own, (first.writes if n in own else reads).index(n)) for n in second.reads
        )
        key = first.unit.code, second.unit.code, wires, tuple(map(first.writes.index, kept))
        if key not in made:
            made[key] = _join(*key, codes)
        yield k, j, made[key], kept


def _reads(first: Row, second: Row) -> tuple[Name, ...]:
    """What two units read that are one."""
    return tuple(dict.fromkeys((*first.reads, *(n for n in second.reads if n not in first.writes))))


def _joined(program: Program, backend: Backend, products: set[Name]) -> dict[int, Work]:
    """Both run in the place of the first; the second only puts down what it made."""
    out: dict[int, Work] = {}
    for k, j, code, kept in _merged(program):
        first, second = program.rows[k], program.rows[j]
        reads = _reads(first, second)
        slots: dict[Name, int] = {}
        for at in (k, j):
            row, i = program.rows[at], program.instructions[at]
            slots |= zip((*row.reads, *row.writes), (*i.reads, *i.writes), strict=True)
        run = backend(code, _at((*kept, *second.writes), products))
        a, b = program.instructions[k], program.instructions[j]
        spent = tuple(s for s in b.frees if s in {slots[n] for n in reads})
        out[k], out[j] = _both(run, len(kept), spent + a.frees, b.frees)
        out[k] = out[k]._replace(
            reads=tuple(slots[n] for n in reads), writes=tuple(slots[n] for n in kept)
        )
        out[j] = out[j]._replace(writes=b.writes)
    return out


def _both(
    run: Run, kept: int, first: tuple[int, ...], second: tuple[int, ...]
) -> tuple[Work, Work]:
    later: list[Any] = []

    def both(inputs: list[Any]) -> Any:
        made = run(inputs)
        later.append(made[kept:])
        return made[:kept]

    return Work(both, (), (), first), Work(lambda _: later.pop(), (), (), second)


def pairs(program: Program) -> Iterator[tuple[int, int]]:
    """The places of F and B, or I, of one segment and microbatch with nothing between them but
    sums, and gathers for later units, which then start a little later."""
    rows = program.rows
    for k, row in enumerate(rows):
        j = next((j for j in range(k + 1, len(rows)) if rows[j].op not in (ADD, GATHER)), k)
        a, b = row.unit, rows[j].unit
        if a is None or b is None or a.kind != "F" or b.kind not in "BI":
            continue
        if a.segment == b.segment and row.action.microbatch == rows[j].action.microbatch:
            yield k, j


def _join(
    a: Code,
    b: Code,
    wires: tuple[tuple[bool, int], ...],
    kept: tuple[int, ...],
    codes: dict[str, Code],
) -> Code:
    """Two units as one.

    Args:
        a, b: the first and the second.
        wires: for every input of the second, whether the first makes it, and its place among the
            outputs of that, or among the inputs of both.
        kept: the places of the outputs of the first that others read; they come before those of the
            second.
        codes: by hash, those that are there already.
    """
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs: list[fx.Node] = []

    def enter(x: fx.Node) -> fx.Node:
        inputs.append(graph.placeholder(f"in{len(inputs)}"))
        inputs[-1].meta["val"] = x.meta["val"]
        return inputs[-1]

    def copy(code: Code) -> list[fx.Node]:
        nodes = [x for x in code.module.graph.nodes if x.op not in ("placeholder", "output")]
        for x in nodes:
            new[x] = graph.node_copy(x, lambda y: new[y])
        return [new[x] for x in outputs_of(code.module.graph)]

    entries = [[x for x in code.module.graph.nodes if x.op == "placeholder"] for code in (a, b)]
    new.update((x, enter(x)) for x in entries[0])
    strange = [(x, wire) for x, wire in zip(entries[1], wires, strict=True)]
    for x, (made, at) in strange:
        if not made:
            new[x] = inputs[at] if at < len(inputs) else enter(x)
    outputs = copy(a)
    new.update((x, outputs[at]) for x, (made, at) in strange if made)
    body_outputs = [outputs[at] for at in kept] + copy(b)
    body = [x for x in graph.nodes if x.op != "placeholder"]
    root = {
        x.target: attrgetter(x.target)(c.module)
        for c in (a, b)
        for x in c.module.graph.nodes
        if x.op == "get_attr"
    }
    return compile_unit(fx.GraphModule(root, fx.Graph()), body, inputs, body_outputs, codes)
