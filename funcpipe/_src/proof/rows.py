"""The proof that the rows of a batch that is split do not meet inside a loss: what its parts
compute adds up to what one device does.

A *part* of the batch is a microbatch of a shard: data axes and microbatches split rows, and
microbatches are one axis more, which no collective can name. The proof is that of sequences
(`verify.py`), along another dim, and on whole sequences: the loss function is run with the rows of
a part and with those of the whole batch. Here is which dims are split, what may mix rows (nothing
but a declared batch statistic, `functional/batch_statistic.py`), and what an error advises.

Where a leaf is split along two dims, by two transforms, each of them is proven by itself, on what
the one before it leaves.

In: a loss function; fakes of params and of one part. Out: nothing, or a BatchError that names the
op, its line, the reason and what to write instead.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import Mean, Rows, is_summary
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import line_of
from funcpipe._src.functional.leaf_cut import LeafCut
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.trace_errors import explain
from funcpipe._src.proof.align import Walk, text
from funcpipe._src.proof.loss_runs import Run, Subject
from funcpipe._src.proof.op_context import MIXES
from funcpipe._src.proof.op_recorder import NAMED, Ref
from funcpipe._src.proof.placements import (
    COUNTS,
    PSUM,
    Average,
    Number,
    Partial,
    Refused,
    Replicate,
    Shard,
    State,
    World,
    as_partial,
    plain,
)
from funcpipe._src.proof.propagate import Proof
from funcpipe._src.proof.row_numbers import Largest, Norm
from funcpipe._src.proof.rules_pointwise import LENGTH
from funcpipe.errors import BatchError, FuncpipeError, SequenceError

MICROBATCHES = (
    "microbatches of a rank"  # no axis of a mesh has such a name; a cut without axes is over it
)
Leaves = list[Any]
Cuts = Sequence[
    Sequence[LeafCut]
]  # of every leaf, along which dims and into how many pieces its rows are split


@dataclass(frozen=True)
class Share:
    """How the rows of some leaves are split.

    Args:
        size: the number of rows of the whole batch; of leaves that have several entries for a row,
            of groups of entries.
        axes: over which, major first.
    """

    size: int
    axes: Axes

    def __str__(self) -> str:
        return "the rows of a part"


def prove_rows(
    subject: Subject, local: Leaves, cuts: Cuts, mesh: Mesh, ready: bool = False, dealt: Axes = ()
) -> bool:
    """Prove that the parts of a batch compute what one device does.

    Args:
        subject: the loss function.
        local: the leaves of one part, with whole sequences: fakes, or no tensors.
        cuts: of every leaf, in the order in which they are made.
        mesh: the mesh, with one rank on the axes of sequences.
        ready: whether microbatches came as such: rows of one may meet, but its total may not be a
            mean.
        dealt: the axes over which these are dealt, each to one rank: a collective would join two of
            them.

    Returns:
        whether there are no numbers of 16 bits, of which sums are not exact.

    Raises:
        BatchError: it cannot be proven.
        FuncpipeError: the loss function is wrong on one device, too.
    """
    if ready:
        _check_ready(subject, local, cuts, mesh, dealt)
        cuts = [[c for c in cs if c.axes] for cs in cuts]
    groups = _groups(cuts)
    exact = bool(groups)
    for k, group in enumerate(groups):
        later = [a for g in groups[k + 1 :] for a in g]
        with _speaking(mesh, group):
            proven = _Proven(subject, local, cuts, mesh, group, later)
            proven.check()
        exact = exact and not any(
            o.dtype.itemsize == 2 for e in proven.on_part.tape.entries for o in e.outs
        )
    return exact


def _check_ready(subject: Subject, local: Leaves, cuts: Cuts, mesh: Mesh, dealt: Axes) -> None:
    """The total of a ready microbatch is a sum over its rows, as far as that is known; there is no
    whole batch."""
    twice = [[replace(c, pieces=2) for c in cs if not c.axes] for cs in cuts]
    for group in _groups(twice):
        with _speaking(mesh, group):
            proven = _Proven(subject, local, twice, mesh, group, ())
            _refuse_joining(proven.on_part, dealt)
            proven.check_known()


def _refuse_joining(part: Run, dealt: Axes) -> None:
    """Refuse a collective over axes that deal whole microbatches: on one device each is alone."""
    for entry in part.tape.entries:
        if entry.name != NAMED or entry.args["free"]:
            continue
        if frozenset(entry.args["axes"].split(",")) & frozenset(dealt):
            raise BatchError(
                f"fp.{entry.args['kind']} over {entry.args['axes']!r}{text(entry.line)}: ready "
                "microbatches whose rows do not divide are dealt to ranks, whole, so it would "
                "join two microbatches, where one device has each alone. Give every microbatch "
                "rows that divide over the axis, or leave the collective out"
            )


@contextlib.contextmanager
def _speaking(mesh: Mesh, group: Axes) -> Iterator[None]:
    """Errors are about rows."""
    try:
        yield
    except SequenceError as error:
        words = Words(mesh.ordered(a for a in group if a in mesh.axes), MICROBATCHES in group)
        raise BatchError(words.say(str(error))) from error


def _over(cut: LeafCut) -> Axes:
    return cut.axes or (MICROBATCHES,)


def _groups(cuts: Cuts) -> list[Axes]:
    """The axes of every proof: of all cuts together, if no leaf is cut along two dims."""
    over = list(dict.fromkeys(_over(c) for cs in cuts for c in cs if c.pieces > 1))
    if all(len({c.dim for c in cs if c.pieces > 1}) < 2 for cs in cuts):
        over = [tuple(a for axes in over for a in axes)] if over else []
    return over


class _Proven:
    """One proof.

    Args:
        group: the axes that it is about.
        later: those that split what it leaves.
    """

    def __init__(
        self,
        subject: Subject,
        local: Leaves,
        cuts: Cuts,
        mesh: Mesh,
        group: Axes,
        later: Sequence[str],
    ) -> None:
        self.subject, self.mode = subject, subject.mode
        part = [self._grown(x, cs, later) for x, cs in zip(local, cuts, strict=True)]
        whole = [self._grown(x, cs, group) for x, cs in zip(part, cuts, strict=True)]
        own = [[c for c in cs if _over(c)[0] in group and c.pieces > 1] for cs in cuts]
        moving = [
            (x.shape[cs[0].dim], y.shape[cs[0].dim], tuple(a for c in cs for a in _over(c)))
            if cs
            else None
            for x, y, cs in zip(part, whole, own, strict=True)
        ]
        shares = _shares([m for m in moving if m is not None])
        self.states: list[State] = []
        for x, cs, m in zip(part, own, moving, strict=True):
            if isinstance(x, torch.Tensor):
                self.states.append(Shard(cs[0].dim, shares[m[2]][0], 1, m[0]) if m else Replicate())
        alone = {a: 1 if a in later else n for a, n in mesh.axes.items()}
        self.on_part = Run(subject, part, Mesh(**alone), Mesh(**alone))
        named = any(x.name == NAMED for x in self.on_part.tape.entries)
        by_hand = _by_hand(part, own) if named and MICROBATCHES not in group else frozenset()
        self.world = World({s: lengths for s, lengths in shares.values()}, group, True, by_hand)
        self.on_one = Run(
            subject,
            whole,
            Mesh(**{a: 1 if a in group else n for a, n in alone.items()}),
            Mesh(**alone),
        )

    def _grown(self, x: Any, cuts: Sequence[LeafCut], axes: Sequence[str]) -> Any:
        """A leaf before it was split over some axes."""
        if not isinstance(x, torch.Tensor):
            return x
        shape = list(x.shape)
        for c in cuts:
            shape[c.dim] *= c.pieces if _over(c)[0] in axes else 1
        return x if shape == list(x.shape) else fake(shape, x, self.mode)

    def check(self) -> None:
        """Raise an error unless it is proven."""
        _raise(self.on_part, self.on_one, self.subject)
        _Judge(self.on_part, self._proof(), self.world).judge()

    def check_known(self) -> None:
        """Raise an error if what is known does not add up."""
        if self.on_part.error or self.on_one.error:
            return
        try:
            proof = self._proof()
        except SequenceError:
            return
        _Judge(self.on_part, proof, self.world).judge_known()

    def _proof(self) -> Proof:
        live = frozenset(self.world.live) - {MICROBATCHES}
        proof = Proof(
            Walk(self.on_part.tape, self.on_one.tape, live, True), self.world, lambda *_: None
        )
        proof.run([*([Replicate()] * (self.on_part.count - len(self.states))), *self.states])
        return proof


def _by_hand(part: Leaves, cuts: Cuts) -> frozenset[float]:
    """How many entries of rows all ranks have; no number that a rank may have, too."""
    own: dict[int, int] = {}
    for x, cs in zip(part, cuts, strict=True):
        for c in cs:
            ranks = math.prod(c.pieces for c in cs)
            own |= {math.prod(x.shape[c.dim : d]): ranks for d in range(c.dim + 1, x.dim() + 1)}
    return frozenset(n * ranks for n, ranks in own.items()) - own.keys()


def _shares(moving: Sequence[tuple[int, int, Axes]]) -> dict[Axes, tuple[Share, tuple[int, int]]]:
    """For all axes over which leaves are split, how; all rows of a part are taken together, so that
    groups of them may be."""
    out: dict[Axes, tuple[Share, tuple[int, int]]] = {}
    for axes in dict.fromkeys(m[2] for m in moving):
        sizes = [(a, b) for a, b, over in moving if over == axes]
        out[axes] = Share(math.gcd(*(b for _, b in sizes)), axes), (1, sizes[0][1] // sizes[0][0])
    return out


def _raise(part: Run, one: Run, subject: Subject) -> None:
    """Raise what the runs raised."""
    for run in (part, one):
        error = run.error
        if error is None:
            continue
        explained = explain(error, subject.loss_fn)
        if isinstance(explained, FuncpipeError):
            raise explained from error
        rows = "the rows of a part" if run is part else "all rows"
        raise SequenceError(
            f"the loss function fails with {rows} of the batch{line_of(error) or ''}: "
            f"{type(error).__name__}: {error}. It has to work for every number of rows"
        ) from error


# ---- what the loss function returned


_ELSEWHERE = Refused("It is a tensor that came from elsewhere")


class _Judge:
    """Judges what the loss function returned of a part."""

    def __init__(self, part: Run, proof: Proof, world: World) -> None:
        self.part, self.proof, self.world = part, proof, world

    def judge(self) -> None:
        """Refuse a loss that does not add up over parts."""
        total, weight, aux = self.part.loss
        self._add_up("Mean.total", total)
        if not self._shared(weight):
            self._add_up("Mean.weight", weight)
        nodes: list[Any] = []
        names = tree.paths(tree.map(lambda x: nodes.append(x) or 0, aux, is_leaf=is_summary))  # type: ignore[func-returns-value]
        for path, x in zip(names, nodes, strict=True):
            if isinstance(x, Mean) and not self._constant(f"aux{path}", x):
                self._add_up(f"aux{path}.total", x.total)
                self._add_up(f"aux{path}.weight", x.weight)
            elif isinstance(x, Rows):
                self._rows(f"aux{path}", x)

    def _shared(self, weight: torch.Tensor) -> bool:
        """Whether a weight is the sum over all ranks, over how many they are, written as a
        number."""
        made = {o.number: e for e in self.part.tape.entries for o in e.outs}
        last = made.get(self.part.tape.ref(weight).number)
        x = last.args["self"] if last is not None and last.name == "div" else None
        summed = made.get(x.number) if isinstance(x, Ref) else None
        if (
            last is None
            or summed is None
            or summed.name != NAMED
            or not plain(self._state("Mean.weight", weight))
        ):
            return False
        whole = (
            set(summed.args["axes"].split(",")) == set(self.world.live)
            and summed.args["kind"] == "psum"
        )
        return whole and last.args["other"] == summed.args["ranks"]

    def judge_known(self) -> None:
        """The same of the total alone, unless rows meet in it."""
        total = self.part.loss[0]
        state = self.proof.states.get(self.part.tape.ref(total).number, _ELSEWHERE)
        if not isinstance(state, Refused) or state.summands:
            self._add_up("Mean.total", total)

    def _state(self, what: str, x: torch.Tensor) -> State:
        state = self.proof.states.get(self.part.tape.ref(x).number, _ELSEWHERE)
        if isinstance(state, Refused):
            raise SequenceError(f"{what} is not what one device computes. {state.text}")
        return state

    def _constant(self, what: str, x: Mean) -> bool:
        """Whether a mean is one of means, which parts of equal size may be given equal weight."""
        total, weight = (
            self._state(f"{what}.total", x.total),
            self._state(f"{what}.weight", x.weight),
        )
        return plain(weight) and (plain(total) or isinstance(total, Average))

    def _add_up(self, what: str, x: torch.Tensor) -> None:
        state = as_partial(self.world, self._state(what, x))
        if isinstance(state, Partial) and set(state.axes) == set(self.world.live):
            return
        made = self.proof.made.get(self.part.tape.ref(x).number, "")
        by = f" (made by {made})" if made else ""
        if isinstance(state, Average):
            raise SequenceError(
                f"{what} is a mean over the rows of a part{by}: means of parts do not add up to "
                "the mean of the batch. Return the sum as total (reduction='sum') and the number "
                "of rows or tokens as weight"
            )
        if isinstance(state, Partial) and state.axes:
            raise SequenceError(
                f"{what} is summed over {', '.join(state.axes)} alone{by}: other parts have it "
                "once more"
            )
        if isinstance(state, Number) and not state.constant:
            raise SequenceError(
                f"{what} is {state}{by}, made from the number of rows: over parts that does not "
                "add up. Return the number of rows or tokens, such as torch.tensor(float(len(x)))"
            )
        if isinstance(state, Largest | Norm):
            raise SequenceError(
                f"{what} is {state}{by}, no sum over them: those of the parts do not add up to "
                "that of the batch. Compute it for every row and sum over rows"
            )
        what_it_is = (
            "is an entry for every row"
            if isinstance(state, Shard)
            else "does not depend on the rows of the batch"
        )
        raise SequenceError(
            f"{what} {what_it_is}{by}: it would be counted once for every microbatch and shard. "
            "Multiply it by the weight (total + weight * l2), or add it to the gradients"
        )

    def _rows(self, what: str, x: Rows) -> None:
        state, dim = self._state(what, x.x), x.dim % x.x.dim()
        if (
            isinstance(state, Shard)
            and (state.dim, state.outer) == (dim, 1)
            and set(state.part.axes) == set(self.world.live)
        ):
            return
        raise SequenceError(
            f"{what}, fp.Rows along dim {dim}, is {state}: it takes a tensor with the rows of the "
            "part along that dim, which are put one after another. A value of the whole batch is "
            "an fp.Mean"
        )


# ---- words


@dataclass(frozen=True)
class Words:
    """The reasons of rules, which speak of positions, in words of rows.

    Args:
        axes: of the mesh that split rows.
        microbatches: whether microbatches do.
    """

    axes: Axes
    microbatches: bool

    def say(self, text: str) -> str:
        """A text about positions as one about rows; quoted code stays as it is."""
        return "".join(
            t if t.startswith("`") else self._said(t) for t in re.split("(`[^`]*`)", text)
        )

    def _said(self, text: str) -> str:
        for old, new in self._phrases().items():
            text = re.sub(rf"(?<!\w){re.escape(old)}(?![\w]|\.py| at \S+\.py:)", new, text)
        return text

    def _phrases(self) -> Mapping[str, str]:
        return {MIXES: self._ways(), PSUM: self._ways()} | _PHRASES

    def _ways(self) -> str:
        gather = (
            ""
            if self.microbatches
            else f"gather them (fp.all_gather(x, {self._axis()}), fp.psum(x, {self._axis()})), "
        )
        return (
            f"Rows of a batch that is split do not meet inside the loss: {gather}compute what "
            "needs all rows in a first fp.value_and_grad and pass it through batch, or, if each "
            "microbatch of each shard may be a batch of its own, declare it: "
            "fp.batch_statistic(fn)(x)"
        )

    def _axis(self) -> str:
        return repr(self.axes[0] if len(self.axes) == 1 else self.axes)


_PHRASES = {
    f"no sum over ranks makes that what one device has. Write sums, and {COUNTS}": "means of parts "
    "do not add up to the mean of the batch. Return the sum as total (reduction='sum') and the "
    "number of rows or tokens as weight",
    "the sum over ranks would hold what is the same on every rank once for each of them. Multiply "
    "that by the number of this rank's tokens, or add it to the "
    "gradients": "what does not depend on the batch would be counted once for every microbatch and "
    "shard. Multiply it by the weight (total + weight * l2), or add it to the gradients",
    f". {LENGTH}": ". It is made from the number of rows of a part",
    LENGTH: "it is made from the number of rows of a part",
    "which is made from the length of a rank's slice: take the whole length from a Python value "
    "that the closure brings, or positions from fp.positions(x, "
    "dim)": "which is made from the number of rows of a part: return sums, with the number of rows "
    "as Mean.weight",
    "with fewer than two, torch itself takes other ways": "with fewer than two, torch itself takes "
    "other ways",
    "where a rank, which has its slice of the sequence, does": "where a part of the batch does",
    "takes another way for another length": "takes another way for another number of rows",
    "a loop over positions ends on a rank where its slice ends. Compute all positions at once": "only a loop in which every turn does the "
    "same with its row, and of which all rows are summed, or joined, is known. Compute all rows "
    "at once",
    "ranks may hold unequal numbers of positions, so the mean of what they have is not what one "
    "device has": "its operand is no mean",
    "every position of a rank's slice with every other one of the slice": "every row of a part "
    "with every other one of the part",
    "with another rank's": "with another part's",
    "every pair of a rank's own positions": "every pair of a part's own rows",
    "the length of a slice": "the number of rows of a part",
    "take a rank's part of it by fp.positions(x, dim), or split it with the batch": "split it with "
    "the batch",
    "as many as a slice is long: which ones a rank needs depends on its place. Index with "
    "fp.positions(x, dim)": "as many as a part has rows: which ones it needs depends on its place "
    "in the batch. Pass them through batch",
    "Shift, pool or cut positions outside of the loss function (labels come shifted in the batch), "
    "or choose them by a mask made with fp.positions(x, "
    "dim)": "Choose rows outside of the loss function, or by a mask that comes in the batch",
    "every rank would have it, and one device has it once. Add such tokens outside of the loss "
    "function, before the sequence is "
    "split": "every part would have it, and one device has it once. Add such rows outside of the "
    "loss function",
    "or of different sequences": "or of different batches",
    "what that does to a slice's gradient": "what that does to the gradient of a part",
    "what a rank makes of its place among the ranks that split the sequence cannot be proven to be "
    "what one device computes. fp.positions(x, dim) numbers positions; fp.psum(x, axis) sums over "
    "ranks": "what it makes of the rows of other ranks cannot be proven to be what one device "
    "computes. fp.all_gather(x, axis) joins the rows of ranks, fp.psum(x, axis) sums over them",
    "one rank's positions": "the rows of a part",
    "a rank's positions": "the rows of a part",
    "a rank's slice of positions": "the rows of a part",
    "the length of a rank's slice": "the number of rows in a part",
    "a slice's length": "the number of rows in a part",
    "a slice of the sequence": "a part of the batch",
    "a rank's slice": "the rows of a part",
    "the same on every rank": "the same in every part",
    "every rank": "every part",
    "between ranks": "between parts",
    "on ranks": "in parts",
    "over ranks": "over parts",
    "on a rank": "in a part",
    "a rank": "a part",
    "for another length": "for another number of rows",
    "positions": "rows",
    "position": "row",
}
