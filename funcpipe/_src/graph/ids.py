"""Ids: what params, args of a call and values of a program are called, from analysis to slots.

In: nothing. Out: `ParamId`, `ArgId` and `ValueId`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, NewType

ParamId = NewType("ParamId", int)  # a leaf of the full params
ArgId = NewType("ArgId", int)  # a leaf of the params that one call gets; two may be one param

Kind = Literal[
    "param",  # an arg as the step brings it: a tensor, or this rank's shard; named by its ArgId
    "batch",  # a leaf of a microbatch; named by its number
    "const",  # a folded constant; of the first microbatch whose graph has it
    "value",  # what a unit makes; named as its node in the joint graph
    "sum",  # over microbatches: of an output (named by its number) or of a partial gradient
    "unsharded",  # the same sum of a sharded arg that is reduced once per step, before that
    "row",  # an output of one microbatch that is not summed; named by its number
    "shard",  # this rank's shard of a partial gradient that was reduced
    "gathered",  # a sharded arg, unsharded
    "pending",  # a collective under way
    "sent",  # what a message holds until it has arrived
]


class OfArg(NamedTuple):
    """One of several values that belong to an arg: its nth partial gradient, or its nth gather.

    >>> str(OfArg(ArgId(3), 1))
    '3#1'
    """

    arg: ArgId
    nth: int

    def __str__(self) -> str:
        return f"{self.arg}#{self.nth}"


class ValueId(NamedTuple):
    """What an instruction reads or writes.

    Args:
        kind: see `Kind`.
        name: unique among the values of a kind and a microbatch.
        microbatch: None for what belongs to no microbatch.

    >>> print(ValueId("value", "mm_3", 2), ValueId("param", 4), sep="; ")
    value mm_3@2; param 4
    """

    kind: Kind
    name: str | int | OfArg
    microbatch: int | None = None

    def __str__(self) -> str:
        of = "" if self.microbatch is None else f"@{self.microbatch}"
        return f"{self.kind} {self.name}{of}"
