"""Stages: segments grouped for the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from funcpipe.errors import CutError


def group(
    costs: Sequence[int], stages: int, how: str | tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Consecutive segments for every stage.

    Args:
        costs: of every segment (FLOPs of forward and backward).
        stages: how many.
        how: "balanced" (the dearest stage as cheap as can be), "even" (by count), or how many
            segments each stage gets.

    Raises:
        CutError: fewer segments than stages, or a list that does not fit.

    >>> group([1, 1, 1, 3], 2, "balanced"), group([1, 1, 1, 3], 2, "even"), group([1, 1, 1, 3], 2, (1, 3))
    (((0, 1, 2), (3,)), ((0, 1), (2, 3)), ((0,), (1, 2, 3)))
    """
    n = len(costs)
    if n < stages:
        raise CutError(
            f"{stages} stages need {stages - 1} boundaries or more, but the loss function has "
            f"{n - 1}: call fp.stage_boundary after every block"
        )
    if isinstance(how, tuple):
        if len(how) != stages or sum(how) != n:
            raise CutError(
                f"stages={list(how)} has {len(how)} entries that add up to {sum(how)}, but there "
                f"are {stages} stages and {n} segments (one more than boundaries): write {stages} "
                f"numbers that add up to {n}"
            )
        sizes = list(how)
    elif how == "even":
        sizes = [n // stages + (s < n % stages) for s in range(stages)]
    else:
        sizes = _balanced(costs, stages)
    starts = [sum(sizes[:s]) for s in range(stages)]
    return tuple(tuple(range(a, a + k)) for a, k in zip(starts, sizes, strict=True))


def _balanced(costs: Sequence[int], stages: int) -> list[int]:
    """The sizes that make the dearest stage cheapest, by dynamic programming over (stages,
    segments)."""
    n = len(costs)
    total = [0]
    for c in costs:
        total.append(total[-1] + max(c, 1))
    best = [total[k] for k in range(n + 1)]  # one stage for the first k segments
    cut: list[list[int]] = []
    for s in range(2, stages + 1):
        row, at = [0] * (n + 1), [0] * (n + 1)
        for k in range(s, n + 1):
            row[k], at[k] = min((max(best[j], total[k] - total[j]), j) for j in range(s - 1, k))
        best = row
        cut.append(at)
    sizes, k = [], n
    for at in reversed(cut):
        sizes.append(k - at[k])
        k = at[k]
    return [k, *reversed(sizes)]
