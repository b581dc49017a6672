"""Pairs: two tapes of one loss function, walked side by side, as a rank runs it and as one device
does.

Terms. Tape A is a rank's, tape B one device's. A `OpCall` is one op of both. What only copies
(``clone``, which ``reshape`` and ``contiguous`` make where strides ask for it) or takes all (an
index that is cut to the length) may stand on one tape alone; so do collectives over the axes of the
sequence, which one device does not have. Everything else has to be the same, op by op: a loss
function takes no other way for another length.

In: two tapes. Out: calls in order, with what differs between them as `Differs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from funcpipe._src.core.source_lines import Line
from funcpipe._src.proof.loops import rolled
from funcpipe._src.proof.op_recorder import BEGIN, BUFFER, NAMED, STATISTIC, Entry, Ref, Tape
from funcpipe.errors import SequenceError

WAIT = "funcpipe::wait"
_SAME = {
    "_unsafe_view": "view",
    "reshape": "view",
    "_reshape_alias": "view",
    "alias": "detach",
    "lift_fresh": "detach",
}


@dataclass(frozen=True)
class Differs:
    """An argument that is ``a`` on a rank and ``b`` on one device."""

    a: Any
    b: Any


@dataclass(frozen=True, eq=False)
class Pair:
    """A tensor of both tapes: its numbers and shapes on A and B."""

    number: int
    other: int
    a: tuple[int, ...]
    b: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class OpCall:
    """One op of both tapes.

    Args:
        name: of its rule: that of the op, without the ``_`` of one that writes to its operand.
        func: the op itself; None for a known call, or a collective over the axes of the sequence.
        args: by name; tensors as `Pair`.
        outs: its results.
        where: the op and the line of the user's code, for messages.
    """

    name: str
    func: Any
    args: dict[str, Any]
    outs: tuple[Pair, ...]
    where: str


@dataclass
class Walk:
    """Two tapes, and how far they have been walked.

    Args:
        a, b: the tapes of a rank and of one device.
        axes: of what is split, those with more than one rank.
        rows: whether that is the rows of the batch.
        partner: for a tensor of A, that of B.
        origin: for a copy on tape B alone, what it is a copy of.
        copies: tensors of B that are copied on one tape alone.
    """

    a: Tape
    b: Tape
    axes: frozenset[str]
    rows: bool = False
    partner: dict[int, Ref] = field(default_factory=dict)
    origin: dict[int, int] = field(default_factory=dict)
    copies: set[int] = field(default_factory=set)

    def inputs(self, count: int) -> list[Pair]:
        """The tensors that came in."""
        for x, y in zip(self.a.inputs(count), self.b.inputs(count), strict=True):
            self.partner[x.number] = y
        return [self.pair(x) for x in self.a.inputs(count)]

    def pair(self, x: Ref) -> Pair:
        """A tensor of tape A with its partner."""
        other = self.partner[x.number]
        return Pair(x.number, other.number, x.shape, other.shape, x.dtype)

    def calls(self) -> Iterator[OpCall]:
        """The calls, in order.

        Raises:
            SequenceError: the tapes differ.
        """
        i = j = 0
        while i < len(self.a.entries) or j < len(self.b.entries):
            x = self.a.entries[i] if i < len(self.a.entries) else None
            y = self.b.entries[j] if j < len(self.b.entries) else None
            if self.rows and x is not None and y is not None and x.name == y.name == BEGIN:
                i, j = _end(self.a, i), _end(self.b, j)
                if not self._fits(self.a.entries[i], self.b.entries[j]):
                    raise _other_way(self.a.entries[i], self.b.entries[j])
                yield self._both(self.a.entries[i], self.b.entries[j])
                i, j = i + 1, j + 1
            elif not self.rows and x is not None and x.name in _DECLARED:
                i += 1
            elif not self.rows and y is not None and y.name in _DECLARED:
                j += 1
            elif x is not None and axes_of(x) and axes_of(x) <= self.axes:
                yield self._collective(
                    x, self.a.entries[i + 1] if i + 1 < len(self.a.entries) else x
                )
                i += 2
            elif (
                self.rows
                and x is not None
                and y is not None
                and x.name == "unbind"
                and self._rolled(i, j)
            ):
                pass
            elif x is not None and y is not None and self._fits(x, y):
                yield self._both(x, y)
                i, j = i + 1, j + 1
            elif x is not None and (x.name in _ALONE or self._saved(i)):
                yield self._alone_on_a(x)
                i += 1
            elif y is not None and y.name in _ALONE:
                self._alone_on_b(y)
                j += 1
            elif x is not None and x.name == "slice":
                yield self._slice_of_all(x)
                i += 1
            elif x is not None and x.name == "div" and i and self.a.entries[i - 1].name == WAIT:
                raise SequenceError(
                    f"fp.pmean{text(x.line)}: ranks may hold unequal numbers of positions, so the "
                    "mean of what they have is not what one device has. Write fp.psum of a sum "
                    "over fp.psum of a count"
                )
            else:
                raise _other_way(x, y)

    def _rolled(self, i: int, j: int) -> bool:
        """Whether a loop over rows begins here that can be, and now is, one turn."""
        x, y = self.a.entries[i], self.b.entries[j]
        if y.name != "unbind" or len(x.outs) == len(y.outs):
            return False
        found = rolled(self.a.entries[i:], self.b.entries[j:])
        if found is not None:
            self.a.entries[i:], self.b.entries[j:] = found
        return found is not None

    def _saved(self, i: int) -> bool:
        """Whether an entry of A is the alias of a collective's result that autograd saves."""
        x, before = self.a.entries[i], self.a.entries[i - 1]
        return (
            x.name == "detach"
            and before.name == WAIT
            and x.args["self"].number == before.outs[0].number
        )

    def _fits(self, x: Entry, y: Entry) -> bool:
        """Whether two entries do the same to the same tensors."""
        same = _name(x) == _name(y) and x.args.keys() == y.args.keys() and x.grad == y.grad
        return same and self._alike(list(x.args.values()), list(y.args.values()))

    def _alike(self, x: Any, y: Any) -> bool:
        if isinstance(x, Ref) or isinstance(y, Ref):
            return (
                isinstance(x, Ref)
                and isinstance(y, Ref)
                and self.partner[x.number].number == self._original(y)
            )
        if _holds_refs(x) or _holds_refs(y):
            return len(x) == len(y) and all(self._alike(p, q) for p, q in zip(x, y, strict=True))
        return True

    def _original(self, y: Ref) -> int:
        return self.origin.get(y.number, y.number)

    def _both(self, x: Entry, y: Entry) -> OpCall:
        if len(x.outs) != len(y.outs):
            raise SequenceError(
                f"{op_name(x)}{text(x.line)} gives {len(x.outs)} tensors on a rank and "
                f"{len(y.outs)} on one device, one for every position: a loop over positions ends "
                "on a rank where its slice ends. Compute all positions at once"
            )
        args = {k: self._merged(v, y.args[k]) for k, v in x.args.items()}
        for p, q in zip(x.outs, y.outs, strict=True):
            if p.dtype != q.dtype:
                raise _other_way(x, y)
            found = Ref(self._original(q), q.shape, q.dtype)
            if self.partner.setdefault(p.number, found).number == found.number:
                self.partner[p.number] = found  # of another shape, perhaps
        return OpCall(
            _name(x), x.func, args, tuple(map(self.pair, x.outs)), f"{op_name(x)}{text(x.line)}"
        )

    def _merged(self, x: Any, y: Any) -> Any:
        if isinstance(x, Ref):
            return self.pair(x)
        if _holds_refs(x):
            return [self._merged(p, q) for p, q in zip(x, y, strict=True)]
        return x if _same(x, y) else Differs(x, y)

    def _alone_on_a(self, x: Entry) -> OpCall:
        source, out = self.partner[x.args["self"].number], x.outs[0]
        self.partner[out.number] = source
        if x.name == "clone":
            self.copies.add(source.number)
        return OpCall(
            _name(x),
            x.func,
            {"self": self.pair(x.args["self"])},
            (self.pair(out),),
            f"{op_name(x)}{text(x.line)}",
        )

    def _alone_on_b(self, y: Entry) -> None:
        source = self._original(y.args["self"])
        self.origin[y.outs[0].number] = source
        if y.name == "clone":
            self.copies.add(source)

    def _slice_of_all(self, x: Entry) -> OpCall:
        """A slice that takes all on one device, where indexing leaves it out."""
        source = self.partner[x.args["self"].number]
        self.partner[x.outs[0].number] = source
        whole = {"start": 0, "end": source.shape[x.args["dim"]], "step": 1}
        args: dict[str, Any] = {k: Differs(x.args[k], v) for k, v in whole.items()}
        args |= {"self": self.pair(x.args["self"]), "dim": x.args["dim"]}
        return OpCall("slice", x.func, args, (self.pair(x.outs[0]),), f"{op_name(x)}{text(x.line)}")

    def _collective(self, start: Entry, wait: Entry) -> OpCall:
        """A collective over the axes of the sequence, which is nothing on one device."""
        if start.name not in _SUMMED:
            raise SequenceError(
                f"{op_name(start)} over {start.args['axes']!r}{text(start.line)}: what a rank "
                "makes of its place among the ranks that split the sequence cannot be proven to "
                "be what one device computes. fp.positions(x, dim) numbers positions; fp.psum(x, "
                "axis) sums over ranks"
            )
        source = start.args["x"]
        self.partner[wait.outs[0].number] = self.partner[source.number]
        args = {"x": self.pair(source), "axes": Differs(start.args["axes"], "")}
        return OpCall(
            start.name,
            None,
            args,
            (self.pair(wait.outs[0]),),
            f"{op_name(start)}{text(start.line)}",
        )


