"""The step: what a researcher calls in it.

A *step* is a pure function ``(state, batch) -> (state, metrics)``; a *loss function* a pure
function ``(params, batch) -> scalar`` or ``-> Mean(total, weight)``. In a step, ``value_and_grad``
is the one primitive that transforms rewrite. It asks the current *context*: there is none in plain
PyTorch; a runner binds one while it runs a transformed step (or looks at it on fake tensors).

In: a loss function, params and a batch. Out: the loss and its gradient, as plain PyTorch or as the
context says.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch

from funcpipe._src.core import loss_scale as scaling
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.batch_leaves import read_batch, with_tensors
from funcpipe._src.core.containers import check_containers
from funcpipe.errors import BatchError, TraceError


class Mean(NamedTuple):
    """A loss (or aux value) that is ``total / weight``, both additive over any split of the batch.

    Args:
        total: 0-d tensor, the sum of what is averaged; every summand depends on the batch.
        weight: 0-d tensor, how much there was to average (tokens, rows); does not depend on params.

    The loss of a step is the sum of totals over the sum of weights, over every microbatch and every
    shard, so that gradients do not depend on how the batch was split.

    A mean of nothing is 0, and so is its gradient: where the whole weight is 0, as in a batch whose
    labels are all ignored, an optimizer gets zeros. It still lets its momentum run out and decays
    weights, as with any gradient of zeros.
    """

    total: torch.Tensor
    weight: torch.Tensor


class Rows(NamedTuple):
    """An aux value with one entry per row of the batch: concatenated along ``dim`` in global row
    order."""

    x: torch.Tensor
    dim: int = 0


class Microbatches(NamedTuple):
    """A batch that is a sequence of ready microbatches, which may differ in shape."""

    parts: Sequence[Any]


class Context(Protocol):
    """What a runner binds while a transformed step runs."""

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any: ...
    def global_sum(
        self, params: Any, local: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor: ...
    def stage_boundary(self, x: Any) -> Any: ...


_context: ContextVar[Context | None] = ContextVar("funcpipe_context", default=None)
_tap: ContextVar[list | None] = ContextVar("funcpipe_tap", default=None)


@contextlib.contextmanager
def bind(context: Context | None) -> Iterator[None]:
    """Run a step under a context; None for plain PyTorch."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


@contextlib.contextmanager
def tap() -> Iterator[list]:
    """Collect ``(context, loss, grads)`` of every ``value_and_grad`` call, in tensors of their own:
    for tests."""
    seen: list = []
    token = _tap.set(seen)
    try:
        yield seen
    finally:
        _tap.reset(token)


# ---- what a step calls


def stage_boundary(x: Any) -> Any:
    """Mark a place where the loss function may be cut, typically after every block.

    Args:
        x: any pytree of what goes on from here; tensors of any shape and dtype, and anything else.

    Returns:
        ``x``; the identity unless a pipeline is being cut.

    >>> stage_boundary({"x": 1, "mask": None})
    {'x': 1, 'mask': None}
    """
    context = _context.get()
    return x if context is None else context.stage_boundary(x)


