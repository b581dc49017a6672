"""Transforms, batches, schedules and runners used wrongly: each refusal with its text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    D,
    batch,
    body,
    count,
    keep,
    loss_fn,
    params,
    pipe,
    refused,
    run_loss,
    start,
    step_of,
)

import funcpipe as fp
from funcpipe._src.runtime.simulate import check_same
from funcpipe._src.schedule import Schedule, from_table, gpipe, interleaved_1f1b, one_f_one_b
from funcpipe.errors import (
    BatchError,
    CutError,
    MeshError,
    MismatchError,
    PlanError,
    ScheduleError,
    StackError,
    StateError,
)

STEP = step_of()
TWO = fp.Mesh(pipe=2)


# ---- the stack of transforms


def test_an_axis_that_the_mesh_lacks() -> None:
    with refused(
        MeshError,
        "pipelined(axis='pipe')",
        "axis 'pipe' is not in Mesh(data=2)",
        "its axes are 'data'",
    ):
        fp.simulate(pipe(STEP), fp.Mesh(data=2))
    with refused(MeshError, "axis 'pipe' is not in Mesh()", "its axes are none"):
        fp.simulate(pipe(STEP), fp.Mesh())


def test_a_step_among_composed_transforms() -> None:
    with refused(StackError, "compose: <step step", "is a step, not a transform", "(step)"):
        fp.compose(fp.data_parallel(STEP, axis="data"), fp.accumulated(microbatches=2))


def test_an_axis_that_nobody_uses() -> None:
    with refused(
        StackError,
        "axis 'data' of Mesh(pipe=2, data=2) is used by no transform",
        "leave it out of the mesh",
    ):
        fp.simulate(pipe(STEP), fp.Mesh(pipe=2, data=2))
    with refused(StackError, "axis 'data' of Mesh(data=2)", "would all compute the same"):
        fp.simulate(STEP, fp.Mesh(data=2))


def test_two_pipelines() -> None:
    words = ("two pipelines on one step", "pipelined(axis='pipe')", "cut along one axis")
    with refused(StackError, *words):
        fp.simulate(pipe(pipe(STEP)), TWO)
    with refused(StackError, *words):
        fp.simulate(pipe(pipe(STEP), axis="other"), fp.Mesh(pipe=2, other=2))


def test_two_transforms_that_make_microbatches() -> None:
    with refused(
        StackError,
        "accumulated()",
        "pipelined(axis='pipe')",
        "both split the batch into microbatches",
        "keep one",
    ):
        fp.simulate(fp.accumulated(pipe(STEP), microbatches=2), TWO)
    with refused(StackError, "accumulated() and accumulated() both split"):
        fp.simulate(fp.accumulated(fp.accumulated(STEP, microbatches=2), microbatches=2), fp.Mesh())


def test_a_pipe_axis_carries_nothing_else() -> None:
    with refused(StackError, "share axis 'pipe'", "the axis of a pipeline carries nothing else"):
        fp.simulate(fp.data_parallel(pipe(STEP), axis="pipe"), TWO)


def test_one_axis_splits_the_batch_once() -> None:
    with refused(
        StackError,
        "data_parallel(axis='data')",
        "both split over axis 'data'",
        "give each its own axis",
    ):
        fp.simulate(
            fp.data_parallel(fp.data_parallel(STEP, axis="data"), axis="data"), fp.Mesh(data=2)
        )
    with refused(StackError, "data_parallel(axis='data', axis='data') names an axis twice"):
        fp.simulate(fp.data_parallel(STEP, axis=("data", "data")), fp.Mesh(data=2))


OPTIONS: dict[str, tuple[Callable, str]] = {
    "axis is a number": (lambda: pipe(STEP, axis=3), "axis=3: write the name of a mesh axis"),
    "axis is None": (
        lambda: fp.data_parallel(STEP, axis=None),
        "axis=None: write the name of a mesh axis",
    ),  # type: ignore[arg-type]
    "two axes": (
        lambda: pipe(STEP, axis=("a", "b")),
        "axis is \\('a', 'b'\\); a pipeline runs along one axis",
    ),
    "no microbatch": (
        lambda: pipe(STEP, 0),
        "microbatches is 0; it has to be a whole number, 1 or more",
    ),
    "text": (lambda: pipe(STEP, "4"), "pipelined: microbatches is '4'"),  # type: ignore[arg-type]
    "bool": (lambda: fp.accumulated(STEP, microbatches=True), "accumulated: microbatches is True"),
    "stages word": (
        lambda: pipe(STEP, stages="odd"),
        "stages='odd'; write 'balanced', 'even', or a list",
    ),
    "stages number": (
        lambda: pipe(STEP, stages=3),
        "stages=3; write 'balanced', 'even', or a list",
    ),
    "empty stage": (lambda: pipe(STEP, stages=[1, 0]), "each entry of stages is 0"),
    "schedule not called": (
        lambda: pipe(STEP, schedule=one_f_one_b),
        "schedule is one_f_one_b, not a function \\(ranks, "
        "microbatches\\).*fp.schedules.one_f_one_b\\(\\)",
    ),
    "schedule laid out": (
        lambda: pipe(STEP, schedule=one_f_one_b()(2, 2)),
        "schedule is a Schedule, not a function",
    ),
    "schedule word": (
        lambda: pipe(STEP, schedule="one_f_two_b"),
        "pipelined: no schedule is called 'one_f_two_b'; did you mean one_f_one_b\\? There are: "
        "gpipe, .*forward_only; and 'auto'",
    ),
    "step": (lambda: pipe(3), "pipelined: the step is an int; pass a function \\(state, batch\\)"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    make, text = OPTIONS[name]
    with pytest.raises(StackError, match=text):
        make()


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (fp.pipelined(axis="pipe", microbatches=2), "pipelined(axis='pipe')"),
        (fp.mixed_precision(compute="bfloat16"), "mixed_precision(compute='bfloat16')"),
        (
            fp.compose(pipe, fp.data_parallel(axis="data")),
            "compose(pipe, data_parallel(axis='data'))",
        ),
    ],
)
def test_a_transform_that_was_never_applied(transform: Any, name: str) -> None:
    words = (
        f"{name} is a transform that was not applied to a step",
        "Write it with the step",
        "fp.compose(...)(step)",
    )
    for run in (fp.simulate, fp.spmd):
        with refused(StackError, *words):
            run(transform, TWO)  # type: ignore[operator]
    with refused(StackError, *words):
        transform({}, {})
    with refused(StackError, "accumulated(): ", *words):
        fp.accumulated(transform, microbatches=2)
    assert repr(transform) == f"<transform {name}>"


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("1f1b", fp.schedules.one_f_one_b()),
        ("1F1B", fp.schedules.one_f_one_b()),
        ("zb-v", fp.schedules.zb_v()),
        ("interleaved_1f1b", fp.schedules.interleaved_1f1b(2)),
    ],
)
def test_a_schedule_by_its_name(name: str, same: Callable) -> None:
    found = pipe(STEP, schedule=name).specs[0].cut.schedule
    assert found.__name__ == same.__name__ and found(2, 4) == same(2, 4)


def test_a_mesh_is_a_mesh() -> None:
    with refused(MeshError, "the mesh is an int", "write fp.Mesh(...)"):
        fp.simulate(pipe(STEP), 4)  # type: ignore[arg-type]


# ---- the batch


def test_a_leaf_that_does_not_divide_is_named() -> None:
    with refused(
        BatchError,
        "pipelined: batch['x'] of shape (7, 4)",
        "along dim 0 into 2 microbatches",
        "dims=..., None hands",
    ):
        run_loss(loss_fn, b=batch(7))
    with refused(BatchError, "batch['x'] of shape (8, 4) does not split along dim 5"):
        run_loss(loss_fn, dims=5)
    both = fp.data_parallel(pipe(STEP), axis="data")
    with refused(
        BatchError,
        "batch['x'] of shape (10, 4), (5, 4) after other splits, does not split",
        "2 microbatches",
    ):
        start(both, fp.Mesh(pipe=2, data=2), b=batch(10))
    with refused(BatchError, "data_parallel: batch['x'] of shape (9, 4)", "2 shards over 'data'"):
        start(both, fp.Mesh(pipe=2, data=2), b=batch(9))


def test_dims_that_do_not_fit_say_so_without_data() -> None:
    for dims in ({"y": 0}, [0, 0]):
        with refused(
            BatchError,
            f"pipelined: dims={dims} is not a prefix of the batch {{'x': *}}",
            "Write one dim",
        ) as caught:
            run_loss(loss_fn, dims=dims)
        assert "tensor" not in str(caught.value)
    with refused(BatchError, "dims={'x': True} holds True; a dim is an int, or None"):
        run_loss(loss_fn, dims={"x": True})


def test_ready_microbatches() -> None:
    ready = fp.Microbatches([batch(4), batch(4), batch(4)])
    with refused(
        BatchError, "pipelined asks for 2 microbatches, but the batch brings 3", "microbatches=None"
    ):
        run_loss(loss_fn, b=ready)
    with refused(
        BatchError,
        "pipelined(microbatches=None) takes ready microbatches",
        "a dict",
        "fp.Microbatches([...])",
    ):
        run_loss(loss_fn, microbatches=None)
    for none in (fp.Microbatches([]), fp.Microbatches(5)):  # type: ignore[arg-type]
        with refused(BatchError, f"fp.Microbatches({none.parts!r})", "a step needs at least one"):
            run_loss(loss_fn, b=none, microbatches=None)
        with refused(BatchError, "a step needs at least one"):
            STEP(params(), none)


def test_a_microbatch_that_takes_another_way() -> None:
    def loss(p: Any, b: Any) -> fp.Mean:
        x = body(p, b) if len(b["x"]) > 2 else b["x"] @ p["w"][0]
        return fp.Mean(x.sum(), count(x))

    with refused(
        CutError,
        "microbatch 1 takes another way through the loss",
        "1 segments instead of 3",
        "the path may not",
    ):
        run_loss(loss, b=fp.Microbatches([batch(4), batch(2)]), microbatches=None)


# ---- stages


def test_fewer_boundaries_than_stages_need() -> None:
    with refused(
        CutError,
        "4 stages need 3 boundaries or more",
        "has 2",
        "fp.stage_boundary after every block",
    ):
        start(pipe(STEP), fp.Mesh(pipe=4))
    with refused(CutError, "4 stages need 3 boundaries"):  # two ranks, two stages each
        run_loss(loss_fn, schedule=interleaved_1f1b(2))


def test_stages_that_do_not_fit() -> None:
    for stages in ([1, 1], [1, 1, 1]):
        with refused(
            CutError,
            f"stages={stages}",
            "2 stages and 3 segments",
            "write 2 numbers that add up to 3",
        ):
            run_loss(loss_fn, stages=stages)


# ---- schedules that the user wrote


def table(*rows: str) -> Any:
    return from_table([row.split() for row in rows], name="mine")


def test_a_table_that_is_right_runs() -> None:
    run_loss(loss_fn, schedule=table("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"))


TABLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing receive": (
        table(
            "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
            "1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
        ),
        (
            "0SEND_F1>1 is sent to rank 1, which never receives it",
            "instead: write 1RECV_F1<0 on rank 1",
        ),
    ),
    "duplicate forward": (
        table("0F0 0F1 0F0 0B0 0B1", "1F0 1B0 1F1 1B1"),
        ("mine: rank 0 has 0F0 twice, at positions 0 and 4", "runs once", "instead: leave one out"),
    ),
    "cycle": (
        table("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"),
        (
            "mine: deadlock: rank 0 and rank 1 wait for each other",
            "rank 0 stands at",
            "rank 1 stands at",
            "instead: ",
        ),
    ),
    "missing backward": (
        table("0F0 0F1 0B0", "1F0 1B0 1F1 1B1"),
        ("mine: rank 0 never runs 0B1", "instead: write 0B1"),
    ),
    "other ranks": (
        table("0F0 0F1 0B0 0B1"),
        ("mine: written for 1 rank and 2 microbatches, not 2 ranks and 2 microbatches",),
    ),
    "other microbatches": (
        table("0F0 0B0", "1F0 1B0"),
        ("mine: written for 2 ranks and 1 microbatch, not 2 ranks and 2 microbatches",),
    ),
    "forward only": (
        table("0F0 0F1", "1F0 1F1"),
        ("mine: has no backward actions, but value_and_grad needs gradients",),
    ),
    "segment too many": (
        table("0F0 0I0 0W0.0 0W0.7 0F1 0B1", "1F0 1B0 1F1 1B1"),
        ("0W0.7 names segment 7 of 1", "stage 0 has 1 segment"),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_table(name: str) -> None:
    schedule, words = TABLES[name]
    with refused(ScheduleError, *words):
        run_loss(loss_fn, schedule=schedule, stages=[1, 2])


def test_a_schedule_function_that_is_wrong() -> None:
    with refused(
        ScheduleError, "the schedule function returned an int", "fp.schedules.from_table(rows)"
    ):
        run_loss(loss_fn, schedule=lambda ranks, microbatches: 5)
    with refused(
        ScheduleError,
        "gpipe: is a table for 3 ranks",
        "axis 'pipe' has 2 ranks and the batch 2 microbatches",
    ):
        run_loss(loss_fn, schedule=lambda ranks, microbatches: gpipe()(3, microbatches))
    with refused(ScheduleError, "own: rank 1 holds no stage"):
        row = gpipe()(1, 2).ranks[0]
        run_loss(
            loss_fn,
            schedule=lambda ranks, microbatches: Schedule("own", (row, ()), (0,), microbatches),
        )


# ---- runners


def test_init_comes_first() -> None:
    run = fp.simulate(pipe(STEP), TWO)
    for call in (
        lambda: run([params(), params()], batch()),
        lambda: run.plan([], batch()),
        lambda: run.place(params()),
        lambda: run.unplace([params(), params()]),
    ):
        with refused(
            StateError, "call run.init(init_state, params, batch) first", "it makes the plan"
        ):
            call()


def test_a_simulated_state_has_one_state_for_each_rank() -> None:
    run, state = start(pipe(STEP), TWO)
    for wrong, what in (
        (params(), "a dict"),
        (state[:1], "a list of 1"),
        (tuple(state), "a tuple of 2"),
    ):
        words = ("a list with one state for each of 2 ranks", f"this is {what}", "run.place(full)")
        with refused(StateError, *words):
            run(wrong, batch())
        with refused(StateError, *words):
            run.unplace(wrong)


def test_a_state_that_is_not_the_ranks_own() -> None:
    run, (first, second) = start(pipe(STEP), TWO, params(3))
    leaf = first["w"][0]
    again = "Pass the state that run.init, run.place or the last step returned"
    cases: list[tuple[Any, tuple[str, ...]]] = [
        (second, ("rank 0: params['w'][0] should be a tensor of shape (4, 4)", "but is None")),
        (params(3), ("rank 0: params['w'][2] is not held by this rank, but is a tensor",)),
        (
            {"w": [leaf.float(), *first["w"][1:]]},
            ("params['w'][0] should be", "torch.float64, but is", "torch.float32"),
        ),
        (
            {"w": [leaf[:2], *first["w"][1:]]},
            ("params['w'][0] should be", "(4, 4)", "but is", "(2, 4)"),
        ),
        ({"w": [1.0, *first["w"][1:]]}, ("params['w'][0] should be a tensor", "but is a float")),
        (
            {"v": first["w"]},
            ("rank 0: params have another structure than planned", "expected key(s): ['w']"),
        ),
    ]
    for wrong, words in cases:
        with refused(StateError, *words, again) as caught:
            run([wrong, second], batch())
        assert "tensor(" not in str(caught.value)


def test_a_full_state_of_another_structure() -> None:
    run, _ = start(pipe(STEP), TWO)
    with refused(
        StateError, "place: the state has another structure than init_state made", "tree_map"
    ) as caught:
        run.place({"v": torch.zeros(D)})
    assert "tensor(" not in str(caught.value)


def test_metrics_that_differ_between_ranks() -> None:
    held = lambda state: torch.tensor(sum(x is not None for x in state["w"]))  # noqa: E731

    def returning(metrics: Callable[[Any], Any]) -> Callable:
        def step(state: Any, b: Any) -> Any:
            return fp.value_and_grad(loss_fn)(state, b)[1], metrics(state)

        return step

    with refused(
        StateError, "metrics['held'] on a rank that does not hold params", "than on one device"
    ):
        start(pipe(returning(lambda state: {"held": held(state)})), TWO, params(3))
    with refused(StateError, "metrics"):
        start(pipe(returning(lambda state: {"a": 1} if state["w"][0] is None else {"b": 1})), TWO)
    with refused(
        MismatchError, "metrics['held'] is 2 on rank 0 and 1 on rank 1", "the same on all"
    ):
        check_same({"held": torch.tensor(2)}, {"held": torch.tensor(1)}, 1)
    with refused(MismatchError, "metrics are", "'b'", "on rank 0 and", "'a'", "on rank 1"):
        check_same({"b": 1}, {"a": 1}, 1)


def test_a_plan_is_saved_as_a_page_or_a_picture(tmp_path: Path) -> None:
    run, state = start(pipe(STEP), TWO)
    plan = run.plan(state, batch())
    for name, shown in (("x.pdf", "'.pdf'"), ("x", "'x'"), ("x.HTML", "'.HTML'")):
        with refused(PlanError, f"cannot draw a plan as {shown}; name a file .html or .svg"):
            plan.save(tmp_path / name)
    with refused(PlanError, "cannot draw value_and_grad 3: the step has 1"):
        plan.save(tmp_path / "x.svg", call=3)
    assert not list(tmp_path.iterdir())
    for name in ("x.svg", "x.html"):
        assert plan.save(tmp_path / name).stat().st_size > 100


def test_every_error_is_one_of_funcpipe() -> None:
    kinds = [
        x for x in vars(fp.errors).values() if isinstance(x, type) and issubclass(x, Exception)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, fp.errors.FuncpipeError)
        assert kind.__doc__


def test_init_state_is_kept_apart_between_ranks() -> None:
    p = params(3)
    _, state = start(pipe(STEP), TWO, p, init=keep)
    owned = [x.data_ptr() for s in state for x in s["w"] if x is not None]
    assert len(set(owned) | {x.data_ptr() for x in p["w"]}) == 6
