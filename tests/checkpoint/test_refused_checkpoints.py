"""Checkpoints that cannot be saved or loaded: every error names the place and the leaf, what is
there and what is wanted."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import BATCHES, counting, equal, started, with_counts
from support.models import refused
from support.sharded_steps import clipped
from torch.distributed.checkpoint.filesystem import FileSystem

import funcpipe as fp
from funcpipe import checkpoint
from funcpipe._src.checkpoint import files
from funcpipe.errors import CheckpointError, StateError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A root with a checkpoint of step 4."""
    run, state = started("pipe=3")
    checkpoint.save(tmp_path, run, state, step=4)
    return tmp_path


def loading(
    root: Path, init: Callable = with_counts, step: Callable = counting, **options: Any
) -> Any:
    return checkpoint.load(root, started("data=4 sharded", init, step)[0], **options)


def changed(edit: Callable[[dict], Any], **new: Any) -> tuple[Callable, Callable]:
    """``init_state`` and step with another state around the same."""

    def init(p: Any) -> Any:
        return edit(with_counts(p))

    def step(state: Any, b: Any) -> Any:
        moved, metrics = clipped(state["of"] if "of" in state else state["renamed"], b)
        return {**state, "of" if "of" in state else "renamed": moved}, metrics

    return init, step


def test_a_leaf_that_the_checkpoint_lacks(saved: Path) -> None:
    init, step = changed(lambda s: {**s, "ema": s["of"][0]})
    with refused(
        CheckpointError,
        f"{saved}/step-4 has no leaf state['ema']['none'], which the state of this run has "
        "(float64[0, 2]). Load it with the model, optimizer and dtypes that it was saved with; "
        "for anything else, fp.checkpoint.export it",
    ):
        loading(saved, init, step)


def test_a_leaf_that_the_run_lacks(saved: Path) -> None:
    init, step = changed(lambda s: {k: x for k, x in s.items() if k != "key"})
    with refused(
        CheckpointError,
        f"{saved}/step-4 has a leaf state['key'] (int64[2]), which the state of this run lacks",
    ):
        loading(saved, init, step)


@pytest.mark.parametrize(
    "value, told",
    [
        (torch.zeros(3, dtype=torch.int64), "int64[3]"),
        (torch.zeros(2, dtype=torch.int32), "int32[2]"),
        (2, "not a tensor"),
    ],
    ids=str,
)
def test_another_shape_or_dtype(value: Any, told: str, saved: Path) -> None:
    init, step = changed(lambda s: {**s, "key": value})
    with refused(
        CheckpointError,
        f"{saved}/step-4: state['key'] was saved as int64[2], but this run has {told}. Load it with",
    ):
        loading(saved, init, step)


def test_places_without_a_checkpoint(saved: Path) -> None:
    run, _ = started("plain")

    def text(root: Path, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(root, run, **options)
        with pytest.raises(CheckpointError) as exported:
            checkpoint.export(root, saved / "x", **options)
        assert str(caught.value) == str(exported.value) and not (saved / "x").exists()
        return str(caught.value)

    assert text(saved, step=5) == f"{saved} has no checkpoint of step 5; its steps are 4"
    assert text(saved / "step-4").startswith(
        f"{saved / 'step-4'} is one checkpoint: pass the directory above it"
    )
    assert (
        text(saved / "no")
        == f"{saved / 'no'} holds no checkpoint: pass the directory that fp.checkpoint.save was "
        "given"
    )
    manifest = saved / "step-4" / "checkpoint.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format": 3, "leaves": "other"}))
    assert text(saved) == (
        f"{saved}/step-4 has format 3, but this funcpipe reads format 2: use the funcpipe that "
        "wrote it, or a newer one"
    )
    manifest.write_text(json.dumps({**found, "format": 1}))
    assert text(saved) == (
        f"{saved}/step-4 has format 1, which has no digests of its files, so this funcpipe does "
        "not read it: fp.checkpoint.export it with the funcpipe that wrote it, and hand run.place "
        "here the state that you make of it"
    )
    for broken in ("{", "[]", "{}", json.dumps({"format": 2})):
        manifest.write_text(broken)
        assert text(saved).startswith(
            f"{saved}/step-4 is not a checkpoint: its checkpoint.json cannot be read ("
        )
    manifest.unlink()
    assert (
        text(saved) == f"{saved} holds no complete checkpoint; step-4 was begun and never finished"
    )


INSTEAD = "Put the right file back, or load another step: fp.checkpoint.steps says which there are"


def signed(step: Path, edit: Callable[[dict], Any]) -> None:
    """Edit a manifest, and give it the digest that belongs to it."""
    found = json.loads((step / "checkpoint.json").read_text())
    del found["digest"]
    edit(found)
    digest = files.digest_of(json.dumps(found, sort_keys=True).encode())
    (step / "checkpoint.json").write_text(json.dumps({**found, "digest": digest}))


