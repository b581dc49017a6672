"""Process groups over gloo, in four processes that are started once: every check runs in all of them.

The checks below are functions of a rank; ``results`` starts the processes, runs all checks there and
collects what they return; each test looks at one of them. Checks of failures make communicators of their
own, and break them.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from loops_for_tests import DTYPES, KINDS, call, expected, operand, same

from funcpipe.comm.process_group import ProcessGroupCommunicator
from funcpipe.errors import MeshError, RankError
from funcpipe.mesh import Mesh
from funcpipe.runtime.launch import launch

GRID = Mesh(pipe=2, data=2)
LINE = Mesh(pipe=4)
SOON = 5.0  # seconds in which every rank must have stopped; one second is usual
ZEROS = torch.zeros(2)


def communicator(mesh=GRID, timeout=60.0):
    return ProcessGroupCommunicator(mesh, "cpu", timeout=timeout)


# --- checks: what ranks say ---------------------------------------------------------------------------


def collectives_equal_plain_loops():
    """Bitwise, also in groups of four: sums are taken in group order."""
    for mesh, axes_sets in [
        (GRID, [("pipe",), ("data",), ("pipe", "data"), ("data", "pipe")]),
        (Mesh(one=1, pipe=4), [("pipe",), ("one",), ("one", "pipe")]),
    ]:
        comm = communicator(mesh)
        comm.prepare(axes_sets)
        comm.prepare(reversed(axes_sets))
        shapes = [(), (3,), (2, 3, 2), (0, 2)]
        cases = list(itertools.product(axes_sets, KINDS, shapes, DTYPES))
        # All dtypes for one shape, all shapes for one dtype, and one operand too large to be gathered at
        # once.
        few = [c for c in cases if c[2] == (2, 3, 2) or c[3] == torch.float32]
        for axes, kind, shape, dtype in [*few, (axes_sets[0], "all_reduce", (50_001,), torch.float32)]:
            if kind == "all_reduce_max" and dtype.is_complex:
                continue
            n = mesh.axis_size(axes)
            xs = [operand(kind, r, shape, dtype, n) for r in range(mesh.size)]
            got = call(comm, kind, xs[comm.rank], axes)
            assert same(got, expected(kind, xs, mesh, axes)[comm.rank]), (mesh, axes, kind, shape, dtype)
            assert got.data_ptr() != xs[comm.rank].data_ptr() or not got.numel()
        comm.close()


def exchange():
    comm = communicator()
    objects = comm.exchange({"rank": comm.rank, "x": torch.full((2,), comm.rank)})
    done = []
    digests = comm.exchange_digest((comm.rank - 2) * 2**61, lambda: done.append(True))
    comm.close()
    return [o["rank"] for o in objects], [o["x"].tolist() for o in objects], digests, done


def digests_of_ranks_ahead():
    """Now one rank is ahead, now another."""
    comm = communicator()
    delays = random.Random(comm.rank)
    for i in range(40):
        time.sleep(delays.choice((0, 0, 0.003)))
        assert comm.exchange_digest(100 * i + comm.rank) == [100 * i + r for r in range(4)]
    comm.close()


def messages():
    """Every rank sends to every other one, on two channels, before anyone receives; received out of order."""
    comm = communicator()
    others = [r for r in range(4) if r != comm.rank]
    for i, other, channel in itertools.product(range(20), others, "FB"):
        comm.send([torch.full((i % 3, 2), comm.rank * 100.0 + i), torch.tensor(i)], other, channel)
    for channel, other, i in itertools.product("BF", reversed(others), range(20)):
        x, n = comm.recv([torch.empty(i % 3, 2), torch.tensor(-1)], other, channel)
        assert n == i and (x == other * 100 + i).all() and x.shape == (i % 3, 2)
    comm.flush()
    comm.close()


def layouts():
    """Strides of every kind, all dtypes, in place where the buffer is dense."""
    comm = communicator()
    other = comm.rank ^ 1
    for make in [
        lambda x: x.clone(),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),  # dense, not contiguous
        lambda x: torch.stack([x, x], 2)[:, :, 0],  # not dense
        lambda x: x[:, :, :0],
        lambda x: x[0, 0, 0],
    ]:
        xs = [make(operand("all_gather", comm.rank, (2, 3, 4), dtype, 4)) for dtype in DTYPES]
        want = [make(operand("all_gather", other, (2, 3, 4), dtype, 4)) for dtype in DTYPES]
        outs = [torch.zeros_like(make(torch.empty(2, 3, 4, dtype=dtype))) for dtype in DTYPES]
        comm.send(xs, other, "layouts")
        got = comm.recv(outs, other, "layouts")
        assert all(map(torch.equal, got, want)), (got, want)
        assert all(a.data_ptr() == b.data_ptr() and a.stride() == b.stride() for a, b in zip(got, outs, strict=True))
    wide = torch.zeros(2, 3, 8)
    comm.send([torch.ones(2, 3, 4)], other, "layouts")
    comm.recv([wide[:, :, ::2]], other, "layouts")
    assert wide.flatten().tolist() == [1, 0] * 24
    comm.flush()
    comm.close()


def large_messages_cross():
    """Both directions at once, larger than what sockets hold."""
    comm = communicator()
    other = comm.rank ^ 1
    x = torch.full((1_000_000,), float(comm.rank))
    for _ in range(2):
        comm.send([x], other, "x")
    for _ in range(2):
        assert (comm.recv([torch.empty_like(x)], other, "x")[0] == other).all()
    comm.flush()
    comm.close()


def what_has_arrived_is_let_go():
    """A tensor lives until its sender knows that it has arrived: here since the other end has answered."""
    comm = communicator()
    other = comm.rank ^ 1
    x = torch.ones(1_000_000)
    alive = weakref.ref(x)
    sent = comm.send([x, torch.ones(2), torch.empty(0)], other, "x")
    del x
    comm.recv([torch.empty(1_000_000), torch.empty(2), torch.empty(0)], other, "x")
    comm.send([torch.zeros(1)], other, "answer")
    comm.recv([torch.empty(1)], other, "answer")
    assert alive() is not None
    comm.settle(sent)
    del sent
    assert alive() is None
    comm.flush()
    comm.close()


def flush_waits_for_what_was_started():
    comm = communicator()
    comm.prepare([("pipe",)])
    begun = [comm.start_all_gather(torch.ones(2), ("pipe",)), comm.start_reduce_scatter(torch.ones(2, 2), ("pipe",))]
    assert list(comm._begun) == begun
    begun[0].wait()
    comm.flush()
    assert not comm._begun
    comm.close()


def unprepared_axes():
    comm = communicator()
    comm.prepare([("pipe",)])
    with pytest.raises(MeshError) as caught:
        comm.all_reduce(ZEROS, ("data",))
    comm.close()
    return str(caught.value)


def mesh_of_the_wrong_size():
    with pytest.raises(MeshError) as caught:
        ProcessGroupCommunicator(Mesh(pipe=3), "cpu")
    return str(caught.value)


def two_communicators():
    """On different meshes, closed in the order in which they were made."""
    grid, line = communicator(GRID), communicator(LINE)
    grid.prepare([("data",)])
    line.prepare([("pipe",)])
    x = torch.tensor(float(grid.rank))
    sums = grid.all_reduce(x, ("data",)).item(), line.all_reduce(x, ("pipe",)).item()
    grid.send([x], grid.rank ^ 1, "F")
    line.send([-x], line.rank ^ 1, "F")
    got = line.recv([x.clone()], line.rank ^ 1, "F"), grid.recv([x.clone()], grid.rank ^ 1, "F")
    assert [xs[0].item() for xs in got] == [-(grid.rank ^ 1), grid.rank ^ 1]
    grid.flush()
    grid.close()
    last = line.exchange_digest(7)
    line.close()
    return sums, last


# --- checks: a rank that fails ------------------------------------------------------------------------


def broken(body, timeout=60.0):
    """What a rank gets to know, and after how many seconds, when ``body`` breaks the communicator."""
    comm = communicator(LINE, timeout)
    comm.prepare([("pipe",)])
    comm.exchange_digest(0)
    start = time.monotonic()
    try:
        body(comm)
        text = "nothing"
    except Exception as error:
        text = str(comm.fail(error))
    seconds = time.monotonic() - start
    comm.close()
    return text, seconds


def a_rank_raises():
    """Rank 1 does; the others wait for it, for a rank that waits, and in an exchange."""

    def body(comm):
        if comm.rank == 0:
            comm.recv([ZEROS], 1, "F")
        if comm.rank == 1:
            time.sleep(0.2)
            raise ValueError("boom\n  in two lines")
        if comm.rank == 2:
            comm.recv([ZEROS], 0, "F")
        comm.exchange("here")

    return broken(body)


def a_rank_raises_while_messages_are_awaited():
    """Who holds a receive that was begun holds its connection, which then does not close when the rank gives up."""

    def body(comm):
        HELD.append(comm._groups.mail.recv([torch.empty(1)], (comm.rank + 1) % 4, 7))
        if comm.rank == 1:
            raise ValueError("boom")
        comm.recv([ZEROS], 0 if comm.rank == 2 else 1, "F")

    return broken(body)


HELD = []


def a_rank_raises_before_a_collective():
    def body(comm):
        if comm.rank == 3:
            time.sleep(0.2)
            raise KeyError("boom")
        comm.all_reduce(ZEROS, ("pipe",))

    return broken(body)


def a_rank_raises_before_its_digest():
    def body(comm):
        if comm.rank == 3:
            time.sleep(0.2)
            raise ValueError("boom")
        comm.exchange_digest(1)

    return broken(body)


def a_rank_raises_while_all_else_is_busy():
    """Rank 0 waits for rank 2, which is far from any communication; neither talks to rank 1, which fails."""

    def body(comm):
        if comm.rank == 0:
            comm.recv([ZEROS], 2, "F")
        if comm.rank == 1:
            raise ValueError("boom")
        time.sleep(2)
        comm.send([torch.zeros(1_000_000)], 0, "F")
        comm.flush()

    return broken(body)


def two_ranks_raise():
    def body(comm):
        time.sleep(0.2 * comm.rank)
        if comm.rank in (1, 2):
            raise ValueError(f"of rank {comm.rank}")
        comm.exchange(0)

    return broken(body)


def a_rank_is_late_for_the_construction():
    if dist.get_rank() == 3:
        time.sleep(1.5)
    with pytest.raises(RankError) as caught:
        communicator(LINE, timeout=1.0)
    return str(caught.value)


def a_rank_is_late():
    def body(comm):
        if comm.rank == 0:
            comm.recv([ZEROS], 3, "F")
        time.sleep(1.7 if comm.rank == 3 else 0.4)
        comm.recv([ZEROS], 0, "F")

    return broken(body, timeout=1.0)


def a_rank_is_late_for_a_collective():
    def body(comm):
        if comm.rank == 3:
            time.sleep(1.5)
        comm.all_reduce(ZEROS, ("pipe",))

    return broken(body, timeout=1.0)


def a_rank_is_late_for_its_digest():
    def body(comm):
        if comm.rank == 3:
            time.sleep(1.5)
        comm.exchange_digest(1)

    return broken(body, timeout=1.0)


CHECKS = [
    collectives_equal_plain_loops,
    exchange,
    digests_of_ranks_ahead,
    messages,
    layouts,
    large_messages_cross,
    what_has_arrived_is_let_go,
    flush_waits_for_what_was_started,
    unprepared_axes,
    two_communicators,
    a_rank_raises,
    a_rank_raises_while_messages_are_awaited,
    a_rank_raises_before_a_collective,
    a_rank_raises_before_its_digest,
    a_rank_raises_while_all_else_is_busy,
    two_ranks_raise,
    a_rank_is_late,
    a_rank_is_late_for_a_collective,
    a_rank_is_late_for_its_digest,
    a_rank_is_late_for_the_construction,
]


def run_checks():
    """In each process: every check's result, or the text of its error."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    keeper = communicator()  # so that the default group lives from the first check to the last
    out = {}
    for check in [mesh_of_the_wrong_size, *CHECKS]:
        try:
            out[check.__name__] = True, check()
        except Exception:
            out[check.__name__] = False, traceback.format_exc()
        keeper.exchange_digest(0)  # the next check's communicator may have a short timeout
    keeper.close()
    assert not dist.is_initialized()
    assert not [t for t in threading.enumerate() if t.name == "funcpipe-alarm"]
    return out


