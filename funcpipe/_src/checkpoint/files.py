"""The directories of checkpoints: what makes one complete, how one appears, how old ones go.

In the root, the directory that a user names, ``step-N`` is the checkpoint of step N. It is complete
when it holds its *manifest*, ``checkpoint.json``. It is written in a folder of its own
(`claims.py`). Its files are on the disk before its directory gets its name, and it loses its
manifest before it is removed. So whatever is killed at whatever moment, what `steps` lists can be
loaded; and of two saves of one step, the one that is complete first gets the name.

The manifest says at which bytes of which file the elements of a leaf lie. It has a digest of these
bytes (SHA-256, its first 128 bits), taken while they were written; one of DCP's metadata, which
nothing here reads; and one of itself.

In: a root. Nothing here knows of ranks.
Out: paths, manifests, or a CheckpointError that says what is there instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from funcpipe._src.checkpoint.claims import LOCK, Claim, new_folder, remove_dead
from funcpipe._src.comm.tensor_layout import is_dense
from funcpipe.errors import CheckpointError

FORMAT = 2
MANIFEST = "checkpoint.json"
METADATA = ".metadata"  # DCP's, for its own readers: a pickle
DAMAGED = "is damaged, or belongs to another checkpoint"
INSTEAD = "Put the right file back, or load another step: fp.checkpoint.steps says which there are"
_NAME = re.compile(r"step-(0|[1-9]\d*)")


class Leaf(NamedTuple):
    """What a manifest says of a leaf.

    Args:
        shape: of the unsharded tensor; None where the leaf is not a tensor.
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


