"""Every example runs as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Runs of several processes, and the longest, are slow; a short simulation of every example is not.
slow = pytest.mark.slow


@pytest.mark.parametrize("args", [pytest.param([], marks=slow), ["--simulate"]], ids=str)
def test_fsdp(args: list[str], tmp_path: Path) -> None:
    out = run("fsdp.py", *args, cwd=tmp_path)
    assert "a rank receives" in out and "the params equal those of one device" in out


@pytest.mark.parametrize(
    "args",
    [
        ["--simulate", "--steps", "3"],
        pytest.param(
            [
                "--simulate",
                "--check",
                "--steps",
                "2",
                "--mesh",
                "pipe=2,data=2",
                "--shard",
                "data",
                "--tied",
            ],
            marks=slow,
        ),
        pytest.param(
            [
                "--steps",
                "2",
                "--blocks",
                "2",
                "--mesh",
                "data=2,pipe=2",
                "--shard",
                "data",
                "--schedule",
                "gpipe",
            ],
            marks=slow,
        ),
    ],
    ids=" ".join,
)
def test_train_lm(args: list[str], tmp_path: Path) -> None:
    out = run("train_lm.py", "--short", *args, cwd=tmp_path)
    assert "What it writes now" in out
    assert (tmp_path / "train_lm.html").exists()
    assert "--check" not in args or "check: two steps equal one device" in out


@pytest.mark.parametrize(
    "args", [pytest.param([], marks=slow), ["--simulate", "--mesh", "ring=2,seq=2"]], ids=" ".join
)
def test_long_context(args: list[str], tmp_path: Path) -> None:
    out = run("long_context.py", "--length", "510", "--steps", "2", *args, cwd=tmp_path)
    assert "within the budget" in out and "the first loss equals that of one device" in out
