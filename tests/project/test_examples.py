"""Every example runs as it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.examples import run

from funcpipe import checkpoint

# Runs of several processes, and the longest, are slow; a short simulation of every example is not.
slow = pytest.mark.slow


@pytest.mark.parametrize("options", [pytest.param("", marks=slow), "--simulate"])
def test_fsdp(options: str, tmp_path: Path) -> None:
    out = run("fsdp.py", *shlex.split(options), cwd=tmp_path)
    assert "a rank receives" in out and "the params equal those of one device" in out


CHECKED = "--simulate --check --steps 2 --mesh pipe=2,data=2 --shard data --tied"
PROCESSES = "--steps 2 --blocks 2 --mesh data=2,pipe=2 --shard data --schedule gpipe"


@pytest.mark.parametrize(
    "options",
    [
        "--simulate --steps 3",
        pytest.param(CHECKED, marks=slow),
        pytest.param(PROCESSES, marks=slow),
    ],
)
def test_train_lm(options: str, tmp_path: Path) -> None:
    out = run("train_lm.py", "--short", *shlex.split(options), cwd=tmp_path)
    assert "What it writes now" in out
    assert (tmp_path / "train_lm.html").exists()
    assert "--check" not in options or "check: two steps equal one device" in out


@pytest.mark.parametrize("start", ["--simulate", pytest.param("", marks=slow)])
def test_a_resume_of_a_complete_run_says_so(start: str, tmp_path: Path) -> None:
    """A job that is restarted when it is done, as torchrun may, ends well and changes nothing."""
    options = shlex.split(f"--short {start} --steps 2 --mesh pipe=2 --blocks 1 --save saved")
    run("train_lm.py", *options, cwd=tmp_path)
    before = checkpoint.steps(tmp_path / "saved")
    out = run("train_lm.py", *options, "--resume", "saved", cwd=tmp_path)
    assert "the run is complete: saved has all 2 steps" in out
    assert "loss" not in out
    assert before == checkpoint.steps(tmp_path / "saved") == [2]


@pytest.mark.parametrize(
    "options", [pytest.param("", marks=slow), "--simulate --mesh ring=2,seq=2"]
)
def test_long_context(options: str, tmp_path: Path) -> None:
    args = shlex.split(f"--length 510 --steps 2 {options}")
    out = run("long_context.py", *args, cwd=tmp_path)
    assert "within the budget" in out and "the first loss equals that of one device" in out
