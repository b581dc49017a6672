"""`find_nonfinite` names the first value that is not finite, whatever runs when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from funcpipe.transforms import mixed_precision
from hypothesis import given
from hypothesis import strategies as st
from support.models import (
    D,
    batch,
    block,
    count,
    descend,
    keep,
    params,
    refused,
    same_bits,
    step_of,
)

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.runtime.nonfinite import find_nonfinite
from funcpipe._src.runtime.nonfinite_watch import Nonfinite
from funcpipe.errors import StateError
from funcpipe.testing import schedules

LAYERS = 3
DATA = fp.data_parallel(axis="data")
MESH = fp.Mesh(pipe=2, data=2)
MICROBATCHES = 2


class Spoil(torch.autograd.Function):
    """The identity, of which rows with a mark become infinite: in the forward pass (1), or backward
    (-1)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mark: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mark)
        return x / (mark != 1).to(x.dtype)[:, None]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (mark,) = ctx.saved_tensors
        return g / (mark != -1).to(g.dtype)[:, None], None


def loss_fn(p: Any, b: Any) -> fp.Mean:
    """Of segment ``k`` the rows with ``b["mark"][:, k]`` are spoiled; the last one is the head."""
    x = b["x"]
    for k, w in enumerate(p["w"]):
        x = fp.stage_boundary(Spoil.apply(block(w, x), b["mark"][:, k]))
    x = Spoil.apply(x, b["mark"][:, len(p["w"])])
    return fp.Mean(x.pow(2).sum(), count(x))


def marked(*marks: tuple[int, int, int], rows: int = 8) -> dict[str, torch.Tensor]:
    """A batch with marks: row, segment, 1 or -1."""
    mark = torch.zeros(rows, LAYERS + 1, dtype=torch.int64)
    for row, segment, sign in marks:
        mark[row, segment] = sign
    return batch(rows) | {"mark": mark}


def started(
    step: Callable, mesh: fp.Mesh, p: Any = None, b: Any = None, init: Callable = keep
) -> tuple[Any, Any]:
    run = fp.simulate(step, mesh)
    return run, run.init(init, params(LAYERS) if p is None else p, marked() if b is None else b)


def stacked(sharded: bool = False, **options: Any) -> Callable:
    step = fp.pipelined(DATA(step_of(loss_fn)), axis="pipe", microbatches=MICROBATCHES, **options)
    return fp.sharded_weights(step, axis="data") if sharded else step


def test_nothing_where_all_is_finite() -> None:
    run, state = started(stacked(), MESH)
    before = [tree.map(torch.clone, s) for s in state]
    assert find_nonfinite(run, state, marked()) is None
    assert same_bits(state, before)


