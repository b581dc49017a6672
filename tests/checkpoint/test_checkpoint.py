"""Checkpoints of simulated meshes: the bits come back, on any mesh; what is there survives every
failure."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import BATCHES, STACKS, equal, started, with_counts
from support.models import D, batch, keep, params, refused, same_bits, step_of
from support.sharded_stacks import stacks, training
from support.sharded_steps import linear_params
from torch._subclasses.fake_tensor import FakeTensor

import funcpipe as fp
from funcpipe import checkpoint
from funcpipe._src.checkpoint import claims, files, reading
from funcpipe._src.checkpoint import dcp as dcp_chunks
from funcpipe._src.core import pytree as tree
from funcpipe.errors import CheckpointError
from funcpipe.testing import Model, models


@pytest.fixture(params=[3, dcp_chunks.CHUNK], ids="chunks of {}".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements in a chunk: with 3, most leaves of these tests have several."""
    monkeypatch.setattr(dcp_chunks, "CHUNK", request.param)
    return request.param


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A save in the background ends, also one that fails."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("funcpipe-checkpoint"):
            thread.join(5)
            assert not thread.is_alive()


# ---- the bits come back


@given(st.data(), models(max_segments=3), st.integers(1, 40))
def test_any_stack_loads_what_any_other_saved(
    draw: st.DataObject, model: Model, chunk: int
) -> None:
    """Full states are equal, and the stack that saved goes on as if it had not stopped: bitwise."""
    step, init_state = training(model)

    def runner(name: str) -> tuple[Any, Any, Any]:
        mesh, transforms, parts = draw.draw(stacks(model, most=4), label=name)
        run, b = fp.simulate(fp.compose(*transforms)(step), mesh), model.batch(0, parts)
        return run, run.init(init_state, model.init(7), b), b

    run, state, b = runner("saves")
    state, _ = run(state, b)
    other, _, _ = runner("loads")
    with tempfile.TemporaryDirectory() as dir, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_chunks, "CHUNK", chunk)
        checkpoint.save(dir, run, state, step=1)
        assert equal(other.unplace(checkpoint.load(dir, other)[0]), run.unplace(state))
        loaded, info = checkpoint.load(dir, run)
    assert equal(loaded, state) and info.mesh == run.mesh
    assert equal(run(loaded, b), run(state, b))


@functools.cache
def planned(name: str) -> Any:
    """A runner that tests may share."""
    return started(name)[0]


@pytest.mark.parametrize("new", STACKS)
@pytest.mark.parametrize("old", STACKS)
def test_from_one_mesh_to_another(old: str, new: str, chunk: int, tmp_path: Path) -> None:
    """0-d leaves, empty ones, integers, numbers, shards with no element: all states are what
    `place` makes."""
    run, other = planned(old), planned(new)
    state, _ = run(run.place(with_counts(linear_params())), BATCHES[0])
    full = run.unplace(state)
    checkpoint.save(tmp_path, run, state, step=1)
    loaded, info = checkpoint.load(tmp_path, other)
    assert equal(loaded, other.place(full))
    assert info == (1, None, STACKS[old][0], tmp_path / "step-1")
    assert full["n"] == 1 and full["on"] is True


@pytest.mark.parametrize("name", STACKS)
def test_a_run_that_stops_and_goes_on_computes_what_one_that_does_not_stop_computes(
    name: str, tmp_path: Path
) -> None:
    """Bitwise, through a new runner."""
    run, state = started(name)
    wanted = []
    for k, b in enumerate(BATCHES):
        if k == 2:
            checkpoint.save(tmp_path, run, state, step=k)
        state, metrics = run(state, b)
        wanted.append(metrics)
    new, _ = started(name)
    resumed, info = checkpoint.load(tmp_path, new)
    for k in range(info.step, len(BATCHES)):
        resumed, metrics = new(resumed, BATCHES[k])
        assert equal(metrics, wanted[k])
    assert equal(resumed, state)


