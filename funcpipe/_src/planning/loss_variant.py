"""Loss variant: one loss function for one set of local shapes, from its proof to its units.

The stages are prove, trace, check and partition; each hands its record to the next.

In: a call, a microbatch as a rank sees it. Out: `LossVariant`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from funcpipe._src.analysis import loss_checks
from funcpipe._src.core import pytree
from funcpipe._src.core.loss_types import SCALAR_LOSS
from funcpipe._src.graph.node_labels import Nodes, read_nodes
from funcpipe._src.graph.partition import Units, partition_graph
from funcpipe._src.graph.trace import Traced, trace
from funcpipe._src.planning.compile_inputs import CallInputs, CompileInputs, StageClock
from funcpipe._src.planning.local_batch import LocalBatch
from funcpipe._src.planning.loss_outputs import check_aux
from funcpipe._src.planning.weight_layout import traced_params
from funcpipe._src.proof.verify import SequenceProof, prove_sequence
from funcpipe._src.sequence.rewrite import rewriting
from funcpipe._src.spec.resolve import ResolvedStep
from funcpipe.errors import BatchError


@dataclass(frozen=True, eq=False)
class CheckedLoss:
    """A joint graph of which a split batch may be asked for.

    Args:
        joint: the graph.
        labels: what is known of its nodes.
        weight: computes the weight from the tensors of a microbatch; None where the loss has none,
            or it depends on params.
    """

    joint: Traced
    labels: Nodes
    weight: fx.GraphModule | None

    def __str__(self) -> str:
        if not self.joint.has_weight:
            return "a plain scalar, of the whole batch"
        read = loss_checks.batch_read(self.weight, self.joint.batch)
        return f"a sum over a weight that is computed from {len(read)} leaves of the batch"


@dataclass(frozen=True, eq=False)
class LossVariant:
    """A loss function for one set of local shapes: what every stage made of it.

    Args:
        proof: how the operands of attention and the like are split; None where positions are not.
        checked: the joint graph, its labels and its weight.
        units: the graph cut at its boundaries.
    """

    proof: SequenceProof | None
    checked: CheckedLoss
    units: Units

    @property
    def joint(self) -> Traced:
        """The joint graph."""
        return self.checked.joint


def compile_loss(
    inputs: CallInputs, local: LocalBatch, separate_w: bool, clock: StageClock
) -> LossVariant:
    """Prove, trace, check and cut a loss function.

    Args:
        separate_w: whether to make I and W units beside B.

    Raises:
        SequenceError, BatchError, TraceError, CutError: a stage refuses it.
    """
    params = traced_params(inputs)
    contexts = inputs.resolved.contexts
    with clock.time("prove"), contexts():
        proof = _prove(inputs, params, local)
    with clock.time("trace"):
        joint = _trace(inputs, params, local, proof)
    with clock.time("check"):
        checked = _check(inputs.resolved, joint, local)
    with clock.time("partition"):
        units = partition_graph(joint, checked.labels, inputs.resolved.remats, separate_w)
    return LossVariant(proof, checked, units)


def _prove(
    inputs: CallInputs, params: Sequence[torch.Tensor], local: LocalBatch
) -> SequenceProof | None:
    """That ranks with a part of the positions compute what one device does."""
    if not local.splits_positions:
        return None
    call, resolved = inputs.call, inputs.resolved
    return prove_sequence(
        call.loss_fn,
        call.has_aux,
        pytree.unflatten(call.params_spec, params),
        local.leaves,
        local.spec,
        local.sequences,
        local.sequence_rank,
        inputs.mode,
        resolved.mesh,
        resolved.split_axes,
    )


def _trace(
    inputs: CallInputs,
    params: list[torch.Tensor],
    local: LocalBatch,
    proof: SequenceProof | None,
) -> Traced:
    call, resolved = inputs.call, inputs.resolved

    @contextlib.contextmanager
    def as_rank() -> Iterator[None]:
        with resolved.contexts(), rewriting(proof, local.sequence_rank, local.is_part):
            yield

    return trace(
        call.loss_fn,
        call.has_aux,
        (params, call.params_spec),
        (local.leaves, local.spec),
        inputs.mode,
        resolved.mesh,
        resolved.split_axes,
        as_rank(),
        _loss_scale(inputs.step),
        local.is_part,
    )


def _loss_scale(inputs: CompileInputs) -> torch.Tensor | float:
    """What a backward pass starts from: a number, or a fake of a dynamic loss scale."""
    precision = inputs.resolved.precision
    if precision is None:
        return 1.0
    if not precision.dynamic:
        return precision.constant
    device = next((leaf.device for leaf in pytree.leaves(inputs.params)), None)
    with inputs.mode:
        return torch.empty((), device=device)


def _check(resolved: ResolvedStep, joint: Traced, local: LocalBatch) -> CheckedLoss:
    """That a joint graph says how its parts are joined, where the batch is split."""
    labels = read_nodes(joint)
    weight = loss_checks.weight_of(labels, joint.module) if joint.has_weight else None
    if local.is_part:
        if not joint.has_weight:
            raise BatchError(SCALAR_LOSS.format(why=f"{_splitters(resolved)} split the batch"))
        loss_checks.check_weight(labels)
        check_aux(joint.aux)
    return CheckedLoss(joint, labels, weight)


def _splitters(resolved: ResolvedStep) -> str:
    """The transforms that split the batch."""
    names = [spec.name for spec in resolved.splits]
    if resolved.microbatch_spec:
        names.append(resolved.microbatch_spec.name)
    return " and ".join(names)
