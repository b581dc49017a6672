"""Texts: what a runner says of ranks that differ, and of one that ran out of memory.

In: what every rank is about to run; a rank and its state. Out: text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from funcpipe._src.analysis.outside_ops import Op
from funcpipe._src.core import pytree as tree
from funcpipe._src.graph.grouped_mm import copied_experts
from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.runtime.rank import Rank

_SHOWN = 8  # ranks that a text names


def too_large(rank: Rank, state: Any, error: BaseException) -> str:
    """What a rank that ran out of memory holds."""
    memory = rank.plan.memory[rank.place]
    held = bytes_text(sum(x.nbytes for x in tree.leaves(state) if isinstance(x, torch.Tensor)))
    activations, gathered, gradients = (
        bytes_text(memory[k]) for k in ("activations", "gathered", "gradients")
    )
    return (
        f"rank {rank.comm.rank} is out of memory on {rank.comm.device}: beside its state of {held} "
        f"the plan predicts {activations} of activations, {gathered} of gathered params and "
        f"{gradients} of gradients. Use more and smaller microbatches, a schedule that holds fewer "
        "of them (fp.schedules.one_f_one_b(), v_half() or auto(memory_limit=...)), or checkpoint "
        f"the blocks.{_experts(rank)} {str(error).splitlines()[0]}"
    )


def _experts(rank: Rank) -> str:
    """What to say of experts whose weights are copied for every token."""
    traced = [call.joint for call in rank.plan.calls]
    copied = sum(copied_experts(joint.module.graph, joint.params) for joint in traced)
    if not copied:
        return ""
    return (
        f" {bytes_text(copied)} of a microbatch are copies of experts' weights, one for every "
        "token, as batched_mm makes "
        "them: use grouped products (F.grouped_mm; in transformers "
        'config._experts_implementation = "grouped_mm").'
    )


def described(trees: dict[str, Any]) -> list[tuple[str, str]]:
    """Path and description of every leaf."""
    out = []
    for name, x in trees.items():
        for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
            text = (
                f"{leaf.dtype}{list(leaf.shape)}".removeprefix("torch.")
                if isinstance(leaf, torch.Tensor)
                else repr(leaf)
            )
            out.append((name + path, text))
    return out


def other_plan(
    first: dict[str, list[str]], other: dict[str, list[str]], most: int, odd: int
) -> str:
    """Which line differs first between the plans of two ranks."""
    for topic in dict.fromkeys([*first, *other]):
        for a, b in itertools.zip_longest(
            first.get(topic, ()), other.get(topic, ()), fillvalue="nothing more"
        ):
            if a != b:
                return (
                    f"rank {odd} has planned another program than rank {most} for the same shapes. "
                    f"First difference, in {topic}: {a!r} on rank {most}, {b!r} on rank {odd}. Run "
                    "the same script with the same options everywhere"
                )
    return f"rank {odd} has planned another program than rank {most} for the same shapes"


def other_step(first: Sequence[Op], other: Sequence[Op], most: int, odd: Sequence[int]) -> str:
    """Which op of the step differs first between rank ``most`` and the ``odd`` ones, of which
    ``other`` is the first's."""
    lines = dict(other) | dict(first)
    counts = [Counter(text for text, _ in ops) for ops in (first, other)]
    alone = [next(iter((a - b).elements()), None) for a, b in (counts, counts[::-1])]
    texts = [f"`{text}`" if text else "nothing" for text in alone]
    line = lines[alone[0] or alone[1] or first[0][0]] or ""
    return (
        f"the step{line} computes {texts[0]} on rank {most} and {texts[1]} on {in_words(odd)}, "
        "outside value_and_grad. Give the step and its optimizer the same learning rate and other "
        "Python values on every rank"
    )


def in_words(ranks: Sequence[int]) -> str:
    """Ranks in words.

    >>> in_words([1]), in_words([0, 2, 3]), in_words(range(20))
    ('rank 1', 'ranks 0, 2 and 3', 'ranks 0, 1, 2, 3, 4, 5, 6 and 13 more')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    names = [str(r) for r in ranks]
    if len(names) > _SHOWN:
        names[_SHOWN - 1 :] = [f"{len(names) - _SHOWN + 1} more"]
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def majority(said: Sequence[Any]) -> tuple[int, list[int]]:
    """The first of the ranks that say what most say, and those that say something else.

    >>> majority([5, 7, 7, 7]), majority([5, 7])
    ((1, [0]), (0, [1]))
    """
    most = max(said, key=said.count)  # of two as frequent, what the lowest rank says
    return said.index(most), [r for r, x in enumerate(said) if x != most]


def difference(all_ranks: list[tuple[str, list[tuple[str, str]]]], local: bool) -> str:
    """What ranks are about to run differently: for every rank what it runs, and what was
    `described`."""
    what, first = all_ranks[0]
    same = (
        "rows of its own, of the same shapes as the others', and the same"
        if local
        else "the same global batch and"
    )
    for r, (other_what, other) in enumerate(all_ranks):
        if other_what != what:
            return (
                f"rank 0 is about to run {what!r}, rank {r} {other_what!r}: all ranks run the same "
                "calls in the same order"
            )
        a, b = dict(first), dict(other)
        for path in [*a, *b]:
            if a.get(path) != b.get(path):
                mine, theirs = (x.get(path, "no such leaf") for x in (a, b))
                return (
                    f"{path} is {mine} on rank 0 and {theirs} on rank {r}: every rank passes "
                    f"{same} params"
                )
    return "ranks disagree about the order of leaves: build batch and params alike everywhere"
