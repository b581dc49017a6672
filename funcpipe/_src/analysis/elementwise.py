"""Outside ``value_and_grad`` a step may touch leaves only elementwise.

A rank holds some leaves of the params, or flat parts of them. It could not repeat an op that mixes
the elements of a leaf, or two leaves.

In: every op of a step that runs on tagged fakes. Out: nothing, or a StateError with the user's
line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from funcpipe._src.analysis.call_results import Origin, hand_on, origin
from funcpipe._src.core.source_lines import user_line
from funcpipe._src.graph.fake_tensors import BatchIsReal
from funcpipe.errors import StateError

if TYPE_CHECKING:
    from funcpipe._src.analysis.state import AnalysisContext

_COPIES = ("clone", "detach", "alias", "_to_copy", "copy", "copy_", "contiguous", "lift_fresh")
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_empty_strided")
_ELEMENTWISE = frozenset([*_COPIES, *_LIKE])
_FILLS = frozenset(["zeros", "ones", "full", "empty", "empty_strided"])
_FOREACH_REDUCTIONS = frozenset(["_foreach_norm", "_foreach_max"])
_OF_EACH = dict.fromkeys(
    ["norm", "linalg_vector_norm", "_foreach_norm", "sum"],
    ", fp.clip_by_global_norm in place of an optimizer's own clipping, "
    "fp.optim.statistics(tree).norm for the norm of each leaf",
) | dict.fromkeys(
    ["max", "amax", "_foreach_max", "aminmax"],
    ", fp.optim.statistics(tree).max_abs for the largest value of each leaf",
)


class ElementwiseOnly(BatchIsReal):
    """Refuses ops on tagged leaves that a rank, which holds a part of the leaves, could not
    repeat."""

    def __init__(self, context: AnalysisContext) -> None:
        super().__init__(context.tags.mode)
        self.tags, self.row_ranks, self.expressions = (
            context.tags,
            context.row_ranks,
            context.expressions,
        )
        self.outside = context.outside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, types, args, kwargs or {})
        self.expressions.record(func, args, kwargs or {}, out)
        if self.outside is not None:
            self.outside.note(func, args, kwargs or {}, out)
        return out

    def _run(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tagged = self._params(pytree.tree_leaves((args, kwargs)))
        sized = [] if tagged else self.tags.sizes(args)
        if sized and name in _FILLS:
            with self.mode:
                return func(*args, **kwargs)
        if (tagged or sized) and func.namespace != "prim":
            self._check(func, name, [*tagged, *sized], (*args, *kwargs.values()))
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        except RuntimeError as error:
            if self.row_ranks > 1 and {Origin.ROWS, Origin.BATCH} <= self._origins((args, kwargs)):
                raise StateError(
                    f"{func.overloadpacket}{user_line() or ''} combines fp.Rows of a "
                    "value_and_grad, which have the rows of all ranks, with a tensor of the "
                    "batch, which has this rank's alone (batch='local'): pass both through the "
                    "batch of a second value_and_grad and combine them there, or use "
                    "batch='global'"
                ) from error
            raise
        if not tagged:
            hand_on(pytree.tree_leaves((args, kwargs)), out)
        return out

    def _params(self, values: Any) -> list[int]:
        """The params that tensors belong to."""
        params = map(self.tags.of, values)
        return [param for param in params if param is not None]

    @staticmethod
    def _origins(args: Any) -> set[Origin]:
        tensors = filter(torch.is_tensor, pytree.tree_leaves(args))
        return set(map(origin, tensors))

    def _check(self, func: Any, name: str, tagged: list[int], args: tuple) -> None:
        who, what = self.tags.name(tagged[0]), str(func.overloadpacket)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise StateError(
                f"the step draws random values ({what}) for {who} outside value_and_grad: ranks "
                "that hold copies or parts of it would draw different ones. Draw them before the "
                "step and pass them through the state or batch"
            )
        listed = (
            name.startswith(("_foreach_", "_fused_"))
            and name.rstrip("_") not in _FOREACH_REDUCTIONS
        )
        if not (listed or torch.Tag.pointwise in func.tags or name in _ELEMENTWISE):
            raise StateError(
                f"the step applies {what} to {who} (or its gradient or state) outside "
                f"value_and_grad{user_line() or ''}: that is not elementwise, and a rank holds "
                "only part of the leaves. Use fp.global_norm or fp.global_sum for a "
                f"reduction{_OF_EACH.get(name, '')}, or move it into the loss function"
            )
        lists = [value for value in args if isinstance(value, list | tuple)]
        for together in zip(*lists, strict=False) if listed else [pytree.tree_leaves(args)]:
            mixed = sorted(set(self._params(together)))
            if len(mixed) > 1:
                first, second = map(self.tags.name, mixed[:2])
                raise StateError(
                    f"the step mixes {first} and {second} in {what}: a rank may hold only one of "
                    "them"
                )
        for value in [] if listed else pytree.tree_leaves(args):
            self._check_shape(what, value, tagged[0])

    def _check_shape(self, what: str, value: Any, param: int) -> None:
        """Refuse a tensor that would be broadcast with a leaf: it does not fit a flat shard, or
        would reshape it."""
        if not isinstance(value, torch.Tensor) or self.tags.of(value) is not None:
            return
        if value.numel() != 1 or value.dim() > self.tags.leaves[param].dim():
            raise StateError(
                f"the step combines {self.tags.name(param)} (or its gradient or state) with a "
                f"tensor of shape {tuple(value.shape)} in {what} outside value_and_grad: a rank "
                "may hold a flat part of the leaf. Keep to numbers and 0-d tensors here, or do it "
                "in the loss function"
            )
