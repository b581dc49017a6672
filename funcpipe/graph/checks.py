"""What must hold of a loss whose batch is split, checked when it is traced.

The loss is ``sum of totals / sum of weights`` over the parts of a batch. That is the loss of the whole batch only if
``weight`` does not depend on params and adds up over the parts, and every summand of ``total`` comes from the batch: an
unscaled ``+ l2(params)`` would be counted once per part.

In: the nodes of a joint graph, the loss function, the batch and its parts. Out: nothing, or an error that says which
rule is broken and what to write instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from funcpipe import step as step_
from funcpipe import tree
from funcpipe.errors import BatchError
from funcpipe.graph.fakes import BatchIsReal
from funcpipe.graph.nodes import Nodes

aten = torch.ops.aten
_THROUGH = frozenset(["clone", "_to_copy", "alias", "neg", "view", "reshape", "squeeze", "unsqueeze"])
_SCALES = frozenset(["mul", "div"])
_WEIGHT_TOLERANCE = 1e-5  # relative: weights are float32 sums of the same numbers in another order


def check_summands(n: Nodes) -> None:
    """Every additive summand of the total depends on the batch, and is a sum and not a mean over it.

    Raises:
        BatchError: a summand that would be counted once per part, or a bare mean.
    """
    from_batch = _reached(n, n.batch)
    for x, scaled in _summands(n.heads[0], False):
        if not isinstance(x, fx.Node) or x not in from_batch:
            raise BatchError(
                f"a summand of Mean.total does not depend on the batch ({_describe(x)}): it would be counted once for "
                "every microbatch and shard. Multiply it by the weight (total + weight * l2), or add it to the gradients"
            )
        if not scaled and _is_mean(x):
            raise BatchError(
                f"Mean.total is a mean over the rows of a part ({_describe(x)}): means of parts do not add up to the mean of "
                "the batch. Return the sum as total (reduction='sum') and the number of rows or tokens as weight"
            )


def check_weight(n: Nodes) -> None:
    """The weight does not depend on params.

    Raises:
        BatchError: it does.
    """
    if n.heads[1] in _reached(n, n.params):
        raise BatchError(
            "Mean.weight depends on params: it has to be computed from the batch alone (a count of tokens or rows), "
            "since gradients are divided by it once, after all sums"
        )


def check_additive(
    loss_fn: Callable,
    has_aux: bool,
    params: Any,
    batch: Any,
    parts: Iterable[torch.Tensor],
    mode: FakeTensorMode,
) -> None:
    """The weights of the parts add up to the weight of the whole batch.

    Args:
        params: the full tree, of fakes of ``mode``; what depends on it is computed as shapes only.
        batch: the whole batch, with its data.
        parts: the weight of every part.

    Raises:
        BatchError: they do not.
    """
    token = step_._context.set(_Whole())  # type: ignore[arg-type]
    try:
        with torch.no_grad(), BatchIsReal(mode):
            weight = step_.read_loss(loss_fn(params, batch), has_aux)[1]
    finally:
        step_._context.reset(token)
    if isinstance(weight, FakeTensor):
        return  # depends on params in the whole batch only; the traced part said it does not
    weights = [w.double() for w in parts]
    whole, total = float(weight), float(sum(weights[1:], weights[0]))
    if abs(whole - total) > _WEIGHT_TOLERANCE * max(abs(whole), abs(total)):
        raise BatchError(
            f"Mean.weight of the whole batch is {whole:g}, but those of its {len(weights)} parts add up to {total:g}: the "
            "loss would change with the split. Return a weight that adds up, such as the number of tokens or rows in "
            "what the loss function sees"
        )


class _Whole:
    """The context of a loss that is looked at on a whole batch: boundaries are inert."""

    def stage_boundary(self, x: Any) -> Any:
        return x

    def value_and_grad(self, loss_fn: Callable, has_aux: bool, params: Any, batch: Any) -> Any:
        return step_._plain(loss_fn, has_aux, params, batch)

    def global_sum(self, leaves: Any, local: Callable) -> torch.Tensor:
        return local(tree.leaves(leaves))


def weight_of(n: Nodes, module: fx.GraphModule) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """A function from the tensors of a part of the batch to its weight."""
    need = _ancestors(n.heads[1])
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for x in n.batch:
        new[x] = graph.placeholder(x.name)
    for x in sorted(need - set(n.batch), key=n.place.__getitem__):
        new[x] = graph.node_copy(x, lambda a: new[a])
    graph.output(new[n.heads[1]])
    run = fx.GraphModule(module, graph)
    return lambda tensors: run(*tensors)


def _ancestors(x: fx.Node) -> set[fx.Node]:
    seen, stack = {x}, [x]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return seen


def _reached(n: Nodes, sources: Iterable[fx.Node]) -> set[fx.Node]:
    out = set(sources)
    for x, label in n.label.items():
        if label < n.segments and any(a in out for a in x.all_input_nodes):
            out.add(x)
    return out


def _summands(x: Any, scaled: bool) -> Iterable[tuple[Any, bool]]:
    """The additive summands of a 0-d node, and whether each was multiplied by something on the way."""
    if not isinstance(x, fx.Node) or x.op != "call_function" or not hasattr(x.target, "overloadpacket"):
        yield x, scaled
        return
    name = x.target.overloadpacket.__name__
    if name in ("add", "sub"):
        yield from (y for a in x.args[:2] for y in _summands(a, scaled))
    elif name in _THROUGH:
        yield from _summands(x.args[0], scaled)
    elif name in _SCALES:
        tensors = [a for a in x.args if isinstance(a, fx.Node)]
        if len(tensors) == 1:
            yield from _summands(tensors[0], True)
        else:
            yield x, True
    elif name == "sum" and _is_stack(x.args[0]):
        pieces: Any = x.args[0]
        yield from (y for a in pieces.args[0] for y in _summands(a, scaled))
    else:
        yield x, scaled


def _is_stack(x: Any) -> bool:
    ops = (aten.stack.default, aten.cat.default)
    return x.target in ops and all(a.meta["val"].numel() == 1 for a in x.args[0])


def _is_mean(x: fx.Node) -> bool:
    if x.target is aten.mean.default:
        return True
    name = getattr(getattr(x.target, "overloadpacket", None), "__name__", "")
    if x.target is operator.getitem:
        return _is_mean(x.args[0])  # type: ignore[arg-type]
    reductions = {
        "nll_loss_forward": 3,
        "nll_loss2d_forward": 3,
        "mse_loss": 2,
        "huber_loss": 2,
        "smooth_l1_loss": 2,
    }
    at = reductions.get(name)
    return at is not None and (x.args[at] if len(x.args) > at else 1) == 1


def _describe(x: Any) -> str:
    if not isinstance(x, fx.Node):
        return f"the constant {x}"
    return f"{x.name}, made by {getattr(x.target, 'overloadpacket', x.target)}"
