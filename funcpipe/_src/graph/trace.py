"""Trace: a loss function becomes one joint FX graph, forward then backward, of one microbatch as
one rank runs it.

Terms. The *joint* function returns the loss and its gradient, by autograd on fake tensors. A
*marker* is a node of the graph that reads and makes nothing, ``funcpipe::mark(label)``: what comes
after it has that label (see `node_labels.py`). A boundary marks the forward half and notes how many
autograd nodes there were. The engine, on one thread, runs them in the reverse order of their
creation; so when it first comes to an older one than that, it has crossed the boundary backward,
and a marker says so. Autograd knows nothing of boundaries: it adds up in the order in which it does
without them.

In: a loss function, the structure and fake leaves of params and batch. Out: `Traced`, a flat graph
of ATen ops whose placeholders are the params' tensors, then the batch's. It holds no real data,
process group or rank number.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
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
from funcpipe._src.core.loss_types import Mean, differentiable
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.functional.checkpoint_name import NAMED
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

    def stage_boundary(self, x: Any) -> Any:
        if self.segment is not None:
            raise CutError(
                "stage_boundary is called again while a checkpoint recomputes: a boundary inside "
                "torch.utils.checkpoint cannot be cut. Put the boundary outside: checkpoint one "
                "block, then stage_boundary"
            )
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(x)):
            raise CutError(
                f"stage_boundary got {type(x).__name__} without any tensor: nothing to cut; pass "
                "what goes on"
            )
        self.ages.append(torch.autograd._get_sequence_nr())
        MARK(self.boundaries)
        return x

    def checkpoint_name(self, x: torch.Tensor, name: str) -> None:
        NAMED(x, name)

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

    def run(inner: Any, batch: Any) -> Any:
        out = loss_fn(inner, batch)
        if shared or isinstance(out[0] if has_aux and type(out) is tuple else out, Mean):
            raise BatchError(
                f"value_and_grad is called inside a loss function{where} whose batch is split: "
                "every part would take the loss and gradient of its own rows, and not those of "
                "the batch. Call it in the step: update params with its gradient there, pass its "
                "loss or fp.Rows through the batch, and call value_and_grad a second time; or use "
                "torch.func.vmap, for a gradient of every row"
            )
        return out

    shared = any(x.requires_grad for x in tree.leaves(params) if isinstance(x, torch.Tensor))
    where = user_line() or ""
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
        rewriting: under what the loss function and its gradient run.
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
    found: dict[str, Any] = {}
    context = TraceContext(parts)
    leaves, moving = batch[0], [i for i, x in enumerate(batch[0]) if isinstance(x, torch.Tensor)]

    @traceable()
    def joint(*tensors: torch.Tensor) -> Any:
        context.begin()
        inputs = [
            x.detach().requires_grad_() if differentiable(x) else x
            for x in tensors[: len(params[0])]
        ]
        data = dict(enumerate(leaves)) | dict(zip(moving, tensors[len(params[0]) :], strict=False))
        with torch.enable_grad():
            out = loss_fn(
                tree.unflatten(params[1], inputs), tree.unflatten(batch[1], data.values())
            )
            total, weight, aux = read_loss(out, has_aux)
        extra: list[torch.Tensor] = []
        found["aux"] = tree.map(lambda x: _number(x, extra), aux)
        found["weight"] = weight is not None
        with torch.no_grad():  # clones, so that every output is a node of the forward half
            heads = [
                x.detach().clone() for x in (total, *([] if weight is None else [weight]), *extra)
            ]
        context.backward()
        with _Crossing(context):
            grads = _gradients(total, inputs, tensors[-1] if hidden else scale)
        _refuse_sparse(grads, params[1])
        return (*heads, *grads)

    hidden = [scale] if isinstance(scale, torch.Tensor) else []
    tensors = [*params[0], *(leaves[i] for i in moving), *hidden]
    device = tensors[0].device if tensors else None
    bound = one_rank() if mesh is None else bind_mesh(mesh, axes, device)
    with (
        _TRACING,
        bind_context(context),
        bound,
        torch.autograd.set_multithreading_enabled(False),
        fake_mode,
    ):
        try:
            with rewriting, restored(loss_fn):
                module = make_fx(joint, tracing_mode="fake")(*tensors)
            if not make_functional(module):
                pure = torch.func.functionalize(module, remove="mutations")
                module = make_fx(pure, tracing_mode="fake")(*tensors)
        except FuncpipeError:
            raise
        except Exception as error:
            raise explain(error, loss_fn) from error
    traced = Traced(
        module,
        len(params[0]),
        len(moving),
        context.boundaries,
        found["weight"],
        found["aux"],
        _count(found["aux"]),
    )
    paths = tree.paths(tree.unflatten(batch[1], leaves))
    names = [f"params{p}" for p in tree.paths(tree.unflatten(*params[::-1]))]
    names += [f"batch{paths[i]}" for i in moving] + ["the loss scale"] * len(hidden)
    refuse_impure(module.graph, traced.boundaries, names)
    return traced


def _gradients(
    total: torch.Tensor, inputs: list[torch.Tensor], scale: torch.Tensor | float
) -> list[torch.Tensor | None]:
    wanted = [x for x in inputs if x.requires_grad]
    if not (total.requires_grad and wanted):
        return [None] * len(inputs)
    # torch.autograd.grad, but it would switch modes of torch functions off, and a checkpoint would
    # recompute without them.
    engine = torch.autograd.graph._engine_run_backward  # type: ignore[attr-defined]
    found = iter(
        engine(
            (total,),
            (_seed(total, scale),),
            False,
            False,
            tuple(wanted),
            True,
            accumulate_grad=False,
        )
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def _refuse_sparse(grads: list[torch.Tensor | None], spec: Any) -> None:
    for i, x in enumerate(grads):
        if x is not None and x.layout is not torch.strided:
            path = tree.paths(tree.unflatten(spec, range(len(grads))))[i]
            raise TraceError(
                f"the gradient of params{path} is sparse ({x.layout}), but gradients are summed "
                "over ranks and microbatches as dense tensors: compute with x.to_dense() in the "
                "loss function"
            )


def _seed(total: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    if isinstance(scale, torch.Tensor):
        return scale.to(total.dtype)
    return torch.ones_like(total) if scale == 1 else torch.full_like(total, scale)


class _Output(int):
    """The number of an aux output, standing in for its tensor."""


def _number(x: Any, out: list[torch.Tensor]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    out.append(x)
    return _Output(len(out) - 1)


def _count(aux: Any) -> int:
    return sum(isinstance(x, _Output) for x in tree.leaves(aux))


def fill_aux(aux: Any, values: Callable[[int], Any]) -> Any:
    """The aux tree with a value in place of every output number."""
    return tree.map(lambda x: values(int(x)) if isinstance(x, _Output) else x, aux)
