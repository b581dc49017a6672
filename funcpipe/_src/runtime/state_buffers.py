"""State buffers: the memory of the newest state, over which steps write the next one.

A step may use up the state that it is given: the state is invalidated, its memory is that of the
new state. Each step returns new tensor objects over the same buffers. An outdated state is
recognised by object identity.

In: states. Out: `StateBuffers`, and the steps of a rank that donate without a CUDA graph,
`DonatedStep`; those with one are in `cuda_graph.py`.
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
    """The newest state of a runner. Where no graph has taken it in, weak references to its tensors
    are kept, and no memory."""

    def __init__(self) -> None:
        self.leaves: list[torch.Tensor] = []  # the buffers that a graph works on
        self._spec: Any = None
        self._failed = False  # whether the step that was run last has failed
        # The leaves as the last step returned them; weak references, unless their memory is that of
        # the buffers.
        self._references: list[Any] = []
        # The leaves that the next step returns, and the state of them.
        self._next: tuple[list[torch.Tensor], Any] | None = None

    @property
    def state(self) -> Any:
        """The state as captured steps see it."""
        return tree.unflatten(self._spec, self.leaves)

    @property
    def _returned(self) -> list[Any]:
        """The leaves as the last step returned them; None for those that are gone."""
        if self.leaves:
            return self._references
        return list(map(_dereferenced, self._references))

    @_returned.setter
    def _returned(self, leaves: list[Any]) -> None:
        self._references = leaves if self.leaves else list(map(_referenced, leaves))

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
            self._check_valid(given)
            if self.leaves:
                self._check_alike(given)
        return given

    def _read_last(self, state: Any) -> Given | None:
        """A state that is what the last captured step returned: looking where its leaves were takes
        an eighth of the time of flattening."""
        if self._spec is None:
            return None
        try:
            leaves = self._spec.flatten_up_to(state)
        except ValueError:
            return None
        if not self._is_last(leaves):
            return None
        return Given(state, leaves, self._spec, last=True)

    def _check_valid(self, given: Given) -> None:
        """Refuse leaves that were invalidated, and views of the buffers that no step returned."""
        returned = [leaf for leaf in self._returned if isinstance(leaf, torch.Tensor)]
        valid = set(map(id, returned))
        own = _memories(self.leaves or returned)
        for number, leaf in enumerate(given.leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            gone = invalidated(leaf)
            from_outside = gone is None or bool(self.leaves)
            view = from_outside and id(leaf) not in valid and memory(leaf) in own
            if gone or view:
                path = tree.paths(given.state)[number]
                raise StateError(INVALIDATED_LEAF.format(path=f"state{path}"))

    def _check_alike(self, given: Given) -> None:
        """Refuse a state that does not fit the buffers."""
        if given.spec != self._spec:
            raise StateError(
                f"the state has another structure than when the step was captured: {given.spec}, "
                f"not {self._spec}"
            )
        pairs = zip(given.leaves, self.leaves, strict=True)
        for number, (leaf, buffer) in enumerate(pairs):
            if not _fits(leaf, buffer):
                path = tree.paths(given.state)[number]
                raise StateError(
                    f"state{path} is {describe(leaf)}, but the step was "
                    f"captured with {describe(buffer)} on the {buffer.device}"
                )

    def _is_last(self, leaves: list[Any]) -> bool:
        """Whether these are what the last step returned, all of them."""
        if self._failed or len(leaves) != len(self._references):
            return False
        return all(map(is_, leaves, self._returned))

    @staticmethod
    def give(state: Any) -> Any:
        """A state that a runner has made, in memory of its own, as if a step had returned it; the
        same."""
        invalidate(tree.leaves(state), gone=False)
        return state

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a step writes over the newest state. A step that fails after it has begun to
        invalidates that state; so does any failure once buffers were invalidated."""
        try:
            yield
        except BaseException:
            if any(map(invalidated, self.leaves)):
                invalidate(self._returned)
            self._failed = True
            raise

    # ---- buffers that move: steps without a graph

    def lent(self, leaves: list[Any], free: frozenset[int]) -> list[torch.Tensor]:
        """Of the leaves with some numbers, those that the runner has made, and whose memory no
        other leaf has."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        users = Counter(map(memory, tensors))
        found = []
        for number in free:
            leaf = leaves[number]
            own = invalidated(leaf) is False
            if own and users[memory(leaf)] == 1 and memory(leaf) and is_dense(leaf):
                found.append(leaf)
        return found

    def put(self, state: Any, lent: list[torch.Tensor]) -> Any:
        """The state that a step made of leaves of which it has written to some: new tensor objects
        where it has."""
        leaves, spec = tree.flatten(state)
        written = set(map(memory, lent))
        invalidate(lent)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and memory(leaf) in written:
                leaves[number] = leaf.detach()
        self._returned, self._failed = leaves, False
        return self.give(tree.unflatten(spec, leaves))

    # ---- buffers that stay: captured steps

    def load(self, given: Given) -> None:
        """Take in the values of a state. The first one's memory becomes the buffers; a tensor that
        shares memory with another leaf, or has elements that do, is copied."""
        if not self.leaves:
            self.leaves, self._spec = unshared(given.leaves), given.spec
            self._returned = given.leaves
            return
        if given.last:
            return
        moved = []
        for buffer, leaf, returned in zip(self.leaves, given.leaves, self._returned, strict=True):
            if leaf is not returned:
                moved.append((buffer, leaf))
        self.overwrite(moved)

    def overwrite(self, moved: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Write tensors to buffers. What lies in a buffer is read before that is written."""
        own = _memories(self.leaves)
        sources = []
        for _, source in moved:
            sources.append(source.clone() if memory(source) in own else source)
        write([buffer for buffer, _ in moved], sources)

    def make_next(self) -> None:
        """Make the state after the next step ahead of time, as far as it is new tensor objects over
        buffers that stay."""
        if self._spec is not None and self._next is None:
            # `data` shares no version counter, and takes half the time of `detach`.
            leaves = [buffer.data for buffer in self.leaves]
            self._next = leaves, tree.unflatten(self._spec, leaves)

    def release(self) -> Any:
        """The state after a step, of new tensor objects."""
        self.make_next()
        assert self._next is not None
        self._returned, state = self._next
        self._next, self._failed = None, False
        return state