def test_leaves_in_another_order_of_memory_have_it_again(tmp_path: Path) -> None:
    """A product of matrices may round differently for another order."""
    p = {"w": [params()["w"][0].T, torch.ones(1, dtype=torch.float64).expand(D)]}
    step = step_of(
        lambda p, b: fp.Mean(
            (b["x"] @ p["w"][0] * p["w"][1]).sum(), float(len(b["x"])) * torch.ones(())
        )
    )
    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    state = run.init(keep, p, batch())
    assert state[0]["w"][0].stride() == (1, D)
    checkpoint.save(tmp_path, run, state, step=0)
    loaded, _ = checkpoint.load(tmp_path, run)
    assert equal(loaded, state)
    assert [x.stride() for x in optree.tree_leaves(loaded)] == [
        x.stride() for x in optree.tree_leaves(state)
    ]
    cut = fp.simulate(
        fp.sharded_weights(fp.data_parallel(step, axis="data"), axis="data"), fp.Mesh(data=2)
    )
    cut.init(keep, p, batch())
    assert equal(checkpoint.load(tmp_path, cut)[0], cut.place(p))


class Moments(NamedTuple):
    m: Any
    nothing: None
    low: Any


def test_dtypes_that_are_not_those_of_params(tmp_path: Path) -> None:
    kinds = (torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn)

    def init(p: Any) -> Any:
        return {
            "p": p,
            "opt": Moments(
                optree.tree_map(lambda x: x.to(torch.bfloat16), p),
                None,
                [torch.ones(2, dtype=k) for k in kinds],
            ),
        }

    def step(state: Any, b: Any) -> Any:
        return state, {
            "loss": fp.value_and_grad(
                lambda p, b: fp.Mean((b["x"] @ p["w"][0]).sum(), torch.tensor(1.0))
            )(state["p"], b)[0]
        }

    run = fp.simulate(fp.sharded_weights(step, axis="data"), fp.Mesh(data=3))
    state = run.init(init, params(1), batch())
    checkpoint.save(tmp_path, run, state, step=0)
    loaded, _ = checkpoint.load(tmp_path, run)
    flat = [optree.tree_leaves(x) for x in (loaded, state)]
    assert [x.dtype for x in flat[0]] == [x.dtype for x in flat[1]]
    assert all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(*flat, strict=True)
    )


# ---- who reads and writes what


def test_no_rank_reads_or_holds_more_than_its_part_and_a_chunk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dcp_chunks, "CHUNK", 4)
    run, state = started("pipe=3")
    checkpoint.save(tmp_path, run, state, step=0)
    new, placed = started("pipe=2 data=2 sharded")
    wanted: dict[str, int] = {}
    made: dict[str, int] = {}
    fetched = []
    fill, empty, load = reading._read_file, reading._empty, torch.load

    def rank() -> str:
        return threading.current_thread().name

    def filling(path: Path, found: list[reading.Overlap], values: Any) -> None:
        wanted[rank()] = wanted.get(rank(), 0) + sum(
            x.end - x.start for x in found if x.shard.shape is not None
        )
        fill(path, found, values)

    def making(part: Any) -> torch.Tensor:
        out = empty(part)
        made[rank()] = made.get(rank(), 0) + out.numel()
        return out

    def loading(*args: Any, **kwargs: Any) -> Any:
        out = load(*args, **kwargs)
        fetched.append(out.numel() if isinstance(out, torch.Tensor) else 0)
        return out

    monkeypatch.setattr(reading, "_read_file", filling)
    monkeypatch.setattr(reading, "_empty", making)
    monkeypatch.setattr(torch, "load", loading)
    loaded, _ = checkpoint.load(tmp_path, new)
    held = [
        sum(x.numel() for x in optree.tree_leaves(s) if isinstance(x, torch.Tensor)) for s in placed
    ]
    assert sorted(wanted.values()) == sorted(made.values()) == sorted(held) and max(fetched) == 4
    for x in optree.tree_leaves(loaded):
        assert not isinstance(x, torch.Tensor) or x.untyped_storage().nbytes() == x.nbytes


