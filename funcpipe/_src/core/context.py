"""Contexts: what the functions that a step or a loss calls mean, on one device and under a runner.

`value_and_grad`, `global_sum`, `stage_boundary` and `checkpoint_name` ask the current context.
These are all contexts; each derives from `PlainContext`:

| context | where | bound by | what ``value_and_grad`` is |
|---|---|---|---|
| `PlainContext` | ``core/context.py`` | nobody; runs on the whole batch | ``torch.autograd.grad`` |
| `AnalysisContext` | ``analysis/state.py`` | `analyse` | notes the call, returns fakes |
| `RehearsalContext` | ``analysis/rehearsal.py`` | `Rehearsal` | compares it with the noted call |
| `TraceContext` | ``graph/trace.py`` | `trace` | plain; boundaries and names leave markers |
| `RunContext` | ``runtime/rank.py`` | a rank's step | runs the bound program |

In: a context, bound around a function. Out: `current`, the context that is bound.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.gradients import plain_value_and_grad

if TYPE_CHECKING:
    from funcpipe._src.core.buffer_donation import DonationAnalysis, Overwritable
    from funcpipe._src.core.loss_scale import LossScale

# From a value for each leaf of the whole tree to a tree of them.
Join = Callable[[Sequence[Any]], Any]
# From the leaves of a tree, None for those that this rank does not count, to their sum or maximum.
Local = Callable[[list[Tensor | None]], Tensor]


class Context(Protocol):
    """What a step and a loss function ask."""

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any: ...
    def reduce(self, tree_of_leaves: Any, local: Local, op: str) -> tuple[Join, Tensor]: ...
    def stage_boundary(self, value: Any) -> Any: ...
    def checkpoint_name(self, value: Tensor, name: str) -> None: ...


class PlainContext:
    """One device: every function is what its docstring says, in plain PyTorch.

    Attributes:
        loss_scale: from what the backward passes of a step start, if a step scales its loss.
        donation: which leaves of the state an optimizer would write to, while that is found out.
        overwritable: which leaves of the state an optimizer writes to.
        calls_seen: gets ``(context, loss, grads)`` of every ``value_and_grad``, for `tap`.
    """

    loss_scale: LossScale | None = None
    donation: DonationAnalysis | None = None
    overwritable: Overwritable | None = None
    calls_seen: list[tuple[PlainContext, Any, Any]] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether no runner is at work."""
        return type(self) is PlainContext

    def value_and_grad(
        self,
        loss_fn: Callable,
        has_aux: bool,
        params: Any,
        batch: Any,
    ) -> Any:
        """The loss and its gradient."""
        return plain_value_and_grad(loss_fn, has_aux, params, batch)

    def reduce(
        self,
        tree_of_leaves: Any,
        local: Local,
        op: str,
    ) -> tuple[Join, Tensor]:
        """See `reduce_leaves`."""
        leaves, spec = tree.flatten(tree_of_leaves)
        return functools.partial(tree.unflatten, spec), local(leaves)

    def stage_boundary(self, value: Any) -> Any:
        """See `stage_boundary`."""
        return value

    def checkpoint_name(self, value: Tensor, name: str) -> None:
        """See `funcpipe.checkpoint_name`; ``value`` is one tensor."""


_PLAIN = PlainContext()
_context: ContextVar[PlainContext] = ContextVar("funcpipe_context", default=_PLAIN)


def current() -> PlainContext:
    """The context that is bound, or plain PyTorch."""
    return _context.get()


@contextlib.contextmanager
def bind_context(context: PlainContext) -> Iterator[None]:
    """Run a step or a loss function under a context."""
    if context.calls_seen is None:
        context.calls_seen = current().calls_seen
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


@contextlib.contextmanager
def tap() -> Iterator[list[tuple[PlainContext, Any, Any]]]:
    """Collect ``(context, loss, grads)`` of every ``value_and_grad`` inside, in tensors of their
    own."""
    context = PlainContext()
    context.calls_seen = []
    with bind_context(context):
        yield context.calls_seen
