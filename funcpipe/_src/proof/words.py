"""Words: how errors name what is split, the positions of a sequence or the rows of a batch.

In: which of them is split. Out: nouns, and advice that fits them.
"""

from __future__ import annotations

from dataclasses import dataclass

from funcpipe._src.core.mesh import Axes

COUNTS = "return sums as Mean.total and Mean.weight, which are divided once, after all sums"


@dataclass(frozen=True)
class Words:
    """Nouns and advice for errors.

    Args:
        items, item: what is split.
        owner: who has a share of them.
        at_owner, at_owners, at_every: where that share is.
        own_items: the items of one owner.
        share: the same, as one thing.
        share_of: the same, of ``size`` items.
        length: the size of a share.
        keep_apart: instead of mixing items.
        sum_first: instead of computing with a sum over a share.
        no_mean: why means of shares do not add up, and what to write.
        no_constant: why what all owners have alike does not add up, and what to write.
        length_advice: instead of computing with the length of a share.
        number_advice: instead of a tensor that is made from the length of a share.
        take_share: instead of a tensor that is whole beside items.
        cut_advice: instead of as many entries as a share is long.
        choose_advice: instead of choosing items by number.
        join_advice: instead of putting something before or behind a share.
        pairs: products of all pairs of items.
        loop_advice: instead of a loop over items.
        place_advice: instead of the place of a rank.
    """

    items: str
    item: str
    owner: str
    at_owner: str
    at_owners: str
    at_every: str
    own_items: str
    share: str
    share_of: str
    length: str
    keep_apart: str
    sum_first: str
    no_mean: str
    no_constant: str
    length_advice: str
    number_advice: str
    take_share: str
    cut_advice: str
    choose_advice: str
    join_advice: str
    pairs: str
    loop_advice: str
    place_advice: str


POSITIONS = Words(
    items="positions",
    item="position",
    owner="rank",
    at_owner="on a rank",
    at_owners="on ranks",
    at_every="on every rank",
    own_items="one rank's positions",
    share="a rank's slice",
    share_of="a rank's slice of {size} positions",
    length="the length of a rank's slice",
    keep_apart=(
        "Only attention may mix positions: do it there, outside of the loss function on the whole "
        "sequence (and pass the result through batch), or for every position by itself"
    ),
    sum_first="fp.psum(x, axis) makes it the sum over all ranks",
    no_mean=f"no sum over ranks makes that what one device has. Write sums, and {COUNTS}",
    no_constant=(
        "the sum over ranks would hold what is the same on every rank once for each of them. "
        "Multiply that by the number of this rank's tokens, or add it to the gradients"
    ),
    length_advice=(
        "take the whole length from a Python value that the closure brings, or positions from "
        "fp.positions(x, dim)"
    ),
    number_advice="Take positions from fp.positions(x, dim)",
    take_share="take a rank's part of it by fp.positions(x, dim), or split it with the batch",
    cut_advice=(
        "which ones a rank needs depends on its place in the sequence. Index with "
        "fp.positions(x, dim)"
    ),
    choose_advice=(
        "Shift, pool or cut positions outside of the loss function (labels come shifted in the "
        "batch), or choose them by a mask made with fp.positions(x, dim)"
    ),
    join_advice="Add such tokens outside of the loss function, before the sequence is split",
    pairs=(
        "every position of a rank's slice with every other one of the slice, but none with "
        "another rank's"
    ),
    loop_advice=(
        "a loop over positions ends on a rank where its slice ends. Compute all positions at once"
    ),
    place_advice=(
        "what a rank makes of its place among the ranks that split the sequence cannot be proven "
        "to be what one device computes. fp.positions(x, dim) numbers positions; "
        "fp.psum(x, axis) sums over ranks"
    ),
)


def _ways_out(axes: Axes, microbatches: bool) -> str:
    axis = repr(axes[0] if len(axes) == 1 else axes)
    gather = f"gather them (fp.all_gather(x, {axis}), fp.psum(x, {axis})), "
    return (
        f"Rows of a batch that is split do not meet inside the loss: "
        f"{'' if microbatches else gather}compute what needs all rows in a first "
        "fp.value_and_grad and pass it through batch, or, if each microbatch of each shard may "
        "be a batch of its own, declare it: fp.batch_statistic(fn)(x)"
    )


def words_of_rows(axes: Axes, microbatches: bool) -> Words:
    """The words for the rows of a batch.

    Args:
        axes: of the mesh, those that split rows.
        microbatches: whether microbatches split rows too; no collective joins those.
    """
    ways_out = _ways_out(axes, microbatches)
    return Words(
        items="rows",
        item="row",
        owner="part",
        at_owner="in a part",
        at_owners="in parts",
        at_every="in every part",
        own_items="the rows of a part",
        share="the rows of a part",
        share_of="the rows of a part ({size} in all)",
        length="the number of rows in a part",
        keep_apart=ways_out,
        sum_first=ways_out,
        no_mean=(
            "means of parts do not add up to the mean of the batch. Return the sum as total "
            "(reduction='sum') and the number of rows or tokens as weight"
        ),
        no_constant=(
            "what does not depend on the batch would be counted once for every microbatch and "
            "shard. Multiply it by the weight (total + weight * l2), or add it to the gradients"
        ),
        length_advice="return sums, with the number of rows as Mean.weight",
        number_advice="Pass what numbers rows through batch",
        take_share="split it with the batch",
        cut_advice=(
            "which ones a part needs depends on its place in the batch. Pass them through batch"
        ),
        choose_advice=(
            "Choose rows outside of the loss function, or by a mask that comes in the batch"
        ),
        join_advice="Add such rows outside of the loss function",
        pairs="every row of a part with every other one of the part, but none with another part's",
        loop_advice=(
            "the proof knows only a loop in which every turn does the same with its row, and "
            "which sums or joins all rows. Compute all rows at once"
        ),
        place_advice=(
            "what it makes of the rows of other ranks cannot be proven to be what one device "
            "computes. fp.all_gather(x, axis) joins the rows of ranks, fp.psum(x, axis) sums over "
            "them"
        ),
    )
