"""Checkpoints that cannot be saved or loaded: every error names the place and the leaf, what is there and what is wanted."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import counting, started, with_counts
from models_for_tests import refused
from shards_for_tests import clipped

import funcpipe as fp
from funcpipe import checkpoint
from funcpipe.errors import CheckpointError, StateError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A root with a checkpoint of step 4."""
    run, state = started("pipe=3")
    checkpoint.save(tmp_path, run, state, step=4)
    return tmp_path


def loading(root: Path, init: Callable = with_counts, step: Callable = counting, **options: Any) -> Any:
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
        f"{saved}/step-4 has no leaf state['ema']['none'], which the state of this run has (float64[0, 2]). Load it with "
        "the model, optimizer and dtypes that it was saved with; for anything else, fp.checkpoint.export it",
    ):
        loading(saved, init, step)


def test_a_leaf_that_the_run_lacks(saved: Path) -> None:
    init, step = changed(lambda s: {k: x for k, x in s.items() if k != "key"})
    with refused(
        CheckpointError, f"{saved}/step-4 has a leaf state['key'] (int64[2]), which the state of this run lacks"
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
        CheckpointError, f"{saved}/step-4: state['key'] was saved as int64[2], but this run has {told}. Load it with"
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
    assert text(saved / "step-4").startswith(f"{saved / 'step-4'} is one checkpoint: pass the directory above it")
    assert (
        text(saved / "no")
        == f"{saved / 'no'} holds no checkpoint: pass the directory that fp.checkpoint.save was given"
    )
    manifest = saved / "step-4" / "checkpoint.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format": 2, "leaves": "other"}))
    assert text(saved) == (
        f"{saved}/step-4 has format 2, but this funcpipe reads format 1: use the funcpipe that wrote it, or a newer one"
    )
    for broken in ("{", "[]", "{}", json.dumps({"format": 1})):
        manifest.write_text(broken)
        assert text(saved).startswith(f"{saved}/step-4 is not a checkpoint: its checkpoint.json cannot be read (")
    manifest.unlink()
    assert text(saved) == f"{saved} holds no complete checkpoint; step-4 was begun and never finished"


def test_a_file_that_is_damaged(saved: Path) -> None:
    metadata = saved / "step-4" / ".metadata"
    whole = metadata.read_bytes()
    found = pickle.loads(whole)
    found.state_dict_metadata["state['of'][0]['w']"].chunks.pop()
    metadata.write_bytes(pickle.dumps(found))
    with refused(CheckpointError, "state['of'][0]['w'] is not stored whole: the checkpoint is damaged"):
        loading(saved)
    metadata.write_bytes(whole)
    for path in (saved / "step-4").glob("*.distcp"):
        os.truncate(path, path.stat().st_size // 2)
    with refused(CheckpointError, f"loading {saved}/step-4 failed on rank 0: "):
        loading(saved)
    with refused(CheckpointError, f"{saved}/step-4 cannot be read: "):
        checkpoint.export(saved, saved / "state.pt")


def test_a_step_that_is_there_already(saved: Path) -> None:
    run, state = started("pipe=3")
    with refused(CheckpointError, f"{saved}/step-4 is there already: save into another directory, or remove it first"):
        checkpoint.save(saved, run, state, step=4)
    with refused(CheckpointError, "is there already"):
        checkpoint.save_async(saved, run, state, step=4)


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
    with refused(CheckpointError, "state['on'] is a Other, which is not stored: keep tensors, numbers, text, True"):
        checkpoint.save(tmp_path, run, state, step=0)


def test_leaves_that_are_not_what_init_state_makes(tmp_path: Path) -> None:
    run, state = started("data=4 sharded")
    moments = {**state[1]["of"][1], "w": state[1]["of"][1]["w"].float()}
    state[1] = {**state[1], "of": (state[1]["of"][0], moments)}
    with refused(
        CheckpointError,
        "state['of'][1]['w'] on rank 1 is float32[4, 1], but init_state makes it float64[4, 1]: it could not be loaded again. "
        "Let the step keep shapes and dtypes, and save what it returned",
    ):
        checkpoint.save(tmp_path, run, state, step=0)
    state[1] = {**state[1], "of": (state[1]["of"][0], {**moments, "w": None})}
    with refused(CheckpointError, "state['of'][1]['w'] on rank 1 is None, but init_state makes it float64[4, 1]"):
        checkpoint.save(tmp_path, run, state, step=0)


def test_states_of_another_kind(tmp_path: Path) -> None:
    run, state = started("data=3 whole")
    with refused(StateError, "a simulated state is a list with one state for each of 3 ranks"):
        checkpoint.save(tmp_path, run, state[0], step=0)
    with refused(CheckpointError, "fp.checkpoint.save: the state has another structure than init_state made"):
        checkpoint.save(tmp_path, run, [{"of": 1}] * 3, step=0)
    new = fp.simulate(counting, fp.Mesh())
    for use in (lambda: checkpoint.save(tmp_path, new, [state[0]], step=0), lambda: checkpoint.load(tmp_path, new)):
        with refused(StateError, "call run.init(init_state, params, batch) first"):
            use()
