"""Predictions, profiles and recordings of a plan: times and memory that agree with each other, and
with what ran."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.runtime import profile_pieces
from funcpipe._src.runtime import profile_units as profile
from funcpipe._src.schedule import Costs
from funcpipe.errors import PlanError
from funcpipe.testing import Layer, Model, models, schedules

MODEL = Model(tuple((Layer("linear", (k, k)),) for k in range(4)))


def start(
    schedule: Any = None,
    model: Model = MODEL,
    ranks: int = 2,
    microbatches: int = 3,
    **options: Any,
) -> tuple[Any, Any, Any]:
    def step(params: Any, batch: Any) -> Any:
        out, _ = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(params, batch)
        return params, {"loss": out[0] if model.has_aux else out}

    fast = fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule, **options)
    run = fp.simulate(fast, fp.Mesh(pipe=ranks))
    batch = model.batch(rows=microbatches)
    return run, run.init(lambda p: p, model.init(), batch), batch


def test_times_follow_from_costs() -> None:
    """1F1B, P=2, M=3, five segments as 2 + 3: every number by hand."""
    run, state, batch = start(stages=[2, 3])
    plan = run.plan(state, batch)
    found = plan.predict({"F": 1.0, "B": 2.0})
    assert found.busy == (18.0, 27.0)
    assert (
        found.step_time == 2 + 27 + 4
    )  # the first F of rank 0, all of rank 1, the last B of rank 0
    assert found.bubble == pytest.approx(1 - 45 / 66)
    assert (
        plan.predict(lambda kind, segment: {"F": 1.0, "B": 2.0}[kind]).step_time == found.step_time
    )
    assert str(found).startswith(
        "step 33 s, bubble 31.8%\n  rank 0 of the pipeline: busy 18 s, peak "
    )


def test_links_cost_time() -> None:
    run, state, batch = start(stages=[2, 3])
    plan = run.plan(state, batch)
    sent = next(i for i in plan.calls[0].programs[0].instructions if i.op == "send")
    nbytes = sum(v.nbytes for v in sent.values)
    costs = Costs({"F": 1.0, "B": 2.0}, bandwidth=nbytes / 0.25, latency=0.5)
    # Rank 1 receives three times, and computes without a pause otherwise; rank 0 then receives what
    # its last B reads.
    assert plan.predict(costs).step_time == pytest.approx(33 + 4 * 0.75)


def test_stages_that_exchange_nothing() -> None:
    """A loss that reads neither its first stage's output nor its params: no message, and none is
    predicted."""

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        fp.stage_boundary(batch * 2)
        return fp.Mean((batch * params).sum(), torch.tensor(float(len(batch))))

    step = lambda p, b: (p, {"loss": fp.value_and_grad(loss_fn)(p, b)[0]})  # noqa: E731
    run = fp.simulate(
        fp.pipelined(step, axis="pipe", microbatches=2, stages=[1, 1]), fp.Mesh(pipe=2)
    )
    plan = run.plan(run.init(lambda p: p, torch.ones(3), torch.ones(4, 3)), torch.ones(4, 3))
    assert plan.calls[0].schedule.report.messages == 0
    assert plan.predict({"F": 1.0, "B": 2.0}).step_time == 6.0


@given(model=models(max_segments=4), schedule=schedules(v=2), microbatches=st.integers(1, 4))
def test_the_memory_curve_peaks_where_the_plan_says(
    model: Model, schedule: Any, microbatches: int
) -> None:
    if len(model.segments) + 1 < 2:
        return
    run, state, batch = start(
        schedule if len(model.segments) >= 3 else None, model, 2, microbatches
    )
    plan = run.plan(state, batch)
    found = plan.predict({"F": 1.0, "I": 1.0, "W": 1.0})
    assert list(found.peak_memory) == [memory["activations"] for memory in plan.memory]
    for curve, spans in zip(found.memory, found.timeline.spans, strict=True):
        times = [time for time, _ in curve]
        assert times == sorted(times) and curve[-1][1] >= 0
        assert times[-1] == pytest.approx(max(span.end for span in spans))


def test_profiles_are_costs() -> None:
    """Every kind of every segment, equal units alike; of a schedule without I and W too."""
    run, state, batch = start()
    costs = fp.profile_units(run, state, batch, rounds=3)
    assert set(costs.units) == {(kind, s) for kind in "FBIW" for s in range(5)}
    assert costs.of("F", 1) == costs.of("F", 2) > 0
    plan = run.plan(state, batch)
    assert plan.predict(costs).step_time >= max(plan.predict(costs).busy)
    searched = start(fp.schedules.auto(costs=costs))[0]
    assert searched.plan(None, batch).predict(costs).step_time <= plan.predict(costs).step_time * (
        1 + 1e-9
    )
    with pytest.raises(
        PlanError, match="cannot profile value_and_grad 1: the step has 1, counted from 0"
    ):
        fp.profile_units(run, state, batch, call=1)


def test_profiles_assume_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the type of the devices; none on CPUs."""
    run, state, batch = start()
    assert fp.profile_units(run, state, batch, rounds=1).message(1e9) == 0
    monkeypatch.setattr(profile, "_LINKS", {"cpu": (8.0, 2.0)})
    assert fp.profile_units(run, state, batch, rounds=1).message(16) == 4


