"""Stage assignment: which consecutive segments make up each stage.

In: the cost of every segment, the number of stages, and how to divide them.
Out: for every stage its segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from funcpipe.errors import CutError


def group(
    costs: Sequence[int],
    stages: int,
    how: str | tuple[int, ...],
) -> tuple[tuple[int, ...], ...]:
    """Consecutive segments for every stage.

    Args:
        costs: of every segment (FLOPs of forward and backward).
        stages: how many.
        how: "balanced" (the dearest stage as cheap as can be), "even" (by count), or how many
            segments each stage gets.

    Raises:
        CutError: fewer segments than stages, or a list that does not fit.

    >>> group([1, 1, 1, 3], 2, "balanced"), group([1, 1, 1, 3], 2, "even")
    (((0, 1, 2), (3,)), ((0, 1), (2, 3)))
    >>> group([1, 1, 1, 3], 2, (1, 3))
    ((0,), (1, 2, 3))
    """
    segments = len(costs)
    if segments < stages:
        raise CutError(
            f"{stages} stages need {stages - 1} boundaries or more, but the loss function has "
            f"{segments - 1}: call fp.stage_boundary after every block"
        )
    if isinstance(how, tuple):
        if len(how) != stages or sum(how) != segments:
            raise CutError(
                f"stages={list(how)} has {len(how)} entries that add up to {sum(how)}, but there "
                f"are {stages} stages and {segments} segments (one more than boundaries): write "
                f"{stages} numbers that add up to {segments}"
            )
        sizes = list(how)
    elif how == "even":
        size, larger = divmod(segments, stages)
        sizes = [size + 1] * larger + [size] * (stages - larger)
    else:
        sizes = _balanced(costs, stages)
    ends = accumulate(sizes)
    return tuple(tuple(range(end - size, end)) for size, end in zip(sizes, ends, strict=True))


def _balanced(costs: Sequence[int], stages: int) -> list[int]:
    """The sizes that make the dearest stage cheapest.

    Dynamic programming: the best way to divide the first segments over a number of stages follows
    from the best ways over one stage fewer.
    """
    segments = len(costs)
    total = [0, *accumulate(max(cost, 1) for cost in costs)]  # of the first segments
    dearest = list(total)  # with one stage
    last_starts: list[list[int]] = []  # for each further stage: where it starts, by where it ends
    for stage in range(1, stages):
        before = dearest
        dearest = [0] * (segments + 1)
        starts = [0] * (segments + 1)
        for end in range(stage + 1, segments + 1):
            ways = (
                (max(before[start], total[end] - total[start]), start)
                for start in range(stage, end)
            )
            dearest[end], starts[end] = min(ways)
        last_starts.append(starts)
    sizes = []
    end = segments
    for starts in reversed(last_starts):
        sizes.append(end - starts[end])
        end = starts[end]
    return [end, *reversed(sizes)]
