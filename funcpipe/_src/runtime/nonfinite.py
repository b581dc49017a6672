"""Find non-finite values: where in a step the first NaN or infinity comes from.

Terms. An *event* is a value that is not finite, where it is made. Events are compared by where they
stand in the flow of data,
not by when they happen: what enters a ``value_and_grad`` comes before its units, units go by
microbatch and then in the order of one microbatch, sums come after units, results after sums. So
the answer does not depend on the schedule. Negative infinity that a mask put there, or that came in
with the batch, is meant; where any other event is found, it does not count.

In: a runner, its state, a batch. Out: `Nonfinite`, or None where losses, gradients and the new
state are finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from funcpipe._src.backends.grad_accumulation import outputs_of
from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.context import tap
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import Microbatches, differentiable
from funcpipe._src.planning.lowered import PlannedCall
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.variants import StaleValues
from funcpipe._src.program import ADD, RUN, WAIT
from funcpipe._src.program.instructions import Row
from funcpipe._src.runtime.interpreter import Bound, Slots, execute
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.simulate import Simulation
from funcpipe._src.runtime.spmd import Spmd

_INPUT, _WORK, _RESULT = range(3)  # the order of what happens in a value_and_grad
_LAST = 1 << 30  # after all units of a microbatch, or after all calls
_MASKS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("masked_fill", "where", "full", "full_like", "scalar_tensor")
)


class Nonfinite(NamedTuple):
    """The first value of a step that is not finite.

    Args:
        what: its name: ``params['w']``, ``batch['x']``, a value of a unit, "the gradient of
            params['w']", a leaf of the state.
        rank: which rank has it, the lowest.
        call: in which ``value_and_grad``, counted from 0; None outside.
        unit: the unit that made it, such as ``"F3"``: forward of segment 3; None where none did.
        microbatch: in which microbatch; None where it belongs to none.
        op: the op in the unit that it comes from; None where it came into the unit, or without one.
        text: shape and dtype, and how many of its values are not finite.

    ``str`` of it is a sentence.
    """

    what: str
    rank: int
    call: int | None
    unit: str | None
    microbatch: int | None
    op: str | None
    text: str

    def __str__(self) -> str:
        where = [f"rank {self.rank}"]
        where += [] if self.call is None else [f"value_and_grad {self.call}"]
        where += [] if self.microbatch is None else [f"microbatch {self.microbatch}"]
        where += [] if self.unit is None else [f"unit {self.unit}"]
        op = "" if self.op is None else f"; it comes from {self.op}"
        return f"{', '.join(where)}: {self.what}, {self.text}{op}"


def find_nonfinite(run: Simulation | Spmd, state: Any, batch: Any) -> Nonfinite | None:
    """Run a step once, unit by unit and op by op, and name the first value that is not finite.

    Args:
        run: what `fp.simulate` or `fp.spmd` made, initialised. In `spmd` every rank calls this
            alike, and it runs eagerly.
        state, batch: what ``run`` would be called with; neither is changed. The state before the
            step that went wrong is there only where steps leave old states alone: ``fp.spmd(...,
            donate=False)``, or a checkpoint.

    Returns:
        where the first NaN or infinity is, the same on every rank; None if every loss and gradient
        is finite, and no leaf of the state ceases to be so.

    Raises:
        StateError: ``run.init`` was not called.

    >>> import funcpipe as fp
    >>> def loss_fn(w, x):
    ...     x = fp.stage_boundary(x * w["a"])
    ...     return fp.Mean((x * w["b"]).log().sum(), torch.tensor(float(len(x))))
    >>> def step(w, x):
    ...     return w, {"loss": fp.value_and_grad(loss_fn)(w, x)[0]}
    >>> run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    >>> w, x = {"a": torch.ones(2), "b": torch.ones(2)}, torch.ones(4, 2)
    >>> state = run.init(lambda w: w, w, x)
    >>> find_nonfinite(run, state, x)
    >>> print(find_nonfinite(run, state, x - 2 * (torch.arange(4) == 3)[:, None]))
    rank 0, value_and_grad 0, microbatch 1, unit F1: Mean.total, a tensor of shape () and dtype
        torch.float32 of which 1 of 1 is NaN; it comes from aten.log.default
    """
    run._check_state(state)
    batch = read_batch(batch)
    if isinstance(run, Spmd):
        batch = run._feed(batch)
    try:
        found = _everywhere(run, state, batch)
    except StaleValues:
        run._made.of(batch).forget()
        found = _everywhere(run, state, batch)
    events = [e for f in found for e in (f.events if any(x.bad for x in found) else f.later)]
    return min(events, key=lambda e: e.key).found if events else None


def _everywhere(run: Simulation | Spmd, state: Any, batch: Any) -> list[_Found]:
    """What every rank sees, under the plan for what is read from Python now."""
    if isinstance(run, Spmd):
        run._guarded(
            run._agreed_rank, batch
        )  # all ranks have the same plan, and lanes for what it sends
    plan = run._made.plan(batch)

    def search(comm: Communicator, _: Any) -> _Found:
        mine = state if isinstance(run, Spmd) else state[comm.rank]
        return _search(Rank(plan, comm), mine, batch)

    return run._everywhere(search, together=True)


class _Event(NamedTuple):
    key: tuple
    found: Nonfinite


class _Found(NamedTuple):
    """What a rank saw: its first event in a ``value_and_grad``, its first one after them, whether a
    result is an event."""

    events: list[_Event]
    later: list[_Event]
    bad: bool


def _search(rank: Rank, state: Any, batch: Any) -> _Found:
    watch = _Watch(rank)
    rank.observer = watch.program
    with tap() as seen, torch.no_grad():
        new, _ = rank.step(state, batch)
    rank.comm.flush()
    before = len(watch.events)
    for k, (_, loss, grads) in enumerate(seen):
        watch.results(k, loss, grads)
    bad = len(watch.events) > before
    events, watch.events = watch.events, []
    watch.state(state, new)
    return _Found(_first(events), _first(watch.events), bad)


def _first(events: list[_Event]) -> list[_Event]:
    return sorted(events, key=lambda e: e.key)[:1]


@dataclass
class _Watch:
    """Runs the programs of a rank, and notes events."""

    rank: Rank
    events: list[_Event] = field(default_factory=list)

    def program(self, bound: list[Bound], slots: Slots, comm: Communicator) -> None:
        """Run a program, as `execute` does, and look at all that it makes."""
        call = next(k for k, c in enumerate(self.rank.calls) if c.bound is bound)
        planned, program = self.rank.calls[call].planned, self.rank.calls[call].program
        self._inputs(call, slots)
        orders = [{key: n for n, key in enumerate(cut.units)} for cut in planned.microbatch_units]
        for b, row in zip(bound, program.rows, strict=True):
            origins: list[_Origin | None] = []
            if row.op == RUN:
                assert row.unit is not None
                b = b._replace(run=partial(_interpreted, row.unit.code.module, origins))
            execute([b], slots, comm)
            if row.op not in (RUN, ADD, WAIT):
                continue
            m = row.action.microbatch
            order = orders[m][row.unit.kind, row.unit.segment] if row.unit else _LAST
            made = [slots[i] for i in b.writes]
            for n, (name, x) in enumerate(zip(row.writes, made, strict=True)):
                kind, what = _INPUT if name[0] == "full" else _WORK, self._name(call, name, row)
                unit = str(row.unit) if row.unit else None
                self._note(
                    (call, kind, m, order, n),
                    what,
                    x,
                    call,
                    unit,
                    m,
                    origins[n] if origins else None,
                )

    def _inputs(self, call: int, slots: Slots) -> None:
        bound = self.rank.calls[call]
        paths = _param_paths(self.rank.plan, bound.planned)
        for k, slot in bound.program.params.items():
            self._note((call, _INPUT, -1, k), f"params{paths[k]}", slots[slot], call)
        names = list(_batch_paths(bound.planned))
        for (m, i), slot in bound.program.batch.items():
            moving = bound.planned.moving[m]
            what = f"batch{names[m][moving[i]]}" if i < len(moving) else "the loss scale"
            self._note((call, _INPUT, m, i), what, slots[slot], call, microbatch=m)

    def _name(self, call: int, name: tuple, row: Row) -> str:
        """What a name of a program holds, in words."""
        planned = self.rank.calls[call].planned
        paths = _param_paths(self.rank.plan, planned)
        if name[0] in ("head", "row"):
            return f"{_head(planned, name[1])}, summed so far"
        if name[0] != "value":
            path = paths[name[1]]
            return (
                f"params{path}, gathered"
                if name[0] == "full"
                else f"the gradient of params{path}, summed so far"
            )
        cut = planned.microbatch_units[name[2]]
        if name[1] in cut.heads:
            return _head(planned, cut.heads.index(name[1]))
        leaf = next((k for k, partials in enumerate(cut.grads) if name[1] in partials), None)
        if leaf is not None:
            return f"the gradient of params{paths[leaf]}"
        half = "forward" if row.unit and row.unit.kind == "F" else "backward"
        return f"a value of the {half} pass ({name[1].name})"

    def results(self, call: int, loss: torch.Tensor, grads: Any) -> None:
        """Look at what a ``value_and_grad`` returned."""
        planned = self.rank.calls[call].planned
        paths = _param_paths(self.rank.plan, planned)
        self._note((call, _RESULT, -1), "the loss", loss, call)
        for k, x in enumerate(tree.leaves_up_to(planned.call.params_spec, grads)):
            self._note((call, _RESULT, k), f"the gradient of params{paths[k]}", x, call)

    def state(self, old: Any, new: Any) -> None:
        """Look at what became of the state."""
        analysis = self.rank.plan.placement.analysis
        leaves = [self.rank.plan.placement.state_leaves(x, "find_nonfinite") for x in (old, new)]
        for n, (path, a, b) in enumerate(zip(analysis.state_paths, *leaves, strict=True)):
            if _told(a) is None:
                self._note((_LAST, n), f"state{path} after the step", b)

    def _note(
        self,
        key: tuple,
        what: str,
        x: Any,
        call: int | None = None,
        unit: str | None = None,
        microbatch: int | None = None,
        origin: _Origin | None = None,
    ) -> None:
        told = _told(x)
        if told is None:
            return
        op, meant = origin or _Origin(None, told[1])
        rank = self.rank.comm.rank
        self.events.append(
            _Event((meant, key, rank), Nonfinite(what, rank, call, unit, microbatch, op, told[0]))
        )


def _head(planned: PlannedCall, h: int) -> str:
    """What a head of a loss function is called."""
    names = ["Mean.total", "Mean.weight"] if planned.joint.has_weight else ["the loss"]
    return names[h] if h < len(names) else "an aux value"


def _param_paths(plan: Plan, planned: PlannedCall) -> list[str]:
    return [plan.placement.analysis.paths[i] for i in planned.call.params]


def _batch_paths(planned: PlannedCall) -> Iterator[list[str]]:
    """The paths of the leaves of every microbatch."""
    batch, count = planned.call.batch, len(planned.losses)
    parts = (
        [batch.parts[i] for i in planned.ready]
        if isinstance(batch, Microbatches)
        else [batch] * count
    )
    yield from map(tree.paths, parts)


def _told(x: Any) -> tuple[str, bool] | None:
    """What of a tensor is not finite, in words, and whether it is all negative infinity; None if
    all is finite."""
    if not isinstance(x, torch.Tensor) or not differentiable(x):
        return None
    odd = int(x.isfinite().logical_not().sum())
    if not odd:
        return None
    nan, low = int(x.isnan().sum()), int(torch.isneginf(x).sum()) if x.is_floating_point() else 0
    counts = [f"{n} {kind}" for n, kind in ((nan, "NaN"), (odd - nan, "infinite")) if n]
    if len(counts) == 1:
        n, kind = counts[0].split()
        counts = [f"{n} of {x.numel()} {'is' if n == '1' else 'are'} {kind}"]
    else:
        counts = [f"{counts[0]} and {counts[1]} of {x.numel()}"]
    return f"{describe(x)} of which {counts[0]}", low == odd


class _Origin(NamedTuple):
    """Where in a unit a value that is not finite comes from: an op (None: from outside), and
    whether it may be meant."""

    op: str | None
    meant: bool


class _Interpreter(fx.Interpreter):
    """Runs the graph of a unit, and notes the origin of what is not finite."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.origins: dict[fx.Node, _Origin] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        told = [_told(x) for x in (out if isinstance(out, tuple | list) else [out])]
        low = [t[1] for t in told if t is not None]
        if low:
            self.origins[n] = self._origin(n, all(low))
        return out

    def _origin(self, n: fx.Node, low: bool) -> _Origin:
        """``low``: whether there is nothing but negative infinity."""
        if n.op == "placeholder":
            return _Origin(None, low)  # if it is not meant, the unit that made it has said so
        before = [self.origins[a] for a in n.all_input_nodes if a in self.origins]
        worst = min(before, key=lambda o: o.meant, default=None)
        if worst is None:
            return _Origin(
                str(n.target), low and getattr(n.target, "overloadpacket", None) in _MASKS
            )
        return _Origin(str(n.target), False) if worst.meant and not low else worst


def _interpreted(module: fx.GraphModule, origins: list[_Origin | None], args: list[Any]) -> Any:
    """Run a unit; ``origins`` gets one for each of its outputs."""
    interpreter = _Interpreter(module)
    inputs = list(args)
    args.clear()
    out = interpreter.run(*inputs, enable_io_processing=False)
    origins += [interpreter.origins.get(x) for x in outputs_of(module.graph)]
    return out
