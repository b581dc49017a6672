"""The architecture is what its page says: which room imports which, and what is public."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import funcpipe as fp

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "funcpipe" / "_src"
TRANSFORMS, PACKAGE = "transforms", "funcpipe"


def rooms() -> list[str]:
    """The rooms of the page, lowest first."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = re.search("```rooms\n(.*?)```", page, re.DOTALL)
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