@pytest.fixture(scope="module")
def results():
    return launch(run_checks, 4, timeout=90)


def result(results, check):
    """What each rank's check returned."""
    for rank, (fine, value) in enumerate(r[check.__name__] for r in results):
        assert fine, f"rank {rank}: {value}"
    return [r[check.__name__][1] for r in results]


# --- the tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_passes_on_every_rank(check, results):
    result(results, check)


def test_exchange(results):
    digests = [(r - 2) * 2**61 for r in range(4)]
    assert result(results, exchange) == [([0, 1, 2, 3], [[r, r] for r in range(4)], digests, [True])] * 4


def test_error_texts(results):
    assert (
        result(results, unprepared_axes)
        == ["no process groups over ('data',): every rank must call prepare([('data',)]) first"] * 4
    )
    assert (
        result(results, mesh_of_the_wrong_size)
        == [
            "Mesh(pipe=3) has 3 ranks, but 4 processes were started; start one for each rank, "
            "as with `torchrun --nproc-per-node=3`, or change the mesh"
        ]
        * 4
    )


def test_two_communicators(results):
    assert result(results, two_communicators) == [((s, 6.0), [7] * 4) for s in (1.0, 1.0, 5.0, 5.0)]


@pytest.mark.parametrize(
    "check, failed, own, told",
    [
        (a_rank_raises, 1, "boom\n  in two lines", "ValueError: boom in two lines"),
        (a_rank_raises_while_messages_are_awaited, 1, "boom", "ValueError: boom"),
        (a_rank_raises_before_a_collective, 3, "'boom'", "KeyError: 'boom'"),
        (a_rank_raises_before_its_digest, 3, "boom", "ValueError: boom"),
        (a_rank_raises_while_all_else_is_busy, 1, "boom", "ValueError: boom"),
        (two_ranks_raise, 1, "of rank 1", "ValueError: of rank 1"),
    ],
)
def test_every_rank_hears_who_failed_first(check, failed, own, told, results):
    texts, seconds = zip(*result(results, check), strict=True)
    assert texts == tuple(own if r == failed else f"rank {failed} failed: {told}" for r in range(4))
    assert max(seconds) < SOON


