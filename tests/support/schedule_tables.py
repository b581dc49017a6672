"""What the schedule tests share: every schedule of the library by name, and ways to write a table
down."""

from __future__ import annotations

from hypothesis import strategies as st

from funcpipe._src.schedule import (
    Action,
    Edge,
    Schedule,
    ScheduleFn,
    chain,
    dual_pipe_v,
    forward_only,
    from_table,
    gpipe,
    interleaved_1f1b,
    interleaved_zb,
    looped_bfs,
    one_f_one_b,
    v_half,
    v_min,
    zb_h1,
    zb_v,
)

# Every schedule of the library: its name, the factory, and whether it takes a number of stages per
# rank.
LIBRARY: dict[str, tuple] = {
    "gpipe": (gpipe, False),
    "one_f_one_b": (one_f_one_b, False),
    "interleaved_1f1b": (interleaved_1f1b, True),
    "looped_bfs": (looped_bfs, True),
    "zb_h1": (zb_h1, False),
    "interleaved_zb": (interleaved_zb, True),
    "zb_v": (zb_v, False),
    "dual_pipe_v": (dual_pipe_v, False),
    "v_half": (v_half, False),
    "v_min": (v_min, False),
    "forward_only": (forward_only, True),
}


def table(*rows: str) -> Schedule:
    """A table from one text a rank, actions separated by blanks, called "mine"."""
    actions = [[Action.parse(text) for text in row.split()] for row in rows]
    microbatches = 1 + max(action.microbatch for row in actions for action in row)
    return from_table(actions, name="mine")(len(rows), microbatches)


@st.composite
def library(draw: st.DrawFn, ranks: int = 16, microbatches: int = 64, v: int = 4) -> Schedule:
    """Any schedule of the library at any size up to these."""
    return draw(schedule_fns(v))(draw(st.integers(1, ranks)), draw(st.integers(1, microbatches)))


@st.composite
def schedule_fns(draw: st.DrawFn, v: int = 4) -> ScheduleFn:
    """Any schedule of the library with any number of stages per rank."""
    factory, takes_v = LIBRARY[draw(st.sampled_from(sorted(LIBRARY)))]
    return factory(draw(st.integers(1, v))) if takes_v else factory()


@st.composite
def edges_for(draw: st.DrawFn, stages: int) -> frozenset[Edge]:
    """A chain with random skips: forward to a later stage, backward to an earlier one, residuals to
    any."""
    extra = st.tuples(
        st.integers(0, stages - 1), st.integers(0, stages - 1), st.sampled_from("FBR")
    )
    edges = set(chain(stages))
    for a, b, kind in draw(st.lists(extra, max_size=6)):
        low, high = min(a, b), max(a, b)
        if kind == "R" and a != b:
            edges.add((("F", a), ("B", b)))
        elif low != high:
            edges.add((("F", low), ("F", high)) if kind == "F" else (("B", high), ("B", low)))
    return frozenset(edges)