def value_and_grad(
    loss_fn: Callable[[Any, Any], Any], has_aux: bool = False
) -> Callable[[Any, Any], Any]:
    """The loss and its gradient with respect to the params: the one primitive that transforms
    rewrite.

    Args:
        loss_fn: ``(params, batch) -> scalar | Mean``; with ``has_aux``, ``-> (scalar | Mean,
            aux)``. Pure: every tensor comes in through its arguments.
        has_aux: whether the loss function returns further values. Their leaves are `Mean` (averaged
            over the whole batch) or `Rows` (concatenated in row order); any tensor where the batch
            is not split.

    Returns:
        A function ``(params, batch) -> (loss, grads)``, or ``((loss, aux), grads)``. ``loss`` is a
        detached 0-d tensor, ``grads`` a tree like ``params`` of dense tensors; the gradient of an
        unused or integer leaf is zeros.

    Python values that the loss function reads (closed-over numbers, attributes, training flags)
    count as they are at the
    call, also in a transformed step: another value makes another plan. What is followed, and what
    is not, is said in ``analysis/host_values.py``.

    In plain PyTorch it is ``torch.autograd.grad``; inside a torch.func transform it is
    torch.func's.

    Arrays and numbers of numpy in the batch are tensors for the loss function.

    Raises:
        TraceError: the loss is not a 0-d tensor, or a leaf of params is not a tensor; it runs in
        torch.inference_mode.
        BatchError: a leaf of the batch is neither a tensor nor a constant (a number, a text, ...);
        in a runner.

    >>> w = torch.tensor([1.0, 2.0])
    >>> value_and_grad(lambda p, b: (p * b).sum())(w, torch.tensor([3.0, 4.0]))
    (tensor(11.), tensor([3., 4.]))
    """

    @functools.wraps(loss_fn)
    def run(params: Any, batch: Any) -> Any:
        refuse_inference_mode("value_and_grad")
        context = _context.get()
        if context is None:
            out = _plain(loss_fn, has_aux, params, with_tensors(batch))
        else:
            out = context.value_and_grad(loss_fn, has_aux, params, read_batch(batch))
        seen = _tap.get()
        if seen is not None:
            loss, grads = tree.map_tensors(torch.clone, (out[0][0] if has_aux else out[0], out[1]))
            seen.append((context, loss, grads))
        scaled = scaling.current()
        if scaled is not None:
            scaled.bad = scaled.bad + global_sum(out[1], scaling.non_finite)
        return out

    return run


def global_norm(tree_of_leaves: Any) -> torch.Tensor:
    """The 2-norm over all elements of a tree of params, gradients or the like: a 0-d tensor, the
    same on every rank.

    Computed in float32, or in float64 where a leaf has it. A leaf that several ranks hold counts
    once.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return global_sum(tree_of_leaves, _sum_of_squares).sqrt()


def global_sum(
    tree_of_leaves: Any, local: Callable[[list[torch.Tensor]], torch.Tensor]
) -> torch.Tensor:
    """The sum over every rank of ``local(leaves)``, each element of a leaf counted once.

    Args:
        tree_of_leaves: params, gradients, or a tree like them.
        local: from the leaves that this rank counts (possibly none) to a 0-d tensor or number,
            additive over elements.

    >>> global_sum([torch.ones(3), torch.ones(2)], lambda leaves: sum(x.sum() for x in leaves))
    tensor(5.)
    """
    context = _context.get()

    def summed(leaves: list[torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(local(leaves))

    if context is not None:
        return context.global_sum(tree_of_leaves, summed)
    return summed(tree.leaves(tree_of_leaves))


Join = Callable[
    [Sequence[Any]], Any
]  # from a value for each leaf of the whole tree to a tree of them


def join(spec: Any, shown: Sequence[bool], values: Sequence[Any]) -> Any:
    """The tree of the values that are shown, with None for others."""
    return tree.unflatten(
        spec, [x if here else None for x, here in zip(values, shown, strict=True)]
    )


def reduce_leaves(
    tree_of_leaves: Any, local: Callable[[list[torch.Tensor | None]], torch.Tensor], op: str = "sum"
) -> tuple[Join, torch.Tensor]:
    """`global_sum` where it matters which leaf is which.

    Args:
        tree_of_leaves: as for `global_sum`.
        local: gets an entry for every leaf of the whole tree, None for those that this rank does
            not count; gives a tensor whose shape follows from their number.
        op: "sum" or "max".

    Returns:
        what makes a tree of a value for each leaf, and what ``local`` gave, reduced over every
        rank. Where the values of such a tree go with leaves, a rank has those of its own leaves.
    """
    # The contexts under which a loss function is looked at or traced hold all leaves, as plain
    # PyTorch does.
    return getattr(_context.get(), "reduce", _plain_reduce)(tree_of_leaves, local, op)


def _plain_reduce(tree_of_leaves: Any, local: Callable, op: str) -> tuple[Join, torch.Tensor]:
    leaves, spec = tree.flatten(tree_of_leaves)
    return functools.partial(tree.unflatten, spec), local(leaves)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, torch.Tensor]:
    """Gradients scaled down to a global norm of at most ``max_norm``, and their norm before that.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0])], 1.0)[1]
    tensor(5.)
    """
    norm = global_norm(grads)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return tree.map(
        lambda g: g * scale.to(g.dtype) if g.is_floating_point() or g.is_complex() else g, grads
    ), norm


def _sum_of_squares(leaves: list[torch.Tensor]) -> torch.Tensor:
    leaves = [x for x in leaves if x.is_floating_point() or x.is_complex()]
    if not leaves:
        return torch.zeros(())
    real = functools.reduce(torch.promote_types, (x.dtype.to_real() for x in leaves), torch.float32)
    norms = [
        torch.linalg.vector_norm(x, dtype=real.to_complex() if x.is_complex() else real)
        for x in leaves
    ]
    return torch.stack([x.real.square().to(norms[0].device) for x in norms]).sum()


# ---- value_and_grad in plain PyTorch


def differentiable(x: torch.Tensor) -> bool:
    """Whether a leaf can have a gradient; the others are frozen."""
    return x.is_floating_point() or x.is_complex()


def divisor_of(weight: torch.Tensor) -> torch.Tensor:
    """What totals are divided by: the weight, and infinity where that is 0. It is floating.

    >>> divisor_of(torch.tensor([2, 0]))
    tensor([2., inf], dtype=torch.float64)
    """
    weight = weight if differentiable(weight) else weight.double()
    return weight.masked_fill(weight == 0, math.inf)


def mean(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``total / weight``, in its dtype; 0 where the weight is 0.

    >>> mean(torch.tensor([3, 0]), torch.tensor([2, 0]))
    tensor([1.5000, 0.0000])
    """
    dtype = torch.result_type(total, weight)
    if not (dtype.is_floating_point or dtype.is_complex):
        dtype = torch.get_default_dtype()
    return (total / divisor_of(weight)).to(dtype)


