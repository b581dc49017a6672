"""Tapes: a loss function is run on fake tensors, and every op it does is written down.

Terms. A *tape* lists `Entry`s in order. A tensor has a number on its tape; a `Ref` is that number
with its shape. What came in has the first numbers. A *known call* (`functional/dispatch.py`) is one
entry; what it returns here is a tensor of the right shape, with nothing behind it; it is never
read.

In: a loss function, fakes. Out: a tape, and what the function returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from funcpipe._src.core.source_lines import Line, user_line
from funcpipe._src.functional import dispatch as hook
from funcpipe.errors import SequenceError

BEGIN, STATISTIC, BUFFER = (
    "begin",
    "batch_statistic",
    "changed_buffer",
)  # around the ops of a declared batch statistic
# These want the shape of an operand alone.
SHAPES = (
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
)
NAMED = "named"  # a collective over axes that split rows
CONSTANT, UNKNOWN = "constant", "unknown"  # entries of tensors that came in by themselves


@dataclass(frozen=True)
class Ref:
    """A tensor of a tape."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Entry:
    """An op.

    Args:
        name: of the op without its overload, such as ``"add_"`` (ATen's) or ``"funcpipe::wait"``,
            or of a known call.
        func: the op; None for a known call.
        args: by name, defaults included; tensors as `Ref`.
        outs: its results; one that it only writes to keeps its number.
        line: of the user's code.
        grad: whether gradients are recorded.
    """

    name: str
    func: Any
    args: dict[str, Any]
    outs: tuple[Ref, ...]
    line: Line | None
    grad: bool = True


