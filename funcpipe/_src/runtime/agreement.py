"""Agreement: ranks compare what they are about to run before they run it.

Every comparison is an exchange of one number. Only where numbers differ do ranks exchange texts, so
that each of them can say what differs.

In: what this rank is about to run, on which leaves, under which plan. Out: nothing, or a
MismatchError on every rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from funcpipe._src.comm import Communicator
from funcpipe._src.core.checksum import text_sum
from funcpipe._src.planning.batch_split import signature
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.plan_text import values
from funcpipe._src.planning.planner import Planner
from funcpipe._src.planning.variants import Variants
from funcpipe._src.runtime.mismatch_text import described, difference, majority, other_plan
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.replica_watch import Watch
from funcpipe.errors import FuncpipeError, MismatchError, StateError

_REFUSED = -1  # in place of a digest: this rank cannot use its state
# Bits below a digest: whether its rank has news, and what it wants to be compared (`Watch.due`).
_FLAGS = 4
_ALL_FLAGS = (1 << _FLAGS) - 1


def _nothing() -> None:
    """There is no state to read, or nothing to do meanwhile."""


class AgreedError(Exception):
    """An error that all ranks know of: no rank waits, and the next call may do better."""

    def __init__(self, error: FuncpipeError) -> None:
        self.error = error


@dataclass
class Agreement:
    """What this rank compares with the others before it runs.

    Args:
        comm: its communicator.
        watch: what is due to be compared is exchanged beside the digests.
        local: whether ranks bring rows of their own.
    """

    comm: Communicator
    watch: Watch
    local: bool
    _digests: dict[tuple, int] = field(default_factory=dict)

    def agree(
        self,
        trees: dict[str, Any],
        what: str,
        read: Callable[[], Any] = _nothing,
        meanwhile: Callable[[], object] = _nothing,
        news: bool = False,
    ) -> tuple[Any, bool]:
        """Check that all ranks are about to run the same, with states that they may use.

        Args:
            trees: what it runs on; shapes are compared.
            what: what it runs.
            read: gives this rank's state.
            meanwhile: runs while ranks exchange digests.
            news: whether this rank has to compare its plan.

        Returns:
            what ``read`` gave, and whether any rank has news.

        Raises:
            MismatchError, on every rank: they are not.
            StateError: this rank's state was given to an earlier step; the others get a
                MismatchError that says so.
        """
        try:
            state = read()
        except StateError as error:
            self.comm.exchange_digest(_REFUSED)
            self.comm.exchange(str(error))
            raise AgreedError(error) from None
        digest = self._digest(trees, what) << _FLAGS
        flags = self.watch.due << 1 | news
        arrived = self.comm.exchange_digest(digest | flags, meanwhile)
        if _REFUSED in arrived:
            self._refuse_state_of(arrived.index(_REFUSED))
        digests = {number >> _FLAGS for number in arrived}
        if len(digests) > 1:
            found = self.comm.exchange((what, described(trees)))
            raise MismatchError(difference(found, self.local))
        asked = functools.reduce(operator.or_, arrived) & _ALL_FLAGS
        self.watch.due = asked >> 1
        return state, bool(asked & 1)

    def _refuse_state_of(self, rank: int) -> None:
        texts = self.comm.exchange(None)
        raise MismatchError(f"rank {rank} cannot use the state that it was given: {texts[rank]}")

    def _digest(self, trees: dict[str, Any], what: str) -> int:
        signatures = tuple(map(signature, trees.values()))
        key = what, tuple(trees), signatures
        if key not in self._digests:
            text = repr(described(trees)) + what
            self._digests[key] = text_sum(text)
        return self._digests[key]

    def compare_plans(self, plan: Plan) -> None:
        """Check that all ranks have the same plan.

        Raises:
            MismatchError, on every rank: they have not.
        """
        digests = self.comm.exchange_digest(plan.digest())
        if len(set(digests)) == 1:
            return
        most, odd = majority(digests)
        first_odd = odd[0]
        shows = self.comm.rank in (most, first_odd)
        lines = values(plan) | plan.sections
        found = self.comm.exchange(lines if shows else None)
        raise MismatchError(other_plan(found[most], found[first_odd], most, first_odd))

    def rehearse(self, planner: Planner) -> bool:
        """Whether the step does what was planned on every rank: each rehearses as itself.

        Raises:
            AgreedError, on every rank: the step is refused on one of them, by its error.
        """
        placement = planner.placement
        if planner.rehearsal is None or placement is None:
            return True
        pipeline_rank = placement.pipeline_rank(self.comm.rank)
        problem: FuncpipeError | None = None
        as_planned = False
        try:
            as_planned = planner.rehearse([pipeline_rank])
        except FuncpipeError as error:
            problem = error
        found = self.comm.exchange((pipeline_rank, as_planned, problem))
        for _, _, problem in sorted(found, key=operator.itemgetter(0)):
            if problem is not None:
                raise AgreedError(problem)
        return all(on_rank for _, on_rank, _ in found)

    def number_values(self, variants: Variants, exchange: bool) -> None:
        """Note what was read from Python when ranks compared their plans.

        Args:
            exchange: whether ranks exchange the number of what they read, for captured steps.
        """
        mine = variants.agree(exchange)
        if exchange:
            numbers = self.comm.exchange(mine)
            variants.version = tuple(numbers)

    def by_pipeline_rank(self, rank: Rank, mine: Any) -> dict[int, list[Any]]:
        """What all ranks have of something, by pipeline rank."""
        found: dict[int, list[Any]] = {}
        all_ranks = self.comm.exchange((rank.pipeline_rank, mine))
        for pipeline_rank, theirs in all_ranks:
            found.setdefault(pipeline_rank, []).append(theirs)
        return found