def test_profiles_look_up_the_rows_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one row again and again, whose gradients all wait for each other."""
    seen = []
    make = profile_pieces._input
    monkeypatch.setattr(
        profile_pieces,
        "_input",
        lambda v, known, *rest: seen.append((v, known)) or make(v, known, *rest),
    )
    run, state, batch = start()
    fp.profile_units(run, state, batch, rounds=1)
    rows = [known for v, known in seen if v.kind == "batch" and v.dtype == torch.int64]
    leaves = [
        x for x in tree.leaves(batch) if isinstance(x, torch.Tensor) and x.dtype == torch.int64
    ]
    assert rows and all(any(torch.equal(x, y[: len(x)]) for y in leaves) for x in rows)


def test_costs_of_a_wrong_kind() -> None:
    run, state, batch = start()
    with pytest.raises(PlanError, match=r"costs are float; give fp\.schedules\.Costs, a dict"):
        run.plan(state, batch).predict(3.0)
    with pytest.raises(PlanError, match="costs do not say what B of segment"):
        run.plan(state, batch).predict({"F": 1.0})


@pytest.mark.parametrize(
    "schedule", [fp.schedules.one_f_one_b(), fp.schedules.zb_v()], ids=lambda fn: fn.__name__
)
def test_a_recorded_step(schedule: Any, tmp_path: Path) -> None:
    """Every action of the schedule, in order on its rank; the step computes what it computes
    unrecorded."""
    run, state, batch = start(schedule)
    want = run(state, batch)
    with run.record() as recording:
        got = run(state, batch)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(want), tree.leaves(got), strict=True))
    line = recording.timeline()
    for spans, row in zip(
        line.spans, run.plan(state, batch).calls[0].schedule.table.ranks, strict=True
    ):
        assert [span.action for span in spans] == list(row)
        assert all(0 <= a.start <= a.end <= b.start for a, b in pairwise(spans))
    assert recording.costs().of("F", 0) > 0
    assert recording.prediction().step_time <= line.makespan  # simulated ranks run one at a time
    page = recording.save(tmp_path / "x.html").read_text()
    assert "recorded: " in page and "predicted: " in page
    ET.fromstring(recording.save(tmp_path / "x.svg").read_text())
    names = {
        e["args"]["name"]
        for e in json.loads(recording.save(tmp_path / "x.json").read_text())["traceEvents"]
        if e["name"] == "process_name"
    }
    assert names == {"recorded rank 0", "recorded rank 1", "predicted rank 0", "predicted rank 1"}
    assert all(rank.observer is not None for rank in next(iter(run._bound.values())))
    run(state, batch)
    assert all(rank.observer is None for rank in next(iter(run._bound.values())))


def test_nothing_recorded() -> None:
    run, _, _ = start()
    with run.record() as recording:
        pass
    with pytest.raises(
        PlanError, match=r"nothing was recorded; call the runner once inside `with run.record\(\)"
    ):
        recording.timeline()


def test_plans_are_saved_with_memory_and_as_traces(tmp_path: Path) -> None:
    run, state, batch = start()
    plan = run.plan(state, batch)
    picture = plan.save(tmp_path / "x.svg", costs={"F": 1e-3, "B": 2e-3}).read_text()
    texts = [
        element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert "memory" in texts and any(text and text.endswith(" ms") for text in texts)
    events = json.loads(plan.save(tmp_path / "x.json").read_text())["traceEvents"]
    boxes = [e for e in events if e["ph"] == "X" and e["cat"] in "FB"]
    assert len(boxes) == plan.calls[0].schedule.report.actions
    starts, ends = ([e["id"] for e in events if e["ph"] == kind] for kind in "sf")
    assert sorted(starts) == sorted(ends) and len(starts) == plan.calls[0].schedule.report.messages
    assert max(e["args"]["bytes"] for e in events if e["ph"] == "C") == max(
        plan.predict().peak_memory
    )


def record_in_processes() -> tuple[list[Any], list[int]]:
    mesh = fp.Mesh(pipe=2)

    def step(params: Any, batch: Any) -> Any:
        return params, {"loss": fp.value_and_grad(MODEL.loss_fn)(params, batch)[0]}

    run = fp.spmd(fp.pipelined(step, axis="pipe", microbatches=3), mesh)
    batch = MODEL.batch(rows=3)
    state = run.init(lambda p: p, MODEL.init(), batch)
    with run.record() as recording:
        run(state, batch)
    costs = fp.profile_units(run, state, batch, rounds=2)
    line = recording.timeline()
    out = sorted(costs.units.items()), [len(spans) for spans in line.spans]
    run.close()
    return out


def test_in_processes() -> None:
    """Every rank has the whole recording, and the same costs."""
    found = fp.launch(record_in_processes, 2, timeout=240)
    assert found[0] == found[1]
    assert found[0][1] == [12, 12]
