"""The op recorder: it runs a loss function on fake tensors and writes down every op that it does.

What a known call (`functional/dispatch.py`) returns here is a tensor of the right shape, with
nothing behind it; nobody reads its entries.

In: a loss function, fakes. Out: a recording, and what the function returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from funcpipe._src.core.source_lines import user_line
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.proof.recording import (
    BEGIN,
    BUFFER,
    NAMED,
    STATISTIC,
    RecordedOp,
    Recording,
    TensorRef,
    tensors_of,
    writes,
)
from funcpipe.errors import SequenceError

_NUMBER = torch.ops.aten._local_scalar_dense.default
Made = Sequence[tuple[Any, torch.dtype]]  # shapes and dtypes of what a known call returns


def record(recording: Recording, function: Callable[[], Any]) -> Any:
    """Run a function and write its ops down, also those of gradients that it takes itself."""
    recorder = Recorder(recording)
    with (
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),
        recording.mode,
        hook.bound(recorder),
        recorder,
    ):
        return function()


@dataclass(frozen=True)
class NamedCall:
    """A collective over axes that split rows.

    Args:
        x: its operand; None for ``axis_index``.
        axes: joined by commas.
        ranks: how many ranks those have.
        free: whether the operand comes neither from params nor from the batch.
        options: with what else it was called.
    """

    kind: str
    x: Tensor | None
    axes: str
    ranks: int
    free: bool
    options: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Writes every op on a recording; and is the `hook.Hook` that writes known calls on it.

    While it is *quiet* it writes nothing.
    """

    supports_higher_order_operators = True

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.quiet = False
        self.declared = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _NUMBER and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # of a tensor that is closed over
                return func(*args)
        if self.quiet:
            return func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        named = _by_name(schema, args, kwargs)
        if torch.Tag.inplace_view in getattr(func, "tags", ()):
            # with the shape that it is about to lose
            named = tree_map_only(Tensor, self.recording.ref, named)
        out = func(*args, **kwargs)
        mutates = schema is not None and schema.is_mutable
        if mutates or tensors_of(out):
            self.recording.add(_name(func), func, named, out)
        return out

    def batch_statistic(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """A declared batch statistic: its ops, and then the whole of it as one entry, of all
        tensors that it takes from outside."""
        if self.declared or self.quiet:
            return fn(*args, **kwargs)
        recording = self.recording
        first = len(recording.entries)
        before = len(recording.tensors())
        recording.entries.append(RecordedOp(BEGIN, None, {}, (), None))
        self.declared = True
        try:
            out = fn(*args, **kwargs)
        finally:
            self.declared = False
        taken: dict[int, TensorRef] = {}
        outs: dict[int, TensorRef] = {}
        made = [recording.ref(tensor) for tensor in tensors_of(out)]
        outs.update((ref.number, ref) for ref in made if ref.number >= before)
        for entry in recording.entries[first + 1 :]:
            for ref in tree_leaves(entry.args):
                if isinstance(ref, TensorRef) and ref.number < before:
                    taken[ref.number] = ref
            if writes(entry):
                outs.update((ref.number, ref) for ref in entry.outs if ref.number < before)
        operands = {"taken": list(taken.values())}
        whole = RecordedOp(STATISTIC, None, operands, tuple(outs.values()), user_line())
        recording.entries.append(whole)
        return out

    def einsum(
        self,
        equation: str,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        with self._quietly() as was_quiet:
            out = torch.einsum(equation, left, right)
        if not was_quiet:
            letters = equation.replace(" ", "")
            args = {"equation": letters, "self": left, "other": right}
            self.recording.add("einsum", None, args, out)
        return out

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[bool]:
        """Write nothing meanwhile; gives whether the recorder was quiet before."""
        before = self.quiet
        self.quiet = True
        try:
            yield before
        finally:
            self.quiet = before

    def changed_buffer(self, buffer: Tensor) -> Tensor:
        """A buffer of a module that a call changed is a declared batch statistic, however it was
        changed."""
        out = buffer.detach().clone()
        ref = self.recording.ref(out)
        entry = RecordedOp(BUFFER, None, {"self": ref}, (ref,), user_line())
        self.recording.entries.append(entry)
        return out

    def named(self, call: NamedCall, out: Callable[[], Tensor]) -> Tensor:
        """A collective, as one entry."""
        with self._quietly() as was_quiet:
            result = out()
            if result is call.x:
                result = result.clone()
        if not was_quiet:
            args: dict[str, Any] = {} if call.x is None else {"x": call.x}
            for name in ("kind", "axes", "ranks", "free", "options"):
                args[name] = getattr(call, name)
            self.recording.add(NAMED, None, args, result)
        return result

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: hook.Spec,
    ) -> Tensor:
        tensors = {
            "q": query,
            "k": key,
            "v": value,
            "bias": spec.bias,
            "cu_seqlens": spec.cu_seqlens,
        }
        rest = {"causal": spec.causal, "scale": spec.scale}
        shape = (*query.shape[:-1], value.shape[-1])
        return self._known_call("attention", tensors, rest, [(shape, query.dtype)])[0]

    def positions(self, tensor: Tensor, dim: int) -> Tensor:
        made = [((tensor.shape[dim],), torch.int64)]
        return self._known_call("positions", {"x": tensor}, {"dim": dim}, made)[0]

    def cross_entropy(
        self,
        tokens: Tensor,
        head: Tensor | None,
        labels: Tensor,
        options: Any,
    ) -> tuple[Tensor, Tensor]:
        tensors = {"x": tokens, "head": head, "labels": labels}
        number = ((), torch.promote_types(tokens.dtype, torch.float32))
        rest = {"options": options}
        total, weight = self._known_call("cross_entropy", tensors, rest, [number, number])
        return total, weight

    def dropout(
        self,
        tensor: Tensor,
        rate: float,
        key: Tensor,
    ) -> Tensor:
        tensors = {"x": tensor, "key": key}
        made = [(tensor.shape, tensor.dtype)]
        return self._known_call("dropout", tensors, {"rate": rate}, made)[0]

    def _known_call(
        self,
        name: str,
        tensors: dict[str, Any],
        rest: dict[str, Any],
        made: Made,
    ) -> Any:
        return _KnownCall.apply(self, name, rest, made, tuple(tensors), *tensors.values())


class WholeOps(TorchFunctionMode):
    """Writes ``torch.einsum`` of two operands down as one op, if its letters say what it does."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        asked = hook.current()
        if func is torch.functional.einsum and isinstance(asked, Recorder) and _is_spelled(args):
            return asked.einsum(*args)
        return func(*args, **(kwargs or {}))


def _is_spelled(args: tuple) -> bool:
    """Whether an einsum has two tensors, an arrow, no dots, and no letter twice in one of them."""
    if len(args) != 3:
        return False
    if not isinstance(args[0], str):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    terms, arrow, _ = args[0].replace(" ", "").partition("->")
    each = terms.split(",")
    if not arrow or "." in terms:
        return False
    if len(each) != 2:
        return False
    return all(len(set(letters)) == len(letters) for letters in each)


class _KnownCall(torch.autograd.Function):
    """A known call; refused where the loss function itself differentiates it."""

    @staticmethod
    def forward(  # type: ignore[override]
        recorder: Recorder,
        name: str,
        rest: dict,
        made: Made,
        names: tuple[str, ...],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        recorder.quiet = True
        like = tensors_of(tensors)[0]
        out = tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in made)
        recorder.quiet = False
        args = dict(zip(names, tensors, strict=True)) | rest
        recorder.recording.add(name, None, args, out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.recorder = inputs[0]
        ctx.name = inputs[1]
        ctx.tensors = inputs[5:]
        ctx.mark_non_differentiable(*(out for out in output if not out.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if not ctx.recorder.recording.judging:
            raise SequenceError(
                "the loss function itself takes a gradient through "
                f"{ctx.name.replace('_', '-')}{user_line() or ''}: it cannot be proven that this "
                "computes what one device computes. Leave gradients to fp.value_and_grad"
            )
        ctx.recorder.quiet = True  # of what is made here, nothing is known
        found = []
        for operand in ctx.tensors:
            is_tensor = isinstance(operand, Tensor)
            found.append(torch.empty_like(operand) if is_tensor else None)
        ctx.recorder.quiet = False
        return (None, None, None, None, None, *found)


def _name(func: Any) -> str:
    packet = getattr(func, "overloadpacket", None)
    if packet is None:
        return str(func)
    return packet.__name__ if func.namespace == "aten" else f"{func.namespace}::{packet.__name__}"


def _by_name(schema: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by name, with defaults; by number where an op has no schema."""
    if schema is None:
        return {str(place): value for place, value in enumerate(args)} | kwargs
    named = {}
    for place, parameter in enumerate(schema.arguments):
        default = kwargs.get(parameter.name, parameter.default_value)
        named[parameter.name] = args[place] if place < len(args) else default
    return named
