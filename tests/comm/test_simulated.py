"""In-process ranks: collectives against plain loops, order of messages, who goes on when, error
texts."""

from __future__ import annotations

import contextvars
import gc
import math
import re
import signal
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.collective_loops import DTYPES, KINDS, call, expected, operand, same

from funcpipe._src.comm.simulated import Ranks, run_ranks
from funcpipe._src.core.mesh import Mesh
from funcpipe.errors import DeadlockError, FuncpipeError, MismatchError, RankError

PIPE = Mesh(pipe=2)
GRID = Mesh(pipe=2, data=2)
ZEROS = torch.zeros(2)


def error_of(mesh, body, kind):
    with pytest.raises(kind) as caught:
        run_ranks(mesh, body)
    return caught.value


@st.composite
def meshes_and_axes(draw):
    few = st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 8)
    sizes = draw(few)
    mesh = Mesh(**dict(zip("abc", sizes, strict=False)))
    axes = draw(st.lists(st.sampled_from(list(mesh.axes)), min_size=1, unique=True))
    return mesh, tuple(axes)


# --- collectives
# ------------------------------------------------------------------------------------


@given(
    meshes_and_axes(),
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_collectives_equal_plain_loops(mesh_axes, kind, shape, dtype, turned):
    mesh, axes = mesh_axes
    if kind == "all_reduce_max" and dtype.is_complex:
        return
    n = mesh.axis_size(axes)
    xs = [operand(kind, r, shape, dtype, n) for r in range(mesh.size)]
    if turned and xs[0].dim() > 2:
        xs = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in xs]
    before = [x.clone() for x in xs]
    got = run_ranks(mesh, lambda comm: call(comm, kind, xs[comm.rank], axes))
    assert all(map(same, got, expected(kind, before, mesh, axes)))
    assert all(map(torch.equal, xs, before))
    if xs[0].numel():
        assert len({x.untyped_storage().data_ptr() for x in [*got, *xs]}) == 2 * mesh.size


def test_operands_may_change_once_a_collective_returns():
    def body(comm):
        x = torch.ones(3)
        total = comm.all_reduce(x, ("pipe", "data"))
        x.fill_(100)
        total.add_(comm.rank)
        return comm.all_gather(total, ("data",))[:, 0].tolist()

    assert run_ranks(GRID, body) == [[4, 5], [4, 5], [6, 7], [6, 7]]


def test_exchange_is_in_rank_order():
    def body(comm):
        done = []
        digests = comm.exchange_digest(comm.rank - 2**62, lambda: done.append(True))
        return comm.exchange({"rank": comm.rank})[1]["rank"], digests, done

    assert run_ranks(GRID, body) == [(1, [r - 2**62 for r in range(4)], [True])] * 4


@pytest.mark.parametrize(
    "wrong, text",
    [
        (
            lambda comm: comm.all_reduce(ZEROS, ("pipe",), op="min"),
            "takes op='sum' or op='max', not 'min'",
        ),
        (
            lambda comm: comm.reduce_scatter(ZEROS[:1], ("pipe",)),
            "reduce_scatter over ('pipe',) takes one shard for each of 2 ranks along dim 0, not "
            "float32[1]",
        ),
        (lambda comm: comm.all_to_all(torch.tensor(1), ("pipe",)), "not int64[]"),
    ],
)
def test_wrong_arguments(wrong, text):
    assert text in str(error_of(PIPE, wrong, ValueError))


# --- messages
# ---------------------------------------------------------------------------------------


def number(x):
    return torch.tensor([float(x)])


def test_messages_of_a_channel_arrive_in_order():
    def body(comm):
        if comm.rank == 0:
            for i in range(5):
                comm.send([number(i)], 1, "F")
                comm.send([number(-i), number(i)], 1, "B")
            comm.flush()
            return None
        back = [comm.recv([number(0), number(0)], 0, "B") for _ in range(5)]
        forth = [comm.recv([number(0)], 0, "F") for _ in range(5)]
        return [x.item() for (x,) in forth], [[x.item() for x in xs] for xs in back]

    assert run_ranks(PIPE, body)[1] == ([0, 1, 2, 3, 4], [[-i, i] for i in range(5)])


