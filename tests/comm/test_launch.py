"""Starting processes: results in rank order, the error of the rank that failed first, a quiet
console."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from funcpipe.transforms import data_parallel

from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.runtime.launch import _cause, _report, launch
from funcpipe._src.runtime.spmd import spmd
from funcpipe.errors import RankError


def describe(word, x):
    assert os.environ["LOCAL_RANK"] == os.environ["RANK"]
    return (
        word,
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        x + 1,
        torch.get_num_threads(),
    )


def test_results_in_rank_order():
    handler = signal.getsignal(signal.SIGINT)
    results = launch(describe, 2, "a", torch.arange(3), timeout=120)
    threads = (
        max(1, len(os.sched_getaffinity(0)) // 2)
        if hasattr(os, "sched_getaffinity")
        else results[0][4]
    )
    for rank, (word, r, size, x, t) in enumerate(results):
        assert (word, r, size, x.tolist(), t) == ("a", rank, 2, [1, 2, 3], threads)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "TORCHELASTIC_SIGNALS_TO_HANDLE" not in os.environ


def read_environment():
    return os.environ.get("FUNCPIPE_TEST"), os.getcwd()


def test_ranks_have_the_environment_as_it_is_now(monkeypatch, tmp_path):
    """Also where an earlier launch has started the server that ranks are forked from."""
    here = os.getcwd()
    assert launch(read_environment, 1) == [(None, here)]
    monkeypatch.setenv("FUNCPIPE_TEST", "set")
    monkeypatch.chdir(tmp_path)
    assert launch(read_environment, 1) == [("set", str(tmp_path))]
    monkeypatch.delenv("FUNCPIPE_TEST")
    assert launch(read_environment, 1) == [(None, str(tmp_path))]


def sleep():
    time.sleep(60)


@pytest.mark.parametrize("name, error", [("SIGTERM", "launcher got SIGTERM"), ("SIGINT", "")])
def test_a_signal_acts_as_it_does_without_a_launch(name, error):
    got = []
    number = getattr(signal, name)
    handler = signal.signal(
        number, (lambda n, _: got.append(n)) if error else signal.default_int_handler
    )
    timer = threading.Timer(3, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(RankError if error else KeyboardInterrupt, match=error or None):
            launch(sleep, 2, timeout=120)
    finally:
        signal.signal(number, handler)
    assert got == ([number] if error else [])


def test_a_script_that_is_told_to_end_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nimport funcpipe as fp\n"
        "if __name__ == '__main__':\n    print('here', flush=True)\n    fp.launch(time.sleep, 2, "
        "60)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            assert process.stdout.readline() == b"here\n"
            time.sleep(3)  # the launcher listens
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM
        finally:
            watchdog.cancel()
            process.kill()


def fail(how):
    """Rank 1 fails; rank 0 waits for it, in a communicator or without one."""
    if how == "late":
        time.sleep(60)
    comm = ProcessGroupCommunicator(Mesh(pipe=2), "cpu") if how == "in a step" else None
    try:
        if os.environ["RANK"] == "1":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("boom\nin two lines")
        if comm is not None:
            comm.recv([torch.zeros(2)], 1, "F")
        time.sleep(60)
    except Exception as error:
        raise (comm.fail(error) if comm is not None else error) from None


@pytest.mark.parametrize(
    "how, told",
    [
        ("in a step", "rank 1 failed: ValueError: boom in two lines"),
        pytest.param("killed", "rank 1 failed: ended by SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_the_first_failure_is_raised(how, told, capfd):
    with pytest.raises(RankError) as caught:
        launch(fail, 2, how, timeout=120)
    assert str(caught.value) == told
    notes = "".join(getattr(caught.value, "__notes__", []))
    assert ('raise ValueError("boom' in notes) == ("ValueError" in told)
    assert "ProcessRaisedException" not in capfd.readouterr().err


def test_an_exit_without_a_word_and_reports_that_follow_from_it(tmp_path):
    failures = {1: SimpleNamespace(exitcode=3)}
    assert str(_cause(failures, tmp_path)) == "rank 1 failed: exited with code 3"
    _report(0, RankError("rank 1 failed: gone"), "trace 0", tmp_path)
    assert str(_cause({0: SimpleNamespace(exitcode=1)}, tmp_path)) == "rank 1 failed: gone"
    assert str(_cause(failures, tmp_path)) == "rank 1 failed: exited with code 3"
    _report(2, KeyError("k"), "trace 2", tmp_path)
    error = _cause(failures, tmp_path)
    assert (str(error), error.__notes__) == (
        "rank 2 failed: KeyError: 'k'",
        ["in rank 2:\ntrace 2"],
    )


def test_a_rank_that_does_not_finish_in_time():
    with pytest.raises(
        RankError, match=r"rank . failed: TimeoutError: not finished after 0.5 s"
    ) as caught:
        launch(fail, 2, "late", timeout=0.5)
    assert "time.sleep(60)" in caught.value.__notes__[0]


def returns(how):
    """Rank 1 returns at once; rank 0 waits for it, or is late."""
    if how == "late":
        time.sleep(60 if os.environ["RANK"] == "0" else 0)
        return
    run = spmd(
        data_parallel(lambda state, batch: (state, {}), axis="data"), Mesh(data=2), device="cpu"
    )
    KEPT.append(run)
    run._comm.exchange_digest(0)
    if os.environ["RANK"] == "0":
        run._comm.exchange_digest(1)


KEPT = []


@pytest.mark.parametrize(
    "how, told",
    [
        (
            "waits",
            "rank 1 failed: it ended, or closed its runner, while rank 0 was in exchange_digest",
        ),
        ("late", "rank 0 failed: TimeoutError: not finished after 2 s"),
    ],
)
def test_a_rank_that_returns_early(how, told):
    """It is named where another one waits for it, at once; it is not late itself."""
    with pytest.raises(RankError) as caught:
        launch(returns, 2, how, timeout=2 if how == "late" else 60)
    assert str(caught.value) == told


RESTARTED = """
import os, signal, torch
from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe import Mesh

comm = ProcessGroupCommunicator(Mesh(data=2), "cpu", timeout=20.0)
comm.prepare([("data",)])
for _ in range(2):
    out = comm.all_reduce(torch.tensor(comm.rank + 1), ("data",)).item()
    comm.exchange_digest(out)
comm.close()
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    os.kill(os.getpid(), signal.SIGKILL)
open(f"ran-{comm.rank}", "w").write(f"{out} {os.environ['TORCHELASTIC_RESTART_COUNT']}")
"""


@pytest.mark.slow
def test_a_job_that_torchrun_restarts(tmp_path):
    """The processes of the second start meet each other, not the addresses of the first; also those
    that had finished."""
    (tmp_path / "script.py").write_text(RESTARTED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--max-restarts=1",
    ]
    paths = {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
    }
    done = subprocess.run(
        [*command, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | paths,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"ran-{r}").read_text() for r in range(2)] == ["3 1", "3 1"]


LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def test_no_process_at_all():
    with pytest.raises(ValueError, match="launch starts 1 process or more, not 0"):
        launch(describe, 0)


SCRIPT = """
import os, torch
from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe import Mesh
from funcpipe import launch

def total():
    comm = ProcessGroupCommunicator(Mesh(data=2))
    comm.prepare([("data",)])
    out = comm.all_reduce(torch.tensor(comm.rank + 1), ("data",)).item()
    comm.close()
    return out

if __name__ == "__main__":
    print(launch(total, 2))
"""


@pytest.mark.slow
def test_a_script_with_its_functions_in_main_is_quiet(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[3, 3]\n", "")