def test_loading_makes_no_second_state(tmp_path: Path) -> None:
    """``init_state`` is asked again for what the leaves are, on fakes."""
    seen: list[Any] = []

    def init(p: Any) -> Any:
        seen.append(p["w"][0])
        return {"p": p, "m": [torch.zeros(x.shape, dtype=x.dtype) for x in p["w"]]}

    def step(state: Any, b: Any) -> Any:
        new, metrics = step_of()(state["p"], b)
        return {**state, "p": new}, metrics

    run = fp.simulate(fp.pipelined(step, axis="pipe", microbatches=2), fp.Mesh(pipe=1))
    state = run.init(init, params(), batch())
    seen.clear()
    checkpoint.save(tmp_path, run, state, step=0)
    checkpoint.load(tmp_path, run)
    assert seen and all(isinstance(x, FakeTensor) for x in seen)


def test_ranks_that_hold_the_same_share_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dcp_chunks, "CHUNK", 4)
    run, state = started("data=3 whole")
    path = checkpoint.save(tmp_path, run, state, step=0)
    sizes = [(path / f"__{rank}_0.distcp").stat().st_size for rank in range(3)]
    assert min(sizes) > 0.5 * max(sizes)


def test_plain_torch_distributed_checkpoint_reads_it(chunk: int, tmp_path: Path) -> None:
    run, state = started("pipe=2 data=2 sharded")
    path = checkpoint.save(tmp_path, run, state, step=0)
    w = linear_params()["w"]
    found = {"state['of'][0]['w']": torch.zeros(w.numel(), dtype=w.dtype), "state['n']": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a single process
        dcp.load(found, checkpoint_id=path, no_dist=True)
    assert torch.equal(found["state['of'][0]['w']"].view(w.shape), w) and found["state['n']"] == 0


def test_export(chunk: int, tmp_path: Path) -> None:
    run, state = started("pipe=2 data=2 sharded")
    checkpoint.save(tmp_path, run, state, step=0, extra=[1])
    state, _ = run(state, BATCHES[0])
    checkpoint.save(tmp_path, run, state, step=5)
    info = checkpoint.export(tmp_path, tmp_path / "state.pt", step=0)
    assert info == (0, [1], run.mesh, tmp_path / "step-0")
    first = torch.load(tmp_path / "state.pt", weights_only=True)
    checkpoint.export(tmp_path, str(tmp_path / "state.pt"))
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(found) == list(first) == [f"state{path}" for path in tree.paths(run.unplace(state))]
    assert same_bits(list(found.values()), run.unplace(state))
    assert {type(x) for x in found.values()} == {torch.Tensor, int, bool}
    assert not same_bits(list(first.values()), run.unplace(state))


# ---- the background


def test_a_save_in_the_background_is_of_the_state_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It writes nothing before the state has changed."""
    changed, write = threading.Event(), dcp.FileSystemWriter.write_data
    monkeypatch.setattr(
        dcp.FileSystemWriter, "write_data", lambda *args: changed.wait(60) and write(*args)
    )
    run, state = started("pipe=2 data=2 sharded")
    full = run.unplace(state)
    saving = checkpoint.save_async(tmp_path, run, state, step=0, extra={"a": None})
    optree.tree_map(lambda x: x.fill_(9) if isinstance(x, torch.Tensor) else x, state)
    assert checkpoint.steps(tmp_path) == []
    changed.set()
    assert saving.wait() == saving.wait() == tmp_path / "step-0"
    loaded, info = checkpoint.load(tmp_path, run)
    assert equal(run.unplace(loaded), full) and info.extra == {"a": None}


def test_two_saves_in_the_background_at_once(tmp_path: Path) -> None:
    run, state = started("data=4 sharded")
    savings = [checkpoint.save_async(tmp_path, run, state, step=k) for k in range(2)]
    assert [saving.wait().name for saving in savings] == ["step-0", "step-1"]
    assert checkpoint.steps(tmp_path) == [0, 1]


def test_what_fails_in_the_background_is_raised_by_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, state = started("data=4 sharded")
    fail_in(monkeypatch, dcp.FileSystemWriter, "write_data")
    saving = checkpoint.save_async(tmp_path, run, state, step=3)
    for _ in range(2):
        with refused(
            CheckpointError, f"saving step 3 to {tmp_path} failed on rank 0: OSError: no space left"
        ):
            saving.wait()
    assert checkpoint.steps(tmp_path) == []


# ---- two saves of one step, and folders of saves that died


@contextlib.contextmanager
def held_up(save: Callable[[], checkpoint.Saving]) -> Iterator[checkpoint.Saving]:
    """A save in the background that has begun, and ends after the block; other saves are not held
    up."""
    go, begun, write = threading.Event(), threading.Event(), dcp.FileSystemWriter.write_data
    folders: list[Path] = []

    def writing(self: Any, *args: Any) -> Any:
        folders.append(self.path)
        begun.set()
        assert self.path != folders[0] or go.wait(60)
        return write(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", writing)
        saving = save()
        assert begun.wait(60)
        yield saving
        go.set()
        concurrent.futures.wait([saving._future], 60)


def test_of_two_saves_of_a_step_the_one_that_is_complete_first_is_there(tmp_path: Path) -> None:
    """The other one is refused, and what is there is of one state."""
    run, state = started("data=4 sharded")
    later, _ = run(run.place(run.unplace(state)), BATCHES[0])
    for second in (
        checkpoint.save,
        lambda *args, **options: checkpoint.save_async(*args, **options).wait(),
    ):
        root = tmp_path / second.__name__.strip("<>")
        with held_up(lambda root=root: checkpoint.save_async(root, run, state, step=1)) as saving:
            second(root, run, later, step=1)
            assert checkpoint.steps(root) == [1] and len(os.listdir(root)) == 2
        for _ in range(2):
            with refused(
                CheckpointError, f"{root}/step-1 is there already: save into another directory, or"
            ):
                saving.wait()
        assert os.listdir(root) == ["step-1"]
        assert equal(checkpoint.load(root, run)[0], later)


def test_two_runners_that_save_a_step_at_once(tmp_path: Path) -> None:
    pairs = [started("pipe=3"), started("pipe=3")]
    for trial in range(4):
        root, said = tmp_path / str(trial), []

        def save(pair: Any, root: Path = root, said: list = said) -> None:
            try:
                said.append(checkpoint.save(root, *pair, step=1))
            except CheckpointError as error:
                said.append(str(error))

        threads = [threading.Thread(target=save, args=(pair,)) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        told = [text for text in said if isinstance(text, str)]
        assert len(told) == 1 and told[0].startswith(f"{root}/step-1 is there already: ")
        assert os.listdir(root) == ["step-1"]
        assert equal(checkpoint.load(root, pairs[0][0])[0], pairs[0][1])


def test_a_save_that_is_under_way_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    """Other saves meanwhile, with ``keep``, leave its folder alone, however old it is."""
    run, state = started("plain")
    with held_up(lambda: checkpoint.save_async(tmp_path, run, state, step=1)) as saving:
        (folder,) = tmp_path.iterdir()
        for path in (*folder.iterdir(), folder):
            os.utime(path, (0, 0))
        for step in (2, 3):
            checkpoint.save(tmp_path, run, state, step=step, keep=2)
        assert folder.exists()
    assert saving.wait() == tmp_path / "step-1" and checkpoint.steps(tmp_path) == [1, 2, 3]
    assert equal(checkpoint.load(tmp_path, run, step=1)[0], state)


def left_by(root: Path, name: str, lock: str | None, age: float = 0) -> Path:
    """What a save that died left: a data file, and a lock with what it says of its machine."""
    folder = root / name
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"x" * 100)
    if lock is not None:
        (folder / "lock").write_text(lock)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - age,) * 2)
    return folder


def test_what_dead_saves_left_goes(tmp_path: Path) -> None:
    """At once where it is known that they are dead, else when it has not changed for a day."""
    here, day = claims._machine(), 24 * 3600.0
    run, state = started("plain")
    dead = [
        left_by(tmp_path, "step-1.0a.tmp", here),
        left_by(tmp_path, "step-2.0b.tmp", "another machine", age=day + 60),
        left_by(tmp_path, "step-3.0c.tmp", None, age=day + 60),
        left_by(tmp_path, "step-4.tmp", None, age=day + 60),
    ]
    others = [
        left_by(tmp_path, "step-2.1b.tmp", "another machine", age=day - 600),
        left_by(tmp_path, "step-3.1c.tmp", None),
        left_by(tmp_path, "step-5.tmp", None),
        left_by(tmp_path, "my-step-6.tmp", None, age=2 * day),
        left_by(tmp_path, "step-7.notes.tmp", None, age=2 * day),
    ]
    checkpoint.save(tmp_path, run, state, step=5, keep=1)
    assert not any(path.exists() for path in dead) and all(path.exists() for path in others)
    assert checkpoint.steps(tmp_path) == [5]


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Saves work; what is left goes by its age."""

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", none)
    run, state = started("plain")
    old = left_by(tmp_path, "step-1.0a.tmp", claims._machine(), age=25 * 3600.0)
    new = left_by(tmp_path, "step-1.0b.tmp", claims._machine())
    checkpoint.save(tmp_path, run, state, step=1)
    assert not old.exists() and new.exists() and checkpoint.steps(tmp_path) == [1]


def test_what_a_removal_left_of_a_step_is_no_hindrance(tmp_path: Path) -> None:
    run, state = started("plain")
    path = checkpoint.save(tmp_path, run, state, step=1)
    (path / "checkpoint.json").unlink()
    assert checkpoint.steps(tmp_path) == []
    checkpoint.save(tmp_path, run, state, step=1)
    assert os.listdir(tmp_path) == ["step-1"] and equal(checkpoint.load(tmp_path, run)[0], state)


# ---- what is there survives


def fail_in(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int = 0) -> None:
    """Let a function raise, after some calls."""
    inner, left = getattr(owner, name), iter(range(calls))

    def fn(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise OSError("no space left")
        return inner(*args, **kwargs)

    patch.setattr(owner, name, fn)


@pytest.mark.parametrize(
    "owner, name, calls",
    [
        (dcp.FileSystemWriter, "write_data", 0),
        (dcp.FileSystemWriter, "write_data", 2),
        (dcp.FileSystemWriter, "finish", 0),
        (files, "_sync", 0),
        (json, "dump", 0),
        (Path, "rename", 0),
        (files, "_sync", 1),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_save_that_fails_leaves_what_is_there(
    owner: Any, name: str, calls: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, state = started("data=4 sharded")
    checkpoint.save(tmp_path, run, state, step=1)
    first = state
    state, _ = run(state, BATCHES[0])
    with monkeypatch.context() as patch:
        # DCP renames its own file first
        fail_in(patch, owner, name, calls + (name == "rename"))
        with refused(
            CheckpointError, "saving step 2 to", "failed on rank", "OSError: no space left"
        ):
            checkpoint.save(tmp_path, run, state, step=2, keep=1)
    assert not list(tmp_path.glob("*.tmp"))
    loaded, info = checkpoint.load(tmp_path, run)
    renamed = (name, calls) == ("_sync", 1)
    assert info.step == 1 + renamed and equal(loaded, state if renamed else first)
    if not renamed:
        checkpoint.save(tmp_path, run, state, step=2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert equal(checkpoint.load(tmp_path, run)[0], state)


def test_a_removal_that_dies_leaves_nothing_that_looks_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, state = started("data=3 whole")
    for k in range(3):
        checkpoint.save(tmp_path, run, state, step=k)
    with monkeypatch.context() as patch:
        fail_in(patch, files.shutil, "rmtree")
        with refused(CheckpointError, "saving step 3", "OSError"):
            checkpoint.save(tmp_path, run, state, step=3, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2, 3] and (tmp_path / "step-0").exists()
    checkpoint.save(tmp_path, run, state, step=4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-3", "step-4"]


def test_keep(tmp_path: Path) -> None:
    run, state = started("plain")
    kept = []
    for k in (0, 9, 10, 11, 5):
        checkpoint.save(tmp_path, run, state, step=k, keep=2 if k > 9 else None)
        kept.append(checkpoint.steps(tmp_path))
    assert kept == [[0], [0, 9], [9, 10], [10, 11], [5, 10, 11]]
    assert checkpoint.load(tmp_path, run)[1].step == 11
    assert checkpoint.load(tmp_path, run, step=10)[1].step == 10
