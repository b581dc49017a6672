"""Home: the state that steps take over, and how an old one is known when it is used again.

Terms. A state that a step has used up is *donated*: what it held is gone, its memory is that of the
new state. The *home* is the newest state of a runner. A step returns the home's tensors under new
names (tensor objects), so an old state is known by its names.

In: states. Out: `StateBuffers`, and the steps of a rank that donate without a CUDA graph, `DonatedStep`;
those with one are in `cuda_graph.py`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from operator import is_
from typing import Any, NamedTuple

import torch

from funcpipe._src.comm.tensor_layout import is_dense
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import (
    INVALIDATED_LEAF,
    invalidate,
    invalidated,
    memory,
)
from funcpipe._src.core.describe_value import describe
from funcpipe._src.runtime.rank import Rank
from funcpipe.errors import StateError


class Given(NamedTuple):
    """A state that a runner was given, and what it consists of."""

    state: Any
    leaves: list[Any]
    spec: Any
    last: bool  # whether it is what the last step returned, all of it


class StateBuffers:
    """The newest state of a runner. Where no graph has taken it in, only names are kept, not what
    they name."""

    def __init__(self) -> None:
        self.leaves: list[torch.Tensor] = []  # what a graph has taken in
        self._spec: Any = None
        self._failed = False  # whether the step that was run last has failed
        # The leaves as the last step returned them; weak references, unless what they name is the
        # home's own.
        self._names: list[Any] = []
        # Names for the leaves as the next step leaves them, and its state.
        self._next: tuple[list[torch.Tensor], Any] | None = None

    @property
    def state(self) -> Any:
        """The state as captured steps see it."""
        return tree.unflatten(self._spec, self.leaves)

    @property
    def _named(self) -> list[Any]:
        return (
            self._names
            if self.leaves
            else [x() if isinstance(x, weakref.ref) else x for x in self._names]
        )

    @_named.setter
    def _named(self, leaves: list[Any]) -> None:
        weak = not self.leaves
        self._names = [
            weakref.ref(x) if weak and isinstance(x, torch.Tensor) else x for x in leaves
        ]

    def read(self, state: Any) -> Given:
        """A state that a step may use.

        Raises:
            StateError: it was donated, or does not fit a graph that was captured.
        """
        given = self._read_last(state)
        if given is None:
            leaves, spec = tree.flatten(state)
            given = Given(state, leaves, spec, self._is_last(leaves))
        if not given.last:
            self._check_names(given)
            if self.leaves:
                self._check_alike(given)
        return given

    def _read_last(self, state: Any) -> Given | None:
        """A state that is what the last captured step returned: to look where its leaves were takes
        an eighth of flattening."""
        if self._spec is None:
            return None
        try:
            leaves = self._spec.flatten_up_to(state)
        except ValueError:
            return None
        return Given(state, leaves, self._spec, last=True) if self._is_last(leaves) else None

    def _check_names(self, given: Given) -> None:
        named = [x for x in self._named if isinstance(x, torch.Tensor)]
        valid, mine = set(map(id, named)), {memory(x) for x in (self.leaves or named)} - {0}
        for k, x in enumerate(given.leaves):
            if not isinstance(x, torch.Tensor):
                continue
            gone = invalidated(x)
            view = id(x) not in valid and (gone is None or bool(self.leaves)) and memory(x) in mine
            if gone or view:
                raise StateError(INVALIDATED_LEAF.format(path=f"state{tree.paths(given.state)[k]}"))

    def _check_alike(self, given: Given) -> None:
        if given.spec != self._spec:
            raise StateError(
                f"the state has another structure than when the step was captured: {given.spec}, "
                f"not {self._spec}"
            )
        for k, (x, home) in enumerate(zip(given.leaves, self.leaves, strict=True)):
            if not isinstance(x, torch.Tensor) or (x.shape, x.dtype, x.device) != (
                home.shape,
                home.dtype,
                home.device,
            ):
                raise StateError(
                    f"state{tree.paths(given.state)[k]} is {describe(x)}, but the step was "
                    f"captured with {describe(home)} on the {home.device}"
                )

    def _is_last(self, leaves: list[Any]) -> bool:
        """Whether these are what the last step returned, all of them."""
        return (
            not self._failed
            and len(leaves) == len(self._names)
            and all(map(is_, leaves, self._named))
        )

    @staticmethod
    def give(state: Any) -> Any:
        """A state that a runner has made, in memory of its own, as if a step had returned it; the
        same."""
        invalidate(tree.leaves(state), gone=False)
        return state

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a step writes over the newest state. Where it fails after it has begun to, that
        state is not to be used; nor, where leaves stay where they are, if an earlier one has."""
        try:
            yield
        except BaseException:
            if any(map(invalidated, self.leaves)):
                invalidate(self._named)
            self._failed = True
            raise

    # ---- a home whose leaves move

    def lent(self, leaves: list[Any], free: frozenset[int]) -> list[torch.Tensor]:
        """Of leaves at some places, those that the runner has made, and whose memory no other leaf
        has."""
        users = Counter(memory(x) for x in leaves if isinstance(x, torch.Tensor))
        ours = [x for x in (leaves[k] for k in free) if invalidated(x) is False]
        return [x for x in ours if users[memory(x)] == 1 and memory(x) and is_dense(x)]

    def put(self, state: Any, lent: list[torch.Tensor]) -> Any:
        """The state that a step made of leaves of which it has written to some: under names of its
        own where it has."""
        new, spec = tree.flatten(state)
        used = {memory(x) for x in lent}
        invalidate(lent)
        new = [x.detach() if isinstance(x, torch.Tensor) and memory(x) in used else x for x in new]
        self._named, self._failed = new, False
        return self.give(tree.unflatten(spec, new))

    # ---- a home whose leaves stay where they are

    def enter(self, given: Given) -> None:
        """Take in the values of a state. The first one's memory is the home's; a tensor that shares
        memory with another leaf, or has elements that do, is copied."""
        leaves = given.leaves
        if not self.leaves:
            self.leaves, self._spec, self._named = unshared(leaves), given.spec, leaves
        elif not given.last:
            mine = {memory(x) for x in self.leaves} - {0}
            moved = [
                (a, b)
                for a, b, named in zip(self.leaves, leaves, self._named, strict=True)
                if b is not named
            ]
            write([a for a, _ in moved], [b.clone() if memory(b) in mine else b for _, b in moved])

    def make_next(self) -> None:
        """Make the state after the next step ahead of time, as far as it is the names of leaves
        that stay where they are."""
        if self._spec is not None and self._next is None:
            names = [
                x.data for x in self.leaves
            ]  # shares no version, which takes half the time of detach
            self._next = names, tree.unflatten(self._spec, names)

    def leave(self) -> Any:
        """The state after a step, under names of its own."""
        self.make_next()
        assert self._next is not None
        (self._named, state), self._next, self._failed = self._next, None, False
        return state