def test_a_rank_that_waits_for_a_busy_one_is_freed(results):
    assert result(results, a_rank_raises_while_all_else_is_busy)[0][1] < 1.9


def test_a_late_rank_is_named_with_what_waited_for_it(results):
    texts, seconds = zip(*result(results, a_rank_is_late), strict=True)
    assert max(seconds) < SOON
    told = "it did not answer rank 0, which was receiving (float32[2]) on channel 'F' within 1 s"
    assert set(texts) == {f"rank 3 failed: {told}"}


def test_a_rank_late_for_the_construction(results):
    texts = result(results, a_rank_is_late_for_the_construction)
    assert texts[0].startswith("not every rank of Mesh(pipe=4) came to make process groups within 1 s: ")


def test_a_rank_late_for_a_collective_ends_it(results):
    texts, seconds = zip(*result(results, a_rank_is_late_for_a_collective), strict=True)
    assert max(seconds) < SOON
    assert len(set(texts)) == 1
    assert re.fullmatch(
        r"rank (.) was in all_reduce\(sum\) of float32\[2\] over \('pipe',\); "
        r"not all of ranks ., ., . answered within 1 s",
        texts[0],
    )


def test_a_rank_late_for_its_digest_ends_the_exchange(results):
    texts, seconds = zip(*result(results, a_rank_is_late_for_its_digest), strict=True)
    assert max(seconds) < SOON
    assert len(set(texts)) == 1
    assert re.fullmatch(r"rank . was in exchange_digest; not all of ranks ., ., . answered within 1 s", texts[0])


