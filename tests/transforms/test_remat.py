"""`remat`: the same bits with less memory, in any stack; budgets, names, segments, the plan and the
curve; errors."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from funcpipe.transforms import remat
from hypothesis import given
from hypothesis import strategies as st
from support.fusing_backend import fusing
from support.models import (
    D,
    batch,
    count,
    loss_fn,
    params,
    pipe,
    refused,
    same_bits,
    start,
    step_of,
)
from support.training_steps import batches, descending, equal, pieces, pipelines
from support.watched_slots import slots_seen
from torch.utils.checkpoint import checkpoint

import funcpipe as fp
from funcpipe._src.collectives import collectives_of
from funcpipe._src.functional.checkpoint_name import checkpoint_name
from funcpipe.errors import PlanError, ScheduleError, StackError
from funcpipe.testing import Model, assert_equivalent, microbatch_counts, models

Transform = Callable[[Callable], Callable]
ROWS = 2 * D * 8  # bytes of the rows of one microbatch of four
PRODUCT = 2 * 2 * D * D  # FLOPs of those rows times a matrix


@st.composite
def remats(draw: st.DrawFn, segments: int) -> Transform:
    """Any `remat` without names; sometimes one for some segments and another for the others."""
    how = st.sampled_from([{}, {"policy": "block"}, {"policy": "products"}]) | st.builds(
        lambda budget: {"budget": budget}, st.floats(0, 1)
    )
    some = draw(st.none() | st.lists(st.integers(0, segments - 1), min_size=1, unique=True))
    first = remat(**draw(how), segments=some)
    rest = [s for s in range(segments) if some and s not in some]
    return (
        fp.compose(first, remat(**draw(how), segments=rest))
        if rest and draw(st.booleans())
        else first
    )


# ---- the same numbers


@given(
    models(tops=("none", "scale", "cast")),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_one_microbatch_has_the_bits_of_autograd(
    model: Model, dtype: torch.dtype, data: st.DataObject
) -> None:
    step, init_state = descending(model)
    ranks = data.draw(st.integers(1, pieces(model)), label="ranks")
    pipeline, again = data.draw(pipelines(model, 1, ranks)), data.draw(remats(pieces(model)))
    params, both = model.init(seed=7, dtype=dtype), fp.compose(pipeline, again)(step)
    assert_equivalent(
        step,
        both,
        fp.Mesh(pipe=ranks),
        init_state,
        params,
        batches(model, 2),
        rtol=0.0,
        bitwise=True,
    )


@given(models(), microbatch_counts(4), st.booleans(), st.booleans(), st.data())
def test_bits_do_not_depend_on_what_is_saved(
    model: Model, microbatches: int, spread: bool, sharded: bool, data: st.DataObject
) -> None:
    """Under any schedule, and beside `data_parallel` and `sharded_weights`, in any order."""
    step, init_state = descending(model)
    ranks = data.draw(st.integers(1, pieces(model)), label="ranks")
    stack = [data.draw(pipelines(model, microbatches, ranks), label="pipeline")]
    stack += [fp.data_parallel(axis="data")] if spread else []
    stack += [fp.sharded_weights(axis="data")] if spread and sharded else []
    mesh = fp.Mesh(pipe=ranks, data=2) if spread else fp.Mesh(pipe=ranks)
    params, some = model.init(seed=7, dtype=torch.float32), model.batch(0, 2 * microbatches)

    def gradients(transforms: list[Transform]) -> Any:
        run = fp.simulate(fp.compose(*transforms)(step), mesh)
        state, metrics = run(run.init(init_state, params, some), some)
        return run.unplace(state), metrics

    again = data.draw(remats(pieces(model)), label="remat")
    assert equal(gradients(data.draw(st.permutations([*stack, again]))), gradients(stack))


def ffn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A block of which much is elementwise."""
    gate, up = checkpoint_name((x @ w, x @ w.t()), "hidden")
    return x + checkpoint_name(F.silu(gate) * up, "act") @ w


def ffn_loss(p: Any, b: Any) -> fp.Mean:
    x = b["x"]
    for w in p["w"]:
        x = fp.stage_boundary(ffn(w, x))
    return fp.Mean(x.pow(2).sum(), count(x))


WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "products": {"policy": "products"},
    "budget": {"budget": 0.6},
    "save": {"save": ["act"]},
    "recompute": {"recompute": ["hidden", "act"]},
    "some segments": {"segments": [1, 2]},  # one on each rank
    "some, by a function": {"segments": lambda s: s in (0, 3)},
}
SCHEDULES = {"b": fp.schedules.one_f_one_b(), "i and w": fp.schedules.zb_h1()}


def ran(
    *transforms: Transform, loss: Callable = ffn_loss, schedule: str = "b", layers: int = 4
) -> tuple[fp.Plan, Any]:
    """The plan, and the state after a step, of a pipeline of two ranks with four microbatches."""
    stack = fp.compose(
        fp.pipelined(axis="pipe", microbatches=4, schedule=SCHEDULES[schedule]), *transforms
    )
    run, state = start(stack(step_of(loss)), fp.Mesh(pipe=2), params(layers), batch())
    plan = run.plan(state, batch())
    return plan, run.unplace(run(state, batch())[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_has_the_same_bits_and_saves_memory(name: str, schedule: str) -> None:
    (plain, expected), (plan, found) = (
        ran(schedule=schedule),
        ran(remat(**WAYS[name]), schedule=schedule),
    )
    assert same_bits(found, expected)
    for before, after in zip(plain.memory, plan.memory, strict=True):
        assert after["residuals"] < before["residuals"]
    assert plan.digest() != plain.digest()


def test_untransformed_it_is_nothing() -> None:
    step = step_of(ffn_loss)
    assert same_bits(remat(budget=0.1)(step)(params(), batch()), step(params(), batch()))


def test_without_a_pipeline() -> None:
    step, p, b = step_of(ffn_loss), params(3), batch()
    for transformed in (
        remat(step),
        fp.accumulated(remat(step), microbatches=1),
        remat(fp.accumulated(step, microbatches=1)),
    ):
        run, state = start(transformed, fp.Mesh(), p, b)
        state, metrics = run(state, b)
        assert same_bits(
            (run.unplace(state), metrics["loss"]), (step(p, b)[0], step(p, b)[1]["loss"])
        )


def test_beside_torch_utils_checkpoint() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = b["x"]
        for w in p["w"]:
            x = fp.stage_boundary(checkpoint(ffn, w, torch.tanh(x @ w), use_reentrant=False))
        return fp.Mean(x.pow(2).sum(), count(x))

    (plain, expected), (plan, found) = ran(loss=loss), ran(remat(), loss=loss)
    assert same_bits(found, expected) and plan.memory[0]["residuals"] < plain.memory[0]["residuals"]


def attention_loss(p: Any, x: torch.Tensor) -> fp.Mean:
    """Of rows, positions and the width; two heads."""
    for w in p["w"]:
        q = (x @ w).view(2, x.shape[1], 2, D // 2).transpose(1, 2)
        seen = checkpoint_name(F.scaled_dot_product_attention(q, q, q, is_causal=True), "attention")
        x = fp.stage_boundary(x + torch.tanh(seen.transpose(1, 2).reshape(x.shape) @ w))
    return fp.Mean(x.pow(2).sum(), torch.ones_like(x[..., 0]).sum())


@pytest.mark.parametrize("split", [fp.seq_all_to_all, fp.seq_ring])
def test_exchanges_of_attention_are_not_repeated(split: Callable) -> None:
    """A sequence of four positions over two ranks."""
    b = batch()["x"].view(2, 4, D)
    found = []
    for transforms in ([], [remat()], [remat(save=["attention"])]):
        run, state = start(
            fp.compose(split(axis="seq", dims=1), *transforms)(step_of(attention_loss)),
            fp.Mesh(seq=2),
            params(),
            b,
        )
        plan, state = run.plan(state, b), run.unplace(run(state, b)[0])
        units = plan.calls[0].units.units.values()
        found.append(
            (state, plan.traffic, [collectives_of(u.code.module.graph) for u in units], plan.memory)
        )
    for one in found[1:]:
        assert same_bits(one[0], found[0][0]) and one[1:3] == found[0][1:3]
        assert one[3][0]["residuals"] < found[0][3][0]["residuals"]


@given(models(), microbatch_counts(3), st.data())
def test_beside_what_a_compiled_backend_fuses(
    model: Model, microbatches: int, data: st.DataObject
) -> None:
    step, init_state = descending(model)
    stack = data.draw(pipelines(model, microbatches, 2)), data.draw(remats(pieces(model)))
    some = batches(model, 2 * microbatches, 1)
    with fusing():  # which may sum in another order
        assert_equivalent(
            step,
            fp.compose(*stack)(step),
            fp.Mesh(pipe=2),
            init_state,
            model.init(),
            some,
            rtol=1e-12,
        )


def test_a_searched_schedule_fits_where_it_did_not() -> None:
    def planned(*transforms: Transform) -> fp.Plan:
        search = fp.schedules.auto(memory_limit=1100)
        stack = fp.compose(fp.pipelined(axis="pipe", microbatches=4, schedule=search), *transforms)
        run, state = start(stack(step_of(ffn_loss)), fp.Mesh(pipe=2), params(8), batch())
        return run.plan(state, batch())

    with refused(
        ScheduleError, "no schedule for 2 ranks and 4 microbatches keeps to memory_limit=1100"
    ):
        planned()
    assert max(m["activations"] for m in planned(remat()).memory) <= 1100


# ---- memory


@given(models(max_segments=4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_residuals_are_those_predicted(
    model: Model, microbatches: int, ranks: int, zero: bool, data: st.DataObject
) -> None:
    """What slots hold while a step runs."""

    def step(params: Any, batch: Any) -> Any:
        return params, {
            "out": fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(params, batch)[0]
        }

    ranks = min(ranks, pieces(model))
    schedule = SCHEDULES["i and w" if zero else "b"]
    pipeline = fp.pipelined(axis="pipe", microbatches=microbatches, schedule=schedule)
    again = data.draw(remats(pieces(model)), label="remat")
    p, b = model.init(), model.batch(0, microbatches)
    run = fp.simulate(fp.compose(pipeline, again)(step), fp.Mesh(pipe=ranks))
    with slots_seen() as peaks:
        run(state := run.init(lambda p: p, p, b), b)
    for r, memory in enumerate(run.plan(state, b).memory):
        assert peaks[r]["values"] == memory["residuals"]


def test_memory_that_is_measured_falls() -> None:
    held = {}
    for name, transforms in (("plain", []), ("block", [remat()]), ("half", [remat(budget=0.5)])):
        with slots_seen() as peaks:
            ran(*transforms, layers=6)
        held[name] = [peaks[r]["values"] for r in range(2)]
    for r in range(2):
        assert held["block"][r] < held["half"][r] < held["plain"][r]
    # 1F1B: two microbatches are under way on the first rank. Of each, its three blocks save 4, 5
    # and 5 tensors (what enters the first is the batch), or 0, 1 and 1, and one is on its way until
    # its gradient comes back; beside them there is that gradient, with remat between two blocks in
    # two parts.
    assert held["plain"][0] == (2 * 15 + 1) * ROWS and held["block"][0] == (2 * 2 + 1 + 2) * ROWS


def test_recomputation_happens_once() -> None:
    for schedule in SCHEDULES:
        flops = []
        for transforms in ([], [remat()], [remat(budget=0.6)]):
            plan, _ = ran(*transforms, schedule=schedule)
            units = plan.calls[0].units.units.values()
            kinds = "FB" if schedule == "b" else "FIW"
            flops.append(sum(u.code.flops for u in units if u.kind in kinds))
        # Of three products in a block, the last is not needed again; within the budget none is.
        assert flops[1] - flops[0] == 4 * 2 * PRODUCT and flops[2] == flops[0]


# ---- what the plan says


def test_the_plan_says_what_is_saved() -> None:
    text = str(ran(remat(budget=0.5, segments=[1, 2, 3]), remat(policy="block", segments=[0]))[0])
    assert (
        f"\n  remat(budget=0.5, segments=[1, 2, 3]): segments 1-3 save {3 * 2 * ROWS} B of "
        f"{3 * 5 * ROWS} B a microbatch, and compute {3 * PRODUCT} FLOP again\n"
    ) in text
    assert (
        f"\n  remat(policy='block', segments=[0]): segments 0 save 0 B of {4 * ROWS} B a "
        f"microbatch, and compute {2 * PRODUCT} FLOP again\n"
    ) in text
    assert re.search(r"0F0 +F0 +-> 1 values, 64 B, 0 B saved: ", text)
    assert re.search(r"0F0 +F1 +-> 2 values, 128 B, 128 B saved: ", text)
    assert re.search(r"\n    \S+ +B1 +-> 2 values, \d+ B: ", text)  # B saves nothing


def test_what_cannot_be_reached_is_said() -> None:
    assert "segments 1-4 cannot save less\n" in str(ran(remat(budget=0.1))[0])
    assert "cannot save less" not in str(ran(remat(budget=0.6, segments=range(4)))[0])


def test_the_curve_of_budgets() -> None:
    plan, _ = ran(remat(budget=0.6))
    curve = plan.remat_curve()
    assert [p.budget for p in curve.points] == [i / 10 for i in range(11)]
    assert [p.nbytes for p in curve.points] == sorted(p.nbytes for p in curve.points)
    assert [p.flops for p in curve.points] == sorted((p.flops for p in curve.points), reverse=True)
    assert (
        curve.whole == (4 + 3 * 5 + 1) * ROWS == curve.points[-1].nbytes
        and curve.points[-1].flops == 0
    )
    assert curve.here.nbytes == 4 * 3 * ROWS - ROWS + ROWS and curve.here.flops == 0
    assert not curve.points[0].reached and curve.points[-1].reached
    # The curve is that of the loss function, whatever the plan itself does.
    assert ran()[0].remat_curve().points == curve.points


def test_a_point_of_the_curve_is_what_a_plan_with_that_budget_does() -> None:
    curve = ran()[0].remat_curve([0.4, 0.8])
    for point in curve.points:
        here = ran(remat(budget=point.budget))[0].remat_curve([]).here
        assert (here.nbytes, here.flops) == (point.nbytes, point.flops)


def test_the_curve_reads_as_text_and_as_a_picture(tmp_path: Path) -> None:
    curve = ran(remat())[0].remat_curve([0, 0.5, 1])
    lines = str(curve).splitlines()
    assert lines[0].startswith(
        "residuals and FLOPs computed again, of one microbatch (1.2 KiB and "
    )
    assert [line.split()[:2] for line in lines[1:]] == [
        ["budget", "0.00"],
        ["budget", "0.50"],
        ["budget", "1.00"],
        ["this", "plan"],
    ]
    assert lines[1].endswith("the least there is") and lines[3].split()[-3:] == [
        "0",
        "FLOP",
        "0.0%",
    ]
    root = ET.fromstring(curve.save(tmp_path / "curve.svg", title="a < b").read_text())
    marks = [x.get("class") for x in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert marks == ["point"] * 3 + ["here"]
    assert any(x.text == "a < b" for x in root.iter("{http://www.w3.org/2000/svg}text"))


def test_a_curve_of_a_loss_that_saves_nothing() -> None:
    step = step_of(lambda p, b: fp.Mean((b["x"] @ p["w"][0]).sum(), count(b["x"])))
    run, state = start(fp.accumulated(step, microbatches=2), fp.Mesh(), params(1), batch())
    curve = run.plan(state, batch()).remat_curve([0, 1])
    assert curve.whole == 0 and all(p.reached for p in curve.points)
    assert "0.0%" in str(curve) and curve.svg().endswith("</svg>")


def test_curves_that_cannot_be_drawn(tmp_path: Path) -> None:
    plan, _ = ran()
    with refused(
        PlanError,
        "remat_curve: there is a budget of 1.5; it is the part of the bytes that may be saved, "
        "from 0 to 1",
    ):
        plan.remat_curve([0.5, 1.5])
    with refused(PlanError, "no value_and_grad 1: the step has 1, counted from 0"):
        plan.remat_curve(call=1)
    with refused(PlanError, "cannot draw a curve as '.png'; name a file .svg"):
        plan.remat_curve().save(tmp_path / "curve.png")


# ---- names of several losses


def test_a_name_in_one_of_several_losses_will_do() -> None:
    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state, b)
        _, more = fp.value_and_grad(ffn_loss)(state, b)
        return optree.tree_map(lambda p, g, h: p - 0.1 * (g + h), state, grads, more), {
            "loss": loss
        }

    run, state = start(fp.compose(pipe, remat(save=["act"]))(step), fp.Mesh(pipe=2))
    found = run.unplace(run(state, batch())[0])
    run, state = start(pipe(step), fp.Mesh(pipe=2))
    assert same_bits(found, run.unplace(run(state, batch())[0]))
    with refused(
        StackError,
        "no value of the loss function has the name 'attention'; it names 'act', 'hidden'",
    ):
        start(fp.compose(pipe, remat(save=["attention"]))(step), fp.Mesh(pipe=2))


# ---- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"policy": "full"},
            "remat: policy='full'; write 'block' or 'products', or give budget=, save= or "
            "recompute=",
        ),
        (
            {"budget": 1.5},
            "remat: budget=1.5; it is the part of the bytes that may be saved, from 0 to 1",
        ),
        (
            {"budget": -0.1},
            "remat: budget=-0.1; it is the part of the bytes that may be saved, from 0 to 1",
        ),
        (
            {"budget": True},
            "remat: budget=True; it is the part of the bytes that may be saved, from 0 to 1",
        ),
        (
            {"budget": "half"},
            "remat: budget='half'; it is the part of the bytes that may be saved, from 0 to 1",
        ),
        (
            {"budget": 0.5, "save": ["x"]},
            "remat: budget and save exclude each other; give one of them",
        ),
        (
            {"policy": "block", "budget": 0.5},
            "remat: policy and budget exclude each other; give one of them",
        ),
        (
            {"save": ["x"], "recompute": ["y"]},
            "remat: save and recompute exclude each other; give one of them",
        ),
        ({"save": "x"}, "remat: save='x'; write a list of names, such as save=['attention']"),
        (
            {"recompute": [3]},
            "remat: recompute=[3]; write a list of names, such as recompute=['attention']",
        ),
        ({"save": []}, "remat: save=[]; write a list of names, such as save=['attention']"),
        (
            {"segments": [-1]},
            "remat: segments=[-1]; write a list of numbers, counted from 0, or a function such as "
            "lambda s: s < 4",
        ),
        (
            {"segments": 2},
            "remat: segments=2; write a list of numbers, counted from 0, or a function such as "
            "lambda s: s < 4",
        ),
        (
            {"segments": []},
            "remat: segments=[]; write a list of numbers, counted from 0, or a function such as "
            "lambda s: s < 4",
        ),
    ],
)
def test_options_that_are_none(options: dict[str, Any], text: str) -> None:
    with pytest.raises(StackError) as error:
        remat(**options)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("transforms", "text"),
    [
        (
            [remat(save=["attention"])],
            "remat(save=['attention']): no value of the loss function has the name 'attention'; it "
            "names 'act', 'hidden'. Write x = fp.checkpoint_name(x, 'attention') where the value "
            "is made",
        ),
        (
            [remat(segments=[2, 9])],
            "remat(policy='block', segments=[2, 9]): there is no segment 9: the loss function has "
            "5, counted from 0, one more than stage boundaries",
        ),
        (
            [remat(budget=0.5), remat(segments=lambda s: s > 3)],
            "remat(policy='block', segments=...) and remat(budget=0.5) both choose what segment 4 "
            "saves; give each its own segments (segments=...)",
        ),
    ],
)
def test_what_a_plan_refuses(transforms: list[Transform], text: str) -> None:
    with pytest.raises(StackError) as error:
        ran(*transforms)
    assert str(error.value) == text


def test_it_reads_well_on_a_step() -> None:
    step = fp.compose(pipe, remat(save=["act"], segments=[0, 1]))(step_of(ffn_loss))
    assert (
        repr(step)
        == "<step step\n  pipelined(axis='pipe')\n  remat(save=['act'], segments=[0, 1])>"
    )
