"""Find non-finite values: where in a step the first NaN or infinity comes from.

Every rank runs the step once, and looks at all values (`nonfinite_watch.py`) and ops
(`nonfinite_ops.py`). Negative infinity that a mask put there, or that came in with the batch, is
meant; it does not count where any other event is found.

In: a runner, its state, a batch. Out: `Nonfinite`, or None where losses, gradients and the new
state are finite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.context import tap
from funcpipe._src.planning.variants import StaleValues
from funcpipe._src.runtime.nonfinite_watch import Event, Nonfinite, Watch
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.simulate import Simulation
from funcpipe._src.runtime.spmd_runner import Spmd

Run = Simulation | Spmd


def find_nonfinite(
    run: Run,
    state: Any,
    batch: Any,
) -> Nonfinite | None:
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
    events = _counting(found)
    if not events:
        return None
    return min(events, key=_key).found


def _everywhere(run: Run, state: Any, batch: Any) -> list[_Found]:
    """What every rank finds, under the plan for what is read from Python now."""
    if isinstance(run, Spmd):
        # All ranks have the same plan, and channels for what it sends.
        run._guarded(run._agreed_rank, batch)
    plan = run._made.plan(batch)

    def search(comm: Communicator, _: Any) -> _Found:
        rank = Rank(plan, comm)
        mine = state if isinstance(run, Spmd) else state[comm.rank]
        return _search(rank, mine, batch)

    return run._everywhere(search, together=True)


class _Found(NamedTuple):
    """What a rank found.

    Args:
        first: its first event in a ``value_and_grad``.
        later: its first one after them.
        bad: whether a result of a ``value_and_grad`` is an event.
    """

    first: list[Event]
    later: list[Event]
    bad: bool


def _search(rank: Rank, state: Any, batch: Any) -> _Found:
    """Run a step of one rank, and look at all that it makes."""
    watch = Watch(rank)
    rank.observer = watch.program
    with tap() as seen, torch.no_grad():
        new, _ = rank.step(state, batch)
    rank.comm.flush()
    before = len(watch.events)
    for call, (_, loss, grads) in enumerate(seen):
        watch.results(call, loss, grads)
    events = list(watch.events)
    watch.events.clear()
    watch.state(state, new)
    bad = len(events) > before
    return _Found(_first(events), _first(watch.events), bad)


def _first(events: list[Event]) -> list[Event]:
    return sorted(events, key=_key)[:1]


def _key(event: Event) -> tuple:
    return event.key


def _counting(found: list[_Found]) -> list[Event]:
    """The events of all ranks that count: those in the state only where results are finite."""
    bad = any(of_rank.bad for of_rank in found)
    events: list[Event] = []
    for of_rank in found:
        if bad:
            events += of_rank.first
        else:
            events += of_rank.later
    return events