# --- a process that is killed ---------------------------------------------------------------------------


def beside_a_killed_rank(rank, port, answers):
    """Rank 1 ends without a word; rank 0 waits for it, and rank 2 for rank 0."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    comm = communicator(Mesh(pipe=3))
    comm.exchange_digest(0)
    start = time.monotonic()
    if rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankError) as caught:
        comm.recv([ZEROS], 1 if rank == 0 else 0, "F")
    answers.put((rank, str(caught.value), time.monotonic() - start))
    time.sleep(1 if rank == 0 else 0)  # rank 0 keeps the store that the others read
    comm.close()


def test_a_killed_rank_stops_the_others():
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [context.Process(target=beside_a_killed_rank, args=(r, port, answers)) for r in range(3)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(60)
        assert [w.exitcode for w in workers] == [0, -signal.SIGKILL, 0]
    finally:
        for worker in workers:
            worker.kill()
    told = "it lost contact with rank 0, which was receiving (float32[2]) on channel 'F': "
    for _, text, seconds in [answers.get(), answers.get()]:
        assert text.startswith(f"rank 1 failed: {told}")
        assert seconds < SOON


def test_a_process_that_is_not_one_of_several(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MeshError, match=r"not one of several.*start 4 with `torchrun --nproc-per-node=4"):
        ProcessGroupCommunicator(GRID, "cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MeshError, match="has 4 ranks, but 2 processes were started"):
        ProcessGroupCommunicator(GRID, "cpu")
