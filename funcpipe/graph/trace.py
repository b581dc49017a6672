"""Trace: a loss function becomes one joint FX graph, forward then backward, of one microbatch as one rank runs it.

Terms. The *joint* function returns the loss and its gradient, by autograd on fake tensors. A *marker* is a node of the
graph that reads and makes nothing, ``funcpipe::mark(label)``: what comes after it has that label (see `nodes.py`). A
boundary marks the forward half and notes how many autograd nodes there were. The engine, on one thread, runs them in the
reverse order of their creation; so when it first comes to an older one than that, it has crossed the boundary backward,
and a marker says so. Autograd knows nothing of boundaries: it adds up in the order in which it does without them.

In: a loss function, the structure and fake leaves of params and batch. Out: `Traced`, a flat graph of ATen ops whose
placeholders are the params' tensors, then the batch's. It holds no real data, process group or rank number.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._python_dispatch import TorchDispatchMode

from funcpipe import step as step_
from funcpipe import tree
from funcpipe.errors import CutError, FuncpipeError, TraceError
from funcpipe.graph.mutation import make_functional, mutates

_LIB = torch.library.Library("funcpipe", "FRAGMENT")
_LIB.define("mark(int label) -> ()")
_LIB.impl("mark", lambda label: None, "CompositeExplicitAutograd")
torch.library.register_fake("funcpipe::mark", lambda label: None, lib=_LIB)
MARK = torch.ops.funcpipe.mark.default
fx.has_side_effect(MARK)  # else it is removed as dead code

_TRACING = threading.RLock()  # make_fx keeps process-wide state


@dataclass(frozen=True)
class Traced:
    """A joint graph.

    Args:
        module: the graph; its outputs are the total, the weight (if any), aux tensors, and a gradient (or None) for
            every tensor of params.
        params, batch: how many placeholders belong to each.
        boundaries: the number of boundaries, one less than segments.
        has_weight: whether the loss is a `Mean`.
        aux: the aux tree, with the number of an output in place of a tensor (`Mean` and `Rows` kept).
    """

    module: fx.GraphModule
    params: int
    batch: int
    boundaries: int
    has_weight: bool
    aux: Any
    aux_count: int


class _Tracing:
    """The context of a loss that is being traced: boundaries are marked; everything else is plain PyTorch."""

    def __init__(self) -> None:
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
                "torch.utils.checkpoint cannot be cut. Put the boundary outside: checkpoint one block, then stage_boundary"
            )
        if any(i.key() != TransformType.Vmap for i in get_interpreter_stack() or ()):
            raise CutError(
                "stage_boundary is called inside torch.func.grad, vjp or jvp within the loss function: what is differentiated "
                "there cannot be cut. Put the boundary outside of it"
            )
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(x)):
            raise CutError(
                f"stage_boundary got {type(x).__name__} without any tensor: nothing to cut; pass what goes on"
            )
        self.ages.append(torch.autograd._get_sequence_nr())
        MARK(self.boundaries)
        return x

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
        return step_._plain(loss_fn, has_aux, params, batch)

    def global_sum(self, leaves: Any, local: Callable) -> torch.Tensor:
        return local(tree.leaves(leaves))


class _Crossing(TorchDispatchMode):
    """Tells the context, op by op, which autograd node the engine is at."""

    supports_higher_order_operators = True

    def __init__(self, context: _Tracing) -> None:
        super().__init__()
        self.context = context

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        if node is not None:
            self.context.reach(node._sequence_nr())
        return func(*args, **(kwargs or {}))


def trace(
    loss_fn: Callable,
    has_aux: bool,
    params: tuple[list[torch.Tensor], Any],
    batch: tuple[list[Any], Any],
    fake_mode: FakeTensorMode,
) -> Traced:
    """The joint graph of a loss function.

    Args:
        params, batch: fake leaves (a batch may hold other values too, which become constants) and structure.

    Raises:
        TraceError: a closed-over tensor, control flow that depends on data, randomness, a modified input.
        CutError: a boundary inside a checkpoint, or without a tensor.
    """
    found: dict[str, Any] = {}
    context = _Tracing()
    leaves, moving = batch[0], [i for i, x in enumerate(batch[0]) if isinstance(x, torch.Tensor)]

    def joint(*tensors: torch.Tensor) -> Any:
        context.begin()
        inputs = [
            x.detach().requires_grad_() if step_.differentiable(x) else x for x in tensors[: len(params[0])]
        ]
        data = dict(enumerate(leaves)) | dict(zip(moving, tensors[len(params[0]) :], strict=True))
        with torch.enable_grad():
            out = loss_fn(tree.unflatten(params[1], inputs), tree.unflatten(batch[1], data.values()))
            total, weight, aux = step_.read_loss(out, has_aux)
        extra: list[torch.Tensor] = []
        found["aux"] = tree.map(lambda x: _number(x, extra), aux)
        found["weight"] = weight is not None
        with torch.no_grad():  # clones, so that every output is a node of the forward half
            heads = [x.detach().clone() for x in (total, *([] if weight is None else [weight]), *extra)]
        context.backward()
        with _Crossing(context):
            return (*heads, *_gradients(total, inputs))

    tensors = [*params[0], *(leaves[i] for i in moving)]
    with _TRACING, step_.bind(context), torch.autograd.set_multithreading_enabled(False), fake_mode:
        try:
            module = make_fx(joint, tracing_mode="fake")(*tensors)
            if not make_functional(module):
                pure = torch.func.functionalize(module, remove="mutations")
                module = make_fx(pure, tracing_mode="fake")(*tensors)
        except FuncpipeError:
            raise
        except Exception as error:
            raise _explain(error, loss_fn) from error
    traced = Traced(
        module,
        len(params[0]),
        len(moving),
        context.boundaries,
        found["weight"],
        found["aux"],
        _count(found["aux"]),
    )
    _refuse_impure(traced)
    return traced


def _gradients(total: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    wanted = [x for x in inputs if x.requires_grad]
    if not (total.requires_grad and wanted):
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


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


# ---- what a graph must not hold


def is_op(node: fx.Node) -> bool:
    """Whether a node calls an ATen (or custom) op."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def is_seeded(node: fx.Node) -> bool:
    """Whether a node draws from the global generator. Backward ops are exempt: cuDNN's attention backward is tagged so."""
    if not is_op(node) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return not node.target.overloadpacket.__name__.endswith("_backward") and _argument(node, "dropout_p") != 0.0


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an op by name, its default included; None where the op has none of that name."""
    for i, a in enumerate(node.target._schema.arguments):
        if a.name == name:
            return node.kwargs.get(name, node.args[i] if i < len(node.args) else a.default_value)
    return None


def _refuse_impure(traced: Traced) -> None:
    backward = False
    inputs = [n for n in traced.module.graph.nodes if n.op == "placeholder"]
    for node in traced.module.graph.nodes:
        backward |= node.target is MARK and node.args[0] > traced.boundaries
        if is_seeded(node) and backward:
            raise TraceError(
                f"{node.target} draws a new random mask while torch.utils.checkpoint recomputes: the gradient would belong "
                "to another mask than the loss. Draw the mask outside the checkpoint and pass it in"
            )
        if is_seeded(node):
            raise TraceError(
                f"{node.target} draws from the global random generator, so no two ranks or microbatches could repeat what "
                "one device does. Draw the random values outside the loss and pass them through batch"
            )
        if mutates(node) and node.args and node.args[0] in inputs:
            raise TraceError(
                f"the loss function changes one of its inputs in place ({node.target}); it has to be pure: "
                "write to a clone instead"
            )


def _explain(error: Exception, loss_fn: Callable) -> Exception:
    """The error of a trace in the words of the user's own code, where its kind is known; else the error itself."""
    where = _user_line(error)
    if isinstance(error, DataDependentOutputException | GuardOnDataDependentSymNode):
        return TraceError(
            f"the loss function decides by the value of a tensor{where} (an if, .item(), int() or a mask index): a traced "
            "step is the same for every batch. Use torch.where, or a plain Python value that the closure or batch brings"
        )
    text = str(error)
    if "Please convert all Tensors to FakeTensors first" in text:
        return TraceError(
            f"the loss function uses a tensor that did not come in through its arguments{where}{_closed_over(loss_fn)}: "
            "pass it through params or batch"
        )
    return error


def _user_line(error: BaseException) -> str:
    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*inside, "<"))
    ]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`" if frames else ""


def _closed_over(loss_fn: Callable) -> str:
    code = getattr(loss_fn, "__code__", None)
    if code is None:
        return ""
    cells = zip(code.co_freevars, (c.cell_contents for c in loss_fn.__closure__ or ()), strict=False)
    names = dict(cells) | {n: loss_fn.__globals__[n] for n in code.co_names if n in loss_fn.__globals__}
    held = [n for n, x in names.items() if isinstance(x, torch.Tensor | torch.nn.Module)]
    return f" (it closes over {', '.join(map(repr, held))})" if held else ""