def test_two_ranks_may_send_to_each_other_at_once():
    def body(comm):
        other = 1 - comm.rank
        for i in range(3):
            comm.send([number(10 * comm.rank + i)], other, "x")
        return [comm.recv([number(0)], other, "x")[0].item() for _ in range(3)]

    assert run_ranks(PIPE, body) == [[10, 11, 12], [0, 1, 2]]


def test_a_message_is_handed_over_as_it_is():
    sent = torch.arange(6.0).view(2, 3).T

    def body(comm):
        if comm.rank == 0:
            return comm.send([sent], 1, "F")
        return comm.recv([torch.empty(2, 3).T], 0, "F")[0]

    assert run_ranks(PIPE, body)[1] is sent


@pytest.mark.parametrize(
    "out, told",
    [
        ([torch.empty(2, 3, dtype=torch.float64).T], "float64[3, 2] with strides (1, 3)"),
        ([torch.empty(2, 3)], "float32[2, 3] with strides (3, 1)"),
        ([torch.empty(3, 2)], "float32[3, 2] with strides (2, 1)"),
        ([], ""),
    ],
)
def test_a_message_that_is_not_what_its_receiver_expects(out, told):
    def body(comm):
        if comm.rank == 0:
            comm.send([torch.empty(2, 3).T], 1, "F")
        else:
            comm.recv(out, 0, "F")

    error = error_of(PIPE, body, MismatchError)
    assert str(error) == (
        "rank 0 sent (float32[3, 2] with strides (1, 3)) on channel 'F', but rank 1 receives "
        f"({told}); both ends need the same shapes, dtypes and strides"
    )


def test_a_message_that_nobody_receives():
    def body(comm):
        if comm.rank == 0:
            comm.send([ZEROS], 1, "F")
            comm.send([ZEROS], 1, "F")

    error = error_of(PIPE, body, MismatchError)
    assert str(error) == "rank 1 finished without receiving 2 messages from rank 0 on channel 'F'"


# --- deadlocks and mismatches
# -----------------------------------------------------------------------


def test_a_deadlock_says_where_each_rank_stands():
    def body(comm):
        if comm.rank == 0:
            comm.send([ZEROS], 2, "B")
            comm.recv([ZEROS, torch.zeros((), dtype=torch.int64)], 1, "F")
        if comm.rank == 1:
            comm.all_reduce(torch.zeros(2, 3), ("data",))
        if comm.rank == 2:
            comm.exchange("here")

    assert str(error_of(GRID, body, DeadlockError)) == (
        "every rank that has not finished waits for another one:\n"
        "  rank 0 waits to receive (float32[2], int64[]) from rank 1 on channel 'F'\n"
        "  rank 1 waits in all_reduce(sum) of float32[2, 3] over ('data',); not there yet: rank 0\n"
        "  rank 2 waits in exchange; not there yet: ranks 0, 1, 3; "
        "unread: 1 message from rank 0 on channel 'B'\n"
        "  rank 3 has finished"
    )


def test_a_deadlock_of_two_receivers():
    error = error_of(PIPE, lambda comm: comm.recv([ZEROS], 1 - comm.rank, "F"), DeadlockError)
    assert "rank 1 waits to receive (float32[2]) from rank 0 on channel 'F'" in str(error)


