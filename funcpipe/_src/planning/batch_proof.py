"""Batch proof: the parts of a split batch together compute what one device does.

First that rows do not meet, by propagating splits through the loss function. Where the weights may
not be exact, or the proof fails, the weights of all parts are also compared as numbers with the
weight of the whole batch: that is the clearer error.

In: a call, its split, its graphs. Out: `SplitProof`, or a BatchError.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from funcpipe._src.analysis import loss_checks
from funcpipe._src.analysis.call_results import MADE_UP, with_values
from funcpipe._src.collectives import bind_rank, names_axes
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.core import pytree
from funcpipe._src.core.loss_types import Microbatches
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.core.mixed_precision import ROUNDED
from funcpipe._src.planning.batch_split import BatchSplit, signature
from funcpipe._src.planning.compile_inputs import CallInputs, CompileMemory
from funcpipe._src.planning.local_batch import ready_microbatches, tensor_leaves
from funcpipe._src.planning.weight_layout import traced_params
from funcpipe._src.proof.loss_runs import Subject
from funcpipe._src.proof.rows import prove_rows
from funcpipe._src.proof.verify import SequenceProof
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import BatchError


@dataclass(frozen=True)
class SplitProof:
    """What is proven of a split batch.

    Args:
        dims: what is split: "rows", "positions".
        exact: whether the weights of parts add up to the last bit; else they were compared as
            numbers.
        positions: how the operands of attention and the like are split; None where positions are
            not.
    """

    dims: frozenset[str]
    exact: bool
    positions: SequenceProof | None

    def __str__(self) -> str:
        lines = [f"split and proven: {', '.join(sorted(self.dims)) or 'nothing'}"]
        if "rows" in self.dims:
            how = "exact by proof" if self.exact else "compared as numbers, unless rows came ready"
            lines.append(f"  sums of weights: {how}")
        calls = self.positions.calls if self.positions else {}
        for signature_of_call, layout in calls.items():
            lines.append(f"  {signature_of_call[0]}: {layout}")
        return "\n".join(lines)


Weights = Mapping[int, GraphModule | None]  # by split rank: a function of a microbatch


def prove_batch(
    inputs: CallInputs, split: BatchSplit, weights: Weights, memory: CompileMemory
) -> bool:
    """Prove that the parts of a batch compute what one device does.

    Args:
        weights: by split rank, the function that computes the weight of a microbatch.

    Returns:
        whether the proof alone says that weights add up to the last bit.

    Raises:
        BatchError: it cannot be proven.
    """
    resolved = inputs.resolved
    if not (resolved.splits or split.microbatches > 1 or resolved.precision):
        return True
    microbatches = ready_microbatches(inputs.call.batch)
    try:
        exact = [
            _prove_rows(inputs, split, ready, microbatch, memory)
            for ready, microbatch in enumerate(microbatches)
        ]
    except BatchError:
        _check_weights(inputs, split, weights)  # it says more of a weight
        raise
    proven = all(exact) and not resolved.precision and not split.layouts
    if not proven:
        _check_weights(inputs, split, weights)
    return proven


def split_proof(split: BatchSplit, positions: SequenceProof | None, exact: bool) -> SplitProof:
    """The record of what was proven of a split."""
    dims = set()
    over_axes = [cut for cut in split.all_cuts if cut.axes]
    if split.microbatches > 1 or not all(cut.part for cut in over_axes):
        dims.add("rows")
    if positions is not None:
        dims.add("positions")
    return SplitProof(frozenset(dims), exact, positions)


def _prove_rows(
    inputs: CallInputs, split: BatchSplit, ready: int, microbatch: Any, memory: CompileMemory
) -> bool:
    """The rows of the batch do not meet; returns whether weights add up to the last bits, too."""
    call, resolved = inputs.call, inputs.resolved
    whole, spec = pytree.flatten(microbatch)
    local = []
    for leaf_number, leaf in enumerate(whole):
        if isinstance(leaf, torch.Tensor):
            shape = split.row_shape(ready, leaf_number, tuple(leaf.shape))
            leaf = inputs.step.fake_like(leaf, shape)
        local.append(leaf)
    shapes = signature(pytree.unflatten(spec, local))
    key = (inputs.number, shapes, split.rows[ready], inputs.read_values)
    if key in memory.rows_exact:
        return memory.rows_exact[key]
    params = pytree.unflatten(call.params_spec, traced_params(inputs))
    subject = Subject(
        loss_fn=call.loss_fn,
        has_aux=call.has_aux,
        params=params,
        spec=spec,
        mode=inputs.mode,
        axes=resolved.split_axes,
    )
    brings_ready = isinstance(call.batch, Microbatches)
    mesh = _mesh_of_rows(resolved)
    with resolved.contexts():
        exact = prove_rows(subject, local, split.rows[ready], mesh, brings_ready, split.dealt)
    memory.rows_exact[key] = exact
    return exact


def _mesh_of_rows(resolved: ResolvedStep) -> Mesh:
    """The mesh, with one rank on the axes that split positions."""
    positions = set(resolved.split_axes) - set(resolved.row_axes)
    axes = dict(resolved.mesh.axes)
    axes.update(dict.fromkeys(positions, 1))
    return Mesh(**axes)


def _check_weights(inputs: CallInputs, split: BatchSplit, weights: Weights) -> None:
    """The weights of all parts of the batch add up to what the loss function, as written, makes of
    the whole."""
    call = inputs.analysis.calls[inputs.number]  # as written: it sees masters
    if isinstance(call.batch, Microbatches) or None in weights.values():
        return  # ready microbatches: there is no whole batch to compare with
    resolved = inputs.resolved
    known = {rank: weight for rank, weight in weights.items() if weight is not None}
    batch, made_up = with_values(call.batch, _leaves_read(call.batch, known))
    parts = _weights_of_parts(resolved, batch, split, known)
    if parts is None:
        return
    (times,) = {loss_checks.written_for(weight, resolved.mesh) for weight in known.values()} or {1}
    params = inputs.params(call.dtypes) if resolved.precision else traced_params(inputs)
    loss_checks.check_additive(
        call.loss_fn,
        call.has_aux,
        pytree.unflatten(call.params_spec, params),
        split.own_rows(batch),
        parts,
        inputs.mode,
        _notes(resolved, made_up),
        times,
    )


def _leaves_read(batch: Any, weights: Mapping[int, GraphModule]) -> set[int]:
    """The leaves of a batch that the weight is computed from."""
    tensors = tensor_leaves(batch)
    found: set[int] = set()
    for weight in weights.values():
        numbers = loss_checks.batch_read(weight, len(tensors))
        found.update(tensors[number] for number in numbers)
    return found


def _weights_of_parts(
    resolved: ResolvedStep, batch: Any, split: BatchSplit, weights: Mapping[int, GraphModule]
) -> list[torch.Tensor] | None:
    """The weight of every microbatch of every rank; None where other ranks' rows are not here."""
    tensors = tensor_leaves(batch)
    dynamic = resolved.precision is not None and resolved.precision.dynamic
    scale = [None] if dynamic else []  # an input of the graph, but not of the weight

    def of_rank(rank: int) -> list[torch.Tensor]:
        weight = weights[split.split_rank(rank)]
        found = []
        for leaves in split.local_leaves(batch, rank):
            inputs = [leaves[number] for number in tensors]
            found.append(weight(*inputs, *scale))
        return found

    def as_rank(comm: Communicator) -> list[torch.Tensor]:
        with bind_rank(comm):
            return of_rank(ranks[comm.rank])

    own_rows = resolved.row_axes if resolved.local else ()
    axes = tuple(axis for axis in resolved.split_axes if axis not in own_rows)
    ranks = resolved.mesh.group(0, axes) if axes else (0,)
    if not any(names_axes(weight.graph) for weight in weights.values()):
        found = [of_rank(rank) for rank in ranks]
    elif resolved.local:
        return None
    else:
        sizes = resolved.mesh.axes
        mesh = Mesh(**{axis: sizes[axis] for axis in resolved.split_axes})
        found = run_ranks(mesh, as_rank)
    return list(itertools.chain.from_iterable(found))


def _notes(resolved: ResolvedStep, made_up: str) -> str:
    """What else the error says."""
    notes = ""
    if resolved.precision:
        notes += f" {ROUNDED.format(dtype=resolved.precision.compute)}"
    if made_up:
        notes += f" {MADE_UP.format(paths=made_up)}"
    return notes
