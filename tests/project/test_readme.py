"""The Python blocks of the README and of docs run, as a reader would type them; the README's
commands are those of CI."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory):
    """The names that are there after the README's blocks, what they printed, and where they ran."""
    names: dict = {"__name__": "readme"}
    folder = tmp_path_factory.mktemp("readme")
    printed: list[str] = []
    names["print"] = lambda *values, **_: printed.extend(map(str, values))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for block in blocks_of(README):
            exec(compile(block, "README.md", "exec"), names)
    return names, "\n".join(printed), folder


def test_python_blocks_run(after_the_readme):
    _, printed, folder = after_the_readme
    assert len(blocks_of(README)) >= 5
    assert "segments in 4 stages" in printed
    assert (folder / "plan.html").read_text().startswith("<!")


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_of_docs_run_after_those_of_the_readme(
    page, after_the_readme, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = dict(after_the_readme[0])
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for block in blocks_of(text):
        exec(compile(block, page, "exec"), names)


def test_ci_runs_the_commands():
    commands = [
        part.strip()
        for block in re.findall(r"```sh\n(.*?)\n```", README, re.S)
        for part in block.split("&&")
    ]
    assert commands == [
        "pip install -e '.[test]'",
        "pytest",
        "pip install -e .",
        "python examples/train_lm.py",
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(
        part in ci for part in ("pip install -e '.[test]'", "pytest", "examples/train_lm.py")
    )


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_readme_fits_a_reader():
    assert len(README.splitlines()) <= 250
