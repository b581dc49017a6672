"""The directories of checkpoints: what makes one complete, how one appears, how old ones go.

Terms. A *root* is the directory that a user names. In it ``step-N`` is the checkpoint of step N, complete when it holds
its *manifest*, ``checkpoint.json``; ``step-N.tmp`` is one that is being written, or whose writers died. A checkpoint
appears whole: its files are on the disk before its directory gets its name, and loses its manifest before it goes. So
whatever is killed at whatever moment, what `steps` lists can be loaded.

In: a root. Out: paths, manifests, or a CheckpointError that says what is there instead. Nothing here knows of ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcpipe.comm import wire
from funcpipe.errors import CheckpointError

FORMAT = 1
MANIFEST = "checkpoint.json"
_NAME = re.compile(r"step-(0|[1-9]\d*)")


class Leaf(NamedTuple):
    """What a manifest says of a leaf.

    Args:
        shape: of the whole tensor; None where the leaf is not a tensor.
        dtype: such as ``"float32"``.
        strides: where memory is dense and not in row-major order.
    """

    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    strides: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.shape is None:
            return "not a tensor"
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """What stands in ``checkpoint.json``: the step, what the user added, the mesh it was saved on, every leaf by path."""

    format: int
    step: int
    extra: Any
    mesh: dict[str, int]
    leaves: dict[str, Leaf]


def leaf_of(x: Any, shape: tuple[int, ...]) -> Leaf:
    """A leaf of which ``x`` is the whole or a part.

    >>> print(leaf_of(torch.zeros(2), (3, 4)), "|", leaf_of(1, ()))
    float32[3, 4] | not a tensor
    >>> leaf_of(torch.zeros(2, 3).T, (3, 2)).strides
    (1, 3)
    """
    if not isinstance(x, torch.Tensor):
        return Leaf()
    odd = x.shape == shape and not x.is_contiguous() and wire.is_dense(x)
    return Leaf(shape, str(x.dtype).removeprefix("torch."), x.stride() if odd else None)


# ---- what there is


def steps(dir: str | os.PathLike[str]) -> list[int]:
    """The steps of the complete checkpoints in a directory, in ascending order; so the last one is the newest.

    Args:
        dir: the directory that `save` was given. None where it does not exist.

    >>> steps("no such directory")
    []
    """
    return [n for n, path in _numbered(Path(dir)) if (path / MANIFEST).is_file()]


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Every ``step-N``, complete or not, in ascending order."""
    found = [(m, path) for path in root.glob("step-*") if (m := _NAME.fullmatch(path.name))]
    return sorted((int(m[1]), path) for m, path in found)


def find(root: Path, step: int | None) -> tuple[Path, Manifest]:
    """A complete checkpoint and its manifest: that of a step, or the newest.

    Raises:
        CheckpointError: there is none; it is of a newer format; its manifest cannot be read.
    """
    there = steps(root)
    if not there:
        raise CheckpointError(_nothing(root))
    if step is not None and step not in there:
        raise CheckpointError(f"{root} has no checkpoint of step {step}; its steps are {', '.join(map(str, there))}")
    path = final(root, there[-1] if step is None else step)
    return path, _read(path)


def _nothing(root: Path) -> str:
    if (root / MANIFEST).is_file():
        return f"{root} is one checkpoint: pass the directory above it, and step= to choose among several"
    unfinished = sorted(path.name for path in root.glob("step-*"))
    if unfinished:
        return f"{root} holds no complete checkpoint; {', '.join(unfinished)} was begun and never finished"
    return f"{root} holds no checkpoint: pass the directory that fp.checkpoint.save was given"


def _read(path: Path) -> Manifest:
    try:
        found = json.loads((path / MANIFEST).read_text())
        format = found["format"]
        if format == FORMAT:
            leaves = {name: Leaf(*map(_tuple, leaf)) for name, leaf in found["leaves"].items()}
            return Manifest(format, found["step"], found["extra"], found["mesh"], leaves)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: its {MANIFEST} cannot be read ({error!r})") from error
    raise CheckpointError(
        f"{path} has format {format!r}, but this funcpipe reads format {FORMAT}: use the funcpipe that wrote it, or a newer one"
    )


def _tuple(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


# ---- how one appears, and old ones go


def final(root: Path, step: int) -> Path:
    """Where a checkpoint lies."""
    return root / f"step-{step}"


def unfinished(root: Path, step: int) -> Path:
    """Where it is written."""
    return root / f"step-{step}.tmp"


def begin(root: Path, step: int) -> None:
    """Make an empty directory to write a checkpoint into; what an earlier try left there is gone.

    Raises:
        CheckpointError: a complete checkpoint of this step is there.
    """
    if (final(root, step) / MANIFEST).is_file():
        raise CheckpointError(f"{final(root, step)} is there already: save into another directory, or remove it first")
    for path in (final(root, step), unfinished(root, step)):
        if path.exists():
            shutil.rmtree(path)
    unfinished(root, step).mkdir(parents=True)


def publish(root: Path, manifest: Manifest) -> None:
    """Give a checkpoint whose files are all written its manifest and its name."""
    path = unfinished(root, manifest.step)
    with (path / MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file)
        file.flush()
        os.fsync(file.fileno())
    _sync(path)
    path.rename(final(root, manifest.step))
    _sync(root)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what is left of removed ones."""
    oldest = (steps(root)[-keep:] or [0])[0]
    for n, path in _numbered(root):
        if n < oldest:
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)


def _sync(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