@pytest.mark.parametrize("name", ["state['of'][0]['w']", "state['on']"])
def test_a_leaf_that_is_not_stored_whole(name: str, saved: Path) -> None:
    signed(saved / "step-4", lambda found: found["pieces"][name].pop())
    with refused(CheckpointError, f"{name} is not stored completely: the checkpoint is damaged"):
        loading(saved)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def halved(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [emptied, halved, Path.unlink])
def test_a_file_that_is_damaged(
    damage: Callable[[Path], None], saved: Path, tmp_path: Path
) -> None:
    """Refused with the name of the file, and of a leaf in it; by a load and by an export."""
    run, _ = started("data=4 sharded")
    step = saved / "step-4"
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "checkpoint.json"):
        whole = (step / name).read_bytes()
        damage(step / name)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(saved, run)
        with pytest.raises(CheckpointError) as exported:
            checkpoint.export(saved, tmp_path / "state.pt")
        (step / name).write_bytes(whole)
        for text in (str(caught.value), str(exported.value)):
            if name == "checkpoint.json":
                gone = damage is Path.unlink  # then it is no complete checkpoint at all
                assert ("step-4 was begun and never finished" if gone else name) in text
            else:
                assert str(step / name) in text and ("state['" in text) == name.endswith(".distcp")
    checkpoint.load(saved, run)


def test_what_is_said_of_damage(saved: Path) -> None:
    run, _ = started("plain")
    step = saved / "step-4"
    file = step / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with refused(
        CheckpointError,
        f"{file} ends after 100 bytes, but state['",
        f"the file was cut off. {INSTEAD}",
    ):
        checkpoint.load(saved, run)
    file.write_bytes(whole[:100] + b"?" + whole[101:])
    said = f"{file} is damaged, or belongs to another checkpoint: bytes 0 to "
    with refused(
        CheckpointError, said, "which hold state['", f"are not those that were saved. {INSTEAD}"
    ):
        checkpoint.load(saved, run)
    file.unlink()
    with refused(CheckpointError, f"{file} is missing, which holds state['", INSTEAD):
        checkpoint.load(saved, run)
    file.write_bytes(whole)
    (step / ".metadata").unlink()
    with refused(CheckpointError, f"{step}/.metadata is missing. {INSTEAD}"):
        checkpoint.load(saved, run)


def test_any_flipped_bit_is_noticed_or_without_effect(saved: Path) -> None:
    run, _ = started("plain")
    right, _ = checkpoint.load(saved, run)
    draw = random.Random(0)
    for file in sorted((saved / "step-4").iterdir()):
        whole = file.read_bytes()
        for _ in range(12):
            data = bytearray(whole)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            try:
                loaded, info = checkpoint.load(saved, run)
            except CheckpointError as error:
                assert file.name in str(error) or "format" in str(
                    error
                )  # "format" may be what is hit
            else:  # between pieces, or in spaces of the manifest
                assert equal(loaded, right) and info.step == 4 and info.extra is None
        file.write_bytes(whole)


def test_files_of_another_step(saved: Path) -> None:
    """Each file of step 5 in step 4, and the whole of it under another name."""
    run, state = started("pipe=3")
    checkpoint.save(saved, run, run(state, BATCHES[0])[0], step=5)
    for file in sorted((saved / "step-4").iterdir()):
        whole, other = file.read_bytes(), (saved / "step-5" / file.name).read_bytes()
        if other == whole:  # it holds leaves that the step left as they were
            continue
        file.write_bytes(other)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(saved, run, step=4)
        text = str(caught.value)
        if file.name == "checkpoint.json":
            assert text.startswith(
                f"{saved}/step-4 holds the checkpoint of step 5: it was renamed, or copied over"
            )
        else:
            assert text.startswith(f"{file} is damaged, or belongs to another checkpoint: ")
        file.write_bytes(whole)
    checkpoint.load(saved, run, step=4)


def called() -> None:
    """What a file brings along. It must not run."""
    raise AssertionError("it ran")


class Calls:
    def __reduce__(self) -> Any:
        return called, ()


def test_nothing_that_a_file_brings_along_is_run(saved: Path) -> None:
    """Also where the digests are right: DCP's metadata is not unpickled, and values only as torch
    allows."""
    run, state = started("plain")
    step = saved / "step-4"
    payload = pickle.dumps(Calls())
    (step / ".metadata").write_bytes(payload)
    with refused(
        CheckpointError, f"{step}/.metadata is damaged, or belongs to another checkpoint: its bytes"
    ):
        checkpoint.load(saved, run)
    signed(step, lambda found: found.update(metadata=files.digest_of(payload)))
    assert equal(checkpoint.load(saved, run)[0], state)
    torch.save(Calls(), step / "other.distcp")
    stored = (step / "other.distcp").read_bytes()
    piece = [0, 1, "other.distcp", 0, len(stored), files.digest_of(stored)]
    signed(step, lambda found: found["pieces"].update({"state['on']": [piece]}))
    said = (
        f"{step}/other.distcp: state['on'] is not stored as a tensor, number or text, so it is not "
        "read ("
    )
    with refused(CheckpointError, said, f"{__name__}.called"):
        checkpoint.load(saved, run)


