"""`fp.lower`: every stage's record, its text, and the errors of a refused step."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import funcpipe as fp
from funcpipe.errors import BatchError, PlanError

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "FUNCPIPE_UPDATE_GOLDEN"  # set it to write the texts anew, then read the diff

MESH = fp.Mesh(pipe=2, data=2)


def loss_fn(params: Any, batch: Any) -> fp.Mean:
    x = fp.stage_boundary(torch.tanh(batch["x"] @ params["first"]))
    x = x @ params["second"]
    return fp.Mean(x.square().sum(), batch["weight"].sum())


def step(state: Any, batch: Any) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(state["params"], batch)
    norm = fp.global_norm(grads)
    return {"params": state["params"], "seen": state["seen"] + 1}, {"loss": loss, "norm": norm}


def init_state(params: Any) -> Any:
    return {"params": params, "seen": torch.zeros(())}


def inputs(rows: int = 8) -> tuple[Any, Any]:
    params = {"first": torch.ones(3, 3), "second": torch.ones(3, 3)}
    return params, {"x": torch.ones(rows, 3), "weight": torch.ones(rows)}


def stacked() -> Any:
    piped = fp.pipelined(step, axis="pipe", microbatches=2)
    return fp.sharded_weights(fp.data_parallel(piped, axis="data"), axis="data")


@pytest.fixture(scope="module")
def lowered() -> fp.Lowered:
    return fp.lower(stacked(), MESH, init_state, *inputs())


def texts(lowered: fp.Lowered) -> dict[str, str]:
    call = lowered.calls[0]
    return {
        "lowered": lowered.text(seconds=False),
        "resolved": str(lowered.resolved),
        "analysis": str(lowered.analysis),
        "placement": str(lowered.placement),
        "split": str(call.split),
        "proof": str(call.proof),
        "checked": str(call.checked),
        "units": str(call.units),
        "schedule": str(call.schedule),
        "program": str(call.programs[0]),
    }


RECORDS = [
    "lowered",
    "resolved",
    "analysis",
    "placement",
    "split",
    "proof",
    "checked",
    "units",
    "schedule",
    "program",
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_prints_itself(lowered: fp.Lowered, record: str) -> None:
    path, text = GOLDEN / f"{record}.txt", texts(lowered)[record] + "\n"
    if os.environ.get(UPDATE):
        path.write_text(text)
    want = path.read_text()
    assert sorted_inputs(text) == sorted_inputs(want), f"not {path.name}; {UPDATE}=1 writes it anew"


def sorted_inputs(text: str) -> str:
    """With what stands in brackets in order: which input a trace names first is torch's choice."""
    return re.sub(r"\(([^()]*)\)", lambda found: str(sorted(found[1].split(", "))), text)


def test_seconds_stand_behind_the_stages(lowered: fp.Lowered) -> None:
    stages = [line.split()[0] for line in str(lowered).splitlines() if line.endswith(" s")]
    assert stages == [
        "analyse", "split", "prove", "trace", "check", "partition", "schedule", "lower", "place",
    ]  # fmt: skip


def test_the_graph_prints_as_code(lowered: fp.Lowered) -> None:
    assert "torch.ops.aten.tanh" in str(lowered.graph)


def test_short_forms_are_of_the_first_call_and_rank(lowered: fp.Lowered) -> None:
    call = lowered.calls[0]
    assert lowered.graph is call.joint
    assert (lowered.units, lowered.schedule) == (call.units, call.schedule)
    assert lowered.program is call.programs[0]


def test_lower_is_what_a_runner_plans(lowered: fp.Lowered) -> None:
    params, batch = inputs()
    run = fp.simulate(stacked(), MESH)
    plan = run.plan(run.init(init_state, params, batch), batch)
    assert texts(plan.lowered) == texts(lowered)


def test_nothing_runs() -> None:
    """Params may be shapes alone, and a function that makes them."""
    _, batch = inputs()

    def params_fn(key: torch.Tensor) -> Any:
        names = ("first", "second")
        return {name: fp.random.normal(fp.random.fold_in(key, name), (3, 3)) for name in names}

    found = fp.lower(stacked(), MESH, init_state, params_fn, batch)
    assert len(found.calls[0].programs) == 2


def test_a_dynamic_loss_scale_is_a_part_of_the_state() -> None:
    scaled = fp.mixed_precision(stacked(), compute="float16", batch=False)
    found = fp.lower(scaled, MESH, init_state, *inputs())
    assert ".scale" in "".join(found.analysis.state_paths)


def test_a_refused_batch_is_refused_alike() -> None:
    params, batch = inputs(rows=7)
    errors = []
    for attempt in (
        lambda: fp.lower(stacked(), MESH, init_state, params, batch),
        lambda: fp.simulate(stacked(), MESH).init(init_state, params, batch),
    ):
        with pytest.raises(BatchError) as caught:
            attempt()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_step_without_a_call_has_no_graph() -> None:
    found = fp.lower(lambda state, batch: (state, {}), fp.Mesh(), init_state, *inputs())
    assert found.calls == ()
    with pytest.raises(PlanError, match=r"calls no fp\.value_and_grad"):
        found.graph  # noqa: B018
