"""The README's Python blocks run, one after another, as a reader would type them; its commands are
those of CI."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "segments in 4 stages" in capsys.readouterr().out
    assert (tmp_path / "plan.html").read_text().startswith("<!")


def test_ci_runs_the_commands():
    commands = [
        part.strip()
        for block in re.findall(r"```sh\n(.*?)\n```", README, re.S)
        for part in block.split("&&")
    ]
    assert commands == [
        "pip install -e .",
        "python examples/train_lm.py",
        "pip install -e '.[test]'",
        "pytest",
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(
        part in ci for part in ("pip install -e '.[test]'", "pytest", "examples/train_lm.py")
    )


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
