"""Parts: every position has one member; members know their own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe._src.collectives import bind_mesh, bind_rank
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.functional.positions import member_positions
from funcpipe._src.functional.sequence_layout import SequenceLayout

PARTS = st.builds(
    lambda size, ring, heads, zigzag: SequenceLayout(size, ("r",), ("h",), ring, heads, zigzag and ring > 1),
    st.integers(0, 30), st.integers(1, 4), st.integers(1, 3), st.booleans(),
)  # fmt: skip


def held(part: SequenceLayout, member: int) -> list[int]:
    return [i for a, b in part.ranges(member) for i in range(a, b)]


@given(PARTS)
def test_every_position_has_one_member(part: SequenceLayout) -> None:
    lengths = [part.length(m) for m in range(part.members)]
    assert sorted(i for m in range(part.members) for i in held(part, m)) == list(range(part.size))
    assert lengths == [len(held(part, m)) for m in range(part.members)]
    for r in range(
        part.ring
    ):  # members of one ring rank differ by one position at most, the first have more
        own = lengths[r * part.heads : (r + 1) * part.heads]
        assert own == sorted(own, reverse=True) and own[0] - own[-1] <= 1
    if part.even:
        assert len({part.variant(m) for m in range(part.members)}) == 1


@given(PARTS)
def test_members_know_their_positions(part: SequenceLayout) -> None:
    """By ops that are the same for all members of a variant."""
    mesh = fp.Mesh(r=part.ring, h=part.heads)
    like = {
        m: min(x for x in range(part.members) if part.variant(x) == part.variant(m))
        for m in range(part.members)
    }

    def body(comm: Communicator) -> list[int]:
        with bind_rank(comm), bind_mesh(mesh, ("r", "h")):
            return member_positions(part, like[comm.rank], torch.device("cpu")).tolist()

    assert run_ranks(mesh, body) == [held(part, m) for m in range(part.members)]
