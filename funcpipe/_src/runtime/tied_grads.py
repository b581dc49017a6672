"""Tied gradients: the sum of a param's partial gradients where several stages use it.

The running sum passes through the stages in the order in which autograd would add, so that its bits
do not depend on where the stages lie; then the last rank hands it to the other owners.

In: a planned ``value_and_grad``, a rank's partial gradients. Out: the sum on every rank that holds
the param.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from funcpipe._src.comm import Communicator
from funcpipe._src.graph.ids import ArgId, OfArg
from funcpipe._src.planning.lowered import PlannedCall
from funcpipe._src.planning.placement import StatePlacement

PartialGrad = Callable[[OfArg], torch.Tensor]


@dataclass(frozen=True)
class TiedGrads:
    """Adds partial gradients up on one rank.

    Args:
        planned: the call.
        placement: which pipeline rank holds which param.
        pipeline_rank: of this rank.
        ranks: the rank at every pipeline rank.
        channel: on which sums travel.
    """

    planned: PlannedCall
    placement: StatePlacement
    pipeline_rank: int
    ranks: Sequence[int]
    channel: str

    def sums(
        self,
        args: Sequence[ArgId],
        leaves: Sequence[torch.Tensor | None],
        partial_grad: PartialGrad,
        comm: Communicator,
    ) -> dict[ArgId, torch.Tensor]:
        """The sums of args; those that no unit makes a gradient of are missing.

        Args:
            args: that this rank holds.
            leaves: by arg, what it holds.
            partial_grad: the sum of a partial gradient over microbatches.
            comm: of this rank.
        """
        sums: dict[ArgId, torch.Tensor] = {}
        for arg in args:
            self._pass_on(arg, partial_grad, comm, sums)
        for arg in args:
            last = self._last(arg)
            if last is None or len(self._owners(arg)) < 2:
                continue
            if last != self.pipeline_rank:
                like = leaves[arg]
                assert like is not None
                sums[arg] = self._receive(like, last, comm)
                continue
            for owner in self._others(arg, last):
                # A copy: a message must not change, and the step may write to its own gradient.
                self._send(sums[arg].contiguous().clone(), owner, comm)
        return sums

    def moves(self) -> set[tuple[int, int]]:
        """Between which pipeline ranks sums travel."""
        found: set[tuple[int, int]] = set()
        for number in range(len(self.planned.call.params)):
            arg = ArgId(number)
            stops = [rank for rank, _ in self.planned.hops(arg)]
            found.update(pairwise(stops))
            if stops:
                found.update((stops[-1], owner) for owner in self._others(arg, stops[-1]))
        return found

    def _pass_on(
        self,
        arg: ArgId,
        partial_grad: PartialGrad,
        comm: Communicator,
        sums: dict[ArgId, torch.Tensor],
    ) -> None:
        """Take in the running sum, add this rank's partial gradients, send it on."""
        hops = self.planned.hops(arg)
        for number, (rank, partials) in enumerate(hops):
            if rank != self.pipeline_rank:
                continue
            terms = [partial_grad(OfArg(arg, nth)) for nth in partials]
            if number > 0:
                before, _ = hops[number - 1]
                terms.insert(0, self._receive(terms[0], before, comm))
            sums[arg] = _added(terms)
            if number + 1 < len(hops):
                behind, _ = hops[number + 1]
                self._send(sums[arg].contiguous(), behind, comm)

    def _owners(self, arg: ArgId) -> Sequence[int]:
        return self.placement.layouts[self.planned.call.params[arg]].owners

    def _others(self, arg: ArgId, last: int) -> list[int]:
        return [owner for owner in self._owners(arg) if owner != last]

    def _last(self, arg: ArgId) -> int | None:
        """The pipeline rank that has the whole sum first."""
        hops = self.planned.hops(arg)
        return hops[-1][0] if hops else None

    def _send(
        self,
        tensor: torch.Tensor,
        pipeline_rank: int,
        comm: Communicator,
    ) -> None:
        comm.send([tensor], self.ranks[pipeline_rank], self.channel)

    def _receive(
        self,
        like: torch.Tensor,
        pipeline_rank: int,
        comm: Communicator,
    ) -> torch.Tensor:
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return comm.recv([out], self.ranks[pipeline_rank], self.channel)[0]


def _added(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total, *others = terms
    for term in others:
        total = total + term
    return total