def averaged(grad: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """A gradient of a total over a divisor, in the dtype of the leaf: a quotient of two 0-d tensors
    may have another."""
    return (grad / divisor).to(grad.dtype) if differentiable(grad) else grad


def read_loss(out: Any, has_aux: bool) -> tuple[Any, Any, Any]:
    """What a loss function returned, as ``(total, weight or None, aux)``."""
    if has_aux and not (isinstance(out, tuple) and len(out) == 2 and not isinstance(out, Mean)):
        raise TraceError(
            "with has_aux=True the loss function returns (loss, aux); this one returned "
            f"{describe(out)}"
        )
    loss, aux = out if has_aux else (out, None)
    parts = (
        {"Mean.total": loss.total, "Mean.weight": loss.weight}
        if isinstance(loss, Mean)
        else {"loss": loss}
    )
    for name, x in parts.items():
        if not (isinstance(x, torch.Tensor) and x.dim() == 0):
            raise TraceError(
                f"the {name} that the loss function returned is {describe(x)}; {_instead(x)}"
            )
    total, weight = loss if isinstance(loss, Mean) else (loss, None)
    if not total.is_floating_point():
        raise TraceError(
            f"the loss has dtype {total.dtype}; gradients need a real floating-point loss"
        )
    if aux is not None:
        _check_aux(aux)
    return total, weight, aux


def _instead(x: Any) -> str:
    if isinstance(x, int | float):
        return f"it has to be a 0-d tensor: write torch.tensor({x!r}), on the device of the batch"
    if isinstance(x, tuple):
        return "it has to be a 0-d tensor or fp.Mean(total, weight); with has_aux=True, (loss, aux)"
    return "it has to be a 0-d tensor: sum it, and return Mean(total, weight) for an average"


def _check_aux(aux: Any) -> None:
    """TraceError when a `Mean` or `Rows` in aux holds what cannot be averaged or concatenated."""
    nodes: list[Any] = []
    names = tree.paths(tree.map(lambda x: nodes.append(x) or 0, aux, is_leaf=is_summary))  # type: ignore[func-returns-value]
    for path, x in zip(names, nodes, strict=True):
        held = x if isinstance(x, Mean) else (x.x,) if isinstance(x, Rows) else ()
        if not all(isinstance(y, torch.Tensor) for y in held):
            raise TraceError(
                f"aux{path} is a {type(x).__name__} of {', '.join(map(describe, held))}; it takes "
                "tensors: write torch.tensor(...)"
            )
        if isinstance(x, Rows) and not -x.x.dim() <= x.dim < x.x.dim():
            raise TraceError(
                f"aux{path} is fp.Rows of {describe(x.x)} along dim {x.dim}, which it lacks"
            )


def check_params(params: Any) -> tuple[list[torch.Tensor], Any]:
    """The leaves and structure of params; TraceError when one is not a tensor, StateError when it
    holds some."""
    leaves, spec = tree.flatten(params)
    if not all(map(torch.is_tensor, leaves)):
        check_containers("params", params)
    for path, x in (
        zip(tree.paths(params), leaves, strict=True)
        if not all(map(torch.is_tensor, leaves))
        else ()
    ):
        if not isinstance(x, torch.Tensor):
            raise TraceError(
                f"params{path} is {describe(x)}, not a tensor; pass settings through a closure "
                "instead"
            )
    return leaves, spec


def is_summary(x: Any) -> bool:
    """Whether a node of an aux tree is a `Mean` or `Rows`."""
    return isinstance(x, Mean | Rows)


def plain_aux(x: Any) -> Any:
    """An aux leaf as one device gives it."""
    x = _value(x)
    return x.detach() if isinstance(x, torch.Tensor) else x


def _value(x: Any) -> Any:
    if isinstance(x, Mean):
        return mean(x.total, x.weight)
    return x.x if isinstance(x, Rows) else x


def refuse_inference_mode(who: str) -> None:
    """TraceError in ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        raise TraceError(
            f"{who} is called in torch.inference_mode(), in which PyTorch records nothing to take "
            "gradients of: leave it before, or use torch.no_grad(), in which value_and_grad and "
            "runners work"
        )


def without_inference(x: Any) -> Any:
    """A tree in which tensors made in inference mode, which autograd refuses, are copies."""
    if not any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in tree.leaves(x)):
        return x
    return tree.map_tensors(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, x)


def _plain(loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
    params, batch = without_inference(params), without_inference(batch)
    if isinstance(batch, Microbatches):
        return _plain_microbatches(loss_fn, has_aux, params, batch)
    leaves, spec = check_params(params)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _functorch(loss_fn, has_aux, leaves, spec, batch)
    total, weight, aux, grads = totals_and_grads(loss_fn, has_aux, leaves, spec, batch)
    return _divide(
        total, weight, tree.map(plain_aux, aux, is_leaf=is_summary), grads, spec, has_aux
    )


def totals_and_grads(
    loss_fn: Callable, has_aux: bool, leaves: list[torch.Tensor], spec: Any, batch: Any
) -> tuple[torch.Tensor, torch.Tensor | None, Any, list[torch.Tensor]]:
    """Total, weight, aux and the gradients of the total, by ``torch.autograd.grad``."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() if differentiable(x) else x for x in leaves]
        total, weight, aux = read_loss(loss_fn(tree.unflatten(spec, inputs), batch), has_aux)
    wanted = [x for x in inputs if x.requires_grad]
    found: Any = (torch.zeros_like(x) for x in wanted)
    if total.requires_grad and wanted:
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    grads = [_dense(next(found)) if x.requires_grad else torch.zeros_like(x) for x in inputs]
    return total.detach(), None if weight is None else weight.detach(), aux, grads


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.layout is torch.strided else x.to_dense()


def _functorch(
    loss_fn: Callable, has_aux: bool, leaves: list[torch.Tensor], spec: Any, batch: Any
) -> Any:
    moving = [i for i, x in enumerate(leaves) if differentiable(x)]
    others: list[
        Any
        # torch.func hands back tensors only; the rest of weight and aux, and their structure, stay
        # here
    ] = []

    def loss(some: list[torch.Tensor]) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(moving, some, strict=True))
        total, weight, aux = read_loss(loss_fn(tree.unflatten(spec, full.values()), batch), has_aux)
        beside, beside_spec = tree.flatten((weight, tree.map(_value, aux, is_leaf=is_summary)))
        others[:] = beside_spec, [None if isinstance(x, torch.Tensor) else x for x in beside]
        return total, [x for x in beside if isinstance(x, torch.Tensor)]

    some, (total, tensors) = torch.func.grad_and_value(loss, has_aux=True)(
        [leaves[i] for i in moving]
    )
    rest = iter(tensors)
    weight, aux = tree.unflatten(others[0], [next(rest) if x is None else x for x in others[1]])
    grads = {i: torch.zeros_like(x) for i, x in enumerate(leaves)} | dict(
        zip(moving, some, strict=True)
    )
    return _divide(total, weight, aux, list(grads.values()), spec, has_aux)


