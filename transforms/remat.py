"""`remat`: the backward pass computes values again that the forward pass would have saved for it;
less memory, more FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.spec.requests import Remat
from funcpipe._src.spec.transform_spec import TransformSpec, with_spec
from funcpipe.errors import StackError


@dataclass(frozen=True)
class RematSpec(TransformSpec):
    """What `remat` asks for."""

    name: str = "remat"
    choice: Remat = field(kw_only=True)

    def remat(self) -> Remat:
        return self.choice

    def __str__(self) -> str:
        return str(self.choice)


_POLICIES = ("block", "products")


def remat(
    step: Callable | None = None,
    *,
    policy: str | None = None,
    budget: float | None = None,
    save: Iterable[str] | None = None,
    recompute: Iterable[str] | None = None,
    segments: Iterable[int] | Callable[[int], bool] | None = None,
) -> Any:
    """Save less of every segment (what lies between two stage boundaries) for its backward pass,
    and compute it again there.

    What enters a segment is always at hand, and collectives are never repeated. Give one of the
    first four; without any, the policy is "block". Under a pipeline a value lives from the F of its
    microbatch to its B: there it saves the most. Where a schedule has I and W, what I computes
    again is held until W has read it.

    Args:
        step: the step; without it, a transform to apply later.
        policy: "block": nothing is saved but what enters the segment; "products": of what is made
            in it, the results of matrix products, convolutions and attention (and of custom ops,
            whose cost is not known).
        budget: from 0 to 1: of the bytes that a segment saves without remat it saves at most this
            part, with the least work computed again: views and elementwise ops first. Where less is
            not possible, the plan says so.
        save: names; nothing is saved but what enters the segment and the values that
            `checkpoint_name` gave such a name.
        recompute: names; everything is saved that is needed but the values that `checkpoint_name`
            gave such a name.
        segments: which segments: their numbers, counted from 0, or a function from a number to
            whether it is one. All by default. Several `remat` on one step each take segments of
            their own.

    Returns:
        A step with the same interface and the same numbers, to the bit. Untransformed, it saves
        what autograd saves.

    Raises:
        StackError: an option that is none, or several that exclude each other; once a plan is made,
            a name that no value has, a segment that there is not, or one that two `remat` choose
            for.

    ``plan.remat_curve()`` shows what budgets cost. ``torch.utils.checkpoint`` inside a segment
    works beside it.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (blocks); Korthikanti et al.
    2022, "Reducing Activation Recomputation in Large Transformer Models" (what is large and cheap);
    names: the policies of ``jax.checkpoint``.

    >>> remat(budget=0.5)(lambda state, batch: (state, {}))
    <step <lambda>
      remat(budget=0.5)>
    """
    options = {"policy": policy, "budget": budget, "save": save, "recompute": recompute}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise StackError(f"remat: {' and '.join(given)} exclude each other; give one of them")
    if policy is not None and policy not in _POLICIES:
        raise StackError(
            f"remat: policy={policy!r}; write 'block' or 'products', or give budget=, save= or "
            "recompute="
        )
    if budget is not None and not _is_part(budget):
        raise StackError(
            f"remat: budget={budget!r}; it is the part of the bytes that may be saved, from 0 to 1"
        )
    choice = Remat(
        policy=policy if given else "block",
        budget=budget,
        save=_names("save", save),
        recompute=_names("recompute", recompute),
        segments=segments if callable(segments) else _numbers(segments),
    )
    return with_spec(step, RematSpec(choice=choice))


def _is_part(budget: Any) -> bool:
    is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
    return is_number and 0 <= budget <= 1


def _names(option: str, names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    is_list = isinstance(names, Iterable) and not isinstance(names, str)
    found = tuple(names) if is_list else ()
    if not found or not all(isinstance(name, str) for name in found):
        raise StackError(
            f"remat: {option}={names!r}; write a list of names, such as {option}=['attention']"
        )
    return found


def _numbers(segments: Any) -> tuple[int, ...] | None:
    if segments is None:
        return None
    found = tuple(segments) if isinstance(segments, Iterable) else ()
    if not found or not all(map(_is_number_of_segment, found)):
        raise StackError(
            f"remat: segments={segments!r}; write a list of numbers, counted from 0, or a function "
            "such as lambda s: s < 4"
        )
    return found


def _is_number_of_segment(segment: Any) -> bool:
    return isinstance(segment, int) and not isinstance(segment, bool) and segment >= 0
