"""The search: never slower than a named schedule that fits the cap, within the cap, the same every
time, quick."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe._src.planning.predict import as_costs, load_of
from funcpipe._src.schedule import Action, Costs, Load, Schedule, auto, check, from_table, timeline
from funcpipe._src.schedule.catalogue import NAMES, by_name, training
from funcpipe._src.schedule.communication import insert_communication
from funcpipe._src.schedule.costs import even_load
from funcpipe._src.schedule.greedy import Policy, greedy
from funcpipe._src.schedule.search import Auto
from funcpipe._src.schedule.stage_assignment import group
from funcpipe.errors import PlanError, ScheduleError
from funcpipe.testing import Layer, Model, assert_equivalent, models


def uneven(segments: int, ranks: int, seed: int) -> Load:
    """A chain of blocks with a dear head and messages that take time."""
    rng = random.Random(seed)
    f = [1.0 + 0.2 * rng.random() for _ in range(segments - 1)] + [2.5]
    i, w = [1.1 * x for x in f], [0.9 * x for x in f]
    even = even_load(segments, ranks)
    both = tuple(a + b for a, b in zip(i, w, strict=True))
    return Load(
        tuple(f),
        both,
        tuple(i),
        tuple(w),
        even.held,
        even.waiting,
        even.work,
        even.flows,
        lambda nbytes: 0.1,
    )


def best_named(
    load: Load, ranks: int, microbatches: int, cap: float | None, waits: bool = False
) -> float:
    """The fastest schedule of the library that keeps to a cap, on the balanced cut."""
    found = [float("inf")]
    for schedule_fn in training():
        schedule = schedule_fn(ranks, microbatches)
        if schedule.stages > load.segments:
            continue
        stages = group(
            [round(1e6 * (f + b)) for f, b in zip(load.F, load.B, strict=True)],
            schedule.stages,
            "balanced",
        )
        if cap is None or _most(load, schedule, stages) <= cap + 1e-9:
            transfer = load.transfer(stages, schedule.placement)
            line = timeline(schedule, load.cost(stages), transfer, load.edges(stages))
            found.append(line.makespan if waits else line.period)
    return min(found)


def _most(load: Load, schedule: Schedule, stages: tuple) -> float:
    sending = insert_communication(schedule, load.edges(stages))
    return max(load.memory(sending, rank, stages) for rank in range(len(schedule.ranks)))


def language_model() -> Load:
    """Sixteen blocks and a head, as measured on a GPU: ms, and MiB."""
    f, i, w = ((x,) * 16 + (head,) for x, head in ((0.126, 0.336), (0.19, 0.336), (0.084, 0.185)))
    both = tuple(a + b for a, b in zip(i, w, strict=True))
    held, waiting, work = (
        (x,) * 16 + (head,) for x, head in ((96.0, 254.0), (62.0, 129.0), (72.0, 500.0))
    )
    flows = even_load(17, 1).flows
    return Load(f, both, i, w, held, waiting, work, dict.fromkeys(flows, 4.0), lambda nbytes: 0.032)


@pytest.mark.parametrize(
    ("cap", "bubble"),
    [
        (2752.0, 0.026),
        pytest.param(3000.0, 0.026, marks=pytest.mark.slow),
        pytest.param(3500.0, 0.024, marks=pytest.mark.slow),
        pytest.param(3650.0, 0.017, marks=pytest.mark.slow),
    ],
)
def test_a_language_model_under_a_cap(cap: float, bubble: float) -> None:
    """Of which 0.0088 are the receives of two stages, eight, and twice as much those of four; ranks
    stay balanced while stages slide along so that what they hold moves."""
    load = language_model()
    work = 8 * (sum(load.F) + sum(load.B)) / 2
    assert auto(cap).fit(2, 8, load).time <= work * (1 + bubble)


@pytest.mark.parametrize(
    ("part", "cap", "bubble"),
    [
        (1.0, None, 0.017),
        (0.94, 3000.0, 0.027),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0.94, None, 0.027), (0.97, 3000.0, 0.027), (0.94, 3500.0, 0.027))
        ],
    ],
)
def test_w_waits_only_where_that_gains_time(part: float, cap: float | None, bubble: float) -> None:
    """What waits is held, and I and W may cost more than B: so most microbatches have B, and the
    cut is one that allows it."""
    load = language_model()
    cheaper = replace(load, B=tuple(part * b for b in load.B))
    found = auto(cap).fit(2, 8, cheaper)
    assert found.time <= 8 * (sum(load.F) + sum(cheaper.B)) / 2 * (1 + bubble)
    assert found.memory <= (cap or {1.0: 3700, 0.94: 4100}[part])  # 5,776 where all W wait
    assert sum(a.kind == "B" for row in found.schedule.ranks for a in row) >= 8


CASES = [
    (ranks, microbatches, kind, share)
    for ranks, microbatches in ((1, 3), (2, 4), (3, 7), (4, 16), (8, 8))
    for kind in ("even", "uneven")
    for share in (None, 1.0, 0.6)
]


@pytest.mark.parametrize("waits", [False, True], ids=["steady state", "alone"])
@pytest.mark.parametrize(
    ("ranks", "microbatches", "kind", "share"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] * case[1] >= 64)) for case in CASES],
)
def test_at_least_as_good_as_the_best_named(
    ranks: int, microbatches: int, kind: str, share: float | None, waits: bool
) -> None:
    """The table of the issue: P, M, costs, cap (as a share of what 1F1B holds)."""
    load = (
        even_load(4 * ranks, ranks) if kind == "even" else uneven(3 * ranks + 1, ranks, seed=ranks)
    )
    cap = None if share is None else share * ranks + (0.5 if share < 1 else 0)
    named = best_named(load, ranks, microbatches, cap, waits)
    try:
        found = auto(cap).fit(ranks, microbatches, load, waits=waits)
    except ScheduleError:
        assert named == float("inf")
        return
    assert (found.alone if waits else found.time) <= named * (1 + 1e-9)
    assert found.time >= microbatches * (sum(load.F) + sum(load.B)) / ranks * (
        1 - 1e-9
    )  # where a search may stop at once
    transfer = load.transfer(found.stages, found.schedule.placement)
    line = timeline(found.schedule, load.cost(found.stages), transfer, load.edges(found.stages))
    assert (found.time, found.alone) == (line.period, line.makespan)
    assert cap is None or found.memory <= cap * (1 + 1e-6)
    check(found.schedule, load.edges(found.stages), [len(s) for s in found.stages])
    assert [x for segments in found.stages for x in segments] == list(range(load.segments))


def test_uneven_costs_are_where_the_search_wins() -> None:
    """A dear head and uneven blocks: faster than everything named, at the memory of 1F1B."""
    load = uneven(13, 4, seed=4)
    assert auto(4.5).fit(4, 16, load).time < 0.96 * best_named(load, 4, 16, 4.5)


@pytest.mark.slow
def test_known_bubbles() -> None:
    """P=8, M=32, F=I=W: no more bubble than the best named at the memory of 1F1B, and than the best
    of all."""
    load = even_load(32, 8)
    assert auto(8.0).fit(8, 32, load, waits=True).alone <= 99.5  # zb_v
    assert auto().fit(8, 32, load, waits=True).alone <= 97.75  # interleaved_zb(v=4)


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_no_bubble_in_steady_state(ranks: int) -> None:
    """M=4P, F=I=W, at the memory of 1F1B."""
    found = auto(float(ranks)).fit(ranks, 4 * ranks, even_load(4 * ranks, ranks))
    assert found.time == pytest.approx(12 * ranks)


def test_the_same_every_time() -> None:
    load = uneven(9, 2, seed=1)
    assert auto(3).fit(2, 6, load) == auto(3).fit(2, 6, load)


@pytest.mark.parametrize(
    ("ranks", "microbatches"), [(6, 24), pytest.param(16, 128, marks=pytest.mark.slow)]
)
def test_large(ranks: int, microbatches: int) -> None:
    """In seconds. The bound is for a machine that does other things too."""
    start = time.process_time()
    found = auto(float(ranks)).fit(ranks, microbatches, even_load(2 * ranks, ranks))
    assert time.process_time() - start < 60
    assert found.memory <= ranks * (1 + 1e-6)


def test_caps_that_nothing_keeps_to() -> None:
    with pytest.raises(ScheduleError) as caught:
        auto(0.1)(4, 8)
    assert str(caught.value).startswith(
        "auto: no schedule for 4 ranks and 8 microbatches keeps to memory_limit=0.1; the least"
    )
    with pytest.raises(ScheduleError, match="memory_limit=0; give a positive number of bytes"):
        auto(0)
    with pytest.raises(
        ScheduleError, match="auto: needs at least 1 rank and 1 microbatch, got 0 and 3"
    ):
        auto()(0, 3)


@given(
    ranks=st.integers(1, 4),
    microbatches=st.integers(1, 8),
    v=st.integers(1, 3),
    seed=st.integers(0, 99),
    policy=st.builds(
        Policy,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, 1.0, 2.5]),
        st.booleans(),
    ),
    apart=st.none() | st.tuples(*[st.sampled_from([0, 1, 3, 8])] * 12),
    cap=st.floats(0.5, 9),
)
def test_greedy_tables_pass_the_checker(
    ranks: int,
    microbatches: int,
    v: int,
    seed: int,
    policy: Policy,
    apart: tuple[int, ...] | None,
    cap: float,
) -> None:
    """Whatever the policy, the cut and where stages lie: a right table within the cap, or none."""
    rng = random.Random(seed)
    placement = list(range(ranks)) * v
    rng.shuffle(placement)
    load = uneven(ranks * v + rng.randint(1, 5), ranks, seed)
    stages = group([1] * load.segments, ranks * v, "even")
    drawn = greedy("mine", load, stages, placement, microbatches, cap, replace(policy, apart=apart))
    if drawn is not None:
        check(drawn.schedule, load.edges(stages), [len(s) for s in stages])
        assert _most(load, drawn.schedule, stages) <= drawn.memory * (1 + 1e-6) <= cap * (1 + 2e-6)
        assert drawn.end >= drawn.period >= drawn.busy * (1 - 1e-9)
        line = timeline(
            drawn.schedule, load.cost(stages), load.transfer(stages, placement), load.edges(stages)
        )
        assert (line.makespan, line.period) == pytest.approx((drawn.end, drawn.period))


@pytest.mark.parametrize("how", ["auto", auto(), auto(costs=Costs({"F": 1.0, "B": 2.0}))])
def test_in_a_pipeline(how) -> None:
    """Schedule and cut are chosen together, and the step computes what it computes on one
    device."""
    model = Model(tuple((Layer("linear", (k, k)),) for k in range(5)))

    def step(params, batch):
        loss, grads = fp.value_and_grad(model.loss_fn)(params, batch)
        return grads, {"loss": loss}

    fast = fp.pipelined(step, axis="pipe", microbatches=4, schedule=how)
    assert_equivalent(step, fast, fp.Mesh(pipe=2), lambda p: p, model.init(), [model.batch(rows=4)])


def test_a_memory_limit_in_a_pipeline() -> None:
    """Bytes: the plan's own prediction keeps to the limit; a limit too small is refused; another
    batch shape keeps the cut."""
    model = Model(tuple((Layer("gated", (k, k + 1)),) for k in range(5)), width=6)

    def planned(limit, rows=8):
        step = lambda p, b: (p, {"loss": fp.value_and_grad(model.loss_fn)(p, b)[0]})  # noqa: E731
        schedule = auto(memory_limit=limit)
        run = fp.simulate(
            fp.pipelined(step, axis="pipe", microbatches=8, schedule=schedule), fp.Mesh(pipe=2)
        )
        return run, run.init(lambda p: p, model.init(), model.batch(rows=rows))

    run, state = planned(None)
    free = run.plan(state, model.batch(rows=8))
    most = max(m["activations"] for m in free.memory)
    run, state = planned(0.7 * most)
    capped = run.plan(state, model.batch(rows=8))
    assert max(m["activations"] for m in capped.memory) <= 0.7 * most
    assert capped.predict().period >= free.predict().period * (1 - 1e-9)
    run, state = planned(None)
    a, b = run.plan(state, model.batch(rows=8)), run.plan(state, model.batch(rows=16))
    assert (a.calls[0].schedule.stages, a.calls[0].schedule.table.placement) == (
        b.calls[0].schedule.stages,
        b.calls[0].schedule.table.placement,
    )
    with pytest.raises(
        ScheduleError,
        match="no schedule for 2 ranks and 8 microbatches keeps to memory_limit=1; the least",
    ):
        planned(1)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [("plain", False), ("clipping", True), ("rows", False), ("tied", True), ("means", False)],
)
def test_a_step_alone_counts_where_ranks_wait_for_each_other(
    kind: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss_fn(w, x):
        y = x
        for k in range(4):
            y = fp.stage_boundary(torch.tanh(y @ w[0 if kind == "tied" and k == 3 else k]))
        loss = fp.Mean(y.sum(), torch.tensor(float(len(x))))
        return loss, {"rows": {"y": fp.Rows(y)}, "means": {"y": loss}}.get(kind, {})

    def step(w, x):
        (loss, _), grads = fp.value_and_grad(loss_fn, has_aux=True)(w, x)
        if kind == "clipping":
            grads, _ = fp.clip_by_global_norm(grads, 1.0)
        return grads, {"loss": loss}

    seen = []
    fit = Auto.fit
    monkeypatch.setattr(Auto, "fit", lambda self, *args: seen.append(args[-1]) or fit(self, *args))
    run = fp.simulate(
        fp.pipelined(step, axis="pipe", microbatches=2, schedule=auto()), fp.Mesh(pipe=2)
    )
    run.init(lambda w: w, [torch.eye(3) for _ in range(4)], torch.ones(4, 3))
    assert set(seen) == {alone}


def test_costs() -> None:
    costs = Costs({"F": 1, "I": 2, ("W", 1): 5, "W": 3}, bandwidth=10, latency=1)
    assert [costs.of(*key) for key in (("B", 0), ("B", 1), ("F", 7))] == [5, 7, 1]
    assert costs.message(20) == 3
    assert Costs(lambda kind, segment: segment + 1).of("W", 3) == 4
    with pytest.raises(
        PlanError, match=r"costs do not say what B of segment 2 costs; add \('B', 2\) or 'B'"
    ):
        Costs({"F": 1}).of("B", 2)


def test_names() -> None:
    assert [by_name(name).__name__.split("(")[0] for name in NAMES] == list(NAMES)
    with pytest.raises(
        ScheduleError, match=r"no schedule is called 'zbv'; did you mean zb_v\? There are: gpipe, "
    ):
        by_name("zbv")
    with pytest.raises(
        ScheduleError, match="zb_v has a fixed number of stages a rank: leave out v"
    ):
        by_name("zb_v", v=2)


def test_memory_counts_what_is_on_its_way() -> None:
    """Of 1F1B on two ranks: two microbatches are held on the first, and the activations of both are
    sent when the gradients of the first come back; on the second, when it has no microbatch, the
    gradients of two: what arrives between them was sent before the first was there."""
    load = even_load(2, 2)
    heavy = replace(load, flows=dict.fromkeys(load.flows, 10.0))
    table = by_name("one_f_one_b")(2, 4)
    sending = insert_communication(table, heavy.edges([(0,), (1,)]))
    assert [heavy.memory(table, rank, [(0,), (1,)]) for rank in (0, 1)] == [2, 1]
    assert [heavy.memory(sending, rank, [(0,), (1,)]) for rank in (0, 1)] == [2 + 2 * 10, 2 * 10]


def test_memory_counts_what_waits_to_be_read_on_its_rank() -> None:
    """Handed over by another stage of the rank, or received with what is read first; `work` counts
    it where it is read."""
    load, stages = replace(even_load(3, 1), held=(0.0,) * 3), [(0,), (1,), (2,)]
    one = replace(load, flows={(("F", 0), ("F", 1)): 4.0})
    assert (
        one.memory(
            from_table([["0F0", "1F0", "2F0", "0F1", "1F1", "2F1"]], (0, 0, 0))(1, 2), 0, stages
        )
        == 4
    )
    assert (
        one.memory(
            from_table([["0F0", "0F1", "1F0", "1F1", "2F0", "2F1"]], (0, 0, 0))(1, 2), 0, stages
        )
        == 8
    )
    both = replace(load, flows={(("F", 0), ("F", 1)): 4.0, (("F", 0), ("F", 2)): 3.0})
    table = from_table([["0F0", "0F1"], ["1F0", "1F1", "2F0", "2F1"]], (0, 1, 1))(2, 2)
    assert both.memory(insert_communication(table, both.edges(stages)), 1, stages) == 6


def test_a_message_carries_all_that_its_rank_reads() -> None:
    """Stages 1 and 2 are on one rank, and read what stage 0 makes: one message, which moves 4 and 3
    bytes."""
    load = even_load(3, 3)
    load = replace(
        load,
        flows={(("F", 0), ("F", 1)): 4.0, (("F", 0), ("F", 2)): 3.0},
        link=lambda nbytes: nbytes,
    )
    send = Action("SEND_F", 0, 0, peer=1)
    assert load.transfer([(0,), (1,), (2,)], (0, 1, 1))(send) == 7.0
    assert load.transfer([(0,), (1,), (2,)], (0, 1, 2))(send) == 4.0


@given(models(max_segments=5), st.integers(2, 3), st.integers(1, 6), st.floats(0.4, 1.0))
def test_what_a_plan_holds_keeps_to_the_limit(
    model: Model, ranks: int, microbatches: int, share: float
) -> None:
    """By the plan's own account, which knows what values share memory and when messages have
    arrived."""
    ranks = min(ranks, len(model.segments) + 1)
    params, batch = model.init(), model.batch(0, microbatches)

    def planned(limit: float | None) -> tuple[float, float]:
        """What a rank holds at most, by the plan and by the search."""

        def step(p, b):
            return (
                p,
                {"out": fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(p, b)[0]},
            )

        schedule = auto(memory_limit=limit)
        run = fp.simulate(
            fp.pipelined(step, axis="pipe", microbatches=microbatches, schedule=schedule),
            fp.Mesh(pipe=ranks),
        )
        plan = run.plan(run.init(lambda p: p, params, batch), batch)
        call, cut = plan.calls[0], run._made.separate_units(plan, 0)
        load = load_of(cut, as_costs(None, cut))
        return max(m["activations"] for m in plan.memory), _most(
            load, call.schedule.table, call.schedule.stages
        )

    held, counted = planned(None)
    limit = share * held
    try:
        found, _ = planned(limit)
    except ScheduleError:
        assert (
            limit < counted
        )  # what keeps to it by the search's own count, which shares less, is found again
        return
    assert found <= limit
