"""Trace: a loss function becomes one joint FX graph, forward then backward.

The *joint* function returns the loss and its gradient for one microbatch, as one rank computes it,
by autograd on fake tensors. *Markers* divide its graph into segments: a marker is a node that reads
and makes nothing, ``funcpipe::mark(label)``, and the nodes after it have that label (see
`node_labels.py`).

A boundary leaves a marker in the forward half, and notes how many autograd nodes there were. The
engine, on one thread, runs autograd nodes in the reverse order of their creation. When it first
comes to a node older than the boundary, it has crossed the boundary backward, and leaves a marker
there. Markers do not change autograd: gradients are summed in the same order with and without them.

In: a loss function, the structure and fake leaves of params and batch. Out: `Traced`, a flat graph
of ATen ops whose placeholders are the params' tensors, then the batch's. It holds no real data,
process group or rank number.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe._src.collectives import bind_mesh, one_rank
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.core.loss_result import read_loss
from funcpipe._src.core.loss_types import Mean
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.functional.checkpoint_name import NAMED
from funcpipe._src.graph.fake_tensors import as_leaf
from funcpipe._src.graph.functionalize import make_functional
from funcpipe._src.graph.ops import MARK
from funcpipe._src.graph.restore import restored
from funcpipe._src.graph.trace_errors import explain, refuse_impure
from funcpipe._src.graph.traceable import traceable
from funcpipe.errors import BatchError, CutError, FuncpipeError, TraceError

_TRACING = threading.RLock()  # make_fx keeps process-wide state
_AS_IT_IS = contextlib.nullcontext()


@dataclass(frozen=True)
class Traced:
    """A joint graph.

    Args:
        module: the graph; its outputs are the total, the weight (if any), aux tensors, and a
            gradient (or None) for every tensor of params.
        params, batch: how many placeholders belong to each. One more is the loss scale, if that is
            a tensor.
        boundaries: the number of boundaries, one less than segments.
        has_weight: whether the loss is a `Mean`.
        aux: the aux tree, with the number of an output in place of a tensor (`Mean` and `Rows`
            kept).
    """

    module: fx.GraphModule
    params: int
    batch: int
    boundaries: int
    has_weight: bool
    aux: Any
    aux_count: int

    def __str__(self) -> str:
        loss = "fp.Mean" if self.has_weight else "a plain scalar"
        counts = f"boundaries: {self.boundaries}, params: {self.params}, batch: {self.batch}"
        code = self.module.print_readable(print_output=False)
        return f"loss: {loss}, {counts}, aux outputs: {self.aux_count}\n{code}"


class TraceContext(PlainContext):
    """The context of a loss that is being traced: boundaries are marked; everything else is plain
    PyTorch.

    Args:
        parts: whether the loss sees a part of the batch only.
    """

    def __init__(self, parts: bool) -> None:
        self.parts = parts
        self.begin()

    def begin(self) -> None:
        """Start over: make_fx may run the joint function twice."""
        self.ages: list[int] = []  # of every boundary: the number that the next autograd node gets
        self.segment: int | None = None  # in the backward half, the one whose turn it is

    @property
    def boundaries(self) -> int:
        return len(self.ages)

    def stage_boundary(self, value: Any) -> Any:
        if self.segment is not None:
            raise CutError(
                "stage_boundary is called again while a checkpoint recomputes: a boundary inside "
                "torch.utils.checkpoint cannot be cut. Put the boundary outside: checkpoint one "
                "block, then stage_boundary"
            )
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(value)):
            raise CutError(
                f"stage_boundary got {type(value).__name__} without any tensor: nothing to cut; "
                "pass what goes on"
            )
        self.ages.append(torch.autograd._get_sequence_nr())
        MARK(self.boundaries)
        return value

    def checkpoint_name(self, value: torch.Tensor, name: str) -> None:
        NAMED(value, name)

    def backward(self) -> None:
        """The backward half begins, in the last segment."""
        self.segment = self.boundaries
        MARK(self.boundaries + 1)

    def reach(self, age: int) -> None:
        """The engine is at an autograd node of this age."""
        while self.segment and age < self.ages[self.segment - 1]:
            self.segment -= 1
            MARK(2 * self.boundaries + 1 - self.segment)

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
        by_row = torch._C._functorch.peek_interpreter_stack() is not None
        if self.parts and not by_row:
            loss_fn = _of_part(loss_fn, has_aux, params)
        return super().value_and_grad(loss_fn, has_aux, params, batch)


class _Crossing(TorchDispatchMode):
    """Tells the context, op by op, which autograd node the engine is at."""

    supports_higher_order_operators = True

    def __init__(self, context: TraceContext) -> None:
        super().__init__()
        self.context = context

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        if node is not None:
            self.context.reach(node._sequence_nr())
        return func(*args, **(kwargs or {}))


def _of_part(loss_fn: Callable, has_aux: bool, params: Any) -> Callable:
    """A loss function inside another one that sees a part of the batch. It is refused where another
    split would make another gradient of it.

    Raises:
        BatchError: it is a mean over the part, or its gradient a sum over the rows of the part.
    """
    tensors = [leaf for leaf in tree.leaves(params) if isinstance(leaf, torch.Tensor)]
    sums_rows = any(leaf.requires_grad for leaf in tensors)
    where = user_line() or ""

    def run(inner: Any, batch: Any) -> Any:
        out = loss_fn(inner, batch)
        loss = out[0] if has_aux and type(out) is tuple else out
        if sums_rows or isinstance(loss, Mean):
            raise BatchError(
                f"value_and_grad is called inside a loss function{where} whose batch is split: "
                "every part would take the loss and gradient of its own rows, and not those of "
                "the batch. Call it in the step: update params with its gradient there, pass its "
                "loss or fp.Rows through the batch, and call value_and_grad a second time; or use "
                "torch.func.vmap, for a gradient of every row"
            )
        return out

    return run


def trace(
    loss_fn: Callable,
    has_aux: bool,
    params: tuple[list[torch.Tensor], Any],
    batch: tuple[list[Any], Any],
    fake_mode: FakeTensorMode,
    mesh: Mesh | None = None,
    axes: Axes = (),
    rewriting: contextlib.AbstractContextManager = _AS_IT_IS,
    scale: torch.Tensor | float = 1.0,
    parts: bool = False,
) -> Traced:
    """The joint graph of a loss function.

    Args:
        params, batch: fake leaves (a batch may hold other values too, which become constants) and
            structure.
        mesh, axes: which axes of which mesh a collective in the loss may name; without a mesh, any
            name has one rank.
        rewriting: a context in which the loss function and its gradient run.
        scale: what the backward pass starts from: a number, or a 0-d fake that becomes the last
            placeholder.
        parts: whether the batch is a part of that of the step.

    Raises:
        BatchError: a ``value_and_grad`` inside, of a part.
        TraceError: a closed-over tensor, control flow that depends on data, randomness, a modified
            input.
        AxisError: a collective over another axis.
        CutError: a boundary inside a checkpoint, or without a tensor.
    """
    context = TraceContext(parts)
    joint = _Joint(loss_fn, has_aux, params, batch, scale, context)
    device = joint.inputs[0].device if joint.inputs else None
    bound = one_rank() if mesh is None else bind_mesh(mesh, axes, device)
    with (
        _TRACING,
        bind_context(context),
        bound,
        torch.autograd.set_multithreading_enabled(False),
        fake_mode,
    ):
        try:
            module = _graph_of(joint, rewriting)
        except FuncpipeError:
            raise
        except Exception as error:
            raise explain(error, loss_fn) from error
    refuse_impure(module.graph, context.boundaries, joint.input_names())
    return Traced(
        module=module,
        params=len(joint.params),
        batch=len(joint.moving),
        boundaries=context.boundaries,
        has_weight=joint.has_weight,
        aux=joint.aux,
        aux_count=joint.aux_count,
    )


def _graph_of(joint: _Joint, rewriting: contextlib.AbstractContextManager) -> fx.GraphModule:
    """The graph of a joint function, without in-place ops."""
    with rewriting, restored(joint.loss_fn):
        module = make_fx(joint.run, tracing_mode="fake")(*joint.inputs)
    if make_functional(module):
        return module
    pure = torch.func.functionalize(module, remove="mutations")
    return make_fx(pure, tracing_mode="fake")(*joint.inputs)


class _Joint:
    """The joint function of a loss: from flat tensors to its outputs and gradients.

    Args:
        params, batch, scale: as `trace` takes them.
        context: marks boundaries while the function runs.

    Attributes:
        inputs: fakes of what `run` takes: tensors of params, of the batch, and the loss scale.
        moving: the indices of the batch leaves that are tensors.
        has_weight, aux, aux_count: see `Traced`; known once it ran.
    """

    def __init__(
        self,
        loss_fn: Callable,
        has_aux: bool,
        params: tuple[list[torch.Tensor], Any],
        batch: tuple[list[Any], Any],
        scale: torch.Tensor | float,
        context: TraceContext,
    ) -> None:
        self.loss_fn, self.has_aux, self.context = loss_fn, has_aux, context
        self.params, self.params_spec = params
        self.batch, self.batch_spec = batch
        self.scale = scale
        self.moving = []
        self.inputs = list(self.params)
        for index, leaf in enumerate(self.batch):
            if isinstance(leaf, torch.Tensor):
                self.moving.append(index)
                self.inputs.append(leaf)
        if isinstance(scale, torch.Tensor):
            self.inputs.append(scale)
        self.has_weight = False
        self.aux: Any = None
        self.aux_count = 0

    def input_names(self) -> list[str]:
        """What errors call the inputs."""
        params = tree.paths(tree.unflatten(self.params_spec, self.params))
        batch = tree.paths(tree.unflatten(self.batch_spec, self.batch))
        names = [f"params{path}" for path in params]
        names += [f"batch{batch[index]}" for index in self.moving]
        if isinstance(self.scale, torch.Tensor):
            names.append("the loss scale")
        return names

    @traceable()
    def run(self, *tensors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The total, the weight (if any), aux tensors, and a gradient for every tensor of
        params."""
        self.context.begin()
        params = list(map(as_leaf, tensors[: len(self.params)]))
        outputs = self._outputs(params, tensors[len(self.params) :])
        with torch.no_grad():  # clones, so that every output is a node of the forward half
            clones = [output.detach().clone() for output in outputs]
        self.context.backward()
        scale = tensors[-1] if isinstance(self.scale, torch.Tensor) else self.scale
        with _Crossing(self.context):
            grads = _gradients(outputs[0], params, scale)
        _refuse_sparse(grads, self.params_spec)
        return (*clones, *grads)

    def _outputs(
        self, params: list[torch.Tensor], others: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run the loss function: the total, the weight (if any), and aux tensors."""
        batch = list(self.batch)
        for index, tensor in zip(self.moving, others, strict=False):  # the scale is left
            batch[index] = tensor
        with torch.enable_grad():
            params = tree.unflatten(self.params_spec, params)
            out = self.loss_fn(params, tree.unflatten(self.batch_spec, batch))
            total, weight, aux = read_loss(out, self.has_aux)
        self.has_weight = weight is not None
        outputs = [total] if weight is None else [total, weight]
        before = len(outputs)
        self.aux = tree.map(lambda leaf: _numbered(leaf, outputs, before), aux)
        self.aux_count = len(outputs) - before
        return outputs


def _gradients(
    total: torch.Tensor, params: list[torch.Tensor], scale: torch.Tensor | float
) -> list[torch.Tensor | None]:
    """The gradient of every param; None for those that can have none."""
    wanted = [param for param in params if param.requires_grad]
    if not total.requires_grad or not wanted:
        return [None] * len(params)
    # torch.autograd.grad, but it would switch modes of torch functions off, and a checkpoint would
    # recompute without them.
    engine = torch.autograd.graph._engine_run_backward  # type: ignore[attr-defined]
    seeds = (_seed(total, scale),)
    found = iter(engine((total,), seeds, False, False, tuple(wanted), True, accumulate_grad=False))
    return [next(found) if param.requires_grad else None for param in params]


def _refuse_sparse(grads: list[torch.Tensor | None], spec: Any) -> None:
    for index, grad in enumerate(grads):
        if grad is None or grad.layout is torch.strided:
            continue
        path = tree.paths(tree.unflatten(spec, range(len(grads))))[index]
        raise TraceError(
            f"the gradient of params{path} is sparse ({grad.layout}), but gradients are summed "
            "over ranks and microbatches as dense tensors: compute with x.to_dense() in the "
            "loss function"
        )


def _seed(total: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """What the backward pass starts from."""
    if isinstance(scale, torch.Tensor):
        return scale.to(total.dtype)
    return torch.ones_like(total) if scale == 1 else torch.full_like(total, scale)


class _Output(int):
    """The number of an aux output, standing in for its tensor."""


def _numbered(leaf: Any, outputs: list[torch.Tensor], before: int) -> Any:
    """Add a leaf of aux to the outputs if it is a tensor; what stands in for it."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    outputs.append(leaf)
    return _Output(len(outputs) - before - 1)


def fill_aux(aux: Any, value_of: Callable[[int], Any]) -> Any:
    """The aux tree with a value in place of every output number."""

    def filled(leaf: Any) -> Any:
        return value_of(int(leaf)) if isinstance(leaf, _Output) else leaf

    return tree.map(filled, aux)
