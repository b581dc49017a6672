"""Checkpoints of real processes: the files of a simulation and back; failures; a training that is
killed and goes on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import refused, same_bits
from support.sharded_steps import clipped, data, linear_batch, linear_params, pipe, sharded, start
from torch._subclasses.fake_tensor import FakeTensor

import funcpipe as fp
from funcpipe import checkpoint
from funcpipe._src.checkpoint import dcp as dcp_chunks
from funcpipe.errors import CheckpointError, FuncpipeError, RankError

EXAMPLES = Path(__file__).parents[2] / "examples"
# Seconds in which every rank must have stopped when one of them dies; one second is usual.
SOON = 10.0

BATCHES = [linear_batch(k, [1.0] * 8) for k in range(4)]
STACKS: dict[str, tuple[fp.Mesh, list[Callable]]] = {
    "pipe=2 data=2": (fp.Mesh(pipe=2, data=2), [pipe, data, sharded]),
    "data=4": (fp.Mesh(data=4), [data, sharded]),
    "data=2": (fp.Mesh(data=2), [data, sharded]),
}


def started(runner: Callable, name: str) -> tuple[Any, Any]:
    """A runner and its first state; leaves have several chunks."""
    dcp_chunks.CHUNK = 3
    mesh, stack = STACKS[name]
    run = runner(fp.compose(*stack)(clipped), mesh)
    return run, run.init(start, linear_params(), BATCHES[0])


def spmd(step: Callable, mesh: fp.Mesh) -> Any:
    return fp.spmd(step, mesh, device="cpu", timeout=30)


def steps(run: Any, state: Any, *numbers: int) -> tuple[Any, list[Any]]:
    metrics = []
    for k in numbers:
        state, new = run(state, BATCHES[k])
        metrics.append(new)
    return state, metrics


def equal(a: Any, b: Any) -> bool:
    return optree.tree_structure(a) == optree.tree_structure(b) and same_bits(a, b)


# ---- what every process runs


def outcome(body: Callable[[], Any]) -> tuple[str, str]:
    try:
        body()
    except FuncpipeError as error:
        return type(error).__name__, str(error)
    return "no error", ""


def failures(root: Path, run: Any, state: Any) -> dict[str, tuple[str, str]]:
    """Errors that all ranks must raise alike; the run goes on after each."""
    last, out = dist.get_rank() == 3, {}

    def save(**options):
        return outcome(lambda: checkpoint.save(root, run, state, **{"step": 9, **options}))

    out["step"] = save(step=9 + last)
    out["extra"] = save(extra={"seed": int(last)})
    out["none"] = outcome(lambda: checkpoint.load(root / "none", run))
    with pytest.MonkeyPatch.context() as patch:
        if last:
            patch.setattr(dcp.FileSystemWriter, "write_data", full_disk)
        out["write"] = save()
        saving = checkpoint.save_async(root, run, state, step=9)
        out["background"] = outcome(saving.wait)
    out["other call"] = outcome(
        lambda: checkpoint.load(root, run) if last else run(state, BATCHES[0])
    )
    out["again"] = save()
    out["there"] = save()
    out["damaged"] = damaged(root, run)
    steps(run, state, 0)
    return out


def damaged(root: Path, run: Any) -> tuple[str, str]:
    """A load in which the file of rank 3 has a wrong byte. Rank 0 puts it there, before the load
    begins for anyone."""
    file = root / "step-9" / "__3_0.distcp"
    whole = file.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    out = outcome(lambda: checkpoint.load(root, run))
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_bytes(whole)
    return out


def full_disk(*_: Any) -> Any:
    raise OSError("no space left")


def work(root: Path) -> dict[str, Any]:
    """Steps with saves between them, loads on another mesh and of what a simulation saved,
    failures."""
    torch.set_num_threads(1)
    run, state = started(spmd, "pipe=2 data=2")
    out: dict[str, Any] = {"simulated": checkpoint.load(root / "simulated", run)}
    state, first = steps(run, state, 0, 1)
    checkpoint.save(root / "real", run, state, step=2, extra={"seed": 3})
    saving = checkpoint.save_async(root / "real", run, state, step=20)
    state, second = steps(run, state, 2, 3)
    saving.wait()
    out["run"] = first + second, run.unplace(state)
    out["failures"] = failures(root / "failures", run, state)
    other, _ = started(spmd, "data=4")
    out["other"] = [
        other.unplace(checkpoint.load(root / "real", other, step=k)[0]) for k in (2, 20)
    ]
    resumed, info = checkpoint.load(root / "real", run, step=2)
    resumed, metrics = steps(run, resumed, 2, 3)
    out["resumed"] = metrics, run.unplace(resumed), info
    checkpoint.save_async(
        root / "left", run, state, step=4
    )  # nobody waits for it, and nobody closes the run
    return out


def of_a_pair(root: Path) -> tuple[list[Any], tuple[str, str]]:
    """Two processes go on with what a simulation saved, and with what they saved; a disk is full
    for one of them."""
    torch.set_num_threads(1)
    run, _ = started(spmd, "data=2")
    state, _ = steps(run, checkpoint.load(root / "simulated", run)[0], 1)
    checkpoint.save(root / "real", run, state, step=2)
    with pytest.MonkeyPatch.context() as patch:
        if run.rank:
            patch.setattr(dcp.FileSystemWriter, "write_data", full_disk)
        failed = outcome(lambda: checkpoint.save(root / "real", run, state, step=3))
    metrics = steps(run, checkpoint.load(root / "real", run)[0], 2)[1]
    return metrics, failed


def test_two_processes_and_a_simulation_load_what_the_other_saved(tmp_path: Path) -> None:
    run, state = started(fp.simulate, "data=2")
    state, _ = steps(run, state, 0)
    checkpoint.save(tmp_path / "simulated", run, state, step=1)
    found = fp.launch(of_a_pair, 2, tmp_path, timeout=120)
    state, _ = steps(run, state, 1)
    loaded, info = checkpoint.load(tmp_path / "real", run)
    assert info.step == 2 and equal(loaded, state)
    wanted = steps(run, state, 2)[1]
    for metrics, failed in found:
        assert equal(metrics, wanted)
        assert failed == (
            "CheckpointError",
            f"saving step 3 to {tmp_path / 'real'} failed on rank 1: OSError: no space left",
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ran(root: Path) -> list[dict[str, Any]]:
    """What every rank saw."""
    run, state = started(fp.simulate, "data=4")
    state, _ = steps(run, state, 0)
    checkpoint.save(root / "simulated", run, state, step=1)
    return fp.launch(work, 4, root, timeout=120)


@pytest.mark.slow
def test_processes_load_what_a_simulation_saved(ran: list[dict[str, Any]], root: Path) -> None:
    run, _ = started(fp.simulate, "pipe=2 data=2")
    states, info = checkpoint.load(root / "simulated", run)
    for rank, result in enumerate(ran):
        assert equal(result["simulated"][0], states[rank]) and result["simulated"][1] == info


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_a_simulation_loads_what_processes_saved(
    name: str, ran: list[dict[str, Any]], root: Path
) -> None:
    """Saved in the background or not; it goes on with the bits that the processes computed."""
    simulated, _ = started(fp.simulate, name)
    run, state = started(fp.simulate, "pipe=2 data=2")
    state, _ = steps(run, state, 0, 1)
    for k in (2, 20):
        loaded, info = checkpoint.load(root / "real", simulated, step=k)
        assert equal(simulated.unplace(loaded), run.unplace(state))
        assert info == (k, {"seed": 3} if k == 2 else None, run.mesh, root / "real" / f"step-{k}")
    for result in ran:
        assert equal(result["other"], [run.unplace(state)] * 2)
    state, metrics = steps(run, run.place(start(linear_params())), 0, 1, 2, 3)
    left, _ = checkpoint.load(root / "left", run)
    assert equal(left, state)
    for result in ran:
        assert equal(result["run"], (metrics, run.unplace(state)))


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_bits_of_one_that_did_not_stop(
    ran: list[dict[str, Any]],
) -> None:
    for result in ran:
        metrics, full, info = result["resumed"]
        assert info.step == 2
        assert equal(metrics, result["run"][0][2:]) and equal(full, result["run"][1])


@pytest.mark.slow
def test_a_failure_of_one_rank_is_an_error_of_all(ran: list[dict[str, Any]], root: Path) -> None:
    said = [result["failures"] for result in ran]
    assert said == [said[0]] * 4
    there = root / "failures"
    kind, text = said[0].pop("damaged")
    assert kind == "CheckpointError"
    assert text.startswith(
        f"{there}/step-9/__3_0.distcp is damaged, or belongs to another checkpoint: bytes 0 to "
    )
    assert said[0] == {
        "step": (
            "MismatchError",
            f"fp.checkpoint.save: rank 0 saves step=9, extra=null, keep=None to {there}, but rank "
            f"3 saves step=10, extra=null, keep=None to {there}: every rank saves the same step of "
            "the same run, with the same extra and keep",
        ),
        "extra": (
            "MismatchError",
            f'fp.checkpoint.save: rank 0 saves step=9, extra={{"seed": 0}}, keep=None to '
            f"{there}, but rank 3 saves step=9, "
            f'extra={{"seed": 1}}, keep=None to {there}: every rank saves the same step of the '
            "same run, with the same extra "
            "and keep",
        ),
        "none": (
            "CheckpointError",
            f"{there / 'none'} holds no checkpoint: pass the directory that fp.checkpoint.save was "
            "given",
        ),
        "write": (
            "CheckpointError",
            f"saving step 9 to {there} failed on rank 3: OSError: no space left",
        ),
        "background": (
            "CheckpointError",
            f"saving step 9 to {there} failed on rank 3: OSError: no space left",
        ),
        "other call": (
            "MismatchError",
            "rank 0 is about to run 'step', rank 3 'load a checkpoint': all ranks run the same "
            "calls in the same order",
        ),
        "again": ("no error", ""),
        "there": (
            "CheckpointError",
            f"{there}/step-9 is there already: save into another directory, or remove it first",
        ),
    }


# ---- kill -9


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies(root: Path, background: bool) -> None:
    """Rank 1 dies while it writes. Rank 0 leaves a note of what it was told."""
    run = spmd(data(clipped), fp.Mesh(data=2))
    state = run.init(start, linear_params(), BATCHES[0])
    checkpoint.save(root, run, state, step=0)
    if run.rank:
        dcp.FileSystemWriter.write_data = lambda *_: kill()
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # the launcher stops the others; this one is to speak first
    began = time.monotonic()
    try:
        if background:
            checkpoint.save_async(root, run, state, step=1).wait()
        else:
            checkpoint.save(root, run, state, step=1)
    except RankError as error:
        (root / "told").write_text(f"{time.monotonic() - began} {error}")
    os._exit(1)  # else it would stay until the launcher loses patience


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_process_that_dies_in_a_save(background: bool, tmp_path: Path) -> None:
    """The other one is told soon, and what was saved before is there."""
    with pytest.raises(RankError, match="rank 1 failed: ended by SIGKILL"):
        fp.launch(dies, 2, tmp_path, background, timeout=60)
    seconds, told = (tmp_path / "told").read_text().split(" ", 1)
    assert float(seconds) < SOON and told.startswith("rank 1 failed")
    assert checkpoint.steps(tmp_path) == [0]
    (left,) = tmp_path.glob("step-1.*.tmp")
    assert sorted(os.listdir(tmp_path)) == ["step-0", left.name, "told"]
    run, state = started(fp.simulate, "data=4")
    checkpoint.save(tmp_path, run, state, step=2)
    assert sorted(os.listdir(tmp_path)) == ["step-0", "step-2", "told"]


def waits_in_vain(root: Path) -> str:
    """Rank 1 does not come to make the process groups of a save in the background, until rank 0 has
    given it up."""
    run = fp.spmd(data(clipped), fp.Mesh(data=2), device="cpu", timeout=5)
    state = run.init(start, linear_params(), BATCHES[0])
    new_group = dist.new_group

    def late(*args: Any, **kwargs: Any) -> Any:
        until = time.monotonic() + 60
        while not (root / "given up").exists() and time.monotonic() < until:
            time.sleep(0.05)
        return new_group(*args, **kwargs)

    if run.rank:
        dist.new_group = late
    kind, text = outcome(lambda: checkpoint.save_async(root, run, state, step=1).wait())
    (root / "given up").touch()
    return f"{kind}: {text}"


@pytest.mark.slow
def test_a_save_in_the_background_is_as_patient_as_its_runner(tmp_path: Path) -> None:
    """By default ranks wait for ten minutes; the launcher does not."""
    told = fp.launch(waits_in_vain, 2, tmp_path, timeout=60)
    assert told[0].startswith(
        "RankError: not every rank of Mesh(data=2) came to make process groups within 5 s: "
    )
    assert told[1].startswith("RankError: ") and checkpoint.steps(tmp_path) == []


OPTIONS = [
    "--short",
    "--blocks",
    "1",
    "--width",
    "32",
    "--length",
    "16",
    "--rows",
    "4",
    "--microbatches",
    "2",
]
OPTIONS += ["--steps", "8", "--mesh", "pipe=2"]
# Losses of another mesh: sums in another order, 2**-24 each, on which some steps of Adam build.
FLOAT32 = 1e-4


def train(options: list[str], armed: tuple[int, str, int] | None = None) -> list[float]:
    """The losses of ``examples/train_lm.py``; ``armed`` says which rank dies, where, and at which
    step."""
    sys.path.insert(0, str(EXAMPLES))
    import train_lm

    if armed is not None and armed[0] == train_lm.rank():
        (arm_step if armed[1] == "step" else arm_save)(armed[2])
    return train_lm.work(train_lm.parse(options)).losses


def arm_step(number: int) -> None:
    """Let this process die in a step, while the other one waits for its part of the norm."""
    clip, left = fp.clip_by_global_norm, iter(range(number))

    def dying(grads: Any, norm: float) -> Any:
        if not isinstance(optree.tree_leaves(grads)[0], FakeTensor) and next(left, None) is None:
            kill()
        return clip(grads, norm)

    fp.clip_by_global_norm = dying


def arm_save(number: int) -> None:
    """Let this process die in a save, when it has written its own file."""
    write = dcp.FileSystemWriter.write_data

    def dying(self: Any, *args: Any) -> Any:
        out = write(self, *args)
        return kill() if Path(self.path).name.startswith(f"step-{number}.") else out

    dcp.FileSystemWriter.write_data = dying


@pytest.mark.slow
def test_a_training_that_is_killed_twice_goes_on_as_if_it_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 dies in the sixth step, then rank 0 in the save after it; the losses are those of an
    uninterrupted run."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "saved"
    wanted = train([*OPTIONS, "--simulate"])
    saves = ["--save", str(root), "--save-every", "2"]
    with pytest.raises(RankError, match="rank 1 failed: ended by SIGKILL"):
        fp.launch(train, 2, [*OPTIONS, *saves], (1, "step", 5), timeout=120)
    assert checkpoint.steps(root) == [2, 4]
    resumed = ["--resume", str(root)]
    with pytest.raises(RankError, match="rank 0 failed: ended by SIGKILL"):
        fp.launch(train, 2, [*OPTIONS, *saves, *resumed], (0, "save", 6), timeout=120)
    assert checkpoint.steps(root) == [2, 4] and len(list(root.glob("step-6.*.tmp"))) == 1
    for losses in fp.launch(train, 2, [*OPTIONS, *saves, *resumed], timeout=120):
        assert losses == wanted[4:]
    assert checkpoint.steps(root) == [6, 8] and sorted(os.listdir(root)) == ["step-6", "step-8"]
    shutil.rmtree(root / "step-8")
    other = ["--simulate", "--mesh", "pipe=2,data=2", "--shard", "data", "--schedule", "gpipe"]
    assert train([*OPTIONS, *resumed, *other]) == pytest.approx(wanted[6:], rel=FLOAT32)


def test_a_training_that_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no checkpoint, or the data would be others."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_lm

    args = train_lm.parse([*OPTIONS, "--resume", str(tmp_path)])
    with refused(CheckpointError, f"{tmp_path} holds no checkpoint"):
        train_lm.resume(started(fp.simulate, "data=4")[0], args)
    info = checkpoint.Info(8, train_lm.settings(args), args.mesh, tmp_path / "step-8")
    monkeypatch.setattr(checkpoint, "load", lambda *_: ("state", info))
    assert train_lm.resume(None, args) == ("state", 8)  # complete; see `test_examples.py`
    with refused(
        CheckpointError, "step-8 was saved with", "'rows': 4", "this run has", "'rows': 16"
    ):
        train_lm.resume(None, train_lm.parse([*OPTIONS, "--rows", "16"]))