def _divide(total: Any, weight: Any, aux: Any, grads: list, spec: Any, has_aux: bool) -> Any:
    if weight is None:
        return ((total, aux) if has_aux else total), tree.unflatten(spec, grads)
    loss, divisor = mean(total, weight), divisor_of(weight)
    grads = [averaged(g, divisor) for g in grads]
    return ((loss, aux) if has_aux else loss), tree.unflatten(spec, grads)


def _plain_microbatches(loss_fn: Callable, has_aux: bool, params: Any, batch: Microbatches) -> Any:
    leaves, spec = check_params(params)
    parts = [
        totals_and_grads(loss_fn, has_aux, leaves, spec, part) for part in check_microbatches(batch)
    ]
    if len(parts) > 1 and any(weight is None for _, weight, _, _ in parts):
        raise BatchError(SCALAR_LOSS.format(why="the batch comes in several microbatches"))
    add = functools.partial(functools.reduce, torch.add)
    weight = None if parts[0][1] is None else add([p[1] for p in parts])
    grads = [add(list(gs)) for gs in zip(*(p[3] for p in parts), strict=True)]
    aux = join_aux([p[2] for p in parts])
    return _divide(add([p[0] for p in parts]), weight, aux, grads, spec, has_aux)


def check_microbatches(batch: Microbatches) -> Sequence[Any]:
    """The ready microbatches; BatchError when there are none."""
    if not isinstance(batch.parts, Sequence) or not batch.parts:
        raise BatchError(
            f"the batch is fp.Microbatches({batch.parts!r}): it takes a list of microbatches, and "
            "a step needs at least one"
        )
    return batch.parts


