"""Bound call: one ``value_and_grad`` on one rank, ready to run.

In: a planned call, a communicator, a backend; for every step params and a batch. Out: what
``value_and_grad`` returns: the loss, gradients, aux.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funcpipe._src.backends.bind import bind
from funcpipe._src.backends.grad_mean import divide
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import current
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.loss_types import divisor_of
from funcpipe._src.graph.ids import ArgId, OfArg, ValueId
from funcpipe._src.planning.batch_split import signature
from funcpipe._src.planning.lowered import PlannedCall
from funcpipe._src.planning.variants import stale
from funcpipe._src.runtime import interpreter
from funcpipe._src.runtime.grad_reduction import Grads, reduce_grads
from funcpipe._src.runtime.interpreter import Slots
from funcpipe._src.runtime.step_outputs import StepOutputs, Sums
from funcpipe._src.runtime.tied_grads import TiedGrads
from funcpipe.errors import StateError

if TYPE_CHECKING:
    from funcpipe._src.runtime.rank import Rank

Leaves = Sequence[torch.Tensor | None]  # by arg; None for what the rank does not hold
_PASS = "Pass the state that run.init, run.place or the last step returned"


class ParamSlot(NamedTuple):
    """A slot for an arg, cast to a dtype if one is given."""

    arg: ArgId
    slot: int
    cast: torch.dtype | None


class BatchSlot(NamedTuple):
    """A slot for a leaf of a microbatch."""

    microbatch: int
    leaf: int
    slot: int


class BoundCall:
    """One ``value_and_grad`` on one rank.

    Args:
        rank: that runs it.
        planned: as the rank runs it.
        number: of the ``value_and_grad``.
    """

    def __init__(
        self,
        rank: Rank,
        planned: PlannedCall,
        number: int,
    ) -> None:
        self.rank, self.planned = rank, planned
        self.name = str(number)
        self.program = planned.programs[rank.pipeline_rank]
        self.bound = bind(
            self.program,
            rank.comm,
            rank.backend,
            rank.ranks,
            self.name,
        )
        self.signature = planned.signature
        placement = rank.plan.placement
        self.layouts = [placement.layouts[param] for param in planned.call.params]
        self.shapes = list(map(self._shape_held, planned.call.params))
        self.outputs = StepOutputs(rank.plan, number, planned, rank.comm)
        self.tied = TiedGrads(
            planned,
            placement,
            rank.pipeline_rank,
            rank.ranks,
            self.tied_channel,
        )
        self._sort_inputs()

    @property
    def tied_channel(self) -> str:
        """The channel on which gradients of tied params travel."""
        return self.name + "tied"

    def _shape_held(self, param: int) -> tuple[int, ...] | None:
        """The shape of what this rank holds of a param; None for nothing."""
        placement, rank = self.rank.plan.placement, self.rank.comm.rank
        if not placement.holds(rank, param):
            return None
        return placement.shape(rank, param)

    def _sort_inputs(self) -> None:
        """Which slots are filled with params, leaves of microbatches and constants."""
        self.param_slots: list[ParamSlot] = []
        self.batch_slots: list[BatchSlot] = []
        self.constants: list[tuple[int, torch.Tensor]] = []
        for value in self.program.inputs:
            slot = self.program.slot_of[value]
            if value.kind == "const":
                constant = self.planned.constant(value)
                self.constants.append((slot, constant))
                continue
            assert isinstance(value.name, int)
            if value.microbatch is None:
                cast = self.planned.weights.casts.get(value.name)
                self.param_slots.append(ParamSlot(ArgId(value.name), slot, cast))
            else:
                self.batch_slots.append(BatchSlot(value.microbatch, value.name, slot))

    def __call__(self, params: Any, batch: Any) -> Any:
        leaves = self._leaves(params)
        slots = self._slots(leaves, batch)
        run = self.rank.observer or interpreter.run
        run(self.bound, slots, self.rank.comm)
        sums = self._sums(slots)
        grads = self._grads(leaves, slots)
        divisor = self._divisor(self.outputs.weight(sums))
        if divisor is not None:
            divide(grads, divisor, self.rank.backend)
        loss = self.outputs.loss(sums)
        out = tree.unflatten(self.planned.call.params_spec, grads)
        if not self.planned.call.has_aux:
            return loss, out

        def rows_of(output: int, microbatch: int) -> torch.Tensor:
            return self._held(slots, ValueId("row", output, microbatch))

        aux = self.outputs.aux(sums, rows_of)
        return (loss, aux), out

    def check_values(self, loss_fn: Callable) -> None:
        """StaleValues where the loss reads other Python values than those that it was planned
        for."""
        reading = self.planned.call.reading
        if reading is not None:
            values = reading.follower.values(loss_fn)
            if values != reading.values:
                raise stale(reading, values)

    def _held(self, slots: Slots, value: ValueId) -> torch.Tensor:
        return slots[self.program.slot_of[value]]

    # ---- what goes in

    def _leaves(self, params: Any) -> Leaves:
        """The leaves of params, checked."""
        call = self.planned.call
        try:
            leaves = tree.leaves_up_to(call.params_spec, params)
        except ValueError as error:
            raise StateError(
                f"{self._who}: params have another structure than planned: {error} {_PASS}"
            ) from None
        wanted = zip(self.shapes, call.dtypes, strict=True)
        for number, (leaf, (shape, dtype)) in enumerate(zip(leaves, wanted, strict=True)):
            if not _fits(leaf, shape, dtype):
                raise StateError(self._other_leaf(ArgId(number), leaf))
        return leaves

    def _other_leaf(self, arg: ArgId, leaf: Any) -> str:
        """What is said of a leaf that is not what the plan says."""
        call, shape = self.planned.call, self.shapes[arg]
        wanted = f"should be a tensor of shape {shape} and dtype {call.dtypes[arg]}"
        if shape is None:
            wanted = "is not held by this rank"
        path = self.rank.plan.placement.analysis.paths[call.params[arg]]
        found = describe(leaf)
        return f"{self._who}: params{path} {wanted}, but is {found}. {_PASS}"

    @property
    def _who(self) -> str:
        return f"value_and_grad {self.name} on rank {self.rank.comm.rank}"

    def _slots(self, leaves: Leaves, batch: Any) -> Slots:
        """The list of slots, with what the step brings."""
        if signature(batch) != self.signature:
            raise StateError(
                f"value_and_grad {self.name} got a batch of other shapes or values than when the "
                "step was planned: what a step passes to it may depend on the shapes of the batch "
                "only"
            )
        slots: Slots = [None] * self.program.slots
        for arg, slot, dtype in self.param_slots:
            leaf = leaves[arg]
            if leaf is not None and dtype is not None:
                leaf = leaf.to(dtype)
            slots[slot] = leaf
        for slot, constant in self.constants:
            slots[slot] = constant
        split, rank = self.planned.split, self.rank.comm.rank
        microbatches = split.local_leaves(batch, rank)
        scaled = current().loss_scale
        for microbatch, number, slot in self.batch_slots:
            moving = self.planned.moving[microbatch]
            if scaled is not None and number == len(moving):
                slots[slot] = scaled.scale
            else:
                slots[slot] = microbatches[microbatch][moving[number]]
        return slots

    # ---- what comes out

    def _sums(self, slots: Slots) -> Sums:
        """Total, weight and the sums of averaged aux values, over all microbatches and ranks."""
        sums: Sums = {}
        for output in sorted(self.planned.summed):
            sums[output] = self._held(slots, ValueId("sum", output))
        return self.outputs.over_ranks(sums)

    def _grads(self, leaves: Leaves, slots: Slots) -> list[torch.Tensor | None]:
        """Sums of gradients over all microbatches and ranks, by arg."""
        held = [ArgId(number) for number, leaf in enumerate(leaves) if leaf is not None]

        def partial_grad(name: OfArg) -> torch.Tensor:
            return self._held(slots, ValueId("sum", name))

        sums = self.tied.sums(held, leaves, partial_grad, self.rank.comm)
        for total in self.program.partial_grads:
            slots[self.program.slot_of[total]] = None
        grads: Grads = {}
        for arg in held:
            leaf = leaves[arg]
            assert leaf is not None
            grad = sums.pop(arg, None)
            if grad is None:
                grad = torch.zeros_like(leaf)
            grads[arg] = grad
        reduce_grads(
            grads,
            self.layouts,
            self.rank.split_axes,
            self.rank.comm,
        )
        return [grads.get(ArgId(number)) for number in range(len(leaves))]

    def _divisor(self, weight: torch.Tensor | None) -> torch.Tensor | None:
        """What sums of gradients are divided by: weight and loss scale. A power of two changes no
        bits."""
        divisor = None if weight is None else divisor_of(weight)
        scale = self._scale()
        if scale is None or divisor is None:
            return divisor if scale is None else scale
        return divisor * scale

    def _scale(self) -> torch.Tensor | None:
        """The loss scale, if there is one."""
        scaled = current().loss_scale
        precision = self.rank.plan.resolved.precision
        if scaled is not None and scaled.scale is not None:
            return scaled.scale
        if precision is not None and precision.constant != 1:
            device = self.rank.comm.device
            return torch.full((), precision.constant, device=device)
        return None


def _fits(leaf: Any, shape: tuple[int, ...] | None, dtype: torch.dtype) -> bool:
    """Whether a leaf is what the plan says; a shape of None stands for a leaf that is not held."""
    if leaf is None or shape is None:
        return leaf is shape
    if not isinstance(leaf, torch.Tensor):
        return False
    return leaf.shape == shape and leaf.dtype == dtype