class DonatedStep:
    """A rank's step that writes the new state where the old one was, as far as nobody reads the old
    one any more, and where it is one that the runner has made."""

    def __init__(self, rank: Rank, home: StateBuffers) -> None:
        self.rank, self.home = rank, home
        self._free = rank.plan.placement.free(rank.comm.rank)
        self._spec: Any = None  # of states that were seen to be such as init_state makes

    def __call__(self, given: Given, batch: Any) -> tuple[Any, Any]:
        """One step."""
        if given.spec != self._spec:
            self.rank.plan.placement.state_leaves(given.state, "step")
            self._spec = given.spec
        leaves = self.home.lent(given.leaves, self._free)
        with self.home.kept():
            new, metrics = self.rank.step(given.state, batch, leaves)
            self.rank.comm.flush()
        return self.home.put(
            new, leaves
        ), metrics  # a metric is no leaf of the state: `analysis/state.py` sees to that


def unshared(leaves: list[Any]) -> list[Any]:
    """Leaves of which no two share memory, nor two elements of one: those that do are copied."""
    seen: set[int] = set()
    out = []
    for x in leaves:
        if isinstance(x, torch.Tensor):
            x = x if is_dense(x) and memory(x) not in seen else x.clone()
            seen.add(memory(x))
        out.append(x)
    return out


def write(old: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    """Copy tensors into others."""
    if old:
        torch._foreach_copy_(old, new, non_blocking=True)