@dataclass
class Tape:
    """What a run did.

    Args:
        mode: of all fakes.
        entries: in order.
    """

    mode: FakeTensorMode
    entries: list[Entry] = field(default_factory=list)
    count: int = 0  # of tensors that came in
    hooked: bool = False  # the loss function put a hook on a gradient
    judging: bool = False  # the loss is done, and its gradient is taken (`custom_backward.py`)
    _numbers: dict[int, int] = field(default_factory=dict)
    _kept: list[torch.Tensor] = field(default_factory=list)  # so that an id stays one tensor's

    def new(self, x: torch.Tensor) -> Ref:
        """A tensor that is seen for the first time."""
        self._numbers[id(x)] = len(self._kept)
        self._kept.append(x)
        return self.ref(x)

    def ref(self, x: torch.Tensor) -> Ref:
        """A tensor, which may have come from elsewhere."""
        if id(x) not in self._numbers:
            out, real = (
                self.new(x),
                type(x) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x),
            )
            args = {"value": x} if real else {}
            self.entries.append(
                Entry(CONSTANT if real else UNKNOWN, None, args, (out,), user_line())
            )
            return out
        return Ref(self._numbers[id(x)], tuple(x.shape), x.dtype)

    def free(self, x: torch.Tensor) -> bool:
        """Whether a tensor comes neither from params nor from the batch."""
        bound = set(range(self.count))
        for e in self.entries:
            if e.name not in SHAPES and any(r.number in bound for r in refs(e.args.values())):
                bound |= {r.number for r in e.outs}
        return self.ref(x).number not in bound

    def inputs(self, count: int) -> list[Ref]:
        """The tensors that came in."""
        return [Ref(i, tuple(x.shape), x.dtype) for i, x in enumerate(self._kept[:count])]

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, by number."""
        return self._kept

    def add(self, name: str, func: Any, args: dict[str, Any], out: Any) -> None:
        """Write an op down."""
        refs = tree_map_only(torch.Tensor, self.ref, args)
        outs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = {r.number for r in tree_leaves(refs) if isinstance(r, Ref)}
        made = tuple(
            self.ref(x) if self._numbers.get(id(x)) in known else self.new(x) for x in outs
        )
        self.entries.append(Entry(name, func, refs, made, user_line(), torch.is_grad_enabled()))


_NUMBER = torch.ops.aten._local_scalar_dense.default


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
    x: torch.Tensor | None
    axes: str
    ranks: int
    free: bool
    options: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Writes every op on a tape; and is the `hook.Hook` that writes known calls on it."""

    supports_higher_order_operators = True

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape, self.quiet, self.declared = tape, False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, getattr(func, "_schema", None)
        if func is _NUMBER and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # of a tensor that is closed over
                return func(*args)
        named = _by_name(schema, args, kwargs)
        if torch.Tag.inplace_view in getattr(func, "tags", ()) and not self.quiet:
            named = tree_map_only(
                torch.Tensor, self.tape.ref, named
            )  # with the shape that it is about to lose
        out = func(*args, **kwargs)
        made = any(isinstance(x, torch.Tensor) for x in tree_leaves(out))
        if not self.quiet and (made or (schema is not None and schema.is_mutable)):
            self.tape.add(_name(func), func, named, out)
        return out

    def batch_statistic(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """A declared batch statistic: its ops, and then the whole of it as one entry, of all
        tensors that it takes from outside."""
        if self.declared or self.quiet:
            return fn(*args, **kwargs)
        tape = self.tape
        first, before = len(tape.entries), len(tape.tensors())
        tape.entries.append(Entry(BEGIN, None, {}, (), None))
        self.declared = True
        try:
            out = fn(*args, **kwargs)
        finally:
            self.declared = False
        inside = tape.entries[first + 1 :]
        taken = {
            r.number: r
            for e in inside
            for r in tree_leaves(e.args)
            if isinstance(r, Ref) and r.number < before
        }
        made = [tape.ref(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        changed = [r for e in inside if writes(e) for r in e.outs if r.number < before]
        outs = {r.number: r for r in (*(r for r in made if r.number >= before), *changed)}
        tape.entries.append(
            Entry(
                STATISTIC, None, {"taken": list(taken.values())}, tuple(outs.values()), user_line()
            )
        )
        return out

    def einsum(self, equation: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        quiet, self.quiet = self.quiet, True
        out = torch.einsum(equation, x, y)
        self.quiet = quiet
        if not quiet:
            self.tape.add(
                "einsum", None, {"equation": equation.replace(" ", ""), "self": x, "other": y}, out
            )
        return out

    def changed_buffer(self, x: torch.Tensor) -> torch.Tensor:
        """A buffer of a module that a call changed is a declared batch statistic, however it was
        changed."""
        out = x.detach().clone()
        ref = self.tape.ref(out)
        self.tape.entries.append(Entry(BUFFER, None, {"self": ref}, (ref,), user_line()))
        return out

    def named(self, call: NamedCall, out: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A collective, as one entry."""
        quiet, self.quiet = self.quiet, True
        result = out()
        result = result.clone() if result is call.x else result
        self.quiet = quiet
        if not quiet:
            args = {"x": call.x} if call.x is not None else {}
            rest = {
                "kind": call.kind,
                "axes": call.axes,
                "ranks": call.ranks,
                "free": call.free,
                "options": call.options,
            }
            self.tape.add(NAMED, None, args | rest, result)
        return result

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: hook.Spec
    ) -> torch.Tensor:
        args = {"q": q, "k": k, "v": v, "bias": spec.bias, "cu_seqlens": spec.cu_seqlens}
        shape = (*q.shape[:-1], v.shape[-1])
        return self._known(
            "attention", args, {"causal": spec.causal, "scale": spec.scale}, [(shape, q.dtype)]
        )[0]

    def positions(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self._known("positions", {"x": x}, {"dim": dim}, [((x.shape[dim],), torch.int64)])[0]

    def cross_entropy(
        self, x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        args = {"x": x, "head": head, "labels": labels}
        total, weight = self._known("cross_entropy", args, {"options": options}, [((), dtype)] * 2)
        return total, weight

    def dropout(self, x: torch.Tensor, rate: float, key: torch.Tensor) -> torch.Tensor:
        return self._known("dropout", {"x": x, "key": key}, {"rate": rate}, [(x.shape, x.dtype)])[0]

    def _known(
        self, name: str, tensors: dict[str, Any], rest: dict[str, Any], made: Sequence[Any]
    ) -> Any:
        return _Known.apply(self, name, rest, made, tuple(tensors), *tensors.values())


class WholeOps(TorchFunctionMode):
    """Writes ``torch.einsum`` of two operands as one op on the tape, if its letters say what it
    does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = hook.current()
        if func is torch.functional.einsum and isinstance(asked, Recorder) and _spelled(args):
            return asked.einsum(*args)
        return func(*args, **(kwargs or {}))


def _spelled(args: tuple) -> bool:
    """Whether an einsum has two tensors, an arrow, no dots, and no letter twice in one of them."""
    if (
        len(args) != 3
        or not isinstance(args[0], str)
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    terms, arrow, _ = args[0].replace(" ", "").partition("->")
    each = terms.split(",")
    return (
        bool(arrow)
        and "." not in terms
        and len(each) == 2
        and all(len(set(t)) == len(t) for t in each)
    )


class _Known(torch.autograd.Function):
    """A known call; refused where the loss function itself differentiates it."""

    @staticmethod
    def forward(  # type: ignore[override]
        recorder: Recorder,
        name: str,
        rest: dict,
        made: Sequence,
        names: tuple[str, ...],
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:
        recorder.quiet = True
        like = next(x for x in tensors if isinstance(x, torch.Tensor))
        out = tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in made)
        recorder.quiet = False
        recorder.tape.add(name, None, dict(zip(names, tensors, strict=True)) | rest, out)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.recorder, ctx.name, ctx.tensors = inputs[0], inputs[1], inputs[5:]
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if not ctx.recorder.tape.judging:
            raise SequenceError(
                "the loss function itself takes a gradient through "
                f"{ctx.name.replace('_', '-')}{user_line() or ''}: what it computes of that on a "
                "slice of the sequence cannot be proven to be what one device computes. Leave "
                "gradients to fp.value_and_grad"
            )
        ctx.recorder.quiet = True  # of what is made here, nothing is known
        out = [torch.empty_like(x) if isinstance(x, torch.Tensor) else None for x in ctx.tensors]
        ctx.recorder.quiet = False
        return (None, None, None, None, None, *out)


def run(tape: Tape, loss_fn: Callable[[], Any]) -> Any:
    """Run a function and write its ops down, also those of gradients that it takes itself."""
    recorder = Recorder(tape)
    with (
        torch.enable_grad(),
        torch.autograd.set_multithreading_enabled(False),
        tape.mode,
        hook.bound(recorder),
        recorder,
    ):
        return loss_fn()


def refs(values: Any) -> Iterator[Ref]:
    """The tensors among arguments."""
    for v in values:
        if isinstance(v, Ref):
            yield v
        elif isinstance(v, list | tuple):
            yield from refs(v)


def writes(e: Entry) -> bool:
    """Whether an op changes an operand."""
    schema = getattr(e.func, "_schema", None)
    return schema is not None and schema.is_mutable


def _name(func: Any) -> str:
    packet = getattr(func, "overloadpacket", None)
    if packet is None:
        return str(func)
    return packet.__name__ if func.namespace == "aten" else f"{func.namespace}::{packet.__name__}"


def _by_name(schema: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by name, with defaults; by number where an op has no schema."""
    if schema is None:
        return {str(i): x for i, x in enumerate(args)} | kwargs
    return dict(_bound(schema.arguments, args, kwargs))


def _bound(parameters: Sequence[Any], args: tuple, kwargs: dict) -> Iterator[tuple[str, Any]]:
    for i, p in enumerate(parameters):
        yield p.name, args[i] if i < len(args) else kwargs.get(p.name, p.default_value)