def _referenced(leaf: Any) -> Any:
    return weakref.ref(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _dereferenced(leaf: Any) -> Any:
    return leaf() if isinstance(leaf, weakref.ref) else leaf


def _memories(tensors: list[torch.Tensor]) -> set[int]:
    """Where the memory of tensors begins, of those that have any."""
    return set(map(memory, tensors)) - {0}


def _fits(leaf: Any, buffer: torch.Tensor) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return False
    same_kind = leaf.shape == buffer.shape and leaf.dtype == buffer.dtype
    return same_kind and leaf.device == buffer.device


class DonatedStep:
    """A rank's step that writes the new state where the old one was, as far as nobody reads the old
    one any more, and where it is one that the runner has made."""

    def __init__(self, rank: Rank, buffers: StateBuffers) -> None:
        self.rank, self.buffers = rank, buffers
        placement = rank.plan.placement
        self._free = placement.free(rank.comm.rank)
        self._spec: Any = None  # of states that were seen to be such as init_state makes

    def __call__(self, given: Given, batch: Any) -> tuple[Any, Any]:
        """One step."""
        if given.spec != self._spec:
            self.rank.plan.placement.state_leaves(given.state, "step")
            self._spec = given.spec
        leaves = self.buffers.lent(given.leaves, self._free)
        with self.buffers.kept():
            new, metrics = self.rank.step(given.state, batch, leaves)
            self.rank.comm.flush()
        # A metric is no leaf of the state: `analysis/state.py` sees to that.
        return self.buffers.put(new, leaves), metrics


def unshared(leaves: list[Any]) -> list[Any]:
    """Leaves of which no two share memory, nor two elements of one: those that do are copied."""
    seen: set[int] = set()
    found = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if memory(leaf) in seen or not is_dense(leaf):
                leaf = leaf.clone()
            seen.add(memory(leaf))
        found.append(leaf)
    return found


def write(old: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    """Copy tensors into others."""
    if old:
        torch._foreach_copy_(old, new, non_blocking=True)
