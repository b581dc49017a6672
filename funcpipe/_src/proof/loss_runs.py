"""Loss runs: a loss function runs on fakes, as one rank or as one device sees it, and what it does
is recorded.

In: a loss function, fakes, a mesh. Out: a recording; and what the loss function returned, or the
error that it raised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.collectives import bind_mesh
from funcpipe._src.collectives.axis_scope import axis_spans, intercepted
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.core.loss_result import read_loss
from funcpipe._src.core.loss_types import differentiable, is_summary
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.intercept import Intercept
from funcpipe._src.graph.restore import restored
from funcpipe._src.graph.traceable import traceable
from funcpipe._src.proof import custom_backward
from funcpipe._src.proof.op_recorder import NamedCall, Recorder, WholeOps, record
from funcpipe._src.proof.placements import Placement, Refused
from funcpipe._src.proof.recording import Recording
from funcpipe.errors import SequenceError

ELSEWHERE = Refused("It is a tensor that came from elsewhere")


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


class LossRun:
    """One run.

    Args:
        leaves: of the batch.
        mesh: with one rank on the axes of what is split, where it runs as on one device.
        part_mesh: where rows are split: the mesh that a part sees. Collectives and ``einsum`` are
            then one op each: torch and funcpipe go other ways for one rank, or one row.
    """

    def __init__(
        self,
        subject: Subject,
        leaves: Sequence[Any],
        mesh: Mesh,
        part_mesh: Mesh | None = None,
    ) -> None:
        self.recording = Recording(subject.mode)
        self.subject = subject
        self.part_mesh = part_mesh
        self.error: Exception | None = None
        self.loss: tuple[Any, Any, Any] = (None, None, None)
        with subject.mode:
            params = tree.map(_detached, subject.params)
            data = [leaf.detach() if _is_tensor(leaf) else leaf for leaf in leaves]
        inputs = list(filter(_is_tensor, [*tree.leaves(params), *data]))
        for tensor in inputs:
            self.recording.new(tensor)
        self.count = self.recording.count = len(inputs)
        self.device = inputs[0].device if inputs else None
        try:
            unbound = bind_context(PlainContext())  # a boundary is nothing here
            with restored(subject.loss_fn), unbound, self._axes(mesh):
                record(self.recording, lambda: self._call(params, data))
        except Exception as error:
            self.error = error

    def _axes(self, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
        axes = self.subject.axes
        if self.part_mesh is None:
            return bind_mesh(mesh, axes, self.device)
        ranks = self.part_mesh.axes
        alike = [axis for axis in axes if mesh.axes[axis] == ranks[axis]]
        return bind_mesh(mesh, alike, self.device, alone=True)

    def _call(self, params: Any, data: list[Any]) -> None:
        of_rows = self.part_mesh is not None
        subject = self.subject
        batch = tree.unflatten(subject.spec, data)
        whole_ops = WholeOps() if of_rows else contextlib.nullcontext()
        named = intercepted(self._named) if of_rows else contextlib.nullcontext()
        as_written = torch.backends.opt_einsum.flags(enabled=False)  # whose order depends on sizes
        with traceable(), Intercept(), whole_ops, named, as_written:
            with custom_backward.NoHooks(self.recording if of_rows else None):
                self.loss = read_loss(subject.loss_fn(params, batch), subject.has_aux)
            leaves = tree.leaves(params)
            custom_backward.record_gradients(self.recording, self.loss[0], leaves, of_rows)

    def _named(
        self,
        kind: str,
        fn: Callable,
        x: Tensor | None,
        axis: Any,
        options: dict[str, Any],
    ) -> Any:
        """A collective. What does not come from params and batch, ranks have by themselves, also on
        one device."""
        mesh = self.part_mesh
        asked = hook.current()
        assert mesh is not None
        given = (axis,) if isinstance(axis, str) else axis
        axes = [name for name in given if mesh.axes.get(name, 1) > 1]
        if not axes or not isinstance(asked, Recorder):
            return fn(x, axis_spans(axis, kind))
        if x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x):
            names = ", ".join(map(repr, axes))
            raise SequenceError(
                f"fp.{kind} over {names}{user_line() or ''}: it runs inside a transform of "
                "torch.func, where it cannot be proven that rows meet as on one device. Call it "
                "outside, on the whole tensor"
            )
        free = x is None or self.recording.is_free(x)

        def run_collective() -> Tensor:
            if not free or x is None:
                return fn(x, axis_spans(axis, kind))
            with bind_mesh(mesh, self.subject.axes, self.device):
                return fn(x, axis_spans(axis, kind))

        ranks = mesh.axis_size(tuple(axes))
        return asked.named(NamedCall(kind, x, ",".join(axes), ranks, free, options), run_collective)

    def placement(
        self,
        what: str,
        tensor: Tensor,
        placements: dict[int, Placement],
    ) -> Placement:
        """The placement of a tensor that the loss function returned.

        Raises:
            SequenceError: nothing is known of it.
        """
        found = placements.get(self.recording.ref(tensor).number, ELSEWHERE)
        if isinstance(found, Refused):
            raise SequenceError(f"{what} is not what one device computes. {found.text}")
        return found

    def summaries(self) -> list[tuple[str, Any]]:
        """Every `Mean` and `Rows` of aux, with its path."""
        found: list[Any] = []

        def note(leaf: Any) -> int:
            found.append(leaf)
            return 0

        paths = tree.paths(tree.map(note, self.loss[2], is_leaf=is_summary))
        return [(f"aux{path}", leaf) for path, leaf in zip(paths, found, strict=True)]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _detached(leaf: Tensor) -> Tensor:
    detached = leaf.detach()
    if differentiable(leaf):
        return detached.requires_grad_()
    return detached
