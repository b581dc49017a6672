"""What ranks say to each other over process groups, gloo's, in four processes. Failures:
`test_process_group_failures.py`."""

from __future__ import annotations

import itertools
import random
import time
import weakref

import pytest
import torch
from support.collective_loops import DTYPES, KINDS, call, expected, operand, same
from support.group_checks import GRID, LINE, ZEROS, communicator, launched, result

from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.runtime.launch import launch
from funcpipe.errors import MeshError

# --- checks
# -------------------------------------------------------------------------------------------


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
        # All dtypes for one shape, all shapes for one dtype, and one operand too large to be
        # gathered at once.
        few = [c for c in cases if c[2] == (2, 3, 2) or c[3] == torch.float32]
        for axes, kind, shape, dtype in [
            *few,
            (axes_sets[0], "all_reduce", (50_001,), torch.float32),
        ]:
            if kind == "all_reduce_max" and dtype.is_complex:
                continue
            n = mesh.axis_size(axes)
            xs = [operand(kind, r, shape, dtype, n) for r in range(mesh.size)]
            got = call(comm, kind, xs[comm.rank], axes)
            assert same(got, expected(kind, xs, mesh, axes)[comm.rank]), (
                mesh,
                axes,
                kind,
                shape,
                dtype,
            )
            assert got.data_ptr() != xs[comm.rank].data_ptr() or not got.numel()
        comm.close()


def exchange():
    comm = communicator()
    objects = comm.exchange({"rank": comm.rank, "x": torch.full((2,), comm.rank)})
    done = []
    digests = comm.exchange_digest((comm.rank - 2) * 2**61, lambda: done.append(True))
    comm.close()
    return [o["rank"] for o in objects], [o["x"].tolist() for o in objects], digests, done


def digests_of_ranks_ahead(mesh=LINE):
    """Now one rank is ahead, now another; it closes while others are still in the last exchange."""
    comm = communicator(mesh)
    delays = random.Random(comm.rank)
    for i in range(40):
        time.sleep(delays.choice((0, 0, 0.003)))
        assert comm.exchange_digest(100 * i + comm.rank) == [100 * i + r for r in range(mesh.size)]
    comm.close()


def messages():
    """Every rank sends to every other one, on two channels, before anyone receives; received out of
    order."""
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
        assert all(
            a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
            for a, b in zip(got, outs, strict=True)
        )
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
    """A tensor lives until its sender knows that it has arrived: here since the other end has
    answered."""
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
    begun = [
        comm.start_all_gather(torch.ones(2), ("pipe",)),
        comm.start_reduce_scatter(torch.ones(2, 2), ("pipe",)),
    ]
    assert list(comm._started) == begun
    begun[0].wait()
    comm.flush()
    assert not comm._started
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


CHECKS = [
    mesh_of_the_wrong_size,
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
]


@pytest.fixture(scope="module")
def results():
    return launched(CHECKS)


# --- the tests
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_passes_on_every_rank(check, results):
    result(results, check)


def test_exchange(results):
    digests = [(r - 2) * 2**61 for r in range(4)]
    assert (
        result(results, exchange)
        == [([0, 1, 2, 3], [[r, r] for r in range(4)], digests, [True])] * 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 5])
def test_digests_of_a_number_of_ranks_that_is_no_power_of_two(ranks):
    launch(digests_of_ranks_ahead, ranks, Mesh(pipe=ranks), timeout=90)


def test_error_texts(results):
    assert (
        result(results, unprepared_axes)
        == ["no process groups over ('data',): every rank must call prepare([('data',)]) first"] * 4
    )
    assert (
        result(results, mesh_of_the_wrong_size)
        == [
            "Mesh(pipe=3) has 3 ranks, but 4 processes were started; start one for each rank, as "
            "with `torchrun --nproc-per-node=3`, or change the mesh"
        ]
        * 4
    )


def test_two_communicators(results):
    assert result(results, two_communicators) == [((s, 6.0), [7] * 4) for s in (1.0, 1.0, 5.0, 5.0)]


def test_a_process_that_is_not_one_of_several(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        MeshError, match=r"not one of several.*start 4 with `torchrun --nproc-per-node=4"
    ):
        ProcessGroupCommunicator(GRID, "cpu")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MeshError, match="has 4 ranks, but 2 processes were started"):
        ProcessGroupCommunicator(GRID, "cpu")
