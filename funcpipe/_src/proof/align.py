"""Alignment: two recordings of one loss function side by side, as a rank runs it and as one device
does.

Everything has to be the same in both, op by op: a loss function takes no other way for another
length. Three things may stand in one recording alone: what only copies (``clone``, which
``reshape`` and ``contiguous`` make where strides ask for it), an index that is cut to the length
and takes all, and collectives over the axes of the sequence, which one device does not have.

In: two recordings. Out: calls in order, with arguments that differ between them as `Differs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.core.source_lines import Line
from funcpipe._src.proof.loops import rolled
from funcpipe._src.proof.recording import (
    BEGIN,
    BUFFER,
    NAMED,
    STATISTIC,
    RecordedOp,
    Recording,
    TensorRef,
    holds_refs,
)
from funcpipe._src.proof.words import POSITIONS, Words
from funcpipe.errors import SequenceError

WAIT = "funcpipe::wait"
_SAME_RULE = {
    "_unsafe_view": "view",
    "reshape": "view",
    "_reshape_alias": "view",
    "alias": "detach",
    "lift_fresh": "detach",
}
_COPIES = ("clone", "alias")
_DECLARED = (BEGIN, STATISTIC, BUFFER)  # of a sequence, the ops between them count
_SUMMED = ("funcpipe::psum_start", "funcpipe::pmax_start")


@dataclass(frozen=True)
class Differs:
    """An argument that is ``local`` on a rank and ``full`` on one device."""

    local: Any
    full: Any


@dataclass(frozen=True, eq=False)
class AlignedTensor:
    """A tensor of both recordings.

    Args:
        number, other: its numbers, in the recording of the rank and of one device.
        local, full: its shapes there.
    """

    number: int
    other: int
    local: tuple[int, ...]
    full: tuple[int, ...]
    dtype: torch.dtype

    def sizes(self, dim: int) -> tuple[int, int]:
        """The sizes of a dim, on a rank and on one device."""
        return self.local[dim], self.full[dim]


@dataclass(frozen=True, eq=False)
class OpCall:
    """One op of both recordings.

    Args:
        name: of its rule: that of the op, without the ``_`` of one that writes to its operand.
        func: the op itself; None for a known call, or a collective over the axes of the sequence.
        args: by name; tensors as `AlignedTensor`.
        outs: its results.
        where: the op and the line of the user's code, for messages.
    """

    name: str
    func: Any
    args: dict[str, Any]
    outs: tuple[AlignedTensor, ...]
    where: str


@dataclass
class Alignment:
    """Two recordings, and how far they have been aligned.

    Args:
        local, full: the recordings of a rank and of one device.
        axes: of what is split, those with more than one rank.
        rows: whether that is the rows of the batch.
        words: how errors name what is split.
        partner: for a tensor of the rank, that of one device.
        origin: for a copy on one device alone, the tensor that it copies.
        copies: tensors of one device that are copied in one recording alone.
    """

    local: Recording
    full: Recording
    axes: frozenset[str]
    rows: bool = False
    words: Words = POSITIONS
    partner: dict[int, TensorRef] = field(default_factory=dict)
    origin: dict[int, int] = field(default_factory=dict)
    copies: set[int] = field(default_factory=set)
    _next_local: int = 0
    _next_full: int = 0

    def inputs(self, count: int) -> list[AlignedTensor]:
        """The tensors that came in."""
        inputs = self.local.inputs(count)
        for local, full in zip(inputs, self.full.inputs(count), strict=True):
            self.partner[local.number] = full
        return [self.pair(local) for local in inputs]

    def pair(self, local: TensorRef) -> AlignedTensor:
        """A tensor of the rank with its partner."""
        full = self.partner[local.number]
        return AlignedTensor(local.number, full.number, local.shape, full.shape, local.dtype)

    # ---- which ops belong together

    def calls(self) -> Iterator[OpCall]:
        """The calls, in order.

        Raises:
            SequenceError: the recordings differ.
        """
        while True:
            local = self.local.entry(self._next_local)
            full = self.full.entry(self._next_full)
            if local is None and full is None:
                return
            if self._skip_declared(local, full) or self._roll_loop(local, full):
                continue
            if local is not None and axes_of(local) and axes_of(local) <= self.axes:
                yield self._collective(local)
                self._next_local += 2
            elif local is not None and full is not None and self._fits(local, full):
                yield self._both(local, full)
                self._next_local += 1
                self._next_full += 1
            elif local is not None and self._may_stand_alone(local):
                yield self._alone_on_rank(local)
                self._next_local += 1
            elif full is not None and full.name in _COPIES:
                self._alone_on_one_device(full)
                self._next_full += 1
            elif local is not None and local.name == "slice":
                yield self._slice_of_all(local)
                self._next_local += 1
            else:
                raise self._other_way(local, full)

    def _skip_declared(self, local: RecordedOp | None, full: RecordedOp | None) -> bool:
        """Go on to the end of a declared batch statistic, which stands for its ops; of a sequence,
        go on to its ops."""
        if not self.rows:
            if local is not None and local.name in _DECLARED:
                self._next_local += 1
                return True
            if full is not None and full.name in _DECLARED:
                self._next_full += 1
                return True
            return False
        if local is None or full is None:
            return False
        if not local.name == full.name == BEGIN:
            return False
        self._next_local = _end_of_statistic(self.local, self._next_local)
        self._next_full = _end_of_statistic(self.full, self._next_full)
        ends = self.local.entries[self._next_local], self.full.entries[self._next_full]
        if not self._fits(*ends):
            raise self._other_way(*ends)
        return True

    def _roll_loop(self, local: RecordedOp | None, full: RecordedOp | None) -> bool:
        """Whether a loop over rows begins here; it is replaced by one turn."""
        if not self.rows or local is None or full is None:
            return False
        if not local.name == full.name == "unbind":
            return False
        if len(local.outs) == len(full.outs):
            return False
        of_rank = self.local.entries[self._next_local :]
        found = rolled(of_rank, self.full.entries[self._next_full :])
        if found is None:
            return False
        self.local.entries[self._next_local :], self.full.entries[self._next_full :] = found
        return True

    def _fits(self, local: RecordedOp, full: RecordedOp) -> bool:
        """Whether two ops do the same to the same tensors."""
        if rule_name(local) != rule_name(full):
            return False
        if local.grad != full.grad:
            return False
        if local.args.keys() != full.args.keys():
            return False
        return self._alike(list(local.args.values()), list(full.args.values()))

    def _alike(self, local: Any, full: Any) -> bool:
        if isinstance(local, TensorRef) and isinstance(full, TensorRef):
            return self.partner[local.number].number == self._original(full)
        if isinstance(local, TensorRef):
            return False
        if isinstance(full, TensorRef):
            return False
        if not holds_refs(local) and not holds_refs(full):
            return True
        return len(local) == len(full) and all(map(self._alike, local, full))

    def _original(self, full: TensorRef) -> int:
        return self.origin.get(full.number, full.number)

    # ---- calls

    def _both(self, local: RecordedOp, full: RecordedOp) -> OpCall:
        if len(local.outs) != len(full.outs):
            words = self.words
            raise SequenceError(
                f"{where(local)} gives {len(local.outs)} tensors {words.at_owner} and "
                f"{len(full.outs)} on one device, one for every {words.item}: {words.loop_advice}"
            )
        args = {}
        for name, value in local.args.items():
            args[name] = self._merged(value, full.args[name])
        for out, other in zip(local.outs, full.outs, strict=True):
            if out.dtype != other.dtype:
                raise self._other_way(local, full)
            found = TensorRef(self._original(other), other.shape, other.dtype)
            if self.partner.setdefault(out.number, found).number == found.number:
                self.partner[out.number] = found  # of another shape, perhaps
        return self._call(local, args)

    def _call(self, local: RecordedOp, args: dict[str, Any]) -> OpCall:
        outs = tuple(map(self.pair, local.outs))
        return OpCall(rule_name(local), local.func, args, outs, where(local))

    def _merged(self, local: Any, full: Any) -> Any:
        if isinstance(local, TensorRef):
            return self.pair(local)
        if holds_refs(local):
            return [self._merged(*values) for values in zip(local, full, strict=True)]
        if _same(local, full):
            return local
        return Differs(local, full)

    def _may_stand_alone(self, local: RecordedOp) -> bool:
        """Whether an op copies, or is the alias that autograd saves of a collective's result."""
        if local.name in _COPIES:
            return True
        before = self.local.entries[self._next_local - 1]
        if local.name != "detach" or before.name != WAIT:
            return False
        return local.args["self"].number == before.outs[0].number

    def _alone_on_rank(self, local: RecordedOp) -> OpCall:
        source = self.partner[local.args["self"].number]
        self.partner[local.outs[0].number] = source
        if local.name == "clone":
            self.copies.add(source.number)
        return self._call(local, {"self": self.pair(local.args["self"])})

    def _alone_on_one_device(self, full: RecordedOp) -> None:
        source = self._original(full.args["self"])
        self.origin[full.outs[0].number] = source
        if full.name == "clone":
            self.copies.add(source)

    def _slice_of_all(self, local: RecordedOp) -> OpCall:
        """A slice that takes all on one device, where indexing leaves it out."""
        operand = local.args["self"]
        dim = local.args["dim"]
        source = self.partner[operand.number]
        self.partner[local.outs[0].number] = source
        args: dict[str, Any] = {"self": self.pair(operand), "dim": dim}
        for name, full in (("start", 0), ("end", source.shape[dim]), ("step", 1)):
            args[name] = Differs(local.args[name], full)
        return self._call(local, args)

    def _collective(self, start: RecordedOp) -> OpCall:
        """A collective over the axes of the sequence, which one device does not have."""
        if start.name not in _SUMMED:
            raise SequenceError(
                f"{op_name(start)} over {start.args['axes']!r}{text(start.line)}: "
                f"{self.words.place_advice}"
            )
        wait = self.local.entry(self._next_local + 1) or start
        operand = start.args["x"]
        out = wait.outs[0]
        self.partner[out.number] = self.partner[operand.number]
        args = {"x": self.pair(operand), "axes": Differs(start.args["axes"], "")}
        return OpCall(start.name, None, args, (self.pair(out),), where(start))

    # ---- errors

    def _other_way(self, local: RecordedOp | None, full: RecordedOp | None) -> SequenceError:
        before = self.local.entry(self._next_local - 1) if self._next_local else None
        if local is not None and local.name == "div" and before and before.name == WAIT:
            return SequenceError(
                f"fp.pmean{text(local.line)}: ranks may hold unequal numbers of positions, so the "
                "mean of what they have is not what one device has. Write fp.psum of a sum over "
                "fp.psum of a count"
            )
        items = self.words.items
        return SequenceError(
            f"the loss function takes another way for another number of {items}: with "
            f"{self.words.share} it does {_result(local)}, with all {items} it does "
            f"{_result(full)}. What it does must not depend on the number of {items}"
        )