def join_aux(parts: list[Any]) -> Any:
    """One aux tree from those of all microbatches."""

    def join(path: str, *xs: Any) -> Any:
        if len(xs) == 1:
            return plain_aux(xs[0])
        if all(isinstance(x, Mean) for x in xs):
            return plain_aux(Mean(sum(x.total for x in xs), sum(x.weight for x in xs)))
        if all(isinstance(x, Rows) for x in xs):
            return torch.cat([x.x.detach() for x in xs], xs[0].dim)
        raise BatchError(AUX_LEAF.format(path=path))

    names = iter(tree.paths(tree.map(lambda _: 0, parts[0], is_leaf=is_summary)))
    return tree.map(lambda *xs: join(next(names), *xs), *parts, is_leaf=is_summary)


SCALAR_LOSS = (
    "{why}, but the loss function returns a plain scalar: whether to add or to average the scalars "
    "of the parts cannot be known. Return fp.Mean(total, weight), for instance the summed loss and "
    "the number of tokens."
)
AUX_LEAF = (
    "aux{path} is a plain value, but the batch is split and there is no rule to join the parts: "
    "return fp.Mean(total, weight) for an average or fp.Rows(x, dim) for one entry per row"
)


def describe(x: Any) -> str:
    """What a value is, for messages.

    >>> describe(None), describe(3), describe(torch.ones(2))
    ('None', 'an int', 'a tensor of shape (2,) and dtype torch.float32')
    """
    if x is None:
        return "None"
    if type(x) in (list, tuple):
        return f"a {type(x).__name__} of {len(x)}"
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {tuple(x.shape)} and dtype {x.dtype}"
    return f"{'an' if type(x).__name__[0] in 'aeiou' else 'a'} {type(x).__name__}"
