"""The documents: their links lead somewhere, the glossary is in order, and every public name has
an example."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import funcpipe as fp

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("findings/*.md")])
# Types that a user gets or passes on, and modules: their members have the examples.
NEED_NO_EXAMPLE = {
    "Lowered",
    "Mean",
    "Microbatches",
    "Nonfinite",
    "Plan",
    "Prediction",
    "Recording",
    "Rows",
    "Scaled",
    "checkpoint",
    "data",
    "errors",
    "extend",
    "losses",
    "optim",
    "random",
    "schedules",
    "testing",
}
# Their examples take a step and a mesh, or processes: they stand in the README and docs/running.md.
SHOWN_IN_DOCUMENTS = {"launch", "simulate", "spmd"}


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    headings = re.findall(
        r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page: Path) -> None:
    """Texts in backquotes that look like a file of this repository are one."""
    text = without_code(page.read_text(encoding="utf-8"))
    folders = r"(?:funcpipe|transforms|tests|docs|examples|findings|\.ci)"
    for name in re.findall(rf"`({folders}/[\w./]+\.\w+)`", text):
        assert name.endswith("/name.py") or (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_is_read_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCUMENTS:
        name = page.relative_to(ROOT).as_posix()
        assert name == "README.md" or f"({name})" in readme, name


def test_every_script_of_findings_is_listed() -> None:
    page = (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE)
    assert listed == sorted(path.stem for path in (ROOT / "findings").glob("*.sh"))


def test_glossary_terms_are_in_order() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    terms = [row.split("|")[1].strip() for row in rows]
    assert terms == sorted(terms, key=lambda term: (term.casefold(), term))
    assert len(terms) == len(set(terms))
    assert all(len(row.split("|")) == 5 and row.split("|")[3].strip() for row in rows)


@pytest.mark.parametrize("name", fp.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(fp, name)) or ""
    assert text
    assert (">>> " in text) != (name in NEED_NO_EXAMPLE | SHOWN_IN_DOCUMENTS)


def test_what_is_shown_in_documents_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCUMENTS)
    assert not [name for name in SHOWN_IN_DOCUMENTS if f"fp.{name}(" not in text]
