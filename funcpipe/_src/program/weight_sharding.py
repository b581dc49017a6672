"""Weight sharding: puts the gathers and reductions of sharded args into a rank's instructions.

A sharded arg is held in flat shards of ``ceil(numel / parts)`` elements (the last ones may be
smaller, or empty). A unit reads it unsharded: GATHER starts as many units ahead as *prefetch* says,
WAIT stands right before the unit, and what was gathered is dropped behind it unless *regather* says
to hold it. A unit also makes the gradient of the unsharded arg: REDUCE starts as soon as it is
final, and turns it into this rank's shard of the sum. All args that a unit needs travel in one
bucket, at most ``bucket_bytes`` each.

In: instructions in which units read args, and partial gradients are added up. Out: the same with
GATHER, REDUCE and WAIT, in which a sharded arg is the shard, and the sum of its partial gradients a
sum of shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, pairwise
from typing import NamedTuple

import torch

from funcpipe._src.core.mesh import Axes
from funcpipe._src.graph.ids import ArgId, OfArg, ValueId
from funcpipe._src.program.instructions import (
    ADD,
    GATHER,
    REDUCE,
    RUN,
    WAIT,
    Bucket,
    BucketEntry,
    Instruction,
    tensors_of,
)
from funcpipe._src.spec.requests import WeightSharding


@dataclass(frozen=True)
class ShardedArg:
    """How an arg is sharded.

    Args:
        entry: what it is in a bucket.
        axes: what it is sharded over, in mesh order.
        parts: the number of ranks on them.
        summed: those of its axes that split the batch.
        grad_dtype: of its gradient shards (the parameter's own).
        gathered_dtype: in which it is gathered.
        options: when it is gathered, and how it travels: those of `sharded_weights`.
    """

    entry: BucketEntry
    axes: Axes
    parts: int
    summed: Axes
    grad_dtype: torch.dtype
    gathered_dtype: torch.dtype
    options: WeightSharding


Sharding = Mapping[int, ShardedArg]  # by arg; the others are held unsharded


def insert_collectives(
    instructions: Sequence[Instruction], sharding: Sharding
) -> list[Instruction]:
    """The instructions with their gathers and reductions."""
    gathered = _Gathers(instructions, sharding).inserted()
    return _Reductions(gathered, sharding).inserted()


def _buckets(
    dtypes: Mapping[int, torch.dtype],
    sharding: Sharding,
    of_grads: bool = False,
) -> Iterator[Bucket]:
    """Args with the dtype in which they travel, in the collectives in which they travel."""

    def together(arg: int) -> tuple:
        leaf = sharding[arg]
        summed = leaf.summed if of_grads else ()
        return (
            leaf.axes,
            leaf.parts,
            summed,
            str(dtypes[arg]),
            leaf.options.bucket_bytes or 0,
            leaf.options.prefetch,
        )

    for (axes, parts, summed, _, most_bytes, _), args in groupby(
        sorted(dtypes, key=together), together
    ):
        entries: list[BucketEntry] = []
        for arg in args:
            dtype = dtypes[arg]
            entry = sharding[arg].entry
            numel = entry.numel + sum(other.numel for other in entries)
            nbytes = numel * dtype.itemsize
            if entries and most_bytes and nbytes > most_bytes:
                yield Bucket(axes, parts, tuple(entries), dtype, summed)
                entries = []
            entries.append(entry)
        yield Bucket(axes, parts, tuple(entries), dtype, summed)


# ---- gathers


@dataclass
class _Gathers:
    """Gathers the sharded args that units read."""

    instructions: Sequence[Instruction]
    sharding: Sharding

    def __post_init__(self) -> None:
        self.runs: list[int] = []
        for number, instruction in enumerate(self.instructions):
            if instruction.op == RUN:
                self.runs.append(number)
        self.needs = [self._sharded_args(number) for number in self.runs]
        self.next_use = self._next_uses()
        self.gathers = count()
        self.live: dict[int, ValueId] = {}  # by arg, what it is gathered as
        self.last_use: dict[int, int] = {}  # by arg
        self.ahead: dict[int, list[Instruction]] = defaultdict(
            list
        )  # gathers, by what they precede
        self.waits: dict[int, list[Instruction]] = defaultdict(list)

    def inserted(self) -> list[Instruction]:
        read: dict[int, dict[ValueId, ValueId]] = {}
        for use, number in enumerate(self.runs):
            self._gather(use)
            read[number] = {}
            for arg in self.needs[use]:
                self.last_use[arg] = use
                read[number][ValueId("param", arg)] = self.live[arg]
            for arg in list(self.live):
                if not self._is_kept(arg, use):
                    del self.live[arg]
        out: list[Instruction] = []
        for number, instruction in enumerate(self.instructions):
            out += self.ahead[number]
            out += self.waits[number]
            gathered = read.get(number)
            if gathered:
                reads = [gathered.get(value, value) for value in instruction.reads]
                instruction = replace(instruction, reads=tuple(reads))
            out.append(instruction)
        return out

    def _sharded_args(self, number: int) -> list[int]:
        args: dict[int, None] = {}
        for value in self.instructions[number].reads:
            if value.kind == "param" and value.name in self.sharding:
                assert isinstance(value.name, int)
                args[value.name] = None
        return list(args)

    def _next_uses(self) -> dict[tuple[int, int], int]:
        """For every arg and use, which unit uses it next."""
        uses: dict[int, list[int]] = defaultdict(list)
        for use, args in enumerate(self.needs):
            for arg in args:
                uses[arg].append(use)
        following = {}
        for arg, of_arg in uses.items():
            for use, next_use in pairwise(of_arg):
                following[arg, use] = next_use
        return following

    def _gather(self, use: int) -> None:
        """Gather what a unit needs and what is not there."""
        number = self.runs[use]
        action = self.instructions[number].action
        dtypes = {}
        for arg in self.needs[use]:
            if arg not in self.live:
                dtypes[arg] = self.sharding[arg].gathered_dtype
        for bucket in _buckets(dtypes, self.sharding):
            nth = next(self.gathers)
            args = [entry.arg for entry in bucket.entries]
            shards = tuple(ValueId("param", arg) for arg in args)
            pending = (ValueId("pending", f"gather {nth}"),)
            gathered = tuple(ValueId("gathered", OfArg(arg, nth)) for arg in args)
            self.live.update(zip(args, gathered, strict=True))
            prefetch = self.sharding[args[0]].options.prefetch
            start = self.runs[max(use - prefetch, 0)]
            gather = Instruction(GATHER, action, shards, pending, bucket=bucket)
            self.ahead[start].append(gather)
            wait = Instruction(WAIT, action, pending, gathered, bucket=bucket)
            self.waits[number].append(wait)

    def _is_kept(self, arg: int, use: int) -> bool:
        """Whether a gathered arg is held behind a unit: is its next use near enough?"""
        last = self.last_use[arg]
        following = self.next_use.get((arg, last))
        if following is None:
            return False
        options = self.sharding[arg].options
        if options.regather == "step":
            return True
        if following - use <= 1 + options.prefetch:  # gathered again, it would be under way
            return True
        if options.regather == "microbatch":
            return False
        group = int(options.regather)
        return self._microbatch(last) // group == self._microbatch(following) // group

    def _microbatch(self, use: int) -> int:
        number = self.runs[use]
        return self.instructions[number].action.microbatch


# ---- reductions


class _Final(NamedTuple):
    """A gradient that is to be reduced, and the addition of what comes of it to its sum."""

    add: Instruction
    source: ValueId


@dataclass
class _Reductions:
    """Reduces the gradients of sharded args. A reduction starts right behind the unit that made a
    gradient final; it is waited for before the next unit but one reduces, and at the end."""

    instructions: Sequence[Instruction]
    sharding: Sharding
    out: list[Instruction] = field(default_factory=list)
    waiting: list[list[Instruction]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reductions = count()
        self.tensors = tensors_of(self.instructions)
        self.last_nth: dict[ValueId, int] = {}
        for instruction in self.instructions:
            if instruction.op == ADD:
                self.last_nth[instruction.writes[0]] = instruction.nth

    def inserted(self) -> list[Instruction]:
        adds: list[Instruction] = []  # from the first of a unit's sharded gradients on
        for instruction in self.instructions:
            if instruction.op == ADD and (adds or self._is_sharded_grad(instruction)):
                adds.append(instruction)
                continue
            if adds:
                self._reduce_all(adds)
                adds = []
            self.out.append(instruction)
        self._reduce_all(adds)
        for ends in self.waiting:
            self.out += ends
        return self.out

    def _reduce_all(self, adds: Sequence[Instruction]) -> None:
        """What one unit makes: sums of other values stay, sharded gradients are reduced."""
        grads: list[Instruction] = []
        for add in adds:
            if self._is_sharded_grad(add):
                grads.append(add)
            else:
                self.out.append(add)
        final = self._final(grads)
        starts, ends = self._reduce(final)
        if starts and len(self.waiting) > 1:
            self.out += self.waiting.pop(0)
        self.out += starts
        if ends:
            self.waiting.append(ends)

    def _final(self, grads: Sequence[Instruction]) -> dict[int, list[_Final]]:
        """By arg, what is final and can be reduced. An arg whose sum over microbatches is reduced
        gets its summands here, and is final with the last one."""
        found: dict[int, list[_Final]] = defaultdict(list)
        for add in grads:
            (source,) = add.reads
            (total,) = add.writes
            if self._is_late(add):
                source = total._replace(kind="unsharded")
                dtype = self._travel_dtype(add)
                to_unsharded = replace(add, writes=(source,), dtype=dtype)
                self.out.append(to_unsharded)
                if add.nth < self.last_nth[total]:
                    continue
            arg = _arg_of(add)
            found[arg].append(_Final(add, source))
        return found

    def _reduce(
        self, final: dict[int, list[_Final]]
    ) -> tuple[list[Instruction], list[Instruction]]:
        """What starts the reductions, and what ends them."""
        starts: list[Instruction] = []
        ends: list[Instruction] = []
        while final:  # an arg may have several partial gradients in one unit: one bucket each
            first = {arg: grads[0] for arg, grads in final.items()}
            later = {arg: grads[1:] for arg, grads in final.items()}
            final = {arg: grads for arg, grads in later.items() if grads}
            dtypes = {}
            for arg, grad in first.items():
                dtypes[arg] = self._travel_dtype(grad.add)
            for bucket in _buckets(dtypes, self.sharding, of_grads=True):
                nth = next(self.reductions)
                pending = (ValueId("pending", f"reduction {nth}"),)
                grads = [first[entry.arg] for entry in bucket.entries]
                sources = tuple(grad.source for grad in grads)
                action = grads[0].add.action
                start = Instruction(REDUCE, action, sources, pending, bucket=bucket)
                starts.append(start)
                adds = [grad.add for grad in grads]
                ends += self._finish(adds, pending, bucket)
        return starts, ends

    def _finish(
        self,
        adds: Sequence[Instruction],
        pending: tuple[ValueId],
        bucket: Bucket,
    ) -> list[Instruction]:
        """Wait for a reduction, and add its shards up."""
        shards = []
        for add in adds:
            (total,) = add.writes
            microbatch = add.action.microbatch
            shards.append(ValueId("shard", total.name, microbatch))
        action = adds[0].action
        out = [Instruction(WAIT, action, pending, tuple(shards), bucket=bucket)]
        for add, shard in zip(adds, shards, strict=True):
            leaf = self.sharding[_arg_of(add)]
            of_shard = replace(
                add,
                reads=(shard,),
                nth=0 if self._is_late(add) else add.nth,
                dtype=leaf.grad_dtype,
            )
            out.append(of_shard)
        return out

    def _is_sharded_grad(self, instruction: Instruction) -> bool:
        if instruction.op != ADD:
            return False
        name = instruction.writes[0].name
        return isinstance(name, OfArg) and name.arg in self.sharding

    def _is_late(self, add: Instruction) -> bool:
        """Whether gradients are added up over microbatches before they are reduced."""
        return self.sharding[_arg_of(add)].options.reduce == "last"

    def _travel_dtype(self, add: Instruction) -> torch.dtype:
        """In which dtype a gradient travels: as its unit makes it, or as it was added up.
        Unsharded gradients add up in the parameter's own precision, or the unit's where that is
        higher."""
        leaf = self.sharding[_arg_of(add)]
        if leaf.options.reduce_dtype is not None:
            return leaf.options.reduce_dtype
        (summand,) = add.reads
        made = self.tensors[summand].dtype
        if self._is_late(add):
            return torch.promote_types(made, leaf.grad_dtype)
        return made


def _arg_of(add: Instruction) -> ArgId:
    """The arg whose gradient an addition takes in."""
    name = add.writes[0].name
    assert isinstance(name, OfArg)
    return name.arg
