"""What an installation holds: the transforms are files of the package, not a link that leads out of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of this checkout, since setuptools leaves traces where it builds."""
    there = tmp_path_factory.mktemp("wheel")
    source = there / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("funcpipe", "transforms"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    built = subprocess.run([*command, "-w", there, source], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = there.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_a_wheel_holds_the_transforms_as_real_files(wheel):
    for source in (ROOT / "transforms").glob("*.py"):
        assert wheel.read(f"funcpipe/transforms/{source.name}") == source.read_bytes()


def test_a_wheel_holds_every_module_and_nothing_else(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    rooms = (ROOT / "funcpipe").rglob("*.py")
    modules = {path.relative_to(ROOT).as_posix() for path in rooms}
    modules |= {f"funcpipe/transforms/{path.name}" for path in (ROOT / "transforms").glob("*.py")}
    assert packed == modules


def test_a_wheel_holds_the_license(wheel):
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
