"""Runs: a loss function is run on fakes, as one rank or as one device sees it, and what it does is
written on a tape.

In: a loss function, fakes, a mesh. Out: a tape, what came of the loss function, or the error that
it raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.collectives import bind_mesh
from funcpipe._src.collectives.axis_scope import axis_spans, intercepted
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.core.loss_result import read_loss
from funcpipe._src.core.loss_types import differentiable
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.attention import Intercept
from funcpipe._src.graph.restore import restored
from funcpipe._src.graph.traceable import traceable
from funcpipe._src.proof import custom_backward as backward
from funcpipe._src.proof.op_recorder import NamedCall, Recorder, Tape, WholeOps, run
from funcpipe.errors import SequenceError


@dataclass(frozen=True)
class Subject:
    """A loss function, and what all its runs share.

    Args:
        params: the full tree, of fakes of ``mode``.
        spec: the structure of the batch.
        axes: those that a collective in the loss may name.
    """

    loss_fn: Callable
    has_aux: bool
    params: Any
    spec: Any
    mode: FakeTensorMode
    axes: Axes


class Run:
    """One run.

    Args:
        leaves: of the batch.
        mesh: with one rank on the axes of what is split, where it runs as on one device.
        part: where it is about rows: the mesh that a part sees. Collectives and ``einsum`` are then
            one op each: they go other ways for one rank, or one row.
    """

    def __init__(
        self, subject: Subject, leaves: Sequence[Any], mesh: Mesh, part: Mesh | None = None
    ) -> None:
        self.tape, self.subject, self.part = Tape(subject.mode), subject, part
        self.error: Exception | None = None
        self.loss: tuple[Any, Any, Any] = (None, None, None)
        with subject.mode:
            held = tree.map(
                lambda x: x.detach().requires_grad_() if differentiable(x) else x.detach(),
                subject.params,
            )
            data = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
        inputs = [x for x in (*tree.leaves(held), *data) if isinstance(x, torch.Tensor)]
        self.count = self.tape.count = len([self.tape.new(x) for x in inputs])
        self.device = inputs[0].device if inputs else None
        try:
            unbound = bind_context(PlainContext())  # a boundary is nothing here
            batch = tree.unflatten(subject.spec, data)
            call = partial(self._call, held, batch)
            with restored(subject.loss_fn), unbound, self._axes(mesh):
                run(self.tape, call)
        except Exception as error:
            self.error = error

    def _axes(self, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
        axes, part = self.subject.axes, self.part
        if part is None:
            return bind_mesh(mesh, axes, self.device)
        return bind_mesh(
            mesh, [a for a in axes if mesh.axes[a] == part.axes[a]], self.device, alone=True
        )

    def _call(self, params: Any, batch: Any) -> None:
        whole_ops = WholeOps() if self.part else contextlib.nullcontext()
        named = intercepted(self._named) if self.part else contextlib.nullcontext()
        as_written = torch.backends.opt_einsum.flags(enabled=False)  # whose order depends on sizes
        with traceable(), Intercept(), whole_ops, named, as_written:
            with backward.NoHooks(self.tape if self.part else None):
                out = self.subject.loss_fn(params, batch)
                self.loss = read_loss(out, self.subject.has_aux)
            backward.record(self.tape, self.loss[0], tree.leaves(params), self.part is not None)

    def _named(
        self, kind: str, fn: Callable, x: torch.Tensor | None, axis: Any, options: dict[str, Any]
    ) -> Any:
        """A collective: what does not come from params and batch, ranks have by themselves, also on
        one device."""
        part, asked = self.part, hook.current()
        assert part is not None
        axes = [a for a in ((axis,) if isinstance(axis, str) else axis) if part.axes.get(a, 1) > 1]
        if not axes or not isinstance(asked, Recorder):
            return fn(x, axis_spans(axis, kind))
        if x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
            names = ", ".join(map(repr, axes))
            raise SequenceError(
                f"fp.{kind} over {names}{user_line() or ''}: it runs inside a transform of "
                "torch.func, where it cannot be proven that rows meet as on one device. Call it "
                "outside, on the whole tensor"
            )
        free = x is None or self.tape.free(x)

        def made() -> torch.Tensor:
            if not free or x is None:
                return fn(x, axis_spans(axis, kind))
            with bind_mesh(part, self.subject.axes, self.device):
                return fn(x, axis_spans(axis, kind))

        return asked.named(
            NamedCall(kind, x, ",".join(axes), part.axis_size(tuple(axes)), free, options), made
        )
