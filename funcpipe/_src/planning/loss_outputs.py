"""Loss outputs: what becomes of the outputs of a joint graph when a batch is split.

The outputs are numbered: the total, the weight (of an `fp.Mean`), then the tensors of aux.

In: a joint graph. Out: which outputs are summed over microbatches, and how others are joined.
"""

from __future__ import annotations

from typing import Any

from funcpipe._src.core import pytree
from funcpipe._src.core.loss_types import AUX_LEAF, Mean, Rows, is_summary
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.trace import Traced
from funcpipe._src.proof.verify import SequenceProof
from funcpipe.errors import BatchError


def summed_outputs(joint: Traced) -> frozenset[int]:
    """The outputs that are summed over microbatches: the total, the weight, and both halves of
    every `Mean` in aux."""
    first_of_aux = 1 + joint.has_weight
    found = set(range(first_of_aux))
    for node in _aux_nodes(joint.aux):
        if isinstance(node, Mean):
            numbers = int(node.total), int(node.weight)
            found.update(first_of_aux + number for number in numbers)
    return frozenset(found)


def row_layouts(
    joint: Traced, proof: SequenceProof | None
) -> dict[int, tuple[int, SequenceLayout]]:
    """By output, for every `Rows` in aux whose positions are split, along which dim and how."""
    if proof is None:
        return {}
    first_of_aux = 1 + joint.has_weight
    layouts = iter(proof.rows)
    found = {}
    for node in _aux_nodes(joint.aux):
        if not isinstance(node, Rows):
            continue
        layout = next(layouts)
        if layout is not None:
            output = first_of_aux + int(node.x)
            found[output] = layout
    return found


def check_aux(aux: Any) -> None:
    """Every leaf of aux says how its parts are joined.

    Raises:
        BatchError: a leaf is a plain value.
    """
    nodes = _aux_nodes(aux)
    summaries = pytree.map(lambda _: 0, aux, is_leaf=is_summary)
    paths = pytree.paths(summaries)
    for path, node in zip(paths, nodes, strict=True):
        if not is_summary(node):
            raise BatchError(AUX_LEAF.format(path=path))


def _aux_nodes(aux: Any) -> list[Any]:
    nodes: list[Any] = []
    pytree.map(nodes.append, aux, is_leaf=is_summary)
    return nodes