@pytest.mark.parametrize(
    "first, second, told",
    [
        (
            lambda comm: comm.all_reduce(torch.zeros(2, 3), ("pipe",)),
            lambda comm: comm.all_reduce(torch.zeros(3, 2), ("pipe",)),
            "rank 0 called all_reduce(sum) of float32[2, 3] over ('pipe',), but rank 1 called "
            "all_reduce(sum) of float32[3, 2] over ('pipe',)",
        ),
        (
            lambda comm: comm.all_reduce(ZEROS, ("pipe",)),
            lambda comm: comm.all_reduce(ZEROS, ("pipe",), op="max"),
            "rank 0 called all_reduce(sum) of float32[2] over ('pipe',), but rank 1 called "
            "all_reduce(max) of float32[2] over ('pipe',)",
        ),
        (
            lambda comm: comm.all_gather(ZEROS, ("pipe",)),
            lambda comm: comm.all_gather(ZEROS.double(), ("pipe",)),
            "rank 0 called all_gather of float32[2] over ('pipe',), but rank 1 called all_gather "
            "of float64[2] over ('pipe',)",
        ),
        (
            lambda comm: comm.all_gather(ZEROS, ("pipe",)),
            lambda comm: comm.exchange(1),
            "rank 0 called all_gather of float32[2] over ('pipe',), but rank 1 called exchange",
        ),
    ],
)
def test_members_of_a_group_that_call_different_things(first, second, told):
    error = error_of(PIPE, lambda comm: (first if comm.rank == 0 else second)(comm), MismatchError)
    assert (
        str(error)
        == f"{told}; ranks 0, 1 form a group and must make the same calls in the same order"
    )
    assert error.__notes__ == ["raised by rank 1 of Mesh(pipe=2)"]


# --- a rank that fails
# ------------------------------------------------------------------------------


def test_the_first_error_is_raised_and_stops_the_others():
    seen = {}

    def body(comm):
        if comm.rank == 1:
            comm.recv([ZEROS], 0, "F")
            raise KeyError("boom")
        try:
            if comm.rank == 0:
                comm.send([ZEROS], 1, "F")
                comm.recv([ZEROS], 1, "F")
            elif comm.rank == 2:
                comm.all_reduce(ZEROS, ("data",))
            else:
                comm.exchange(0)
        except RankError as error:
            seen[comm.rank] = str(error)
            raise

    error = error_of(GRID, body, KeyError)
    assert error.__notes__ == ["raised by rank 1 of Mesh(pipe=2, data=2)"]
    assert seen == dict.fromkeys([0, 2, 3], "rank 1 failed: KeyError: 'boom'")


def test_a_stopped_rank_cannot_go_on():
    def body(comm):
        if comm.rank == 1:
            raise ValueError("first")
        for attempt in (
            lambda: comm.recv([ZEROS], 1, "F"),
            lambda: comm.send([ZEROS], 1, "F"),
            lambda: comm.all_reduce(ZEROS, ("pipe",)),
            lambda: comm.exchange(1),
        ):
            with pytest.raises(RankError, match="rank 1 failed: ValueError: first"):
                attempt()
        raise TypeError("second")

    assert str(error_of(PIPE, body, ValueError)) == "first"


def test_fail_returns_the_first_error():
    returned = {}

    def body(comm):
        if comm.rank == 1:
            comm.recv([ZEROS], 0, "F")
        error = ValueError(f"of {comm.rank}")
        returned[comm.rank] = comm.fail(error)
        comm.send([ZEROS], 1, "F")

    error = error_of(PIPE, body, ValueError)
    assert returned == {0: error} and str(error) == "of 0"


def test_an_interrupt_stops_the_ranks():
    """Also where SIGINT is ignored, as in the background of a shell: the handler is set here."""

    def body(comm):
        for _ in range(2_000):  # a few seconds, if no interrupt comes
            if comm.rank == 0:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            comm.exchange(0)
            time.sleep(0.001)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        error_of(PIPE, body, KeyboardInterrupt)
    finally:
        signal.signal(signal.SIGINT, before)


# --- who runs when, and where
# -----------------------------------------------------------------------


