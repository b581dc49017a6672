"""Gradients that the user wrote: the backward of every autograd.Function in a loss is run and
written down, too.

Torch's own gradients are exact; those of user code may be anything. A loss that is proven to be the
sum over ranks fixes what the gradient of every tensor is (`states.dual`): a slice of a slice's, a
part of the sum for what every rank has. So each such backward gets gradients of that state, and has
to make gradients of that state. `fp.value_and_grad` takes gradients the same way; nothing else of
this run is looked at.

In: a tape that holds the loss. Out: entries for what the backward of user code does, and for what
has to hold of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from funcpipe._src.core.source_lines import caller, from_torch, user_line
from funcpipe._src.proof.op_recorder import Entry, Tape
from funcpipe.errors import SequenceError

COTANGENT, GRADIENT = "cotangent", "gradient"
Made = dict[tuple[Any, int], torch.Tensor]  # by the node that made it, and as which of its results
_GRAD_FN: Any = torch.Tensor.grad_fn
_TRUSTED = ("torch.utils.checkpoint", "funcpipe.")


class NoHooks(TorchFunctionMode):
    """Refuses hooks on gradients: they may change one in any way. With a tape, they are written on
    it, like a backward."""

    def __init__(self, tape: Tape | None = None) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        theirs = [f.__module__ for f in hooks or () if not f.__module__.startswith("torch.")]
        node = func == _GRAD_FN.__get__ and not from_torch(caller(sys._getframe(1)))
        if func is torch.Tensor.register_hook and self.tape is not None:
            self.tape.hooked = True
            return func(args[0], _judged(self.tape, args[0], args[1]))
        if func is torch.Tensor.register_hook or node or theirs:
            raise _hooked()
        return func(*args, **(kwargs or {}))


def _hooked() -> SequenceError:
    return SequenceError(
        "the loss function puts a hook on a gradient, or on tensors that are saved for "
        f"one{user_line() or ''}: what that does to a slice's gradient cannot be proven to be what "
        "one device does. Change gradients after fp.value_and_grad"
    )


def _judged(tape: Tape, x: torch.Tensor, hook: Callable) -> Callable:
    """A hook on the gradient of a tensor that is written down where the gradient is taken to be
    judged."""

    def run(g: torch.Tensor) -> torch.Tensor | None:
        if not tape.judging:
            return hook(g)
        out = hook(_cotangent(tape, g, x))
        if out is not None:
            args: dict[str, Any] = {
                "grad": tape.ref(out),
                "function": "a hook on a gradient",
                "of": tape.ref(x),
            }
            tape.entries.append(Entry(GRADIENT, None, args, (), None))
        return out

    return run


def record(
    tape: Tape, total: torch.Tensor, inputs: Sequence[torch.Tensor], hooks: bool = False
) -> None:
    """Take the gradient of a total, if there is user code in it, and write that down.

    Args:
        hooks: whether the backward hooks of modules are written down, too.

    Raises:
        SequenceError: a module of the loss has backward hooks.
    """
    functions = list(_functions(total.grad_fn, hooks))
    wanted = tuple(x for x in inputs if x.requires_grad)
    if not (functions or tape.hooked) or not wanted:
        return
    # By node, not by its id: Python's object of a node lives only as long as something holds it.
    made: Made = {(x.grad_fn, x.output_nr): x for x in tape.tensors() if x.grad_fn is not None}
    for node in functions:
        node.register_prehook(_entering(tape, node, made))
        node.register_hook(_leaving(tape, node, made))
    tape.judging = True
    engine = torch.autograd.graph._engine_run_backward  # type: ignore[attr-defined]  # as in graph/trace.py
    engine((total,), (torch.ones_like(total),), False, False, wanted, True, accumulate_grad=False)


def _functions(node: Any, hooks: bool) -> Iterator[Any]:
    """The nodes of an autograd graph that are user code."""
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
        written = getattr(type(node), "_forward_cls", None)
        hooked = written is torch.nn.modules._functions.BackwardHookFunction
        if hooked and not hooks:
            raise _hooked()
        if written is not None and not written.__module__.startswith(_TRUSTED):
            yield node


def _entering(tape: Tape, node: Any, made: Made) -> Callable:
    def enter(grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
        return tuple(
            None if g is None else _cotangent(tape, g, made.get((node, i)))
            for i, g in enumerate(grads)
        )

    return enter


def _cotangent(tape: Tape, g: torch.Tensor, of: torch.Tensor | None) -> torch.Tensor:
    fresh = torch.empty_like(g)
    ref = tape.new(fresh)
    args: dict[str, Any] = {} if of is None else {"of": tape.ref(of)}
    tape.entries.append(Entry(COTANGENT, None, args, (ref,), None))
    return fresh


def _leaving(tape: Tape, node: Any, made: Made) -> Callable:
    name = f"the backward of autograd.Function {type(node)._forward_cls.__name__}"

    def leave(found: Sequence[torch.Tensor | None], _: Any) -> None:
        for g, (source, k) in zip(found, node.next_functions, strict=True):
            if g is None or source is None:
                continue
            x = getattr(source, "variable", None)
            x = made.get((source, k)) if x is None else x
            args: dict[str, Any] = {"grad": tape.ref(g), "function": name}
            tape.entries.append(
                Entry(GRADIENT, None, args | ({} if x is None else {"of": tape.ref(x)}), (), None)
            )

    return leave
