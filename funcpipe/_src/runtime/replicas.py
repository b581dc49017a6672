"""Replicas: whether ranks that hold the same leaf hold the same values of it.

In: what a rank holds of params, batch and state. Out: `Sums`, of which ranks exchange a digest for
every set; where digests differ, a text that names leaves and ranks.
"""

from __future__ import annotations

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
    leaves, out = tree.leaves(batch), Sums()
    for i, (x, n) in enumerate(zip(leaves, checksums(leaves), strict=True)):
        split = rows is not None and isinstance(x, torch.Tensor) and x.dim()
        out.setdefault(Set("batch", (rows,) if split else ()), {})[i] = n
    return out


def of_state(state: Any, placement: StatePlacement, rank: int) -> Sums:
    """Of what a rank holds of the state, as far as others hold copies."""
    leaves, out = placement.state_leaves(state, "compare replicas"), Sums()
    shared = [j for j in range(len(leaves)) if placement.copies(rank, j) > 1]
    for j, n in zip(shared, checksums([leaves[j] for j in shared]), strict=True):
        out.setdefault(Set("state", placement.held_as(rank, j)), {})[j] = n
    return out


def compare(
    comm: Communicator, sums: Sums, paths: Mapping[str, Sequence[str]], local: bool
) -> None:
    """MismatchError, on every rank, unless ranks hold the same; all call it alike. Arguments as for
    `check`."""
    sets = differing(comm.exchange(digests(sums)))
    if sets:
        check(comm.exchange({key: sums[key] for key in sets if key in sums}), paths, local)


def check(found: Sequence[Sums], paths: Mapping[str, Sequence[str]], local: bool) -> None:
    """MismatchError unless ranks hold the same.

    Args:
        found: what every rank holds.
        paths: for every tree the paths of its leaves.
        local: whether ranks bring rows of their own.
    """
    sets = differing([digests(sums) for sums in found])
    if sets:
        raise MismatchError(difference(sets, found, paths, local))


def digests(sums: Sums) -> dict[Set, int]:
    """A number for every set."""
    return {key: text_sum(repr(numbers)) for key, numbers in sums.items()}


def differing(found: Sequence[Mapping[Set, int]]) -> list[Set]:
    """The sets of which ranks have told different digests."""
    known: dict[Set, set[int]] = {}
    for told in found:
        for key, digest in told.items():
            known.setdefault(key, set()).add(digest)
    return [key for key, seen in known.items() if len(seen) > 1]


def difference(
    sets: Sequence[Set], found: Sequence[Sums], paths: Mapping[str, Sequence[str]], local: bool
) -> str:
    """Which leaves of ``sets``, which are `differing`, differ, and on which ranks."""
    name = sets[0].tree
    each = [_split(key, found) for key in sets if key.tree == name]
    leaves = sorted(set().union(*each))
    leaf = next(iter(each[0]))
    most, *others = sorted(
        each[0][leaf], key=len, reverse=True
    )  # of two as large, that of the lowest rank
    count = len(leaves) - 1
    more = f" (and {count} more {'leaf' if count == 1 else 'leaves'})" if count else ""
    odd = sorted(rank for ranks in others for rank in ranks)
    cure = _CURES["rows" if local and name == "batch" else name]
    return (
        f"{name}{paths[name][leaf]}{more} is not the same on {in_words(odd)} as on "
        f"{in_words(most)}: {cure}"
    )


def _split(key: Set, found: Sequence[Sums]) -> dict[int, list[list[int]]]:
    """The leaves of a set that differ; for each, the ranks by what they hold."""
    held = {rank: sums[key] for rank, sums in enumerate(found) if key in sums}
    out = {}
    for leaf in next(iter(held.values())):
        groups: dict[int, list[int]] = {}
        for rank, sums in held.items():
            groups.setdefault(sums[leaf], []).append(rank)
        if len(groups) > 1:
            out[leaf] = list(groups.values())
    return out


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
