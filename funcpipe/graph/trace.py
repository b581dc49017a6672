"""Trace: a loss function becomes one joint FX graph, forward then backward, of one microbatch as one rank runs it.

Terms. The *joint* function returns the loss and its gradient, by autograd on fake tensors. A *marker* is an op
``funcpipe::cut(x, k)``: the identity, put by boundary ``k``; its autograd emits ``funcpipe::cut_backward(g, k)``. The
marker ``k = -1`` on the seed of the backward pass says where that begins. The engine runs backward nodes in the reverse
order of their creation when it uses one thread, so the markers label both halves of the graph.

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
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from funcpipe import step as step_
from funcpipe import tree
from funcpipe.errors import CutError, FuncpipeError, TraceError
from funcpipe.graph.mutation import make_functional, mutates

_LIB = torch.library.Library("funcpipe", "FRAGMENT")
for _name in ("cut", "cut_backward"):
    _LIB.define(f"{_name}(Tensor x, int k) -> Tensor")
    _LIB.impl(_name, lambda x, k: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake(f"funcpipe::{_name}", lambda x, k: torch.empty_like(x), lib=_LIB)
CUT, CUT_BACKWARD = torch.ops.funcpipe.cut.default, torch.ops.funcpipe.cut_backward.default
torch.library.register_autograd(
    "funcpipe::cut",
    lambda ctx, g: (CUT_BACKWARD(g, ctx.k), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "k", inputs[1]),
    lib=_LIB,
)
SEED = -1  # the marker on the seed of the backward pass

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
    """The context of a loss that is being traced: boundaries are counted; everything else is plain PyTorch."""

    def __init__(self) -> None:
        self.boundaries, self.backward = 0, False

    def stage_boundary(self, x: Any) -> Any:
        if self.backward:
            raise CutError(
                "stage_boundary is called again while a checkpoint recomputes: a boundary inside "
                "torch.utils.checkpoint cannot be cut. Put the boundary outside: checkpoint one block, then stage_boundary"
            )
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree.leaves(x)):
            raise CutError(
                f"stage_boundary got {type(x).__name__} without any tensor: nothing to cut; pass what goes on"
            )
        self.boundaries += 1
        return tree.map_tensors(lambda t: CUT(t, self.boundaries), x)

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
        return step_._plain(loss_fn, has_aux, params, batch)

    def global_sum(self, leaves: Any, local: Callable) -> torch.Tensor:
        return local(tree.leaves(leaves))


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
        context.boundaries, context.backward = 0, False
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
        context.backward = True
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
    with torch.no_grad():
        seed = CUT(torch.ones_like(total), SEED)
    found = iter(torch.autograd.grad(total, wanted, seed, allow_unused=True))
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
    name = node.target.overloadpacket.__name__
    unused = node.kwargs.get("dropout_p", None) == 0.0 or ("attention" in name and 0.0 in node.args)
    return not name.endswith("_backward") and not unused


def _refuse_impure(traced: Traced) -> None:
    backward = False
    inputs = [n for n in traced.module.graph.nodes if n.op == "placeholder"]
    for node in traced.module.graph.nodes:
        backward |= node.target is CUT and node.args[1] == SEED
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
