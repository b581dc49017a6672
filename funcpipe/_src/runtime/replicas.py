"""Replicas: whether ranks that hold the same leaf hold the same values of it.

In: what a rank holds of params, batch and state. Out: `Sums`, of which ranks exchange a digest for
every set; where digests differ, a text that names leaves and ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.checksum import checksums, text_sum
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.runtime.mismatch_text import in_words
from funcpipe.errors import MismatchError


class Set(NamedTuple):
    """Leaves that the same ranks hold copies of.

    Args:
        tree: "params", "batch" or "state".
        holders: the same on all of these ranks, and on no others.
    """

    tree: str
    holders: tuple


Sums = dict[Set, dict[int, int]]  # by set, the checksum of every leaf, by its number
Groups = list[list[int]]  # of ranks that hold the same
Paths = Mapping[str, Sequence[str]]  # for every tree the paths of its leaves


def of_params(checksums: Sequence[int]) -> Sums:
    """Of the params that every rank is given in full, or of what makes them."""
    return {Set("params", ()): dict(enumerate(checksums))}


def of_batch(batch: Any, rows: int | None) -> Sums:
    """Of a batch.

    Args:
        batch: what this rank was given.
        rows: None for the global batch; else the number of the rows that this rank shares with some
            others.
    """
    sums: Sums = {}
    leaves = tree.leaves(batch)
    for index, checksum in enumerate(checksums(leaves)):
        leaf = leaves[index]
        holders: tuple = ()
        if rows is not None and isinstance(leaf, torch.Tensor) and leaf.dim():
            holders = (rows,)
        sums.setdefault(Set("batch", holders), {})[index] = checksum
    return sums


def of_state(state: Any, placement: StatePlacement, rank: int) -> Sums:
    """Of what a rank holds of the state, as far as others hold copies."""
    sums: Sums = {}
    leaves = placement.state_leaves(state, "compare replicas")
    shared = []
    for index in range(len(leaves)):
        if placement.copies(rank, index) > 1:
            shared.append(index)
    found = checksums([leaves[index] for index in shared])
    for index, checksum in zip(shared, found, strict=True):
        key = Set("state", placement.held_as(rank, index))
        sums.setdefault(key, {})[index] = checksum
    return sums


def compare(comm: Communicator, sums: Sums, paths: Paths, local: bool) -> None:
    """Compare what this rank holds with what the others hold; all ranks call it alike.

    Args:
        sums: what this rank holds.
        paths, local: as for `check`.

    Raises:
        MismatchError, on every rank: they hold different values.
    """
    sets = differing(comm.exchange(digests(sums)))
    if sets:
        mine = {key: sums[key] for key in sets if key in sums}
        check(comm.exchange(mine), paths, local)


def check(found: Sequence[Sums], paths: Paths, local: bool) -> None:
    """Compare what all ranks hold.

    Args:
        found: what every rank holds.
        paths: for every tree the paths of its leaves.
        local: whether ranks bring rows of their own.

    Raises:
        MismatchError: they hold different values.
    """
    sets = differing(list(map(digests, found)))
    if sets:
        raise MismatchError(difference(sets, found, paths, local))


def digests(sums: Sums) -> dict[Set, int]:
    """A number for every set."""
    return {key: text_sum(repr(numbers)) for key, numbers in sums.items()}


def differing(found: Sequence[Mapping[Set, int]]) -> list[Set]:
    """The sets of which ranks have different digests."""
    first: dict[Set, int] = {}
    different: dict[Set, None] = {}
    for of_rank in found:
        for key, digest in of_rank.items():
            if first.setdefault(key, digest) != digest:
                different[key] = None
    return [key for key in first if key in different]


def difference(sets: Sequence[Set], found: Sequence[Sums], paths: Paths, local: bool) -> str:
    """Which leaves of ``sets``, which are `differing`, differ, and on which ranks."""
    name = sets[0].tree
    groups = _groups(sets[0], found)
    leaves: set[int] = set()
    for key in sets:
        if key.tree == name:
            leaves.update(_groups(key, found))
    leaf = next(iter(groups))
    # Of two groups as large, the first is that of the lowest rank.
    most, *others = sorted(groups[leaf], key=len, reverse=True)
    odd = sorted(itertools.chain.from_iterable(others))
    count = len(leaves) - 1
    more = f" (and {count} more {'leaf' if count == 1 else 'leaves'})" if count else ""
    cure = _CURES["rows" if local and name == "batch" else name]
    return (
        f"{name}{paths[name][leaf]}{more} is not the same on {in_words(odd)} as on "
        f"{in_words(most)}: {cure}"
    )


def _groups(key: Set, found: Sequence[Sums]) -> dict[int, Groups]:
    """The leaves of a set that differ, with the groups of ranks that hold the same."""
    ranks_of: dict[int, dict[int, list[int]]] = {}  # by leaf and checksum
    for rank, sums in enumerate(found):
        for leaf, checksum in sums.get(key, {}).items():
            groups = ranks_of.setdefault(leaf, {})
            groups.setdefault(checksum, []).append(rank)
    different = {}
    for leaf, groups in ranks_of.items():
        if len(groups) > 1:
            different[leaf] = list(groups.values())
    return different


_CURES = {
    "params": (
        "every rank passes run.init the same params. Draw them from one seed, or pass a function "
        "from a key to params and the same key"
    ),
    "batch": (
        "every rank passes the same global batch. For loaders that give each rank rows of its own, "
        "write fp.spmd(..., batch='local')"
    ),
    "rows": (
        "ranks of one pipeline or one sequence pass the same rows, and all ranks the same leaves "
        "without rows. Give their loaders one seed"
    ),
    "state": (
        "copies of a leaf have to be equal bit by bit. Give run.place one full state, and let "
        "init_state and the step do the same on every rank: one seed, the same Python values, the "
        "same kernels"
    ),
}
