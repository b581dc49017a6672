"""What the others get to know of a rank that fails, is late or is killed: over gloo, in four
processes.

Each check makes a communicator of its own, and breaks it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from support.group_checks import LINE, ZEROS, communicator, launched, result

from funcpipe._src.core.mesh import Mesh
from funcpipe.errors import RankError

SOON = 5.0  # seconds in which every rank must have stopped; one second is usual

# --- checks
# -------------------------------------------------------------------------------------------


def broken(body, timeout=60.0):
    """What a rank gets to know, and after how many seconds, when ``body`` breaks the
    communicator."""
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
    """Who holds a receive that was begun holds its connection, which then does not close when the
    rank gives up."""

    def body(comm):
        HELD.append(comm._groups.messages.recv([torch.empty(1)], (comm.rank + 1) % 4, 7))
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
    """Rank 0 waits for rank 2, which is far from any communication; neither talks to rank 1, which
    fails."""

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


@pytest.fixture(scope="module")
def results():
    return launched(CHECKS)


# --- the tests
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_passes_on_every_rank(check, results):
    result(results, check)


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
    assert texts[0].startswith(
        "not every rank of Mesh(pipe=4) came to make process groups within 1 s: "
    )


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
    assert re.fullmatch(
        r"rank . was in exchange_digest; not all of ranks ., ., . answered within 1 s", texts[0]
    )


# --- a process that is killed
# ---------------------------------------------------------------------------


def beside_a_killed_rank(rank, port, answers, victim):
    """A rank ends without a word. Rank 0 waits for it, and rank 2 for rank 0; or both exchange
    digests."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    comm = communicator(Mesh(pipe=3))
    comm.exchange_digest(0)
    start = time.monotonic()
    if rank == victim:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankError) as caught:
        if victim == 1:
            comm.recv([ZEROS], 1 if rank == 0 else 0, "F")
        comm.exchange_digest(1)
    answers.put((rank, str(caught.value), time.monotonic() - start))
    time.sleep(1 if rank == 0 else 0)  # rank 0 keeps the store that the others read
    comm.close()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_stops_the_others_and_is_named(victim):
    """Also by a rank whose connections to several others close, and where the store goes with rank
    0."""
    context = torch.multiprocessing.get_context("forkserver")
    answers = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=beside_a_killed_rank, args=(r, port, answers, victim))
        for r in range(3)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(60)
        assert [w.exitcode for w in workers] == [
            -signal.SIGKILL if r == victim else 0 for r in range(3)
        ]
    finally:
        for worker in workers:
            worker.kill()
    told = "receiving (float32[2]) on channel 'F': " if victim == 1 else "in exchange_digest: "
    for _ in range(2):
        assert not answers.empty()  # every worker has ended, so it has answered by now
        _, text, seconds = answers.get()
        assert re.match(
            rf"rank {victim} failed: it lost contact with rank [^{victim}], which was {re.escape(told)}",
            text,
        )
        assert seconds < SOON
