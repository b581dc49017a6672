"""The check of what a loss function returned of a part of the batch: it has to add up over parts.

In: a run, and what the proof found of its tensors. Out: nothing, or a SequenceError.
"""

from __future__ import annotations

from torch import Tensor

from funcpipe._src.core.loss_types import Mean, Rows
from funcpipe._src.proof.loss_runs import ELSEWHERE, LossRun
from funcpipe._src.proof.placements import (
    Average,
    Number,
    Partial,
    Placement,
    Refused,
    Shard,
    as_partial,
    replicated,
)
from funcpipe._src.proof.propagate import Proof
from funcpipe._src.proof.recording import NAMED, RecordedOp, TensorRef
from funcpipe._src.proof.rules_row_reductions import Largest, Norm
from funcpipe.errors import SequenceError


class RowLossCheck:
    """Checks what the loss function returned of a part."""

    def __init__(self, run: LossRun, proof: Proof) -> None:
        self.run, self.proof, self.split = run, proof, proof.split

    def check(self) -> None:
        """Refuse a loss that does not add up over parts."""
        total, weight, _ = self.run.loss
        self._check_sum("Mean.total", total)
        if not self._is_share_of_sum(weight):
            self._check_sum("Mean.weight", weight)
        for path, summary in self.run.summaries():
            if isinstance(summary, Rows):
                self._check_rows(path, summary)
            elif isinstance(summary, Mean) and not self._is_mean_of_means(path, summary):
                self._check_sum(f"{path}.total", summary.total)
                self._check_sum(f"{path}.weight", summary.weight)

    def check_known(self) -> None:
        """Check the total alone, unless rows meet in it."""
        total = self.run.loss[0]
        placement = self.proof.placements.get(self.run.recording.ref(total).number, ELSEWHERE)
        if not isinstance(placement, Refused) or placement.summands:
            self._check_sum("Mean.total", total)

    def _placement(self, what: str, tensor: Tensor) -> Placement:
        return self.run.placement(what, tensor, self.proof.placements)

    def _is_share_of_sum(self, weight: Tensor) -> bool:
        """Whether a weight is ``psum(weight) / ranks``: every rank then has an equal share of the
        sum. The number of ranks is a Python number."""
        divided = self._maker(self.run.recording.ref(weight).number)
        if divided is None or divided.name != "div":
            return False
        operand = divided.args["self"]
        summed = self._maker(operand.number) if isinstance(operand, TensorRef) else None
        if summed is None or summed.name != NAMED:
            return False
        if not replicated(self._placement("Mean.weight", weight)):
            return False
        over_all = set(summed.args["axes"].split(",")) == set(self.split.live)
        is_sum = summed.args["kind"] == "psum"
        return over_all and is_sum and divided.args["other"] == summed.args["ranks"]

    def _maker(self, number: int) -> RecordedOp | None:
        """The last op that gave a tensor as a result."""
        for entry in reversed(self.run.recording.entries):
            if any(out.number == number for out in entry.outs):
                return entry
        return None

    def _is_mean_of_means(self, what: str, mean: Mean) -> bool:
        """Whether a mean is one of means, which parts of equal size may be given equal weight."""
        total = self._placement(f"{what}.total", mean.total)
        weight = self._placement(f"{what}.weight", mean.weight)
        return replicated(weight) and (replicated(total) or isinstance(total, Average))

    def _check_sum(self, what: str, tensor: Tensor) -> None:
        placement = as_partial(self.split, self._placement(what, tensor))
        if isinstance(placement, Partial) and set(placement.axes) == set(self.split.live):
            return
        made_by = self.proof.made_by.get(self.run.recording.ref(tensor).number, "")
        by = f" (made by {made_by})" if made_by else ""
        if isinstance(placement, Average):
            raise SequenceError(
                f"{what} is {self.split.text(placement)}{by}: {self.split.words.no_mean}"
            )
        if isinstance(placement, Partial) and placement.axes:
            raise SequenceError(
                f"{what} is summed over {', '.join(placement.axes)} alone{by}: other parts have it "
                "once more"
            )
        if isinstance(placement, Number) and not placement.constant:
            raise SequenceError(
                f"{what} is {placement}{by}, made from the number of rows: over parts that does "
                "not add up. Return the number of rows or tokens, such as "
                "torch.tensor(float(len(x)))"
            )
        if isinstance(placement, Largest | Norm):
            raise SequenceError(
                f"{what} is {placement}{by}, no sum over them: those of the parts do not add up to "
                "that of the batch. Compute it for every row and sum over rows"
            )
        of_rows = isinstance(placement, Shard)
        fault = (
            "is an entry for every row" if of_rows else "does not depend on the rows of the batch"
        )
        raise SequenceError(
            f"{what} {fault}{by}: it would be counted once for every microbatch and shard. "
            "Multiply it by the weight (total + weight * l2), or add it to the gradients"
        )

    def _check_rows(self, what: str, rows: Rows) -> None:
        placement, dim = self._placement(what, rows.x), rows.dim % rows.x.dim()
        if isinstance(placement, Shard):
            along_rows = (placement.dim, placement.outer) == (dim, 1)
            if along_rows and set(placement.layout.axes) == set(self.split.live):
                return
        raise SequenceError(
            f"{what}, fp.Rows along dim {dim}, is {self.split.text(placement)}: it takes a tensor "
            "with the rows of the part along that dim, which are put one after another. A value of "
            "the whole batch is an fp.Mean"
        )
