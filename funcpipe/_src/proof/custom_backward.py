"""Gradients that the user wrote: the backward of every autograd.Function in a loss is run and
recorded, too.

Torch's own gradients are exact; those of user code may be anything. A loss that is proven to be the
sum over ranks fixes what the gradient of every tensor is (`placements.dual`): the slice of the
gradient for a slice, a summand of it for what every rank has. So each such backward gets gradients
of that placement, and has to make gradients of that placement. `fp.value_and_grad` takes gradients
the same way; nothing else of this run is looked at.

In: a recording that holds the loss. Out: entries for what the backward of user code does, and for
the gradients that it gets and makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcpipe._src.core.source_lines import caller, from_torch, user_line
from funcpipe._src.proof.recording import RecordedOp, Recording
from funcpipe.errors import SequenceError

COTANGENT, GRADIENT = "cotangent", "gradient"
_GRAD_FN: Any = Tensor.grad_fn
_TRUSTED = ("torch.utils.checkpoint", "funcpipe.")
# Tensors by the autograd node that made them, and its result. By node, not by its id: Python's
# object of a node lives only as long as something holds it.
Made = dict[tuple[Any, int], Tensor]


class NoHooks(TorchFunctionMode):
    """Refuses hooks on gradients, which may change one in any way. With a recording, they are
    recorded like a backward."""

    def __init__(self, recording: Recording | None = None) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        hooks = func is Tensor.register_hook
        if hooks and self.recording is not None:
            self.recording.hooked = True
            tensor, hook = args
            return func(tensor, _recorded_hook(self.recording, tensor, hook))
        takes_node = func == _GRAD_FN.__get__ and not from_torch(caller(sys._getframe(1)))
        if hooks or takes_node or _saved_tensors_hooks():
            raise _hooked()
        return func(*args, **(kwargs or {}))


def _saved_tensors_hooks() -> bool:
    """Whether user code has hooks on tensors that are saved for gradients."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) or ()
    return any(not hook.__module__.startswith("torch.") for hook in hooks)


def _hooked() -> SequenceError:
    return SequenceError(
        "the loss function puts a hook on a gradient, or on tensors that are saved for "
        f"one{user_line() or ''}: it cannot be proven that this does to gradients what it does on "
        "one device. Change gradients after fp.value_and_grad"
    )


def _recorded_hook(recording: Recording, tensor: Tensor, hook: Callable) -> Callable:
    """A hook on the gradient of a tensor, which is recorded when gradients are judged."""

    def run(grad: Tensor) -> Tensor | None:
        if not recording.judging:
            return hook(grad)
        out = hook(_cotangent(recording, grad, tensor))
        if out is not None:
            _gradient(recording, "a hook on a gradient", out, tensor)
        return out

    return run


def record_gradients(
    recording: Recording,
    total: Tensor,
    inputs: Sequence[Tensor],
    hooks: bool = False,
) -> None:
    """Take the gradient of a total, if there is user code in it, and record that.

    Args:
        hooks: whether the backward hooks of modules are recorded, too.

    Raises:
        SequenceError: a module of the loss has backward hooks.
    """
    functions = list(_user_functions(total.grad_fn, hooks))
    wanted = tuple(tensor for tensor in inputs if tensor.requires_grad)
    if not (functions or recording.hooked) or not wanted:
        return
    made: Made = {}
    for tensor in recording.tensors():
        if tensor.grad_fn is not None:
            made[tensor.grad_fn, tensor.output_nr] = tensor
    for node in functions:
        node.register_prehook(_before(recording, node, made))
        node.register_hook(_after(recording, node, made))
    recording.judging = True
    # as in graph/trace.py
    engine = torch.autograd.graph._engine_run_backward  # type: ignore[attr-defined]
    ones = (torch.ones_like(total),)
    engine((total,), ones, False, False, wanted, True, accumulate_grad=False)


def _user_functions(first: Any, hooks: bool) -> Iterator[Any]:
    """The nodes of an autograd graph that are user code."""
    seen = set()
    waiting = [first]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        written = getattr(type(node), "_forward_cls", None)
        of_module = written is torch.nn.modules._functions.BackwardHookFunction
        if of_module and not hooks:
            raise _hooked()
        if written is not None and not written.__module__.startswith(_TRUSTED):
            yield node


def _before(recording: Recording, node: Any, made: Made) -> Callable:
    """Replaces the gradients that a node gets by tensors of which only the placement is known."""

    def run(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for place, grad in enumerate(grads):
            of = made.get((node, place))
            if grad is not None:
                grad = _cotangent(recording, grad, of)
            found.append(grad)
        return tuple(found)

    return run


def _after(recording: Recording, node: Any, made: Made) -> Callable:
    """Records the gradients that a node makes."""
    name = f"the backward of autograd.Function {type(node)._forward_cls.__name__}"

    def run(found: Sequence[Tensor | None], _: Any) -> None:
        for grad, edge in zip(found, node.next_functions, strict=True):
            source, place = edge
            if grad is None or source is None:
                continue
            tensor = getattr(source, "variable", None)
            if tensor is None:
                tensor = made.get((source, place))
            _gradient(recording, name, grad, tensor)

    return run


def _cotangent(recording: Recording, grad: Tensor, of: Tensor | None) -> Tensor:
    fresh = torch.empty_like(grad)
    out = recording.new(fresh)
    args = {} if of is None else {"of": recording.ref(of)}
    recording.entries.append(RecordedOp(COTANGENT, None, args, (out,), None))
    return fresh


def _gradient(
    recording: Recording,
    function: str,
    grad: Tensor,
    of: Tensor | None,
) -> None:
    args: dict[str, Any] = {"grad": recording.ref(grad), "function": function}
    if of is not None:
        args["of"] = recording.ref(of)
    recording.entries.append(RecordedOp(GRADIENT, None, args, (), None))