def interleaving():
    """The order in which ranks do things, where sends and receives leave them many choices."""
    order = []

    def body(comm):
        for i in range(3):
            order.append((comm.rank, i))
            comm.send([number(i)], (comm.rank + 1 + i % 2) % 4, f"{i}")
            comm.recv([number(0)], (comm.rank - 1 - i % 2) % 4, f"{i}")
            comm.all_reduce(number(i), ("data",))

    run_ranks(GRID, body)
    return order


def test_every_run_interleaves_alike():
    first = interleaving()
    assert all(interleaving() == first for _ in range(20))
    assert first[:4] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_one_rank_runs_at_a_time():
    inside = []

    def body(comm):
        for _ in range(20):
            inside.append(comm.rank)
            time.sleep(0.0002)
            assert inside == [comm.rank]
            inside.clear()
            comm.exchange(0)

    run_ranks(GRID, body)


def test_the_next_rank_that_can_go_on_runs():
    order = []

    def body(comm):
        if comm.rank == 1:
            comm.recv([ZEROS], 3, "F")
        order.append(comm.rank)
        if comm.rank == 3:
            comm.send([ZEROS], 1, "F")
            comm.recv([ZEROS], 0, "F")
            order.append("3 again")
        if comm.rank == 0:
            comm.recv([ZEROS], 2, "F")
            comm.send([ZEROS], 3, "F")
            order.append("0 again")
        if comm.rank == 2:
            comm.send([ZEROS], 0, "F")

    run_ranks(GRID, body)
    assert order == [0, 2, 3, "0 again", 1, "3 again"]


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


def test_ranks_run_in_a_copy_of_the_callers_context():
    def body(comm):
        seen = VARIABLE.get()
        VARIABLE.set(f"rank {comm.rank}")
        comm.exchange(0)
        return seen, VARIABLE.get(), torch.is_grad_enabled(), torch.get_num_threads()

    token = VARIABLE.set("of the caller")
    try:
        got = run_ranks(PIPE, body)
        assert VARIABLE.get() == "of the caller"
    finally:
        VARIABLE.reset(token)
    threads = torch.get_num_threads()
    assert got == [("of the caller", f"rank {r}", False, threads) for r in range(2)]


def test_ranks_serve_many_runs_and_outlive_an_error():
    with Ranks(GRID) as ranks:
        assert ranks.run(lambda comm: comm.rank) == [0, 1, 2, 3]
        with pytest.raises(DeadlockError):
            ranks.run(lambda comm: comm.recv([ZEROS], 0, "F"))
        with pytest.raises(ZeroDivisionError):
            ranks.run(lambda comm: comm.exchange(1 // comm.rank))
        assert ranks.run(lambda comm: comm.exchange(comm.rank)) == [[0, 1, 2, 3]] * 4
        with pytest.raises(FuncpipeError, match="running already"):
            ranks.run(lambda comm: ranks.run(lambda c: None))
    with pytest.raises(FuncpipeError, match="are closed"):
        ranks.run(lambda comm: None)


def test_ranks_inside_ranks():
    def body(comm):
        return sum(run_ranks(Mesh(seq=3), lambda inner: inner.rank + comm.rank))

    assert run_ranks(PIPE, body) == [3, 6]


def test_no_thread_and_no_result_is_left_behind():
    def rank_threads():
        return [
            t
            for t in threading.enumerate()
            if t.name.startswith("funcpipe-rank") and t not in others
        ]

    others = threading.enumerate()  # a failure, or a runner that a test keeps, may hold threads
    run_ranks(GRID, lambda comm: comm.rank)
    assert not rank_threads()
    ranks = Ranks(PIPE)
    result = ranks.run(lambda comm: torch.zeros(3))
    assert len(rank_threads()) == 2
    assert [len(gc.get_referrers(x)) for x in result] == [1, 1]
    del ranks
    gc.collect()
    assert not rank_threads()


def test_an_axis_that_the_mesh_lacks():
    error = error_of(PIPE, lambda comm: comm.prepare([("data",)]), FuncpipeError)
    assert re.match("prepare: axis 'data' is not in Mesh", str(error))
