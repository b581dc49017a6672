"""What an installation holds: the transforms, which lie beside the package in a checkout, and every
room."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of this checkout, since setuptools leaves traces where it builds."""
    there = tmp_path_factory.mktemp("wheel")
    source = there / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("funcpipe", "transforms"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    built = subprocess.run(
        [*command, "-w", there, source], capture_output=True, text=True, timeout=300
    )
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
    assert packed == modules | {"funcpipe/py.typed"}


def test_a_checkout_that_is_not_installed_says_so():
    """As in ``PYTHONPATH=. python script.py``, or a zip that was unpacked."""
    command = [
        sys.executable,
        "-S",
        "-c",
        "import sys; sys.path += %r; import funcpipe" % [str(ROOT), *_site()],
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "funcpipe is not installed: run `pip install -e .` in its checkout" in ran.stderr


def _site() -> list[str]:
    """Where packages are, without what editable installs add."""
    return [path for path in sys.path if path.endswith("site-packages")]


def test_a_wheel_holds_the_license(wheel):
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