class StoredSpan(NamedTuple):
    """Where a rank stored elements of a leaf in one go.

    Args:
        start, end: which elements, in row-major order; 0 to 1 where the leaf is not a tensor.
        file: the name of a data file.
        offset, length: at which bytes of it.
        digest: of these bytes.
    """

    start: int
    end: int
    file: str
    offset: int
    length: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What stands in ``checkpoint.json``, beside its own digest.

    Args:
        format: of the checkpoint.
        step: the number that it was saved under.
        extra: what the user added.
        mesh: the mesh that it was saved on.
        leaves: every leaf by path.
        pieces: the stored spans of every leaf. (Format 2 has this name in the file.)
        metadata: the digest of DCP's metadata.
    """

    format: int
    step: int
    extra: Any
    mesh: dict[str, int]
    leaves: dict[str, Leaf]
    pieces: dict[str, list[StoredSpan]]
    metadata: str


def short(digest: Any) -> str:
    """What is kept of a digest of hashlib: it is there for damage and mistakes."""
    return digest.hexdigest()[:32]


def digest_of(data: bytes) -> str:
    """The digest of bytes.

    >>> digest_of(b"")
    'e3b0c44298fc1c149afbf4c8996fb924'
    """
    return short(hashlib.sha256(data))


def _digest_of_json(body: dict[str, Any]) -> str:
    """The digest of a manifest, whatever its spaces and line ends."""
    return digest_of(json.dumps(body, sort_keys=True).encode())


def leaf_of(value: Any, shape: tuple[int, ...]) -> Leaf:
    """A leaf of this shape, of which ``value`` is a shard or all.

    >>> import torch
    >>> print(leaf_of(torch.zeros(2), (3, 4)), "|", leaf_of(1, ()))
    float32[3, 4] | not a tensor
    >>> leaf_of(torch.zeros(2, 3).T, (3, 2)).strides
    (1, 3)
    """
    if not isinstance(value, Tensor):
        return Leaf()
    dtype = str(value.dtype).removeprefix("torch.")
    if value.shape == shape and not value.is_contiguous() and is_dense(value):
        return Leaf(shape, dtype, value.stride())
    return Leaf(shape, dtype)


# ---- what there is


def steps(dir: str | os.PathLike[str]) -> list[int]:
    """The steps of the complete checkpoints in a directory, in ascending order: the newest last.

    Args:
        dir: the directory that `save` was given. None where it does not exist.

    >>> steps("no such directory")
    []
    """
    numbered = _numbered(Path(dir))
    return [step for step, path in numbered if (path / MANIFEST).is_file()]


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """Every ``step-N``, complete or not, in ascending order."""
    found = []
    for path in root.glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def find(root: Path, step: int | None) -> tuple[Path, Manifest]:
    """A complete checkpoint and its manifest: that of a step, or the newest.

    Raises:
        CheckpointError: there is none; it is of another format or step; its manifest or metadata
            is not what was saved.
    """
    there = steps(root)
    if not there:
        raise CheckpointError(_nothing(root))
    if step is not None and step not in there:
        raise CheckpointError(
            f"{root} has no checkpoint of step {step}; its steps are {', '.join(map(str, there))}"
        )
    step = there[-1] if step is None else step
    path = final(root, step)
    manifest = _read(path)
    if manifest.step != step:
        raise CheckpointError(
            f"{path} holds the checkpoint of step {manifest.step}: it was renamed, or copied over "
            f"another; call it {final(root, manifest.step).name}"
        )
    _check_metadata(path / METADATA, manifest.metadata)
    return path, manifest


def _check_metadata(path: Path, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. {INSTEAD}")
    if digest_of(path.read_bytes()) != digest:
        raise CheckpointError(
            f"{path} {DAMAGED}: its bytes are not those that were saved. {INSTEAD}"
        )


def _nothing(root: Path) -> str:
    if (root / MANIFEST).is_file():
        return (
            f"{root} is one checkpoint: pass the directory above it, and step= to choose among "
            "several"
        )
    unfinished = sorted(path.name for path in root.glob("step-*"))
    if unfinished:
        return (
            f"{root} holds no complete checkpoint; {', '.join(unfinished)} was begun and never "
            "finished"
        )
    return f"{root} holds no checkpoint: pass the directory that fp.checkpoint.save was given"


def _read(path: Path) -> Manifest:
    try:
        found = json.loads((path / MANIFEST).read_text())
        format = found["format"]
        if format == FORMAT:
            digest = found.pop("digest")
            right = digest == _digest_of_json(found)
            manifest = _manifest(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"its {MANIFEST} cannot be read ({error!r})"
        raise CheckpointError(f"{path} is not a checkpoint: {why}") from error
    if format != FORMAT:
        raise CheckpointError(f"{path} has format {format!r}, {_other_format(format)}")
    if not right:
        raise CheckpointError(f"{path / MANIFEST} is not what was saved. {INSTEAD}")
    return manifest


def _manifest(found: dict[str, Any]) -> Manifest:
    leaves = {}
    for name, leaf in found.pop("leaves").items():
        leaves[name] = Leaf(*map(_tuple, leaf))
    pieces = {}
    for name, spans in found.pop("pieces").items():
        pieces[name] = [StoredSpan(*span) for span in spans]
    return Manifest(**found, leaves=leaves, pieces=pieces)


def _other_format(format: Any) -> str:
    if format == 1:
        return (
            "which has no digests of its files, so this funcpipe does not read it: "
            "fp.checkpoint.export it with the funcpipe that wrote it, and hand run.place here the "
            "state that you make of it"
        )
    instead = "use the funcpipe that wrote it, or a newer one"
    return f"but this funcpipe reads format {FORMAT}: {instead}"


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ---- how one appears, and old ones go


def final(root: Path, step: int) -> Path:
    """Where a checkpoint lies."""
    return root / f"step-{step}"


def begin(root: Path, step: int) -> Claim:
    """An empty folder to write a checkpoint in. What dead saves left goes.

    Raises:
        CheckpointError: a complete checkpoint of this step is there.
    """
    _check_free(root, step)
    remove_dead(root)
    if final(root, step).exists():
        _clear(root, step)
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)  # another save may be faster
        _sync(root.parent)
    return Claim(root, step)


def _check_free(root: Path, step: int) -> None:
    path = final(root, step)
    if (path / MANIFEST).is_file():
        instead = "save into another directory, or remove it first"
        raise CheckpointError(f"{path} is there already: {instead}")


def _clear(root: Path, step: int) -> None:
    """Remove what a removal that died left of a checkpoint."""
    aside = new_folder(root, step)
    try:
        final(root, step).rename(aside)
    except FileNotFoundError:  # another save has just done so
        return
    if (aside / MANIFEST).is_file():  # another save has just published it
        aside.rename(final(root, step))
        _check_free(root, step)
    shutil.rmtree(aside)


def publish(
    root: Path,
    claim: Claim,
    manifest: Manifest,
) -> None:
    """Give a checkpoint whose files are all written its manifest and its name.

    Raises:
        CheckpointError: another save of the step came first.
    """
    body = asdict(manifest)
    with (claim.path / MANIFEST).open("w") as file:
        json.dump({**body, "digest": _digest_of_json(body)}, file)
        file.flush()
        os.fsync(file.fileno())
    (claim.path / LOCK).unlink(missing_ok=True)
    _sync(claim.path)
    try:
        claim.path.rename(final(root, manifest.step))  # fails where something is there
    except OSError:
        _check_free(root, manifest.step)
        raise
    _sync(root)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what is left of removed ones."""
    oldest = (steps(root)[-keep:] or [0])[0]
    for step, path in _numbered(root):
        if step < oldest:
            (path / MANIFEST).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another save prunes as well
                shutil.rmtree(path)


def _sync(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