_ALONE = ("clone", "alias")
_DECLARED = (BEGIN, STATISTIC, BUFFER)  # of a sequence, the ops between them count
_SUMMED = ("funcpipe::psum_start", "funcpipe::pmax_start")


def _end(tape: Tape, i: int) -> int:
    """Where the batch statistic ends that begins at an entry."""
    return next(k for k in range(i, len(tape.entries)) if tape.entries[k].name == STATISTIC)


def axes_of(x: Entry) -> frozenset[str]:
    """The axes that a collective names."""
    return (
        frozenset(x.args["axes"].split(","))
        if x.name.startswith("funcpipe::") and "axes" in x.args
        else frozenset()
    )


def op_name(x: Entry) -> str:
    """The name of an op, for messages."""
    if x.name == NAMED:
        return f"fp.{x.args['kind']}"
    if x.func is None:
        return x.name.replace("_", "-")
    if x.name.startswith("funcpipe::"):
        return "fp." + x.name.removeprefix("funcpipe::").removesuffix("_start")
    return x.name if "::" in x.name else "aten." + x.name


def text(line: Line | None) -> str:
    """A line of code, for messages."""
    return "" if line is None else str(line)


def _name(entry: Entry) -> str:
    name = entry.name
    if entry.func is not None and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _SAME.get(name, name)


def _holds_refs(x: Any) -> bool:
    return isinstance(x, list | tuple) and any(isinstance(y, Ref) for y in x)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.dtype == y.dtype and x.tolist() == y.tolist()
    same = type(x) is type(y) and x == y
    return bool(same) or (
        isinstance(x, float) and isinstance(y, float) and math.isnan(x) and math.isnan(y)
    )


def _other_way(x: Entry | None, y: Entry | None) -> SequenceError:
    one, other = ("nothing more" if e is None else f"{op_name(e)}{text(e.line)}" for e in (x, y))
    shapes = ["" if e is None or not e.outs else f" of shape {e.outs[0].shape}" for e in (x, y)]
    return SequenceError(
        "the loss function takes another way for another length: where a rank, which has its "
        f"slice of the sequence, does {one}{shapes[0]}, one device does {other}{shapes[1]}. What "
        "it does must not depend on the number of positions"
    )
