"""The architecture is what its page says: which room imports which, and what is public."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F

import funcpipe as fp

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "funcpipe" / "_src"
TRANSFORMS, PACKAGE = "transforms", "funcpipe"


PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rooms() -> list[str]:
    """The rooms of the page, lowest first."""
    found = re.search("```rooms\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return [name.strip() for name in found[1].replace("\n", " ").split(">") if name.strip()]


def imported(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of everything that a file imports from funcpipe."""
    package = [PACKAGE, TRANSFORMS] if path.parent.name == TRANSFORMS else []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = ".".join([*package, node.module or ""]) if node.level else node.module or ""
            if module.split(".")[0] == PACKAGE:
                for alias in node.names:
                    yield node.lineno, module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name, ""


def room_of_import(module: str, name: str) -> str:
    parts = [*module.split("."), name]
    if parts[:2] == [PACKAGE, "_src"]:
        return parts[2]
    return TRANSFORMS if TRANSFORMS in parts[1:] else PACKAGE


def test_the_page_names_every_room() -> None:
    folders = {
        path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert {*folders, TRANSFORMS, PACKAGE} == set(rooms())


def test_a_room_imports_only_rooms_before_it() -> None:
    order = {name: place for place, name in enumerate(rooms())}
    wrong = []
    files = [(path.relative_to(SOURCE).parts[0], path) for path in sorted(SOURCE.rglob("*.py"))]
    files += [(TRANSFORMS, path) for path in sorted((ROOT / TRANSFORMS).glob("*.py"))]
    for room, path in files:
        if room == "__init__.py":
            continue
        for line, module, name in imported(path):
            errors = module == "funcpipe.errors" or (module, name) == (PACKAGE, "errors")
            if not errors and order[room_of_import(module, name)] > order[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["examples", "README.md", "docs"])
def test_users_import_nothing_private(folder: str) -> None:
    place = ROOT / folder
    files = [place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.md")]
    pattern = re.compile(r"^\s*(?:>>> )?(?:from|import) funcpipe\._src", re.MULTILINE)
    assert not [path for path in files if pattern.search(path.read_text())]


def test_public_classes_are_named_as_users_import_them() -> None:
    public = [getattr(fp, name) for name in fp.__all__]
    assert not [x for x in public if isinstance(x, type) and x.__module__ != PACKAGE]


def test_the_public_list_is_sorted_and_whole() -> None:
    assert fp.__all__ == sorted(fp.__all__)
    public = {name for name in vars(fp) if not name.startswith("_")} - {"transforms"}
    assert public == set(fp.__all__)


# ---- what the page says of the code


def file_of(name: str) -> Path:
    """A file as the page names it: from the top, or from ``funcpipe/_src``."""
    return ROOT / name if (ROOT / name).exists() else SOURCE / name


def test_the_page_describes_every_room() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"\w+", row)}
    assert set(rooms()) <= described


def test_files_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`([\w/]+\.py)`", PAGE)) - {"transforms/name.py", "optim/name.py"}
    assert not [name for name in sorted(names) if not file_of(name).is_file()]


def test_names_that_the_page_gives_a_file_are_there() -> None:
    """In tables ```file` `name```, and in sentences ```name` in `file```."""
    pairs = re.findall(r"`([\w/]+\.py)` `(\w+)`", PAGE)
    pairs += [(file, name) for name, file in re.findall(r"`(\w+)` in\s`([\w/]+\.py)`", PAGE)]
    assert len(pairs) > 20
    for file, name in pairs:
        source = file_of(file).read_text(encoding="utf-8")
        defined = re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE)
        assert defined, f"{file} has no {name}"


def test_contexts_and_records_of_the_page_exist() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    for heading in ("## Contexts", "## The row of stages"):
        section = PAGE.split(heading)[1].split("\n## ")[0]
        for name in re.findall(r"`(_?[A-Z]\w+)`", section):
            assert re.search(rf"^(?:class )?{name}\b", sources, re.MULTILINE), name


# ---- how often the user's functions run


STACKS: dict[str, tuple[Any, fp.Mesh, int]] = {
    "`accumulated`, one rank": (fp.accumulated(microbatches=4), fp.Mesh(), 12),
    "`data=2`": (fp.data_parallel(axis="data"), fp.Mesh(data=2), 12),
    "`pipe=4`": (fp.pipelined(axis="pipe", microbatches=4), fp.Mesh(pipe=4), 12),
    "`seq=2`, positions divide": (fp.seq_all_to_all(axis="seq"), fp.Mesh(seq=2), 12),
    "`seq=2`, positions do not divide": (fp.seq_all_to_all(axis="seq"), fp.Mesh(seq=2), 11),
}


def functions() -> tuple[Callable, Callable, io.StringIO]:
    """A step and its ``init_state``, and where they and the loss are noted: not in a list, which
    would be a Python value that the loss reads and that changes."""
    notes = io.StringIO()

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        notes.write("loss ")
        x = F.embedding(batch, params["embed"])
        for weight in params["blocks"]:
            q, k, v = F.linear(x, weight).unflatten(-1, (3, 4, -1)).unbind(2)
            x = fp.stage_boundary(x + fp.attention(q, k, v, causal=True).flatten(2))
        return fp.losses.cross_entropy(x, params["embed"], batch)

    def step(params: Any, batch: Any) -> Any:
        notes.write("step ")
        loss, grads = fp.value_and_grad(loss_fn)(params, batch)
        return optree.tree_map(torch.sub, params, grads), {"loss": loss}

    def init_state(params: Any) -> Any:
        notes.write("init_state ")
        return params

    return step, init_state, notes


@pytest.mark.parametrize("stack", STACKS)
def test_the_users_functions_run_as_often_as_the_page_says(stack: str) -> None:
    transform, mesh, length = STACKS[stack]
    step, init_state, notes = functions()
    batch = torch.randint(20, (8, length))
    params = {"embed": torch.randn(20, 8), "blocks": [torch.randn(24, 8) for _ in range(3)]}
    run = fp.simulate(transform(step), mesh)
    state = run.init(init_state, params, batch)
    noted = notes.getvalue().split()
    counts = [str(noted.count(name)) for name in ("step", "init_state", "loss")]
    assert f"| {stack} | {' | '.join(counts)} |" in PAGE.splitlines()
    state, _ = run(state, batch)
    before = len(notes.getvalue())
    run(state, batch)
    assert notes.getvalue()[before:].split() == ["step"] * mesh.size
