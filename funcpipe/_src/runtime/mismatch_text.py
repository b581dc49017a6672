"""Mismatch texts: what a runner says of ranks that differ, and of one that ran out of memory.

In: what every rank is about to run; a rank and its state. Out: text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from funcpipe._src.analysis.outside_ops import Op
from funcpipe._src.backends.backend import Backend
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.graph.grouped_mm import copied_experts
from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.spec.resolve import ResolvedStep

_SHOWN = 8  # ranks that a text names
_LOCAL = "rows of its own, of the same shapes as the others', and the same"
_GLOBAL = "the same global batch and"


def about_to_run(resolved: ResolvedStep, mesh: Mesh, backend: Backend, cuda_graph: bool) -> str:
    """What a rank is about to run, in words that are the same on all ranks."""
    transforms = ", ".join(record.text for record in resolved.specs)
    return (
        f"{transforms or 'no transform'} on {mesh!r}, backend={backend.name!r}, "
        f"accumulate_dtype={backend.accumulate_dtype}, cuda_graph={cuda_graph}"
        f"{', local batches' if resolved.local else ''}"
    )


def too_large(rank: Rank, state: Any, error: BaseException) -> str:
    """What a rank that ran out of memory holds."""
    comm = rank.comm
    tensors = [leaf for leaf in tree.leaves(state) if isinstance(leaf, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in tensors)
    predicted = rank.plan.memory[rank.pipeline_rank]
    return (
        f"rank {comm.rank} is out of memory on {comm.device}: beside its state of "
        f"{bytes_text(held)} the plan predicts {bytes_text(predicted['activations'])} of "
        f"activations, {bytes_text(predicted['gathered'])} of gathered params and "
        f"{bytes_text(predicted['gradients'])} of gradients. Use more and smaller microbatches, a "
        "schedule that holds fewer of them (fp.schedules.one_f_one_b(), v_half() or "
        f"auto(memory_limit=...)), or checkpoint the blocks.{_experts(rank)} "
        f"{str(error).splitlines()[0]}"
    )


def _experts(rank: Rank) -> str:
    """What to say of experts whose weights are copied for every token."""
    copied = 0
    for call in rank.plan.calls:
        for cut in call.microbatch_units[:1]:
            graph = cut.traced.module.graph
            copied += copied_experts(graph, cut.traced.params)
    if not copied:
        return ""
    return (
        f" {bytes_text(copied)} of a microbatch are copies of experts' weights, one for every "
        "token, as batched_mm makes them: use grouped products (F.grouped_mm; in transformers "
        'config._experts_implementation = "grouped_mm").'
    )


def described(trees: dict[str, Any]) -> list[tuple[str, str]]:
    """Path and description of every leaf."""
    found = []
    for name, held in trees.items():
        for path, leaf in zip(tree.paths(held), tree.leaves(held), strict=True):
            found.append((name + path, _described(leaf)))
    return found


def _described(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}".removeprefix("torch.")


def other_plan(
    first: dict[str, list[str]], other: dict[str, list[str]], most: int, odd: int
) -> str:
    """Which line differs first between the plans of two ranks."""
    text = f"rank {odd} has planned another program than rank {most} for the same shapes"
    for topic in first | other:
        lines = first.get(topic, ())
        other_lines = other.get(topic, ())
        pairs = itertools.zip_longest(lines, other_lines, fillvalue="nothing more")
        for line, other_line in pairs:
            if line != other_line:
                return (
                    f"{text}. First difference, in {topic}: {line!r} on rank {most}, "
                    f"{other_line!r} on rank {odd}. Run the same script with the same options "
                    "everywhere"
                )
    return text


def other_step(first: Sequence[Op], other: Sequence[Op], most: int, odd: Sequence[int]) -> str:
    """Which op of the step differs first between rank ``most`` and the ``odd`` ones, of which
    ``other`` is the first's."""
    lines = dict(other) | dict(first)
    count = Counter(text for text, _ in first)
    other_count = Counter(text for text, _ in other)
    alone = next((count - other_count).elements(), None)
    other_alone = next((other_count - count).elements(), None)
    line = lines[alone or other_alone or first[0][0]] or ""
    return (
        f"the step{line} computes {_quoted(alone)} on rank {most} and {_quoted(other_alone)} on "
        f"{in_words(odd)}, outside value_and_grad. Give the step and its optimizer the same "
        "learning rate and other Python values on every rank"
    )


def _quoted(op: str | None) -> str:
    return f"`{op}`" if op else "nothing"


def in_words(ranks: Sequence[int]) -> str:
    """Ranks in words.

    >>> in_words([1]), in_words([0, 2, 3]), in_words(range(20))
    ('rank 1', 'ranks 0, 2 and 3', 'ranks 0, 1, 2, 3, 4, 5, 6 and 13 more')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    names = list(map(str, ranks))
    if len(names) > _SHOWN:
        names[_SHOWN - 1 :] = [f"{len(names) - _SHOWN + 1} more"]
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def majority(values: Sequence[Any]) -> tuple[int, list[int]]:
    """The first of the ranks that have the most frequent value, and those that have another.

    >>> majority([5, 7, 7, 7]), majority([5, 7])
    ((1, [0]), (0, [1]))
    """
    most = max(values, key=values.count)  # of two as frequent, that of the lowest rank
    odd = [rank for rank, value in enumerate(values) if value != most]
    return values.index(most), odd


def difference(all_ranks: list[tuple[str, list[tuple[str, str]]]], local: bool) -> str:
    """What ranks are about to run differently: for every rank what it runs, and what was
    `described`."""
    what, leaves = all_ranks[0]
    for rank, (other_what, other_leaves) in enumerate(all_ranks):
        if other_what != what:
            return (
                f"rank 0 is about to run {what!r}, rank {rank} {other_what!r}: all ranks run the "
                "same calls in the same order"
            )
        first, other = dict(leaves), dict(other_leaves)
        for path in first | other:
            mine = first.get(path, "no such leaf")
            theirs = other.get(path, "no such leaf")
            if mine != theirs:
                return (
                    f"{path} is {mine} on rank 0 and {theirs} on rank {rank}: every rank passes "
                    f"{_LOCAL if local else _GLOBAL} params"
                )
    return "ranks disagree about the order of leaves: build batch and params alike everywhere"
