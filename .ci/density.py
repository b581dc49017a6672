"""The style ratchet: how densely each file is written, as numbers that may only fall.

    python .ci/density.py            compare with .ci/density.json; fail where a number rose
    python .ci/density.py --update   write lower numbers, and limits' worth for new files
    python .ci/density.py --table    all files, the densest first

Counted are lines of code: docstrings, comments and blank lines are left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("funcpipe", "transforms")
BASELINE = ROOT / ".ci" / "density.json"
COLUMNS = 100
MATHEMATICS = (
    "attention.py",
    "blockwise.py",
    "ring.py",
    "fused.py",
)  # q, k, v and x have no other names
SILENT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Density:
    """What is counted in one file.

    Args:
        tokens_per_line: a mean over lines of code.
        double_loops: comprehensions with two ``for`` or more.
        nested: comprehensions that hold another one.
        short_names: percent of bound names that are one letter.
        wide_lines: lines over 100 columns.
        longest_function: in lines.
        lines: of the file.
    """

    tokens_per_line: float
    double_loops: int
    nested: int
    short_names: float
    wide_lines: int
    longest_function: int
    lines: int


def limits(path: Path) -> Density:
    """What a new file may have."""
    return Density(9.0, 0, 0, 40.0 if path.name in MATHEMATICS else 5.0, 0, 50, 400)


def measure(path: Path) -> Density:
    source = path.read_text()
    tree = ast.parse(source)
    lines, tokens = code(source, docstring_lines(tree))
    comprehensions = [node for node in ast.walk(tree) if isinstance(node, COMPREHENSIONS)]
    names = [name for name in bound_names(tree) if name != "_"]
    lengths = [length_of(node) for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    return Density(
        tokens_per_line=round(tokens / max(lines, 1), 2),
        double_loops=sum(len(node.generators) > 1 for node in comprehensions),
        nested=sum(holds_another(node) for node in comprehensions),
        short_names=round(100 * sum(len(name) == 1 for name in names) / max(len(names), 1), 1),
        wide_lines=sum(len(line) > COLUMNS for line in source.splitlines()),
        longest_function=max(lengths, default=0),
        lines=len(source.splitlines()),
    )


def docstring_lines(tree: ast.Module) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and first is not None:
                found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def code(source: str, docstrings: set[int]) -> tuple[int, int]:
    """How many lines of code there are, and tokens on them."""
    lines: set[int] = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SILENT or token.start[0] in docstrings:
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
        tokens += 1
    return len(lines), tokens


def bound_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def holds_another(comprehension: ast.AST) -> bool:
    inside = (node for node in ast.walk(comprehension) if node is not comprehension)
    return any(isinstance(node, COMPREHENSIONS) for node in inside)


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    docstring = ast.get_docstring(function, clean=False) is not None
    shorter = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - shorter


def allowed(path: Path, before: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each number the larger of the file's own, as it was, and the limit."""
    limit = asdict(limits(path))
    own = before.get(str(path.relative_to(ROOT)), {})
    return {name: max(own.get(name, 0), most) for name, most in limit.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    before = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    now = {str(path.relative_to(ROOT)): asdict(measure(path)) for path in files}
    if args.table:
        for name, found in sorted(now.items(), key=lambda item: -item[1]["tokens_per_line"]):
            print(f"{found['tokens_per_line']:6.2f} {found['short_names']:5.1f} % {name}")
        return
    faults = []
    for path in files:
        name = str(path.relative_to(ROOT))
        for what, most in allowed(path, before).items():
            if now[name][what] > most and not (args.update and not before):
                faults.append(f"{name}: {what} is {now[name][what]}, at most {most} allowed")
    print("\n".join(faults))
    if args.update and not faults:
        kept = {}
        for path in files:
            name, limit = str(path.relative_to(ROOT)), asdict(limits(path))
            over = {what: x for what, x in now[name].items() if x > limit[what]}
            if over:
                kept[name] = over
        BASELINE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
