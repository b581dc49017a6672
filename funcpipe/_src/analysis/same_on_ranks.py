"""Same on ranks: what a step computes outside ``value_and_grad`` has to be the same on every rank.

A rank that draws random values draws its own ones; a rank whose batch is its own rows computes
other numbers from them. Both would let states and metrics of ranks differ.

In: the ops of a step (`outside_ops.py`), what it returned, the batches of its calls. Out: nothing,
or a StateError that names the leaf and the user's line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from funcpipe._src.analysis.outside_ops import Outside
from funcpipe._src.core import pytree
from funcpipe._src.core.source_lines import Line
from funcpipe.errors import StateError


def check_draws(outside: Outside, state: Any, metrics: Any, batches: Sequence[Any]) -> None:
    """StateError where a step draws random values itself."""
    for line in outside.drawn_numbers:
        raise _drawn(line, "a Python number")
    leaves = [*_results(state, metrics), *_of_calls(batches)]
    for path, leaf in leaves:
        for line in outside.draws_of(leaf):
            raise _drawn(line, path)


def _drawn(line: Line | None, what: str) -> StateError:
    return StateError(
        f"the step draws random values{line or ''} outside value_and_grad, for {what}: every rank "
        "would draw its own. Draw them before the step and pass them through the state or batch, "
        "or compute them with fp.random from a key in the state"
    )


def check_own_rows(outside: Outside, state: Any, metrics: Any) -> None:
    """StateError where a result follows from rows that a rank alone has."""
    for path, leaf in _results(state, metrics):
        if outside.is_of_batch(leaf):
            raise StateError(
                f"{path} is computed from the batch outside value_and_grad: with batch='local' "
                "every rank has rows of its own, so that ranks would differ. Return it from the "
                "loss function as aux (fp.Mean), or use batch='global'"
            )


def _results(state: Any, metrics: Any) -> Iterator[tuple[str, Any]]:
    yield from _named("state", state)
    yield from _named("metrics", metrics)


def _of_calls(batches: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for number, batch in enumerate(batches):
        for path, leaf in _named("batch", batch):
            yield f"{path} of value_and_grad {number}", leaf


def _named(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    paths = pytree.paths(tree)
    leaves = pytree.leaves(tree)
    for path, leaf in zip(paths, leaves, strict=True):
        yield name + path, leaf