def _result(entry: RecordedOp | None) -> str:
    if entry is None:
        return "nothing more"
    shape = f" of shape {entry.outs[0].shape}" if entry.outs else ""
    return f"{where(entry)}{shape}"


def _end_of_statistic(recording: Recording, first: int) -> int:
    """Where the batch statistic ends that begins at an entry."""
    for place in range(first, len(recording.entries)):
        if recording.entries[place].name == STATISTIC:
            return place
    raise AssertionError("a batch statistic has no end")


def axes_of(entry: RecordedOp) -> frozenset[str]:
    """The axes that a collective names."""
    if entry.name.startswith("funcpipe::") and "axes" in entry.args:
        return frozenset(entry.args["axes"].split(","))
    return frozenset()


def where(entry: RecordedOp) -> str:
    """The name of an op and the line of code, for messages."""
    return f"{op_name(entry)}{text(entry.line)}"


def op_name(entry: RecordedOp) -> str:
    """The name of an op, for messages."""
    if entry.name == NAMED:
        return f"fp.{entry.args['kind']}"
    if entry.func is None:
        return entry.name.replace("_", "-")
    if entry.name.startswith("funcpipe::"):
        return "fp." + entry.name.removeprefix("funcpipe::").removesuffix("_start")
    if "::" in entry.name:
        return entry.name
    return "aten." + entry.name


def text(line: Line | None) -> str:
    """A line of code, for messages."""
    return "" if line is None else str(line)


def rule_name(entry: RecordedOp) -> str:
    """The name of an op's rule."""
    name = entry.name
    writes_to_operand = name.endswith("_") and not name.endswith("__")
    if entry.func is not None and writes_to_operand:
        name = name[:-1]
    return _SAME_RULE.get(name, name)


def _same(local: Any, full: Any) -> bool:
    if isinstance(local, Tensor):
        return local.dtype == full.dtype and local.tolist() == full.tolist()
    if type(local) is type(full) and local == full:
        return True
    floats = isinstance(local, float) and isinstance(full, float)
    return floats and math.isnan(local) and math.isnan(full)