@given(
    st.integers(0, 7), st.integers(0, LAYERS), st.sampled_from([1, -1]), st.booleans(), schedules()
)
def test_it_names_unit_microbatch_and_rank(
    row: int, segment: int, sign: int, sharded: bool, schedule: Any
) -> None:
    run, state = started(stacked(sharded, schedule=schedule), MESH)
    found = find_nonfinite(run, state, marked((row, segment, sign)))
    assert found is not None
    planned = run.plan(state, marked()).calls[0]
    (data, rest) = divmod(row, 4)
    assert found.unit is not None and found.unit[1:] == str(segment)
    assert found.unit[0] == "F" if sign == 1 else found.unit[0] in "BI"
    assert (found.call, found.microbatch) == (0, rest // 2)
    assert found.rank == 2 * planned.pipeline_rank_of(segment) + data
    assert found.op == "aten.div.Tensor"
    again = run.plan(state, marked())
    assert again.calls[0] is planned  # nothing was planned anew


def test_the_first_of_several() -> None:
    """In the flow of data: the earlier microbatch, then the earlier unit; on the lower rank."""
    run, state = started(stacked(schedule=fp.schedules.gpipe()), MESH)
    found = find_nonfinite(run, state, marked((6, 0, 1), (1, 2, 1), (4, 2, 1), (5, 3, -1)))
    assert found is not None and (found.unit, found.microbatch, found.rank) == ("F2", 0, 2)


def test_the_text() -> None:
    run, state = started(stacked(), MESH)
    text = str(find_nonfinite(run, state, marked((3, 3, 1))))
    assert text == (
        "rank 2, value_and_grad 0, microbatch 1, unit F3: a value of the forward pass (div_3), a "
        "tensor of shape (2, 4) and dtype torch.float64 of which 4 of 8 are infinite; it comes "
        "from aten.div.Tensor"
    )
    text = str(find_nonfinite(run, state, marked((5, 0, -1))))
    assert text.startswith(
        "rank 1, value_and_grad 0, microbatch 0, unit B0: the gradient of params['w'][0], a tensor "
        "of shape (4, 4) "
    )
    assert text.endswith(" of 16; it comes from aten.div.Tensor") or text.endswith(
        "infinite; it comes from aten.div.Tensor"
    )


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_params_that_come_in(sharded: bool, bad: float) -> None:
    p = params(LAYERS)
    p["w"][2][1, 2] = bad
    run, state = started(stacked(sharded), MESH, p)
    found = find_nonfinite(run, state, marked())
    assert found is not None
    assert found[:6] == ("params['w'][2]", 2, 0, None, None, None)
    assert found.text.endswith(
        f"of which 1 of {8 if sharded else 16} is {'NaN' if bad != bad else 'infinite'}"
    )


def test_a_batch_that_comes_in() -> None:
    run, state = started(stacked(), MESH)
    b = marked()
    b["x"][6] = torch.nan
    found = find_nonfinite(run, state, b)
    assert str(found) == (
        "rank 1, value_and_grad 0, microbatch 1: batch['x'], a tensor of shape (2, 4) and dtype "
        "torch.float64 of which 4 of 8 are NaN"
    )


def test_ready_microbatches() -> None:
    step = fp.accumulated(step_of(loss_fn), microbatches=None)
    parts = [marked(rows=2), marked((2, 1, 1), rows=3)]
    run, state = started(step, fp.Mesh(), b=fp.Microbatches(parts))
    found = find_nonfinite(run, state, fp.Microbatches(parts))
    assert found is not None and (found.unit, found.microbatch) == ("F1", 1)
    parts[0]["x"][0, 0] = torch.inf
    found = find_nonfinite(run, state, fp.Microbatches(parts))
    assert found is not None and (found.what, found.microbatch) == ("batch['x']", 0)


def test_a_mask_is_meant() -> None:
    """Negative infinity, in the batch and in the loss function, is not named where there is
    something else."""

    def masked(p: Any, b: Any) -> fp.Mean:
        x = fp.stage_boundary((b["x"] @ p["w"][0]).masked_fill(b["x"] > 0, -torch.inf) + b["mask"])
        return fp.Mean((x.softmax(-1) * b["x"] * p["w"][1].sum().sqrt()).sum(), count(x))

    p = {"w": [torch.ones(D, D, dtype=torch.float64) for _ in range(2)]}
    b = {"x": -batch()["x"].abs(), "mask": torch.zeros(8, D, dtype=torch.float64)}
    b["mask"][:, 0] = -torch.inf
    run, state = started(step_of(masked), fp.Mesh(), p, b)
    assert find_nonfinite(run, state, b) is None
    run, state = started(step_of(masked), fp.Mesh(), {"w": [p["w"][0], -p["w"][1]]}, b)
    found = find_nonfinite(run, state, b)
    assert found is not None and (found.unit, found.op) == ("F1", "aten.sqrt.default")
    run, state = started(step_of(masked), fp.Mesh(), p, b)
    b["x"][3] = -torch.inf  # what it becomes in the end is another thing
    found = find_nonfinite(run, state, b)
    assert found is not None and (found.unit, found.op) == ("F1", "aten._softmax.default")


def test_negative_infinity_that_is_not_meant() -> None:
    def logs(p: Any, b: Any) -> fp.Mean:
        x = fp.stage_boundary((b["x"] * 0).log() * p["w"][0].exp().sum())
        return fp.Mean((x @ p["w"][1]).sum(), count(x))

    run, state = started(step_of(logs), fp.Mesh(), params(2), batch())
    found = find_nonfinite(run, state, batch())
    assert found is not None and (found.unit, found.op) == ("F0", "aten.log.default")


def test_sums_that_overflow() -> None:
    """Every part is finite: the sum over microbatches is not; or that over ranks."""

    def step(w: Any, b: Any) -> Any:
        loss, grad = fp.value_and_grad(
            lambda p, b: fp.Mean((p * b).sum(), b.new_tensor(float(len(b))))
        )(w, b)
        return descend(w, grad), {"loss": loss}

    w, b = torch.ones(1, dtype=torch.float64), torch.full((2, 1), 1e308, dtype=torch.float64)
    run, state = started(fp.accumulated(step, microbatches=2), fp.Mesh(), w, b)
    found = find_nonfinite(run, state, b)
    assert found is not None
    assert (found.what, found.unit, found.microbatch) == ("Mean.total, summed so far", None, 1)
    run, state = started(DATA(step), fp.Mesh(data=2), w, b)
    found = find_nonfinite(run, state, b)
    assert found is not None and (found.what, found.rank, found.microbatch) == ("the loss", 0, None)
    run, state = started(fp.sharded_weights(DATA(step), axis="data"), fp.Mesh(data=2), w, b)
    found = find_nonfinite(run, state, -b)
    assert found is not None and (found.rank, found.call) == (0, 0)


def test_outside_of_the_loss_function() -> None:
    """What was infinite before, such as the best loss so far, may stay so."""

    def step(state: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state["p"], b)
        new = descend(state["p"], grads)
        root = tree.map(
            lambda r, p: r + 0 * (p + 100 * (b["mark"].sum() - 1)).sqrt(), state["root"], new
        )
        return {"p": new, "root": root, "best": state["best"], "n": 0}, {"loss": loss}

    def init(p):
        return {
            "p": p,
            "root": tree.map(torch.zeros_like, p),
            "best": torch.tensor(torch.inf),
            "n": 0,
        }

    step_ = fp.pipelined(step, axis="pipe", microbatches=2)
    good = marked()
    good["mark"][:, 0] = 2  # marks nothing
    run, state = started(step_, fp.Mesh(pipe=2), b=good, init=init)
    assert find_nonfinite(run, state, good) is None
    found = find_nonfinite(run, state, marked())
    assert found is not None and found.call is None
    assert str(found) == (
        "rank 0: state['root']['w'][0] after the step, a tensor of shape (4, 4) and dtype "
        "torch.float64 of which 16 of 16 are NaN"
    )


def test_under_a_loss_scale() -> None:
    """What a skipped step ran into: a gradient that float16 does not hold, or a param."""
    step = mixed_precision(stacked(), compute="float16")
    p = params(LAYERS, torch.float32)
    run, state = started(step, MESH, p)
    assert (
        find_nonfinite(run, [s._replace(scale=torch.tensor(1.0)) for s in state], marked()) is None
    )
    found = find_nonfinite(run, [s._replace(scale=torch.tensor(2.0**40)) for s in state], marked())
    assert found is not None and found.unit is not None and found.unit[0] == "B"
    p["w"][1][0, 0] = 1e6
    run, state = started(step, MESH, p)
    found = find_nonfinite(run, state, marked())
    assert str(found) == (
        "rank 0, value_and_grad 0: params['w'][1], a tensor of shape (4, 4) and dtype "
        "torch.float16 of which 1 of 16 is infinite"
    )
    run, state = started(fp.sharded_weights(step, axis="data"), MESH, p)
    found = find_nonfinite(run, state, marked())
    assert found is not None and found.what == "params['w'][1], gathered"


def test_a_runner_without_a_plan() -> None:
    with refused(StateError, "call run.init(init_state, params, batch) first"):
        find_nonfinite(fp.simulate(stacked(), MESH), [None] * 4, marked())
    run, _ = started(stacked(), MESH)
    with refused(StateError, "a simulated state is a list with one state for each of 4 ranks"):
        find_nonfinite(run, params(LAYERS), marked())


def work() -> list[Nonfinite | None]:
    torch.set_num_threads(1)
    run = fp.spmd(stacked(), fp.Mesh(pipe=2, data=1), device="cpu", timeout=30)
    state = run.init(keep, params(LAYERS), marked())
    found = [
        find_nonfinite(run, state, b)
        for b in (marked(), marked((5, 1, 1)), marked((5, 2, -1), rows=12))
    ]
    run(state, marked())
    run.close()
    return found


def test_every_process_gets_the_same_answer() -> None:
    first, second = fp.launch(work, 2, timeout=120)
    assert first == second and first[0] is None
    assert [(x.rank, x.unit, x.microbatch) for x in first[1:]] == [(0, "F1", 1), (1, "B2", 0)]