def test_a_step_that_is_there_already(saved: Path) -> None:
    run, state = started("pipe=3")
    with refused(
        CheckpointError,
        f"{saved}/step-4 is there already: save into another directory, or remove it first",
    ):
        checkpoint.save(saved, run, state, step=4)
    with refused(CheckpointError, "is there already"):
        checkpoint.save_async(saved, run, state, step=4)


@pytest.mark.parametrize(
    "number, told",
    [
        (
            errno.ENOSPC,
            "no space is left on that disk: free some, or save into another directory (OSError: ",
        ),
        (errno.EROFS, "that file system is read-only: save into another directory (OSError: "),
        (
            errno.EACCES,
            "this user has no right to it: change its mode, or use another directory "
            "(PermissionError: ",
        ),
    ],
)
def test_places_that_cannot_be_written(
    number: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In plain words; also from inside of torch.save, which calls it a RuntimeError."""
    run, state = started("pipe=3")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    class Full(io.BytesIO):
        write = fail

    said = (
        f"saving step 1 to {tmp_path} failed on rank 0: {told}[Errno {number}] "
        f"{os.strerror(number)})"
    )
    for owner, name, new in (
        (Path, "mkdir", fail),
        (FileSystem, "create_stream", lambda *_: Full()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, new)
            with refused(CheckpointError, said):
                checkpoint.save(tmp_path, run, state, step=1)
        assert os.listdir(tmp_path) == []


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    run, state = started("plain")
    (tmp_path / "file").touch()
    with refused(
        CheckpointError,
        "a file is where a directory must be: use another directory (NotADirectoryError: ",
    ):
        checkpoint.save(tmp_path / "file", run, state, step=1)
    with refused(
        CheckpointError,
        f"{tmp_path}/file holds no checkpoint: pass the directory that fp.checkpoint.save",
    ):
        checkpoint.load(tmp_path / "file", run)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"step": -1}, "step=-1; write a whole number, 0 or more"),
        ({"step": 1.0}, "step=1.0; write a whole number, 0 or more"),
        ({"step": True}, "step=True; write"),
        ({"step": 1, "keep": 0}, "keep=0; write a whole number, 1 or more"),
        (
            {"step": 1, "extra": (1, 2)},
            "extra=(1, 2) would not come back from JSON as it is: write dicts with text as keys",
        ),
        ({"step": 1, "extra": {1: 2}}, "extra={1: 2} would not come back"),
        ({"step": 1, "extra": torch.ones(1)}, "extra=tensor([1.]) would not"),
    ],
    ids=str,
)
def test_arguments(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    run, state = started("plain")
    with refused(CheckpointError, "fp.checkpoint.save: ", told):
        checkpoint.save(tmp_path, run, state, **arguments)


class Other:
    pass


def test_leaves_that_are_not_stored(tmp_path: Path) -> None:
    run, state = started("data=3 whole", lambda p: {**with_counts(p), "on": Other()})
    with refused(
        CheckpointError,
        "state['on'] is a Other, which is not stored: keep tensors, numbers, text, True",
    ):
        checkpoint.save(tmp_path, run, state, step=0)


def test_leaves_that_are_not_what_init_state_makes(tmp_path: Path) -> None:
    run, state = started("data=4 sharded")
    moments = {**state[1]["of"][1], "w": state[1]["of"][1]["w"].float()}
    state[1] = {**state[1], "of": (state[1]["of"][0], moments)}
    with refused(
        CheckpointError,
        "state['of'][1]['w'] on rank 1 is float32[4, 1], but init_state makes it float64[4, 1]: it "
        "could not be loaded again. Let the step keep shapes and dtypes, and save what it returned",
    ):
        checkpoint.save(tmp_path, run, state, step=0)
    state[1] = {**state[1], "of": (state[1]["of"][0], {**moments, "w": None})}
    with refused(
        CheckpointError,
        "state['of'][1]['w'] on rank 1 is None, but init_state makes it float64[4, 1]",
    ):
        checkpoint.save(tmp_path, run, state, step=0)


def test_states_of_another_kind(tmp_path: Path) -> None:
    run, state = started("data=3 whole")
    with refused(StateError, "a simulated state is a list with one state for each of 3 ranks"):
        checkpoint.save(tmp_path, run, state[0], step=0)
    with refused(
        CheckpointError, "fp.checkpoint.save: the state has another structure than init_state made"
    ):
        checkpoint.save(tmp_path, run, [{"of": 1}] * 3, step=0)
    new = fp.simulate(counting, fp.Mesh())
    for use in (
        lambda: checkpoint.save(tmp_path, new, [state[0]], step=0),
        lambda: checkpoint.load(tmp_path, new),
    ):
        with refused(StateError, "call run.init(init_state, params, batch) first"):
            use()
